"""A profile of method `lossless`: a model fitted on other caches of the same language model, which documents share.

Without one, each document carries a model of its own. A profile is a folder of `profile.json` and `predictor.zlib`,
the model in the same form (docs/lossless.md). Nothing in it can run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cachegen.errors import BitstreamError
from cachegen.fields import parse_fields, refuse_file
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.lossless.model import Model, max_packed_bytes, unpack_models
from cachegen.methods.profile_files import (
    MAX_PROFILE_BYTES,
    PROFILE_NAME,
    ReadFile,
    check_hash,
    check_same_model,
    folder_reader,
    pack_record,
    read_plane_shapes,
    refuse_other,
    write_files,
)
from cachegen.rotation import PlaneRotations, Rotation
from cachegen.windows import Window, Windows, pack_windows, read_windows

PREDICTOR_NAME = "predictor.zlib"
FILE_FORMAT = "cachegen-predictor"
FILE_VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Predictor:
    """A profile of method `lossless`.

    Attributes:
        model_fingerprint: SHA-256 in hex, as in a KV cache file.
        planes: heads and dims of the keys and the values of layer 0, of layer 1, ...
        dtype: of the caches, `bfloat16` or `float16`.
        packed: the model of the layers of each window, one after the other, as `Model.pack` returns it.
        calibration: what it was made from, for people.
        profile_hash: SHA-256 in hex of profile.json.
        num_bytes: of both files.
        windows: of the layers; None for a model without any.
    """

    model_fingerprint: str
    planes: tuple[PlaneShape, ...]
    dtype: torch.dtype
    packed: bytes
    calibration: Mapping[str, Any]
    profile_hash: str = ""
    num_bytes: int = 0
    windows: Windows | None = None

    @property
    def num_layers(self) -> int:
        return len(self.planes) // 2

    @property
    def layer_groups(self) -> list[tuple[int, ...]]:
        """The layers of each window, which predict each other, in the order of their first layers."""
        return group_by_window(self.windows, self.num_layers)

    @property
    def plane_shapes(self) -> tuple[tuple[int, int], ...]:
        """(num_kv_heads, head_dim) of each plane."""
        return tuple((plane.num_kv_heads, plane.head_dim) for plane in self.planes)

    @property
    def rotations(self) -> PlaneRotations:
        """What is undone in each plane."""
        found: list[Rotation | None] = [None] * len(self.planes)
        for group, model in zip(self.layer_groups, self.models(), strict=True):
            rotations = [pairs.as_rotation() for pairs in model.rotations]
            for plane, number in zip(_planes_of(group), model.plane_rotations, strict=True):
                found[plane] = rotations[number - 1] if number else None
        return tuple(found)

    @property
    def plane_means(self) -> list[torch.Tensor]:
        """The mean of each plane with its rotation undone, fp32 `[num_kv_heads, head_dim]`."""
        found: dict[int, torch.Tensor] = {}
        for group, model in zip(self.layer_groups, self.models(), strict=True):
            shapes = [self.plane_shapes[plane] for plane in _planes_of(group)]
            parts = torch.split(model.means(), [heads * dim for heads, dim in shapes])
            for plane, part, shape in zip(_planes_of(group), parts, shapes, strict=True):
                found[plane] = part.view(shape)
        return [found[plane] for plane in range(len(self.planes))]

    def models(self) -> list[Model]:
        """Return the models of `layer_groups`; they are unpacked once.

        Raises:
            BitstreamError: they are corrupt.
        """
        return self._models

    @cached_property
    def _models(self) -> list[Model]:
        pairs = [self.planes[2 * layer : 2 * layer + 2] for layer in range(self.num_layers)]
        shapes = [[plane for layer in group for plane in pairs[layer]] for group in self.layer_groups]
        return unpack_models(self.packed, shapes)

    def check(self) -> None:
        """See `AnyProfile.check`: all is read when it is loaded."""

    def describe(self) -> dict[str, object]:
        """Return what there is to say of it, for people."""
        return {
            "method": "lossless",
            "profile_hash": self.profile_hash,
            "model_id": self.calibration.get("model_id"),
            "model_fingerprint": self.model_fingerprint,
            "can_encode": True,
            "num_layers": self.num_layers,
            "bytes": self.num_bytes,
        }

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the files into a folder, each whole or not at all.

        Args:
            folder: is made if need be; encoding and decoding take it as `profile`.
            overwrite: replace another profile that is there.

        Raises:
            OutputError: another profile is there, or the folder cannot be written.
        """
        if not overwrite:
            refuse_other(folder, self.profile_hash)
        write_files(folder, pack_predictor(self)[0])

    def check_cache(self, cache: KVCache, metadata: ContextMetadata) -> None:
        """Refuse a cache of another model.

        Raises:
            MismatchError: naming the field that differs.
        """
        check_same_model(
            "the KV cache",
            ("model_fingerprint", self.model_fingerprint, metadata.model_fingerprint),
            ("dtype", self.dtype, cache.dtype),
            ("planes", self.plane_shapes, tuple(tuple(plane.shape[1:]) for plane in cache.planes)),
        )


def _planes_of(layers: Sequence[int]) -> list[int]:
    return [plane for layer in layers for plane in (2 * layer, 2 * layer + 1)]


def pack_predictor(predictor: Predictor) -> tuple[dict[str, bytes], Predictor]:
    """Return the files by their names, `profile.json` last, and the predictor with its hash and size."""
    record: dict[str, Any] = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "model_fingerprint": predictor.model_fingerprint,
        "dtype": str(predictor.dtype).removeprefix("torch."),
        "plane_shapes": [list(shape) for shape in predictor.plane_shapes],
        **({"windows": pack_windows(predictor.windows)} if predictor.windows is not None else {}),
        "calibration": dict(predictor.calibration),
        "sha256": {PREDICTOR_NAME: hashlib.sha256(predictor.packed).hexdigest()},
    }
    text, profile_hash = pack_record(record)
    complete = dataclasses.replace(predictor, profile_hash=profile_hash, num_bytes=len(text) + len(predictor.packed))
    return {PREDICTOR_NAME: predictor.packed, PROFILE_NAME: text}, complete


def load_predictor(folder: str | os.PathLike[str]) -> Predictor:
    """Read a predictor's folder; see `read_predictor`.

    Raises:
        InputError: there is none.
    """
    return read_predictor(folder_reader(folder), os.fspath(folder))


def read_predictor(read: ReadFile, place: str) -> Predictor:
    """Read a predictor from wherever its files are.

    Args:
        place: what holds them, for messages.

    Raises:
        CacheGenError: whatever `read` raises.
        BitstreamError: a file is corrupt or not a predictor's.
        UnsupportedVersionError: it was written by a later release.
    """
    path = f"{place}/{PROFILE_NAME}"
    text = read(PROFILE_NAME, MAX_PROFILE_BYTES)
    fields = parse_fields(text, refuse_file(path))
    fields.check_format("format", FILE_FORMAT, "a profile for method lossless")
    fields.check_version("version", FILE_VERSION)
    planes = tuple(PlaneShape(*shape) for shape in read_plane_shapes(fields))
    dtype = DTYPES[fields.choice("dtype", list(DTYPES))]
    fingerprint, calibration = fields.hash("model_fingerprint"), fields.object("calibration").content
    expected = fields.object("sha256").hash(PREDICTOR_NAME)
    packed = read(PREDICTOR_NAME, max_packed_bytes(planes))
    check_hash(f"{place}/{PREDICTOR_NAME}", packed, expected)
    num_bytes = len(text) + len(packed)
    profile_hash = hashlib.sha256(text).hexdigest()
    try:
        windows = read_windows(fields, len(planes) // 2)
    except BitstreamError as error:  # of one window, which knows no place
        raise error if error.path else error.at(path) from error
    return Predictor(fingerprint, planes, dtype, packed, dict(calibration), profile_hash, num_bytes, windows)


def group_by_window(windows: Windows | None, num_layers: int) -> list[tuple[int, ...]]:
    """Return the layers that have the same window, in the order of their first layers."""
    groups: dict[Window | None, list[int]] = {}
    for layer in range(num_layers):
        groups.setdefault(windows[layer] if windows is not None else None, []).append(layer)
    return [tuple(group) for group in groups.values()]
