"""What the profiles of all methods have alike: a folder whose profile.json names the other files by their SHA-256.

The SHA-256 of profile.json is the profile's hash, which stands in every file that was encoded with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from cachegen.errors import BitstreamError, OutputError
from cachegen.fields import Fields
from cachegen.files import read_file, write_file
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
