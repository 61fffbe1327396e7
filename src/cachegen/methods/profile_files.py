"""What the profiles of all methods have alike: a folder whose profile.json names the other files by their SHA-256.

The SHA-256 of profile.json is the profile's hash, which stands in every file that was encoded with it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import torch

from cachegen.errors import BitstreamError, MismatchError, OutputError
from cachegen.fields import Fields
from cachegen.files import read_file, write_file
from cachegen.format import MAX_CHANNELS, MAX_HEADS, MAX_LAYERS
from cachegen.rotation import PlaneRotations

PROFILE_NAME = "profile.json"
MAX_PROFILE_BYTES = 1 << 22
"""Of profile.json."""

ReadFile: TypeAlias = Callable[[str, int], bytes]
"""Returns a file by its name, or fails where it has more bytes than are given."""


class AnyProfile(Protocol):
    """A profile of any method.

    Attributes:
        profile_hash: SHA-256 in hex of profile.json.
        model_fingerprint: SHA-256 in hex, as in a KV cache file.
        num_bytes: of the files that decoding needs.
        plane_shapes: (num_kv_heads, head_dim) of the keys and the values of layer 0, of layer 1, ...
        rotations: what is undone in each plane.
        plane_means: of each plane, with its rotation undone: fp32 `[num_kv_heads, head_dim]`.
    """

    @property
    def profile_hash(self) -> str: ...

    @property
    def model_fingerprint(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def plane_shapes(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def rotations(self) -> PlaneRotations: ...

    @property
    def plane_means(self) -> list[torch.Tensor]: ...

    def describe(self) -> dict[str, object]:
        """Return what there is to say of it, for people."""
        ...

    def check(self) -> None:
        """Read what loading has left until it is wanted.

        Raises:
            BitstreamError: a file holds something else than profile.json says.
        """
        ...


def folder_reader(folder: str | os.PathLike[str]) -> ReadFile:
    """Return what reads the files of a profile's folder.

    Raises:
        InputError: (by what is returned) there is no such file.
    """
    hint = "`profile` takes a folder of run_calibration.py"
    return lambda name, max_bytes: read_file(Path(folder) / name, max_bytes, hint=hint)


def read_profile_folder(fields: Fields, source: str) -> str | None:
    """Return the folder that a quantization config's field `profile` names; None where it has none.

    It is relative to the config's own folder, so that the config may be used from any.

    Raises:
        ConfigError: the field is not a name.
    """

    def is_name(value: object) -> bool:
        return isinstance(value, str) and bool(value)

    if "profile" not in fields:
        return None
    return str(Path(source).parent / fields.check("profile", is_name, "a profile's folder"))


def read_plane_shapes(fields: Fields) -> tuple[tuple[int, int], ...]:
    """Return the field `plane_shapes` of profile.json: (num_kv_heads, head_dim) of each plane.

    Raises:
        BitstreamError: it is not two shapes of planes for each layer.
    """
    shapes: list[tuple[int, int]] = []
    for shape in fields.items("plane_shapes", 2, 2 * MAX_LAYERS):
        sizes = cast("list[Any]", shape) if type(shape) is list else []
        if [type(size) for size in sizes] != [int, int]:
            raise fields.error("plane_shapes", "must be pairs of heads and dims")
        if not all(1 <= size <= MAX_HEADS for size in sizes):
            raise fields.error("plane_shapes", f"must be 1 to {MAX_HEADS}")
        shapes.append((sizes[0], sizes[1]))
    if any(heads * dim > MAX_CHANNELS for heads, dim in shapes):
        raise fields.error("plane_shapes", f"a plane must have at most {MAX_CHANNELS} channels")
    if len(shapes) % 2:
        raise fields.error("plane_shapes", "must be two shapes per layer")
    return tuple(shapes)


def check_named(profile: AnyProfile, profile_hash: bytes) -> None:
    """Refuse a profile that is not the one that a document names.

    Args:
        profile_hash: 32 bytes, as the document has it.

    Raises:
        MismatchError: it is another one.
    """
    if bytes.fromhex(profile.profile_hash) != profile_hash:
        raise MismatchError(
            f"profile_hash is {profile.profile_hash[:12]}, but the document was encoded with the profile "
            f"{profile_hash.hex()[:12]}: give `profile` its folder"
        )


def check_same_model(source: str, *fields: tuple[str, object, object]) -> None:
    """Refuse a profile of another model.

    Args:
        source: what it is to be used on.
        fields: name, what the profile has, and what the source has.

    Raises:
        MismatchError: naming the first field that differs.
    """
    for field, found, expected in fields:
        if found != expected:
            raise MismatchError(
                f"the profile's {field} is {_shorten(found)}, but {source} has {_shorten(expected)}: it is another "
                "model's, give `profile` the one made for this model"
            )


def _shorten(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value).removeprefix("torch.")[:60]


def pack_record(record: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return the bytes of profile.json, and its SHA-256 in hex, which is the profile's hash."""
    text = (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()
    return text, hashlib.sha256(text).hexdigest()


def check_hash(path: str, content: bytes, expected_hash: str) -> None:
    """Refuse a file that is not the one that profile.json names.

    Raises:
        BitstreamError: it is not.
    """
    if hashlib.sha256(content).hexdigest() != expected_hash:
        raise BitstreamError(f"is not the file that {PROFILE_NAME} names, or has changed", path=path, field="sha256")


def refuse_other(folder: str | os.PathLike[str], profile_hash: str) -> None:
    """Refuse a folder that holds another profile.

    Raises:
        OutputError: it does.
    """
    path = Path(folder) / PROFILE_NAME
    if os.path.lexists(path) and hashlib.sha256(read_file(path, MAX_PROFILE_BYTES)).hexdigest() != profile_hash:
        raise OutputError(f"{path}: another profile is there; give another folder, or `overwrite` to replace it")


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write a profile's files in their order, each whole or not at all; profile.json must be the last.

    Raises:
        OutputError: a file cannot be written.
    """
    for name, content in files.items():
        write_file(Path(folder) / name, content)
