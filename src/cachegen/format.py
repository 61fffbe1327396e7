"""The byte layout of chunk files and tables files: pack and unpack, standard library only.

docs/format.md is the specification; this module is its header part, field by field. Sections after a header (scales,
streams, tables) are opaque here: a header says how long they are and holds their checksums.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

from cachegen.framing import (
    CRC,
    PREFIX,
    Buffer,
    Checksum,
    check_file_bytes,
    known,
    open_header,
    require,
    seal_header,
    unpack_record,
)

FORMAT_VERSION = 1  # of the files described here; those of method `transform` are in transform_format.py
CHUNK_MAGIC = b"\x89KVC\r\n\x1a\n"
TABLES_MAGIC = b"\x89KVT\r\n\x1a\n"
NO_HASH = bytes(32)

TABLE_SIZE = 32  # symbols of a frequency table
LANES = 32  # tokens of a row
ALIGNMENT = 16  # of sections and streams, in bytes
MAX_LOW_BITS = 8
MAX_CHANNELS = 1 << 16
MAX_HEADS = MAX_LAYERS = (1 << 16) - 1  # and dims of a head: fields of 16 bits
MAX_CHUNK_TOKENS = 1 << 24
MAX_CHUNKS = 1 << 20
MAX_CODE_TOKENS = 1 << 14  # of a stream of coder `ac`: a code's length in bytes must fit in 16 bits

_CHUNK_FIELDS = struct.Struct("<QIHBBBBHI32s32s32s32s32s")
_TABLES_FIELDS = struct.Struct("<QIHBBBBHII32s32s32s32s32s")
_PLANE = struct.Struct("<HHHBBI")
STREAM = struct.Struct("<III")


class Method(IntEnum):
    """How values become symbols."""

    CACHEGEN = 1
    UNIFORM = 2
    TRANSFORM = 3


class Coder(IntEnum):
    """How symbols become bytes."""

    RANS = 1
    AC = 2
    PACKED = 3


class Dtype(IntEnum):
    """The cache's dtype."""

    FLOAT16 = 1
    BFLOAT16 = 2
    FLOAT32 = 3

    @property
    def num_bytes(self) -> int:
        return 4 if self is Dtype.FLOAT32 else 2


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """One layer's keys or values: its shape, its quantizer and how its streams are cut.

    Attributes:
        num_bins: bins of the quantizer; symbols run from 0 to num_bins - 2.
        low_bits: bits of a symbol that are stored raw, below the table-coded high part.
        tokens_per_stream: a multiple of 32; 0 in a tables file, which has no streams.
    """

    num_kv_heads: int
    head_dim: int
    num_bins: int
    low_bits: int
    tokens_per_stream: int = 0

    @property
    def num_channels(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def alphabet_size(self) -> int:
        """The number of values of the high part."""
        return ((self.num_bins - 2) >> self.low_bits) + 1


class StreamEntry(NamedTuple):
    """One stream in a chunk's index: its length without padding, its words, the CRC-32C of it and its padding."""

    num_bytes: int
    num_words: int
    crc: int


@dataclass(frozen=True)
class ChunkHeader:
    """What a chunk file says before its scales and streams. Hashes are 32 raw bytes.

    Attributes:
        first_token: position in the context of the chunk's first token.
        level: which of several encodings of the chunk this is; 0 where there is only one.
        scales_crc: CRC-32C of the scales section with its padding.
        token_hash: hash of the tokens from the context's first to the chunk's last.
        tables_hash: SHA-256 of the tables file; zeros where the coder needs none.
        profile_hash: zeros; kept for the model profiles of a later method.
        planes: keys then values of layer 0, of layer 1, ...
        stream_index: `StreamEntry` records, packed; `streams` unpacks them.
    """

    first_token: int
    num_tokens: int
    method: Method
    coder: Coder
    dtype: Dtype
    level: int
    scales_crc: int
    model_fingerprint: bytes
    token_hash: bytes
    rope_hash: bytes
    tables_hash: bytes
    profile_hash: bytes
    planes: tuple[PlaneLayout, ...]
    stream_index: bytes

    @property
    def num_streams(self) -> int:
        return count_streams(self.planes, self.num_tokens)

    @cached_property
    def streams(self) -> list[StreamEntry]:
        return [StreamEntry(*fields) for fields in STREAM.iter_unpack(self.stream_index)]

    @property
    def header_bytes(self) -> int:
        return _chunk_header_bytes(len(self.planes), self.num_streams)

    @property
    def scales_bytes(self) -> int:
        """Length of the scales section without its padding."""
        return len(self.planes) * self.num_tokens * self.dtype.num_bytes

    @property
    def payload_offset(self) -> int:
        return self.header_bytes + round_up(self.scales_bytes, ALIGNMENT)

    @property
    def payload_bytes(self) -> int:
        return streams_bytes(self.stream_index)


@dataclass(frozen=True)
class TablesHeader:
    """What a tables file says before its tables: the document, its plan of chunks, and the tables' sizes.

    Attributes:
        num_cache_tokens: tokens of the saved cache; those that no chunk covers are recomputed from text.
        coder: of all chunks.
        prefill_block_size: tokens per prefill step of the saved cache.
        tables_crc: CRC-32C of the tables section.
        token_hash: hash of all tokens of the saved cache.
        cache_hash: `kv_cache.hash_planes` of the saved cache.
        plane_table_bytes: per plane, the length of its tables; 0 for coder `packed`.
        chunk_tokens: per chunk, its number of tokens; chunks follow each other from token 0.
    """

    num_cache_tokens: int
    method: Method
    coder: Coder
    dtype: Dtype
    prefill_block_size: int
    tables_crc: int
    model_fingerprint: bytes
    token_hash: bytes
    rope_hash: bytes
    profile_hash: bytes
    cache_hash: bytes
    planes: tuple[PlaneLayout, ...]
    plane_table_bytes: tuple[int, ...]
    chunk_tokens: tuple[int, ...]

    @property
    def header_bytes(self) -> int:
        return _tables_header_bytes(len(self.planes), len(self.chunk_tokens))

    @property
    def tables_bytes(self) -> int:
        return sum(self.plane_table_bytes)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def streams_bytes(stream_index: bytes) -> int:
    """Return the length of the streams of an index of `StreamEntry` records, each with its padding."""
    return sum(round_up(num_bytes, ALIGNMENT) for num_bytes, _, _ in STREAM.iter_unpack(stream_index))


def count_streams(planes: tuple[PlaneLayout, ...], num_tokens: int) -> int:
    """Count the streams of a chunk: per plane, its tokens in runs of `tokens_per_stream`."""
    return sum(-(-num_tokens // plane.tokens_per_stream) for plane in planes)


def pack_chunk_header(header: ChunkHeader, checksum: Checksum) -> bytes:
    """Serialize a chunk's header, its checksum included.

    Args:
        checksum: CRC-32C of bytes.
    """
    fields = _CHUNK_FIELDS.pack(
        header.first_token,
        header.num_tokens,
        len(header.planes) // 2,
        header.method,
        header.coder,
        header.dtype,
        header.level,
        0,
        header.scales_crc,
        header.model_fingerprint,
        header.token_hash,
        header.rope_hash,
        header.tables_hash,
        header.profile_hash,
    )
    body = fields + b"".join(_pack_plane(p, p.tokens_per_stream) for p in header.planes) + header.stream_index
    file_bytes = header.payload_offset + header.payload_bytes
    return seal_header(CHUNK_MAGIC, header.header_bytes, file_bytes, body, checksum, FORMAT_VERSION)


def pack_tables_header(header: TablesHeader, checksum: Checksum) -> bytes:
    """Serialize a tables file's header, its checksum included."""
    fields = _TABLES_FIELDS.pack(
        header.num_cache_tokens,
        len(header.chunk_tokens),
        len(header.planes) // 2,
        header.method,
        header.coder,
        header.dtype,
        0,
        0,
        header.prefill_block_size,
        header.tables_crc,
        header.model_fingerprint,
        header.token_hash,
        header.rope_hash,
        header.profile_hash,
        header.cache_hash,
    )
    planes = b"".join(map(_pack_plane, header.planes, header.plane_table_bytes))
    body = fields + planes + struct.pack(f"<{len(header.chunk_tokens)}I", *header.chunk_tokens)
    return seal_header(
        TABLES_MAGIC, header.header_bytes, header.header_bytes + header.tables_bytes, body, checksum, FORMAT_VERSION
    )


def unpack_chunk_header(content: Buffer, checksum: Checksum) -> ChunkHeader:
    """Parse and check the header of a whole chunk file.

    Args:
        content: the file.
        checksum: CRC-32C of bytes.

    Raises:
        BitstreamError: the bytes are not a whole, unchanged chunk file's (the sections' own checksums aside).
        UnsupportedVersionError: the version, method, coder or dtype is not one this release reads.
    """
    header_bytes = open_header(content, CHUNK_MAGIC, "chunk", checksum, FORMAT_VERSION)
    (
        first_token,
        num_tokens,
        num_layers,
        method,
        coder,
        dtype,
        level,
        reserved,
        scales_crc,
        model_fingerprint,
        token_hash,
        rope_hash,
        tables_hash,
        profile_hash,
    ) = unpack_record(_CHUNK_FIELDS, content, PREFIX.size, header_bytes)
    require(reserved == 0, "reserved bits are set, a later release may read them", 42, "reserved", unsupported=True)
    require(0 < num_tokens <= MAX_CHUNK_TOKENS, f"must be 1 to {MAX_CHUNK_TOKENS}, got {num_tokens}", 32, "num_tokens")
    planes_at = PREFIX.size + _CHUNK_FIELDS.size
    records = _unpack_planes(content, planes_at, num_layers, header_bytes)
    for plane, (layout, tokens_per_stream) in enumerate(records):
        in_range = 0 < tokens_per_stream <= MAX_CHUNK_TOKENS and tokens_per_stream % LANES == 0
        at = planes_at + plane * _PLANE.size
        require(in_range, f"must be a multiple of {LANES}, got {tokens_per_stream}", at + 8, "tokens_per_stream")
        if coder == Coder.PACKED:
            require(layout.alphabet_size == 1, "coder packed has no tables for a high part", at + 6, "low_bits")
        if coder == Coder.AC:
            is_short = tokens_per_stream <= MAX_CODE_TOKENS
            require(is_short, f"must be at most {MAX_CODE_TOKENS} with coder ac", at + 8, "tokens_per_stream")
    planes = tuple(
        PlaneLayout(p.num_kv_heads, p.head_dim, p.num_bins, p.low_bits, tokens_per_stream)
        for p, tokens_per_stream in records
    )
    num_streams = count_streams(planes, num_tokens)
    expected_bytes = _chunk_header_bytes(len(planes), num_streams)
    require(header_bytes == expected_bytes, f"must be {expected_bytes}, got {header_bytes}", 12, "header_bytes")
    index_at = planes_at + len(planes) * _PLANE.size
    index_end = index_at + num_streams * STREAM.size
    require(not any(content[index_end : header_bytes - CRC.size]), "padding must be zero", index_end, "padding")
    header = ChunkHeader(
        first_token=first_token,
        num_tokens=num_tokens,
        method=_known_method(method),
        coder=known(Coder, coder, 39, "coder"),
        dtype=known(Dtype, dtype, 40, "dtype"),
        level=level,
        scales_crc=scales_crc,
        model_fingerprint=model_fingerprint,
        token_hash=token_hash,
        rope_hash=rope_hash,
        tables_hash=tables_hash,
        profile_hash=profile_hash,
        planes=planes,
        stream_index=bytes(content[index_at:index_end]),
    )
    check_file_bytes(content, header.payload_offset + header.payload_bytes)
    return header


def unpack_tables_header(content: Buffer, checksum: Checksum) -> TablesHeader:
    """Parse and check the header of a whole tables file.

    Raises:
        BitstreamError: as `unpack_chunk_header`.
        UnsupportedVersionError: as `unpack_chunk_header`.
    """
    header_bytes = open_header(content, TABLES_MAGIC, "tables", checksum, FORMAT_VERSION)
    (
        num_cache_tokens,
        num_chunks,
        num_layers,
        method,
        coder,
        dtype,
        reserved_level,
        reserved,
        prefill_block_size,
        tables_crc,
        model_fingerprint,
        token_hash,
        rope_hash,
        profile_hash,
        cache_hash,
    ) = unpack_record(_TABLES_FIELDS, content, PREFIX.size, header_bytes)
    is_clear = reserved == reserved_level == 0
    require(is_clear, "reserved bits are set, a later release may read them", 41, "reserved", unsupported=True)
    require(0 < num_chunks <= MAX_CHUNKS, f"must be 1 to {MAX_CHUNKS}, got {num_chunks}", 32, "num_chunks")
    require(prefill_block_size > 0, "must be positive", 44, "prefill_block_size")
    planes_at = PREFIX.size + _TABLES_FIELDS.size
    records = _unpack_planes(content, planes_at, num_layers, header_bytes)
    expected_bytes = _tables_header_bytes(len(records), num_chunks)
    require(header_bytes == expected_bytes, f"must be {expected_bytes}, got {header_bytes}", 12, "header_bytes")
    chunks_at = planes_at + len(records) * _PLANE.size
    chunk_tokens = struct.unpack_from(f"<{num_chunks}I", content, chunks_at)
    check_chunk_tokens(chunk_tokens, num_cache_tokens, chunks_at)
    header = TablesHeader(
        num_cache_tokens=num_cache_tokens,
        method=_known_method(method),
        coder=known(Coder, coder, 39, "coder"),
        dtype=known(Dtype, dtype, 40, "dtype"),
        prefill_block_size=prefill_block_size,
        tables_crc=tables_crc,
        model_fingerprint=model_fingerprint,
        token_hash=token_hash,
        rope_hash=rope_hash,
        profile_hash=profile_hash,
        cache_hash=cache_hash,
        planes=tuple(layout for layout, _ in records),
        plane_table_bytes=tuple(table_bytes for _, table_bytes in records),
        chunk_tokens=chunk_tokens,
    )
    has_tables = header.tables_bytes > 0
    require(has_tables or header.coder is Coder.PACKED, "only coder packed has no tables", 39, "coder")
    require(not has_tables or header.coder is not Coder.PACKED, "coder packed has no tables", 39, "coder")
    check_file_bytes(content, header.header_bytes + header.tables_bytes)
    return header


def check_chunk_tokens(chunk_tokens: tuple[int, ...], num_cache_tokens: int, offset: int) -> None:
    """Refuse a plan of chunks that are empty, too long, or more than the cache."""
    require(min(chunk_tokens) > 0, "a chunk must have tokens", offset, "chunk_tokens")
    require(max(chunk_tokens) <= MAX_CHUNK_TOKENS, "a chunk has too many tokens", offset, "chunk_tokens")
    covers = sum(chunk_tokens) <= num_cache_tokens
    require(covers, "the chunks have more tokens than the cache", offset, "chunk_tokens")


def _chunk_header_bytes(num_planes: int, num_streams: int) -> int:
    fields = PREFIX.size + _CHUNK_FIELDS.size + num_planes * _PLANE.size + num_streams * STREAM.size
    return round_up(fields + CRC.size, ALIGNMENT)


def _tables_header_bytes(num_planes: int, num_chunks: int) -> int:
    return PREFIX.size + _TABLES_FIELDS.size + num_planes * _PLANE.size + 4 * num_chunks + CRC.size


def _pack_plane(plane: PlaneLayout, last_field: int) -> bytes:
    return _PLANE.pack(plane.num_kv_heads, plane.head_dim, plane.num_bins, plane.low_bits, 0, last_field)


def _unpack_planes(content: Buffer, offset: int, num_layers: int, header_bytes: int) -> list[tuple[PlaneLayout, int]]:
    """Parse the plane records; returns each with its last field, which differs between the file kinds."""
    require(num_layers > 0, "must be positive", 36, "num_layers")
    records = []
    for at in range(offset, offset + 2 * num_layers * _PLANE.size, _PLANE.size):
        num_kv_heads, head_dim, num_bins, low_bits, reserved, last_field = unpack_record(
            _PLANE, content, at, header_bytes
        )
        is_clear = reserved == 0
        require(is_clear, "reserved bits are set, a later release may read them", at + 7, "reserved", unsupported=True)
        num_channels = num_kv_heads * head_dim
        require(0 < num_channels <= MAX_CHANNELS, f"{num_channels} channels are not 1 to {MAX_CHANNELS}", at, "shape")
        require(4 <= num_bins <= 256 and num_bins % 2 == 0, "must be even, 4 to 256", at + 4, "num_bins")
        require(low_bits <= MAX_LOW_BITS, f"must be at most {MAX_LOW_BITS}", at + 6, "low_bits")
        layout = PlaneLayout(num_kv_heads, head_dim, num_bins, low_bits)
        require(layout.alphabet_size <= TABLE_SIZE, "too few for this number of bins", at + 6, "low_bits")
        records.append((layout, last_field))
    return records


def _known_method(value: int) -> Method:
    method = known(Method, value, 38, "method")
    require(method is not Method.TRANSFORM, "transform is not of this version", 38, "method", unsupported=True)
    return method
