"""Where an encoded document's files are: in a folder, or kept in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cachegen.errors import InputError
from cachegen.files import open_file
from cachegen.format.files import read_whole
from cachegen.pipeline.profiles import measure_own_profile


class DocumentFiles(Protocol):
    """A document's files, by the names that they have in its folder.

    Attributes:
        path: of the folder; for messages, where there is none.
    """

    path: Path

    def read(self, name: str) -> bytes:
        """Return a whole file.

        Raises:
            InputError: it is missing or cannot be read.
        """
        ...

    def measure(self, name: str) -> int:
        """Return a file's size in bytes.

        Raises:
            InputError: it is missing.
        """
        ...

    def measure_own_profile(self, profile_hash: bytes) -> int:
        """Return the bytes that decoding reads of the document's own profile; 0 where it has none."""
        ...


class FolderFiles:
    """Files in a folder; see `DocumentFiles`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)

    def read(self, name: str) -> bytes:
        """See `DocumentFiles.read`."""
        return read_whole(self.path / name)

    def measure(self, name: str) -> int:
        """See `DocumentFiles.measure`."""
        with open_file(self.path / name, hint="encode the document again") as stream:
            return os.fstat(stream.fileno()).st_size

    def measure_own_profile(self, profile_hash: bytes) -> int:
        """See `DocumentFiles.measure_own_profile`."""
        return measure_own_profile(self.path, profile_hash)


class MemoryFiles:
    """Files in memory; see `DocumentFiles`."""

    def __init__(self, files: Mapping[str, bytes], own_profile_bytes: int = 0) -> None:
        self.path = Path("(in memory)")
        self._files, self._own_profile_bytes = files, own_profile_bytes

    def read(self, name: str) -> bytes:
        """See `DocumentFiles.read`."""
        if name not in self._files:
            raise InputError(f"{self.path / name}: there is no such file")
        return self._files[name]

    def measure(self, name: str) -> int:
        """See `DocumentFiles.measure`."""
        return len(self.read(name))

    def measure_own_profile(self, profile_hash: bytes) -> int:
        """See `DocumentFiles.measure_own_profile`."""
        return self._own_profile_bytes
