"""Read files of others without being held up; write whole files or none.

A written file is a temporary one beside its target, flushed to disk, then given the target's name.

Several processes may work in one folder. Whoever writes a temporary file holds a lock (flock) on it, so that a sweep
removes only what no living process is writing; a crash gives the lock back. `lock_folder` keeps a second process out of
a folder altogether.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from cachegen.errors import InputError, MissingInputError, OutputError, OutputExistsError

_TEMPORARY_PREFIX = ".tmp-"
# Exactly what `atomic_write` makes: someone else's ".tmp-notes" is not ours to remove.
_TEMPORARY_NAME = re.compile(re.escape(_TEMPORARY_PREFIX) + r".+-[0-9a-f]{12}", re.DOTALL)
_NAME_CHARACTERS = 50  # of the target, in the temporary's name: 4 bytes each and ours stay below the usual 255 bytes
_NO_HARD_LINKS = frozenset(
    {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EINVAL}
)
_STALE_SECONDS = 24 * 3600.0  # of a temporary file where no lock can tell


def read_file(path: str | os.PathLike[str], max_bytes: int, *, kind: str = "file", hint: str = "") -> bytes:
    """Read a file that may be anyone's: at once, or not at all.

    Args:
        max_bytes: a larger file is refused before anything of it is read.
        kind: of file, and
        hint: what to do where there is no such file, for the message.

    Raises:
        InputError: there is no such file, it is none (a folder, a pipe, a device), it is too large, or it cannot be
            read.
    """
    with open_file(path, kind=kind, hint=hint) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            if size > max_bytes:
                raise InputError(f"{path}: has {size} bytes, more than the {max_bytes} that a {kind} may have")
            return stream.read(size)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def open_file(path: str | os.PathLike[str], *, kind: str = "file", hint: str = "") -> BufferedReader:
    """Open a file for reading; a pipe or a device, which could be read without end, is refused at once.

    Raises:
        MissingInputError: there is no such file.
        InputError: as `read_file`.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for someone to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingInputError(f"{path}: no such {kind}{f' ({hint})' if hint else ''}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a name with a NUL
        raise InputError(f"{path!r}: cannot be read: {error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise InputError(f"{path}: cannot be read: is {found}, where a file is needed")
    return os.fdopen(descriptor, "rb")


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` only when the block ends without an exception.

    The block should do nothing but write: an OSError in it counts as a failure to write `path`.

    The bytes are on disk (fsync) before they get the final name, so that not even a power cut leaves half a file under
    it. A killed process can leave a `.tmp-*` file behind; `remove_stale_temporaries` sweeps those.

    Args:
        replace: put the file in the place of one that is there. Without it whatever has the name at the end of the
            block keeps it, even if another process gave it that name meanwhile; only a file system without hard links
            leaves an instant between looking and renaming.

    Raises:
        OutputExistsError: `replace` is false and something has that name.
        OutputError: the file cannot be written (no space, no permission, no such folder).
    """
    path = Path(path)
    temporary = stream = None
    try:
        if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
            raise OutputError(f"{path}: cannot be written: is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        while stream is None:
            # Named before it is made: whenever a signal ends this, `finally` knows what to remove.
            temporary = path.parent / f"{_TEMPORARY_PREFIX}{path.name[:_NAME_CHARACTERS]}-{secrets.token_hex(6)}"
            stream = _open_locked(temporary)
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            # Still open, and so still locked: no sweep takes the file before it has its name.
            if replace:
                os.replace(stream.name, path)
            else:
                _rename_to_free_name(Path(stream.name), path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def write_file(path: str | os.PathLike[str], content: bytes, *, replace: bool = True) -> None:
    """Write `content` to `path`, whole or not at all.

    Raises:
        OutputExistsError: as `atomic_write`.
        OutputError: as `atomic_write`.
    """
    with atomic_write(path, replace=replace) as stream:
        stream.write(content)


def is_temporary(path: Path) -> bool:
    """Tell whether `path` is a temporary file of `atomic_write`."""
    return _TEMPORARY_NAME.fullmatch(path.name) is not None


def remove_stale_temporaries(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`, and none that a living one is writing.

    Where the file system cannot lock, those that are a day old are taken for left.
    """
    for path in folder.iterdir():
        if is_temporary(path):
            _remove_if_stale(path)


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes that lock the folder out of it while the block runs; a crash gives the lock back.

    A file system that cannot lock folders lets everyone in.

    Args:
        folder: must be there.

    Raises:
        OutputError: another process holds the lock, or the folder cannot be opened.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be opened: {error.strerror}") from error
    try:
        if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) is False:
            raise OutputError(
                f"{folder}: another process is writing into this folder; wait until it has finished, or give another"
            )
        yield
    finally:
        os.close(descriptor)


def _open_locked(temporary: Path) -> BinaryIO | None:
    """Make a file and lock it; None where a sweep was faster than the lock and has removed it."""
    stream = open(temporary, "xb")  # noqa: SIM115 (returned)
    try:
        _lock(stream.fileno(), fcntl.LOCK_EX)
        if _is_file_of(temporary, stream.fileno()):
            return stream
    except BaseException:
        stream.close()
        raise
    stream.close()
    return None


def _lock(descriptor: int, operation: int) -> bool | None:
    """Return whether the lock was given; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_file_of(path: Path, descriptor: int) -> bool:
    """Tell whether the open file still has that name."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_if_stale(path: Path) -> None:
    try:
        # Not a link's target, nor a pipe to wait at. NFS locks only what is open for writing.
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError:
        descriptor = None
    try:
        is_free = None if descriptor is None else _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_free is None:
            status = os.lstat(path)
            is_free = stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > _STALE_SECONDS
        if is_free and (descriptor is None or _is_file_of(path, descriptor)):
            path.unlink()
    except FileNotFoundError:
        return
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _rename_to_free_name(temporary: Path, path: Path) -> None:
    """Give a file its name if nothing has it."""
    try:
        os.link(temporary, path)
        return
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if not os.path.lexists(path):
            os.replace(temporary, path)
            return
    raise OutputExistsError(f"{path}: is there already, it stays as it is")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder are none the worse for it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)
