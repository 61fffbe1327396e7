"""What a tables file or a profile of method `lossless` holds: how each channel is predicted and its distance coded."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.errors import BitstreamError
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import KVCache
from cachegen.rotation import PAIRINGS, Pairing, Rotation

NUM_SYMBOLS = 64
MAX_CONTEXT = 4096
"""Channels that a prediction may use."""
MAX_BEFORE = 3
"""Layers before its own that a prediction may use."""
NO_WEIGHTS = 255
"""In the place of that number: the layer's channels are not predicted."""

_LEAST_BYTES = 1 << 20  # a model of so many is read however well it is compressed
_MAX_COMPRESSION = 256  # its length over that of its compressed form
_CHANNEL = np.dtype(
    [("mean", "<i4"), ("multiplier", "<i4"), ("step", "<u2"), ("shift", "u1"), ("exponent", "i1"), ("history", "u1")]
)


@dataclass(frozen=True)
class TurningPairs:
    """A `Rotation` in the integers of the file.

    Attributes:
        turns: of each pair from token to token, in 2^-64 turns, below 2^64.
        pairing, offset: as in `Rotation`.
    """

    turns: tuple[int, ...]
    pairing: Pairing = "halves"
    offset: int = 0

    @property
    def dims(self) -> list[tuple[int, int]]:
        """The first and the second dim of each pair."""
        rotation = Rotation((0.0,) * len(self.turns), self.pairing, self.offset)
        dims = range(self.offset + rotation.num_dims)
        return list(zip(dims[rotation.firsts], dims[rotation.seconds], strict=True))

    def fits(self, head_dim: int) -> bool:
        """Tell whether heads of so many dims have all the pairs."""
        return self.offset + 2 * len(self.turns) <= head_dim

    def as_rotation(self) -> Rotation:
        """Return the rotation, whose frequencies are fp64 then."""
        # In half turns around zero, so that what turns backwards does not turn almost once forwards.
        turns = [turn - (1 << 64) if turn >= 1 << 63 else turn for turn in self.turns]
        return Rotation(tuple(2 * math.pi * turn / 2**64 for turn in turns), self.pairing, self.offset)

    def pack(self) -> bytes:
        """Return its bytes in the model."""
        head = struct.pack("<BHH", PAIRINGS.index(self.pairing), self.offset, len(self.turns))
        return head + struct.pack(f"<{len(self.turns)}Q", *self.turns)


def _read_rotation(reader: _Reader) -> TurningPairs:
    pairing = int(reader.take("u1", 1)[0])
    if pairing >= len(PAIRINGS):
        raise BitstreamError("a rotation pairs dims in an unknown way", field="model")
    offset, num_pairs = (int(number) for number in reader.take("<u2", 2))
    return TurningPairs(tuple(map(int, reader.take("<u8", num_pairs))), PAIRINGS[pairing], offset)


def describe_pairs(
    planes: Sequence[PlaneShape], rotations: Sequence[TurningPairs], plane_rotations: Sequence[int]
) -> NDArray[np.int32]:
    """Return int32 `[num_channels, 2]`: how far on the second channel of its pair is, and the pair's turn.

    Of all rotations' turns, one after the other. The distance is 0 for a channel of no pair, -1 for a second one.
    """
    first_turns = np.cumsum([0, *(len(rotation.turns) for rotation in rotations)])
    parts: list[NDArray[np.int32]] = []
    for plane, number in zip(planes, plane_rotations, strict=True):
        head = np.zeros((plane.head_dim, 2), np.int32)
        for pair, (first, second) in enumerate(rotations[number - 1].dims if number else ()):
            head[first] = second - first, first_turns[number - 1] + pair
            head[second] = -1, 0
        parts.append(np.tile(head, (plane.num_kv_heads, 1)))
    return np.ascontiguousarray(np.concatenate(parts))


@dataclass(frozen=True)
class Model:
    """A model; the native coder checks the ranges.

    Attributes:
        channels: int32 `[num_channels, 6]`: mean, multiplier, shift, exponent, history shift and step of each, layer
            after layer, keys before values.
        layers_before: per layer, how many layers before it predict it, or `NO_WEIGHTS`.
        weights: uint8 holding int8, per layer with weights `[its channels, channels before + its channels]`.
        frequencies: uint16 `[2 * num_layers, 64]`, of the symbols of each plane; every row sums to 4096.
        rotations: the distinct ones of the planes.
        plane_rotations: per plane, 0 where nothing turns, else one more than the number of its rotation.
    """

    channels: NDArray[np.int32]
    layers_before: tuple[int, ...]
    weights: NDArray[np.uint8]
    frequencies: NDArray[np.uint16]
    rotations: tuple[TurningPairs, ...]
    plane_rotations: tuple[int, ...]

    def means(self) -> torch.Tensor:
        """Return the channels' means, fp32."""
        means = np.ldexp(self.channels[:, 0].astype(np.float32), -self.channels[:, 3])
        return torch.from_numpy(means)  # pyright: ignore[reportUnknownMemberType]  (torch has no type)

    def for_native(self, planes: Sequence[PlaneShape], *, is_float16: bool) -> _native.LosslessModel:
        """Return what the native functions take as `model`."""
        layers = describe_layers(planes, self.layers_before)
        turns = [turn for rotation in self.rotations for turn in rotation.turns]
        halves = np.array([[turn & 0xFFFFFFFF, turn >> 32] for turn in turns], np.uint32).reshape(-1, 2)
        pairs = describe_pairs(planes, self.rotations, self.plane_rotations)
        return self.channels, layers, self.weights, self.frequencies, halves, pairs, is_float16

    def pack(self, compression: int = 9) -> bytes:
        """Return the model's bytes, compressed by zlib at a level from 0 to 9."""
        channels = np.empty(len(self.channels), _CHANNEL)
        for index, name in enumerate(("mean", "multiplier", "shift", "exponent", "history", "step")):
            channels[name] = self.channels[:, index]
        parts = [
            len(self.rotations).to_bytes(2, "little"),
            *(rotation.pack() for rotation in self.rotations),
            np.array(self.plane_rotations, "<u2").tobytes(),
            bytes(self.layers_before),
            # Field after field: numbers of one kind compress better.
            *(channels[name].tobytes() for name in _CHANNEL.names or ()),
            self.frequencies.astype("<u2").tobytes(),
            self.weights.tobytes(),
        ]
        # Runs, and else a code for each byte: weights do not repeat, but layers without any do.
        compressor = zlib.compressobj(compression, strategy=zlib.Z_RLE)
        return compressor.compress(b"".join(parts)) + compressor.flush()


def max_packed_bytes(planes: Sequence[PlaneShape]) -> int:
    """Return how many bytes packed models of such planes have at most, or a little more."""
    return _LEAST_BYTES + (MAX_CONTEXT + 2 * _CHANNEL.itemsize) * sum(plane.num_channels for plane in planes)


def unpack_models(content: bytes, of_planes: Sequence[Sequence[PlaneShape]]) -> list[Model]:
    """Read what `Model.pack` wrote, one model after the other.

    Args:
        of_planes: for each model, the shapes of keys and values of its first layer, of its second, ...

    Raises:
        BitstreamError: it is not as many models of such planes.
    """
    models: list[Model] = []
    for planes in of_planes:
        model, content = _unpack_model(content, planes)
        models.append(model)
    if content:
        raise BitstreamError("is longer than it must be", field="model")
    return models


def _unpack_model(content: bytes, planes: Sequence[PlaneShape]) -> tuple[Model, bytes]:
    """Return the model at the beginning of some bytes, and what follows it."""
    limit = max(_LEAST_BYTES, _MAX_COMPRESSION * len(content))
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(content, limit)
    except zlib.error as error:
        raise BitstreamError(f"is not compressed data ({error})", field="model") from None
    if not inflater.eof:
        raise BitstreamError("is longer than its compressed form may stand for", field="model")
    reader = _Reader(inflated)
    rotations = tuple(_read_rotation(reader) for _ in range(int(reader.take("<u2", 1)[0])))
    plane_rotations = tuple(int(number) for number in reader.take("<u2", len(planes)))
    for plane, number in zip(planes, plane_rotations, strict=True):
        if number > len(rotations) or (number and not rotations[number - 1].fits(plane.head_dim)):
            raise BitstreamError("a plane has a rotation that is not there or of more dims", field="model")
    if len(rotations) != len(set(plane_rotations) - {0}):
        raise BitstreamError("has rotations of no plane", field="model")
    layers_before = tuple(int(number) for number in reader.take("u1", len(planes) // 2))
    num_channels = sum(plane.num_channels for plane in planes)
    fields = {name: reader.take(_CHANNEL[name].str, num_channels) for name in _CHANNEL.names or ()}
    channels = np.stack(
        [fields[name].astype(np.int32) for name in ("mean", "multiplier", "shift", "exponent", "history", "step")],
        axis=1,
    )
    frequencies = reader.take("<u2", NUM_SYMBOLS * len(planes)).astype(np.uint16).reshape(-1, NUM_SYMBOLS)
    for layer, before in enumerate(layers_before):
        if before != NO_WEIGHTS and before > min(layer, MAX_BEFORE):
            raise BitstreamError(f"layer {layer} is predicted from {before} layers before it", field="model")
    layers = describe_layers(planes, layers_before).astype(np.int64)
    sizes = layers[:, 3] * (layers[:, 0] + layers[:, 1]) * (layers[:, 2] + layers[:, 0] + layers[:, 1])
    weights = reader.take("u1", int(sizes.sum()))
    reader.check_end()
    model = Model(np.ascontiguousarray(channels), layers_before, weights, frequencies, rotations, plane_rotations)
    return model, inflater.unused_data


def describe_layers(planes: Sequence[PlaneShape], layers_before: Sequence[int]) -> NDArray[np.int32]:
    """Return int32 `[num_layers, 4]`: channels of keys and of values, channels before, has weights."""
    widths = [keys.num_channels + values.num_channels for keys, values in zip(planes[::2], planes[1::2], strict=True)]
    rows = [
        (
            planes[2 * layer].num_channels,
            planes[2 * layer + 1].num_channels,
            0 if before == NO_WEIGHTS else sum(widths[layer - before : layer]),
            int(before != NO_WEIGHTS),
        )
        for layer, before in enumerate(layers_before)
    ]
    return np.array(rows, np.int32).reshape(-1, 4)


def join_bits(tokens: KVCache) -> NDArray[np.uint16]:
    """Return the bits of all values, `[num_tokens, num_channels]`, layer after layer, keys before values."""
    rows = torch.cat([plane.flatten(1) for plane in tokens.planes], dim=1)
    return rows.contiguous().view(torch.uint16).numpy()


class _Reader:
    """Takes arrays from bytes, one after the other."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def take(self, dtype: str, count: int) -> NDArray[Any]:
        num_bytes = count * np.dtype(dtype).itemsize
        if num_bytes > len(self._content) - self._at:
            raise BitstreamError("ends too early", field="model")
        array = np.frombuffer(self._content, dtype, count, self._at)
        self._at += num_bytes
        return array

    def check_end(self) -> None:
        if self._at != len(self._content):
            raise BitstreamError("is longer than it must be", field="model")
