"""Objects in a folder, by files' own means: nothing is waited for, neither a pipe nor a library's threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from cachegen.errors import InputError, OutputExistsError, StoreError
from cachegen.files import open_file, write_file
from cachegen.manifest import is_object_name
from cachegen.objects import PIECE_BYTES, Answer


class FolderObjects:
    """The files below a folder; methods may be called from several threads."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url.rstrip("/"), folder

    def get(self, name: str, span: tuple[int, int] | None = None, *, deadline: float | None = None) -> Answer:
        """Open an object, or bytes `start` to `stop` of it.

        Raises:
            StoreError: there is none, it is no regular file, or it cannot be read.
        """
        stream = self._open(name)
        size = os.fstat(stream.fileno()).st_size
        start, stop = (0, size) if span is None else (min(span[0], size), min(span[1], size))
        return Answer(
            stop - start, None if span is None else (start, stop), self._read(name, stream, start, stop), stream.close
        )

    def exists(self, name: str, *, deadline: float | None = None) -> bool:
        """Tell whether there is an object of that name.

        Raises:
            StoreError: what is there is no regular file, or cannot be read.
        """
        try:
            self._open(name).close()
        except StoreError as error:
            if error.is_missing:
                return False
            raise
        return True

    def put(self, name: str, content: bytes, *, overwrite: bool) -> bool:
        """Write an object, whole or not at all; returns False where another one was there first.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            write_file(self._path(name), content, replace=overwrite)
        except OutputExistsError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names below a folder, in no order."""
        for folder, _, names in os.walk(self._folder / prefix):
            for name in names:
                yield Path(folder, name).relative_to(self._folder).as_posix()

    def _path(self, name: str) -> Path:
        if not is_object_name(name):
            raise StoreError(f"{self._url}/{name}: not a name that an object can have")
        return self._folder / name

    def _open(self, name: str) -> BufferedReader:
        path = self._path(name)
        try:
            return open_file(path)
        except InputError as error:
            if not path.exists():
                raise StoreError(f"{self._url}/{name}: no such object", is_missing=True) from None
            raise StoreError(f"{self._url}/{name}: {str(error).removeprefix(f'{path}: ')}") from None

    def _read(self, name: str, stream: BufferedReader, start: int, stop: int) -> Iterator[bytes]:
        with stream:
            try:
                stream.seek(start)
                while start < stop and (piece := stream.read(min(PIECE_BYTES, stop - start))):
                    start += len(piece)
                    yield piece
            except OSError as error:
                raise StoreError(f"{self._url}/{name}: cannot be read: {error.strerror}") from error
