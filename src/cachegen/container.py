"""Chunk files and tables files as bytes: header and sections joined with their checksums, or taken apart and checked.

A file is written whole or not at all, and read whole: every byte is covered by a checksum or compared, so that a single
flipped bit anywhere is always detected.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from cachegen.coder.cpu import DTYPES, checksum_streams, crc32c
from cachegen.errors import BitstreamError, InputError
from cachegen.files import open_file
from cachegen.format import (
    ALIGNMENT,
    CHUNK_MAGIC,
    TABLES_MAGIC,
    ChunkHeader,
    Dtype,
    StreamEntry,
    TablesHeader,
    pack_chunk_header,
    pack_tables_header,
    round_up,
    unpack_chunk_header,
    unpack_tables_header,
)
from cachegen.framing import PREFIX, Buffer, read_version
from cachegen.manifest import MAX_OBJECT_BYTES, MAX_TABLES_BYTES
from cachegen.transform_format import (
    TRANSFORM_FORMAT_VERSION,
    ComponentChunkHeader,
    TransformTablesHeader,
    pack_component_chunk_header,
    pack_transform_tables_header,
    unpack_component_chunk_header,
    unpack_transform_tables_header,
)

TABLES_NAME = "tables.cgt"
CHUNK_SUFFIX = ".cgc"
_UNCHECKED_BYTES = 1 << 22  # of a file, that are read before its header is known to be whole
_MAX_HEADER_BYTES = 1 << 28  # more than any number of planes and streams takes

_Header = TypeVar("_Header", ChunkHeader, ComponentChunkHeader, ChunkHeader | ComponentChunkHeader)
_TORCH_DTYPES = {dtype: torch_dtype for torch_dtype, dtype in DTYPES.items()}


def chunk_name(index: int, level: int = 0) -> str:
    """Return the file name of a document's chunk; level 0 is that of methods without levels."""
    return f"chunk_{index:05d}{f'.L{level}' if level else ''}{CHUNK_SUFFIX}"


@dataclass(frozen=True)
class Chunk(Generic[_Header]):
    """A chunk file taken apart.

    Attributes:
        scales: `[num_planes, num_tokens]` in the cache's dtype; empty with method `transform`, which has none.
        payload: the streams, each padded to a multiple of 16 bytes.
        exact: the section of exact values, which only method `transform` has, without its padding.
    """

    header: _Header
    scales: torch.Tensor
    payload: memoryview
    exact: memoryview = field(default_factory=lambda: memoryview(b""))


def build_chunk(
    header: ChunkHeader, scales: torch.Tensor, streams: Sequence[StreamEntry], payload: bytes | memoryview
) -> list[bytes | memoryview]:
    """Join a chunk's parts.

    Args:
        header: its `stream_index` and `scales_crc` are filled in here.

    Returns:
        The file, as parts to be written one after the other.
    """
    scale_bytes = scales.contiguous().view(torch.uint8).numpy().tobytes()
    padded_scales = scale_bytes.ljust(round_up(len(scale_bytes), ALIGNMENT), b"\0")
    header = dataclasses.replace(
        header,
        stream_index=np.array(streams, dtype="<u4").tobytes(),
        scales_crc=crc32c(padded_scales),
    )
    return [pack_chunk_header(header, crc32c), padded_scales, payload]


def build_component_chunk(
    header: ComponentChunkHeader,
    streams: Sequence[StreamEntry],
    payloads: Sequence[bytes | memoryview],
    exact: bytes = b"",
) -> list[bytes | memoryview]:
    """Join the parts of a chunk of method `transform`.

    Args:
        header: its `stream_index`, `exact_bytes` and `exact_crc` are filled in here.
        payloads: of each group of layers.
        exact: the section of exact values.

    Returns:
        The file, as parts to be written one after the other.
    """
    padded = exact.ljust(round_up(len(exact), ALIGNMENT), b"\0")
    header = dataclasses.replace(
        header,
        stream_index=np.array(streams, dtype="<u4").tobytes(),
        exact_bytes=len(exact),
        exact_crc=crc32c(padded),
    )
    return [pack_component_chunk_header(header, crc32c), *payloads, padded]


def unpack_any_chunk_header(content: Buffer) -> ChunkHeader | ComponentChunkHeader:
    """Parse and check the header of a chunk file of any version, not what follows it.

    Raises:
        BitstreamError: the header is not whole, or the file has another length than it says.
        UnsupportedVersionError: this release does not read it.
    """
    if read_version(content) == TRANSFORM_FORMAT_VERSION:
        return unpack_component_chunk_header(content, crc32c)
    return unpack_chunk_header(content, crc32c)


def header_crc(header: bytes | memoryview) -> int:
    """Return the checksum that ends a packed header; it covers the checksums of all that follows the header."""
    return int.from_bytes(header[-4:], "little")


def parse_chunk(
    content: Buffer,
    num_threads: int = 1,
    *,
    check: Callable[[ChunkHeader | ComponentChunkHeader], object] | None = None,
) -> Chunk[ChunkHeader] | Chunk[ComponentChunkHeader]:
    """Take a chunk file of any version apart and check all of it.

    Args:
        check: called with the header, before memory is taken for what it announces; may raise.

    Raises:
        BitstreamError: the file is not whole, or any bit of it has changed.
        UnsupportedVersionError: this release does not read it.
    """
    content = memoryview(content)
    header = unpack_any_chunk_header(content)
    if check is not None:
        check(header)
    if isinstance(header, ComponentChunkHeader):
        exact_at = header.payload_offset + header.payload_bytes
        if crc32c(content[exact_at:]) != header.exact_crc:
            raise BitstreamError("does not match, the exact values are corrupt", offset=232, field="exact_crc")
        payload = _check_streams(content[:exact_at], header, num_threads)
        return Chunk(header, torch.empty(0), payload, content[exact_at : exact_at + header.exact_bytes])
    padded_scales = content[header.header_bytes : header.payload_offset]
    if crc32c(padded_scales) != header.scales_crc:
        raise BitstreamError("does not match, the scales are corrupt", offset=44, field="scales_crc")
    payload = _check_streams(content, header, num_threads)
    # A copy: torch wants writable memory, and scales are few.
    scale_bytes = torch.frombuffer(bytearray(padded_scales[: header.scales_bytes]), dtype=torch.uint8)
    scales = scale_bytes.view(_TORCH_DTYPES[header.dtype]).reshape(len(header.planes), header.num_tokens)
    if _has_infinity_or_nan(scale_bytes, header.dtype):
        raise BitstreamError("a scale is NaN or infinity", offset=header.header_bytes, field="scales")
    return Chunk(header, scales, payload)


def _has_infinity_or_nan(values: torch.Tensor, dtype: Dtype) -> bool:
    """Tell by the exponents of little-endian floats; torch would start its threads for so little."""
    exponent = {Dtype.FLOAT16: 0x7C00, Dtype.BFLOAT16: 0x7F80, Dtype.FLOAT32: 0x7F800000}[dtype]
    bits = values.numpy().view(f"<u{dtype.num_bytes}")
    return bool(((bits & exponent) == exponent).any())


def _check_streams(content: memoryview, header: ChunkHeader | ComponentChunkHeader, num_threads: int) -> memoryview:
    """Return the streams of a chunk, all of whose checksums match."""
    payload = content[header.payload_offset :]
    # Not `header.streams`: a list of tuples takes ten times the memory of the index.
    index = np.frombuffer(header.stream_index, dtype="<u4").reshape(-1, len(StreamEntry._fields))
    corrupt = np.flatnonzero(checksum_streams(payload, index, num_threads) != index[:, 2])
    if len(corrupt):
        lengths = index[: corrupt[0], 0].astype(np.int64)
        offset = header.payload_offset + int((-(-lengths // ALIGNMENT) * ALIGNMENT).sum())
        raise BitstreamError("does not match its checksum", offset=offset, field=f"stream {corrupt[0]}")
    return payload


def build_tables(header: TablesHeader, tables: bytes) -> bytes:
    """Join a tables file's parts; the header's `tables_crc` is filled in here."""
    header = dataclasses.replace(header, tables_crc=crc32c(tables))
    return pack_tables_header(header, crc32c) + tables


def build_transform_tables(header: TransformTablesHeader) -> bytes:
    """Return the tables file of a document of method `transform`: a header alone."""
    return pack_transform_tables_header(header, crc32c)


def parse_tables(content: bytes) -> tuple[TablesHeader | TransformTablesHeader, bytes]:
    """Take a tables file of any version apart and check all of it.

    Raises:
        BitstreamError: the file is not whole, or any bit of it has changed.
        UnsupportedVersionError: this release does not read it.
    """
    if read_version(content) == TRANSFORM_FORMAT_VERSION:
        return unpack_transform_tables_header(content, crc32c), b""
    header = unpack_tables_header(content, crc32c)
    tables = content[header.header_bytes :]
    if crc32c(tables) != header.tables_crc:
        raise BitstreamError("does not match, the tables are corrupt", offset=48, field="tables_crc")
    return header, tables


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
            begin = stream.read(PREFIX.size)
            if len(begin) < PREFIX.size or begin[: len(CHUNK_MAGIC)] not in (CHUNK_MAGIC, TABLES_MAGIC):
                return begin
            *_, header_bytes, announced = PREFIX.unpack(begin)
            limit = MAX_TABLES_BYTES if begin.startswith(TABLES_MAGIC) else MAX_OBJECT_BYTES
            size = min(os.fstat(stream.fileno()).st_size, announced + 1)
            if size > _UNCHECKED_BYTES:
                header = begin + stream.read(max(0, min(header_bytes, _MAX_HEADER_BYTES) - len(begin)))
                if len(header) != header_bytes or crc32c(header[:-4]) != header_crc(header):
                    return header
            if size > limit:
                raise InputError(f"{path}: has {size} bytes, more than the {limit} that a file of this kind may have")
            stream.seek(0)
            return stream.read(size)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
