"""What a KV file must look like from outside before torch opens it, and whether a damaged one was ours.

`torch.save` writes a zip whose members are stored as they are, one of them a pickle. torch's `weights_only` reader runs
nothing of it, but allows far more than a KV file holds, and some of that takes memory or time without bound: compressed
members, arrays of any length, keys that are tuples of tuples. Here the directory is bounded, the pickle is read opcode
by opcode, and only what `save_kv_cache` writes passes.
"""

from __future__ import annotations

import errno
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from cachegen.errors import BitstreamError, InputError
from cachegen.files import open_file

MARKERS = (b"cachegen-kv", b"model_fingerprint", b"token_hash", b"rotary_embeddings", b"cache_hash")
"""Strings at the beginning of every KV file; one of them is enough to know a damaged one by."""

MAX_PICKLE_BYTES = 1 << 21  # of 10,000 planes; a plane takes about 200
MAX_DIRECTORY_BYTES = 1 << 22  # the zip's: likewise
_HEAD_BYTES = 1 << 14
_PICKLE_NAME = "data.pkl"
_LOCAL_MAGIC = b"PK\3\4"

_GLOBALS = frozenset(
    {
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "torch HalfStorage",
        "torch BFloat16Storage",
        "torch IntStorage",
        "collections OrderedDict",
    }
)
_SHARED = frozenset({"BINUNICODE", "GLOBAL", "REDUCE"})  # what may be referred to again: strings, names, tensors
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError)
_OPCODES = _SHARED | frozenset(
    "PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS "
    "BINPUT LONG_BINPUT BINGET LONG_BINGET BINPERSID BININT BININT1 BININT2 LONG1 BINFLOAT "
    "NEWTRUE NEWFALSE NONE".split()
)


@contextmanager
def check_archive(path: Path) -> Iterator[BinaryIO]:
    """Open a file, refusing what `save_kv_cache` cannot have written, in memory and time that are bounded.

    Raises:
        InputError: there is no such file, or it is no regular one.
        BitstreamError: it is not a KV file, or not whole.
    """
    with open_file(path, kind="KV cache file", hint="write one with main.py, or name another one") as stream:
        try:
            pickle = _read_pickle(stream)
        except BitstreamError as error:
            raise error.at(path) from error
        except _ZIP_ERRORS as error:
            _raise_if_unreadable(error, path)
            problem = f"not a KV cache file of main.py, or not whole ({_first_line(error)})"
            problem += "; plain pickles are never loaded"
            raise BitstreamError(problem, path=path) from error
        try:
            _check_pickle(pickle)
        except BitstreamError as error:
            raise error.at(path) from error
        except Exception as error:  # pickletools fails over corrupt opcodes in many ways
            raise BitstreamError(f"not a KV cache file of main.py ({_first_line(error)})", path=path) from error
        yield stream


def is_damaged_kv_file(path: Path) -> bool:
    """Tell whether a file that `load_kv_cache` refuses was a KV file once, or the beginning of one, and no one's else.

    Raises:
        InputError: it cannot be read.
    """
    with open_file(path) as stream:
        head = stream.read(_HEAD_BYTES)
        if not head or any(marker in head for marker in MARKERS):
            return True
        if not (head.startswith(_LOCAL_MAGIC) and f"/{_PICKLE_NAME}".encode() in head[:300]):
            return False
        try:
            _read_pickle(stream)
        except (BitstreamError, *_ZIP_ERRORS) as error:
            _raise_if_unreadable(error, path)
            return True
    return False  # a whole file of torch.save, of something else


class _BoundedReader:
    """The part of a file that zipfile uses, which reads the directory in one piece, of any size it announces."""

    def __init__(self, stream: BinaryIO | BufferedReader) -> None:
        self._stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(min(size, MAX_DIRECTORY_BYTES + 1) if size >= 0 else MAX_DIRECTORY_BYTES + 1)
        if len(content) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory is too large")
        return content


def _read_pickle(stream: BinaryIO | BufferedReader) -> bytes:
    """Check the zip's directory and return its pickle, whose checksum is right."""
    # What another reader of zips might see otherwise: bytes before the first member, a comment behind the directory.
    if stream.seek(0) == 0 and stream.read(len(_LOCAL_MAGIC)) != _LOCAL_MAGIC:
        raise zipfile.BadZipFile("does not begin as one")
    file_bytes = stream.seek(0, 2)
    with zipfile.ZipFile(_BoundedReader(stream)) as archive:  # type: ignore[arg-type]
        members = archive.infolist()
        names = [member.filename for member in members]
        if archive.comment:
            raise BitstreamError("the zip has a comment", field="zip directory")
        if len(set(names)) != len(names):
            raise BitstreamError("a member of the zip stands there twice", field="zip directory")
        if len({name.split("/", 1)[0] for name in names}) != 1:
            raise BitstreamError("not a KV cache file of main.py: members of several folders", field="zip directory")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise BitstreamError("a member of the zip is compressed", field="zip directory")
        if sum(member.file_size for member in members) > file_bytes:
            raise BitstreamError("the members of the zip are larger than the file", field="zip directory")
        pickles = [member for member in members if member.filename.split("/", 1)[-1] == _PICKLE_NAME]
        if not pickles:
            raise BitstreamError("not a KV cache file of main.py: no pickle", field="zip directory")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise BitstreamError(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes", field="zip directory")
        return archive.read(pickles[0])


def _check_pickle(pickle: bytes) -> None:
    """Refuse a pickle with anything but plain values and tensors; nothing is run, and nothing built."""
    shared: dict[int, bool] = {}
    previous, num_read = "", 0
    for opcode, argument, position in pickletools.genops(pickle):
        name = opcode.name
        if name not in _OPCODES or (name == "GLOBAL" and argument not in _GLOBALS):
            what = f"{name} {argument}" if name == "GLOBAL" else name
            raise BitstreamError(f"not a KV cache file of main.py, nothing of it was run ({what[:100]} in its pickle)")
        if name in ("BINPUT", "LONG_BINPUT"):
            shared[int(argument or 0)] = previous in _SHARED
        # Tuples that hold one tuple twice, and so on, are small here and endless for whoever walks them.
        elif name in ("BINGET", "LONG_BINGET") and not shared.get(int(argument or 0), False):
            raise BitstreamError("not a KV cache file of main.py: a value in its pickle stands in two places")
        previous, num_read = name, (position or 0) + 1
    if previous != "STOP" or num_read != len(pickle):
        raise BitstreamError("not a KV cache file of main.py: bytes after its pickle")


def _raise_if_unreadable(error: Exception, path: Path) -> None:
    """Tell a disk that fails, say, from a directory that sends zipfile to negative positions."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__
