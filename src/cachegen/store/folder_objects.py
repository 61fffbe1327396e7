"""Objects in a folder, by files' own means: whole or not there, and nothing that is no regular file is waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from cachegen.errors import InputError, MissingInputError, OutputExistsError, StoreError
from cachegen.files import is_temporary, open_file, remove_stale_temporaries, write_file
from cachegen.store.manifest import is_object_name
from cachegen.store.objects import PIECE_BYTES, Answer


class FolderObjects:
    """The objects below a folder; methods may be called from several threads."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url.rstrip("/"), folder
        self._swept: set[Path] = set()  # folders that hold no file of a killed writer any more

    def get(self, name: str, span: tuple[int, int] | None = None, *, deadline: float | None = None) -> Answer:
        """Open an object, or bytes `start` to `stop` of it.

        Raises:
            StoreError: there is none, it is no regular file, or it is shorter.
        """
        del deadline
        stream = self._open(name)
        found = os.fstat(stream.fileno()).st_size
        start, stop = span or (0, found)
        if stop > found:
            stream.close()
            raise StoreError(f"{self._describe(name)}: has {found} bytes, {span} were asked for")
        return Answer(stop - start, span, self._read(name, stream, start, stop), stream.close)

    def exists(self, name: str, *, deadline: float | None = None) -> bool:
        """Tell whether there is an object of that name.

        Raises:
            StoreError: there is something that is no regular file, or cannot be read.
        """
        del deadline
        try:
            self._open(name).close()
        except StoreError as error:
            if error.is_missing:
                return False
            raise
        return True

    def put(self, name: str, content: bytes, *, overwrite: bool) -> bool:
        """Write an object, on disk before it has its name; returns False where another one was there first.

        Raises:
            OutputError: it cannot be written.
        """
        self.sweep(name)
        try:
            write_file(self._folder / name, content, replace=overwrite)
        except OutputExistsError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names below a folder, in no order."""
        for folder, _, names in os.walk(self._folder / prefix):
            for name in names:
                path = Path(folder) / name
                if not is_temporary(path):
                    yield path.relative_to(self._folder).as_posix()

    def sweep(self, name: str) -> None:
        """Remove what killed writers left beside an object, once."""
        folder = (self._folder / name).parent
        if folder not in self._swept:
            with suppress(OSError):  # there is no such folder yet, or what is wrong with it will show
                remove_stale_temporaries(folder)
            self._swept.add(folder)

    def _describe(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _open(self, name: str) -> BufferedReader:
        place, path = self._describe(name), self._folder / name
        if not is_object_name(name):
            raise StoreError(f"{place}: not a name that an object can have")
        try:
            return open_file(path)
        except MissingInputError:  # not by looking again: another publisher may have written it meanwhile
            raise StoreError(f"{place}: no such object", is_missing=True) from None
        except InputError as error:
            raise StoreError(f"{place}: {str(error).removeprefix(f'{path}: ')}") from None

    def _read(self, name: str, stream: BufferedReader, start: int, stop: int) -> Iterator[bytes]:
        try:
            stream.seek(start)
            while start < stop and (piece := stream.read(min(PIECE_BYTES, stop - start))):
                start += len(piece)
                yield piece
        except OSError as error:
            raise StoreError(f"{self._describe(name)}: cannot be read: {error.strerror}") from error
