"""Chunk files and tables files: joined from header and sections, or taken apart again and checked.

A file is written whole or not at all, and read whole: every byte is covered by a checksum or compared, so that a single
flipped bit anywhere is always detected.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from cachegen import _native
from cachegen.errors import BitstreamError, InputError
from cachegen.files import open_file
from cachegen.format.constants import ALIGNMENT, CHUNK_MAGIC, TABLES_MAGIC, StreamEntry
from cachegen.format.framing import PREFIX, Buffer
from cachegen.format.headers import ChunkHeader, DocumentHeader

TABLES_NAME = "tables.cgt"
CHUNK_SUFFIX = ".cgc"
MAX_FILE_BYTES = 4 << 30
MAX_TABLES_BYTES = 256 << 20
_UNCHECKED_BYTES = 1 << 22  # of a file, that are read before its header is known to be whole
_MAX_HEADER_BYTES = 1 << 28  # more than any number of planes and streams takes

_Chunk = TypeVar("_Chunk", bound=ChunkHeader)
_Document = TypeVar("_Document", bound=DocumentHeader)


def chunk_name(index: int, level: int = 1) -> str:
    """Return the file name of a document's chunk at a level, 1 being the smallest."""
    return f"chunk_{index:05d}.L{level}{CHUNK_SUFFIX}"


@dataclass(frozen=True)
class Chunk(Generic[_Chunk]):
    """A chunk file taken apart.

    Attributes:
        before: what the method has between header and streams, with its padding.
        payload: the streams, each padded to a multiple of 16 bytes.
        behind: what the method has behind them, with its padding.
    """

    header: _Chunk
    before: memoryview
    payload: memoryview
    behind: memoryview


def join_chunk(
    header: ChunkHeader,
    streams: Sequence[StreamEntry],
    payloads: Sequence[bytes | memoryview],
    *,
    before: bytes = b"",
    behind: bytes = b"",
) -> list[bytes | memoryview]:
    """Join a chunk's parts.

    Args:
        header: its `stream_index` is filled in here.
        payloads: the streams, in any number of pieces.
        before, behind: the method's own sections, padded; see `Chunk`.

    Returns:
        The file, as parts to be written one after the other.
    """
    header = dataclasses.replace(header, stream_index=np.array(streams, dtype="<u4").tobytes())
    return [header.pack(), before, *payloads, behind]


def header_crc(header: bytes | memoryview) -> int:
    """Return the checksum that ends a packed header; it covers the checksums of all that follows the header."""
    return int.from_bytes(header[-4:], "little")


def split_chunk(
    content: Buffer,
    header_class: type[_Chunk],
    num_threads: int = 1,
    *,
    check: Callable[[_Chunk], object] | None = None,
) -> Chunk[_Chunk]:
    """Take a chunk file apart and check all of it.

    Args:
        header_class: of the method that the file names.
        check: called with the header, before memory is taken for what it announces; may raise.

    Raises:
        BitstreamError: the file is not whole, or any bit of it has changed.
        UnsupportedVersionError: this release does not read it.
    """
    content = memoryview(content)
    header = header_class.unpack(content)
    if check is not None:
        check(header)
    payload_offset = header.payload_offset
    payload_end = payload_offset + header.payload_bytes
    before, behind = content[header.header_bytes : payload_offset], content[payload_end:]
    header.check_sections(before, behind)
    payload = content[payload_offset:payload_end]
    _check_streams(payload, header, num_threads)
    return Chunk(header, before, payload, behind)


def _check_streams(payload: memoryview, header: ChunkHeader, num_threads: int) -> None:
    """Compare all streams with their checksums."""
    # Not `header.streams`: a list of tuples takes ten times the memory of the index.
    index = np.frombuffer(header.stream_index, dtype="<u4").reshape(-1, len(StreamEntry._fields))
    found = _native.checksum_streams(np.frombuffer(payload, np.uint8), index, num_threads)
    corrupt = np.flatnonzero(found != index[:, 2])
    if len(corrupt):
        lengths = index[: corrupt[0], 0].astype(np.int64)
        offset = header.payload_offset + int((-(-lengths // ALIGNMENT) * ALIGNMENT).sum())
        raise BitstreamError("does not match its checksum", offset=offset, field=f"stream {corrupt[0]}")


def split_document(content: bytes, header_class: type[_Document]) -> tuple[_Document, bytes, bytes]:
    """Take a tables file apart and check all of it.

    Args:
        header_class: of the method that the file names.

    Returns:
        Its header, the tables and the recurrent states.

    Raises:
        BitstreamError: the file is not whole, or any bit of it has changed.
        UnsupportedVersionError: this release does not read it.
    """
    header = header_class.unpack(content)
    states_at = header.header_bytes + header.tables_bytes
    tables = content[header.header_bytes : states_at]
    header.check_tables(tables)
    return header, tables, content[states_at:]


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """Read a chunk file or a tables file.

    Returns:
        The file. Of one that is longer than its header announces, only so much that this shows; of one that is none of
        ours, or whose header is corrupt, only its beginning: whoever takes it apart refuses it, without its size in
        memory.

    Raises:
        InputError: there is no such file, it is no regular file, or it cannot be read.
    """
    with open_file(path, hint="encode the document again with run_encoding.py") as stream:
        try:
            file_bytes = os.fstat(stream.fileno()).st_size
            is_small = file_bytes <= _UNCHECKED_BYTES
            content = stream.read(file_bytes if is_small else PREFIX.size)
            begin = content[: PREFIX.size]
            if len(begin) < PREFIX.size or begin[: len(CHUNK_MAGIC)] not in (CHUNK_MAGIC, TABLES_MAGIC):
                return begin
            *_, header_bytes, announced = PREFIX.unpack(begin)
            limit = MAX_TABLES_BYTES if begin.startswith(TABLES_MAGIC) else MAX_FILE_BYTES
            if is_small:
                return content[: announced + 1]
            size = min(file_bytes, announced + 1)
            if size > _UNCHECKED_BYTES:
                header = begin + stream.read(max(0, min(header_bytes, _MAX_HEADER_BYTES) - len(begin)))
                if len(header) != header_bytes or _native.crc32c(header[:-4]) != header_crc(header):
                    return header
            if size > limit:
                raise InputError(f"{path}: has {size} bytes, more than the {limit} that a file of this kind may have")
            stream.seek(0)
            return stream.read(size)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
