"""How the vectors of a plane are turned by their positions: which dims are pairs, where they begin, how fast they turn.

A model's rotary modules name frequencies only. Which planes of its cache are turned, and how their dims pair, is found
by `pipeline.rotation` and kept in KV files, profiles and the tables of method `lossless`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cachegen.fields import Fields
from cachegen.format import MAX_HEADS, MAX_LAYERS

Pairing = Literal["halves", "interleaved"]
PAIRINGS: tuple[Pairing, ...] = ("halves", "interleaved")
MAX_ROTATIONS = 1 << 10
"""Distinct ones of a model."""


@dataclass(frozen=True)
class Rotation:
    """The rotation of a plane's heads: a vector at position p has each pair of dims turned by p times its frequency.

    With n frequencies, and o the offset, pair i is

    - "halves": dims o + i and o + n + i;
    - "interleaved": dims o + 2i and o + 2i + 1.

    Attributes:
        inv_freq: in radians per token; negative for models that turn backwards.
        pairing: which dims are a pair.
        offset: the first dim that turns; all others of a head stay.
        attention_scaling: factor on the cosines and sines; not 0.

    Source: rotary position embedding (Su et al. 2021); halves as transformers' Llama, interleaved as its Cohere.
    """

    inv_freq: tuple[float, ...]
    pairing: Pairing = "halves"
    offset: int = 0
    attention_scaling: float = 1.0

    @property
    def num_dims(self) -> int:
        """The number of dims of a head that turn."""
        return 2 * len(self.inv_freq)

    def fits(self, head_dim: int) -> bool:
        """Tell whether heads of so many dims have all the pairs."""
        return self.offset + self.num_dims <= head_dim

    @property
    def firsts(self) -> slice:
        """The first dims of all pairs."""
        if self.pairing == "interleaved":
            return slice(self.offset, self.offset + self.num_dims, 2)
        return slice(self.offset, self.offset + self.num_dims // 2)

    @property
    def seconds(self) -> slice:
        """The second dims of all pairs."""
        if self.pairing == "interleaved":
            return slice(self.offset + 1, self.offset + self.num_dims, 2)
        return slice(self.offset + self.num_dims // 2, self.offset + self.num_dims)


PlaneRotations = tuple[Rotation | None, ...]
"""Of the planes of a cache, in its order: keys and values of layer 0, of layer 1, ...; None where nothing turns."""


def pack_rotations(rotations: PlaneRotations) -> dict[str, Any]:
    """Return the field `plane_rotations` of a file: the distinct rotations, and for each plane which, or null."""
    distinct = list(dict.fromkeys(rotation for rotation in rotations if rotation is not None))
    numbers = {rotation: number for number, rotation in enumerate(distinct)}
    return {
        "rotations": [
            {
                "pairing": rotation.pairing,
                "offset": rotation.offset,
                "inv_freq": list(rotation.inv_freq),
                "attention_scaling": rotation.attention_scaling,
            }
            for rotation in distinct
        ],
        "planes": [None if rotation is None else numbers[rotation] for rotation in rotations],
    }


def read_rotations(fields: Fields, head_dims: Sequence[int]) -> PlaneRotations | None:
    """Read what `pack_rotations` wrote; None where the field is missing.

    Args:
        head_dims: of each plane.

    Raises:
        BitstreamError: naming the field.
    """
    if "plane_rotations" not in fields:
        return None
    record = fields.object("plane_rotations")
    record.require(("rotations", "planes"))
    distinct: list[Rotation] = []
    for entry in record.objects("rotations", 0, MAX_ROTATIONS):
        entry.require(("pairing", "offset", "inv_freq", "attention_scaling"))
        scaling = entry.number("attention_scaling")
        if scaling == 0:
            raise entry.error("attention_scaling", "must not be 0")
        inv_freq = entry.numbers("inv_freq", 1, MAX_HEADS)
        pairing: Pairing = "interleaved" if entry.choice("pairing", PAIRINGS) == "interleaved" else "halves"
        distinct.append(Rotation(inv_freq, pairing, entry.integer("offset", 0, MAX_HEADS), scaling))
    rotations: list[Rotation | None] = []
    planes = record.items("planes", 0, 2 * MAX_LAYERS)
    if len(planes) != len(head_dims):
        raise record.error("planes", f"must be one per plane, {len(head_dims)}")
    for number, head_dim in zip(planes, head_dims, strict=True):
        if number is not None and (type(number) is not int or not 0 <= number < len(distinct)):
            raise record.error("planes", "must be null or the number of a rotation")
        rotation = None if number is None else distinct[number]
        if rotation is not None and not rotation.fits(head_dim):
            raise record.error("planes", "a rotation has more dims than the plane's heads")
        rotations.append(rotation)
    return tuple(rotations)
