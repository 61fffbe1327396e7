"""Write whole files or none: a temporary file beside the target, flushed to disk, then renamed."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cachegen.errors import OutputError

_TEMPORARY_PREFIX = ".tmp-"
# Exactly what `atomic_write` makes: someone else's ".tmp-notes" is not ours to remove.
_TEMPORARY_NAME = re.compile(re.escape(_TEMPORARY_PREFIX) + r".+-[0-9a-f]{12}", re.DOTALL)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` only when the block ends without an exception.

    The block should do nothing but write: an OSError in it counts as a failure to write `path`.

    The bytes are on disk (fsync) before the rename, so that not even a power cut leaves half a file under the final
    name. A killed process can leave a `.tmp-*` file behind; `remove_stale_temporaries` sweeps those.

    Raises:
        OutputError: the file cannot be written (no space, no permission, no such folder).
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
        raise OutputError(f"{path}: cannot be written: is not a file")
    temporary = path.parent / f"{_TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(6)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path`, whole or not at all.

    Raises:
        OutputError: as `atomic_write`.
    """
    with atomic_write(path) as stream:
        stream.write(content)


def is_temporary(path: Path) -> bool:
    """Tell whether `path` is a temporary file of `atomic_write`."""
    return _TEMPORARY_NAME.fullmatch(path.name) is not None


def remove_stale_temporaries(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`."""
    for path in folder.iterdir():
        if is_temporary(path):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder are none the worse for it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)
