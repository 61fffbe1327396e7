"""The byte layout of version 2, the files of method `transform`: pack and unpack, standard library only.

A document has a tables file, which says what belongs to all chunks and holds no tables, and one chunk file per chunk
and level. docs/format.md is the specification. What the profile says (shapes, components, scales) is not repeated,
but for the shapes, which tell a reader what memory to take.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cached_property

from cachegen.format import (
    ALIGNMENT,
    CHUNK_MAGIC,
    LANES,
    MAX_CHANNELS,
    MAX_CHUNK_TOKENS,
    MAX_CHUNKS,
    STREAM,
    TABLES_MAGIC,
    Coder,
    Dtype,
    Method,
    StreamEntry,
    check_chunk_tokens,
    round_up,
    streams_bytes,
)
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

TRANSFORM_FORMAT_VERSION = 2
MAX_LEVELS = 4
MAX_STEP_LOG = 1 << 10  # steps, and all that components of 2^24 of them stand for, stay within fp32
MAX_GROUPS = 65535

_CHUNK_FIELDS = struct.Struct("<QIHBBBBHi32s32s32s32s32sHHIffQI")
_TABLES_FIELDS = struct.Struct("<QIHBBBBHIi32s32s32s32s32s")
_SHAPE = struct.Struct("<HH")


@dataclass(frozen=True, slots=True)
class PlaneShape:
    """The shape of one layer's keys or values, per token."""

    num_kv_heads: int
    head_dim: int

    @property
    def num_channels(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class TransformTablesHeader:
    """What the tables file of a document of method `transform` says. Hashes are 32 raw bytes.

    Attributes:
        num_cache_tokens: tokens of the saved cache; those that no chunk covers are recomputed from text.
        num_levels: levels of the document, 1 to 4; some of their files may be elsewhere.
        step_log: 16 log2 of level 1's quantization step.
        cache_hash: `kv_cache.hash_planes` of the saved cache.
        planes: keys then values of layer 0, of layer 1, ...
        chunk_tokens: tokens of each chunk.
    """

    num_cache_tokens: int
    num_levels: int
    dtype: Dtype
    prefill_block_size: int
    step_log: int
    model_fingerprint: bytes
    token_hash: bytes
    rope_hash: bytes
    profile_hash: bytes
    cache_hash: bytes
    planes: tuple[PlaneShape, ...]
    chunk_tokens: tuple[int, ...]

    method = Method.TRANSFORM
    tables_bytes = 0
    """Tables are the profile's."""

    @property
    def header_bytes(self) -> int:
        return _tables_header_bytes(len(self.planes), len(self.chunk_tokens))


@dataclass(frozen=True)
class ComponentChunkHeader:
    """What a chunk file of method `transform` says before its streams. Hashes are 32 raw bytes.

    Attributes:
        level: 1 to 4; files of a level above 1 refine those of the level before.
        step_log: 16 log2 of level 1's quantization step.
        tokens_per_stream: of each group of layers, multiples of 32.
        stream_index: `StreamEntry` records, packed: group after group, token after token.
        refines: header_crc of the chunk's file of the level before; 0 at level 1.
        max_error: largest difference of a value decoded at this level from the cache's, as the encoder measured it.
        mean_error: mean difference over all values of the chunk.
        exact_bytes: length of the section of exact values without its padding.
        exact_crc: CRC-32C of that section with its padding.
        header_crc: of the file that the header was read from; 0 before it is written.
    """

    first_token: int
    num_tokens: int
    num_layers: int
    coder: Coder
    dtype: Dtype
    level: int
    step_log: int
    model_fingerprint: bytes
    token_hash: bytes
    rope_hash: bytes
    tables_hash: bytes
    profile_hash: bytes
    tokens_per_stream: tuple[int, ...]
    stream_index: bytes = b""
    refines: int = 0
    max_error: float = 0.0
    mean_error: float = 0.0
    exact_bytes: int = 0
    exact_crc: int = 0
    header_crc: int = field(default=0, compare=False)

    method = Method.TRANSFORM
    scales_bytes = 0
    """There are no scales."""

    @cached_property
    def streams(self) -> list[StreamEntry]:
        return [StreamEntry(*fields) for fields in STREAM.iter_unpack(self.stream_index)]

    @property
    def streams_of_groups(self) -> list[int]:
        """The number of streams of each group."""
        return [-(-self.num_tokens // tokens) for tokens in self.tokens_per_stream]

    @property
    def header_bytes(self) -> int:
        return _chunk_header_bytes(len(self.tokens_per_stream), sum(self.streams_of_groups))

    @property
    def payload_offset(self) -> int:
        return self.header_bytes

    @property
    def payload_bytes(self) -> int:
        return streams_bytes(self.stream_index)

    @property
    def file_bytes(self) -> int:
        return self.payload_offset + self.payload_bytes + round_up(self.exact_bytes, ALIGNMENT)


def pack_transform_tables_header(header: TransformTablesHeader, checksum: Checksum) -> bytes:
    """Serialize a whole tables file."""
    fields = _TABLES_FIELDS.pack(
        header.num_cache_tokens,
        len(header.chunk_tokens),
        len(header.planes) // 2,
        header.method,
        header.num_levels,
        header.dtype,
        0,
        0,
        header.prefill_block_size,
        header.step_log,
        header.model_fingerprint,
        header.token_hash,
        header.rope_hash,
        header.profile_hash,
        header.cache_hash,
    )
    shapes = b"".join(_SHAPE.pack(plane.num_kv_heads, plane.head_dim) for plane in header.planes)
    body = fields + shapes + struct.pack(f"<{len(header.chunk_tokens)}I", *header.chunk_tokens)
    return seal_header(TABLES_MAGIC, header.header_bytes, header.header_bytes, body, checksum, TRANSFORM_FORMAT_VERSION)


def unpack_transform_tables_header(content: Buffer, checksum: Checksum) -> TransformTablesHeader:
    """Parse and check a whole tables file.

    Raises:
        BitstreamError: the bytes are not a whole, unchanged tables file's.
        UnsupportedVersionError: the version, method or dtype is not one this release reads.
    """
    header_bytes = open_header(content, TABLES_MAGIC, "tables", checksum, TRANSFORM_FORMAT_VERSION)
    (
        num_cache_tokens,
        num_chunks,
        num_layers,
        method,
        num_levels,
        dtype,
        reserved_level,
        reserved,
        prefill_block_size,
        step_log,
        model_fingerprint,
        token_hash,
        rope_hash,
        profile_hash,
        cache_hash,
    ) = unpack_record(_TABLES_FIELDS, content, PREFIX.size, header_bytes)
    _check_method(method)
    _check_step(step_log, 48)
    is_clear = reserved == reserved_level == 0
    require(is_clear, "reserved bits are set, a later release may read them", 41, "reserved", unsupported=True)
    require(num_layers > 0, "must be positive", 36, "num_layers")
    require(0 < num_levels <= MAX_LEVELS, f"must be 1 to {MAX_LEVELS}, got {num_levels}", 39, "num_levels")
    require(0 < num_chunks <= MAX_CHUNKS, f"must be 1 to {MAX_CHUNKS}, got {num_chunks}", 32, "num_chunks")
    require(prefill_block_size > 0, "must be positive", 44, "prefill_block_size")
    expected_bytes = _tables_header_bytes(2 * num_layers, num_chunks)
    require(header_bytes == expected_bytes, f"must be {expected_bytes}, got {header_bytes}", 12, "header_bytes")
    shapes_at = PREFIX.size + _TABLES_FIELDS.size
    planes = []
    for at in range(shapes_at, shapes_at + 2 * num_layers * _SHAPE.size, _SHAPE.size):
        plane = PlaneShape(*unpack_record(_SHAPE, content, at, header_bytes))
        in_range = 0 < plane.num_channels <= MAX_CHANNELS
        require(in_range, f"{plane.num_channels} channels are not 1 to {MAX_CHANNELS}", at, "shape")
        planes.append(plane)
    chunks_at = shapes_at + len(planes) * _SHAPE.size
    chunk_tokens = struct.unpack_from(f"<{num_chunks}I", content, chunks_at)
    check_chunk_tokens(chunk_tokens, num_cache_tokens, chunks_at)
    check_file_bytes(content, header_bytes)
    return TransformTablesHeader(
        num_cache_tokens=num_cache_tokens,
        num_levels=num_levels,
        dtype=known(Dtype, dtype, 40, "dtype"),
        prefill_block_size=prefill_block_size,
        step_log=step_log,
        model_fingerprint=model_fingerprint,
        token_hash=token_hash,
        rope_hash=rope_hash,
        profile_hash=profile_hash,
        cache_hash=cache_hash,
        planes=tuple(planes),
        chunk_tokens=chunk_tokens,
    )


def pack_component_chunk_header(header: ComponentChunkHeader, checksum: Checksum) -> bytes:
    """Serialize a chunk's header, its checksum included."""
    fields = _CHUNK_FIELDS.pack(
        header.first_token,
        header.num_tokens,
        header.num_layers,
        header.method,
        header.coder,
        header.dtype,
        header.level,
        0,
        header.step_log,
        header.model_fingerprint,
        header.token_hash,
        header.rope_hash,
        header.tables_hash,
        header.profile_hash,
        len(header.tokens_per_stream),
        0,
        header.refines,
        header.max_error,
        header.mean_error,
        header.exact_bytes,
        header.exact_crc,
    )
    lengths = struct.pack(f"<{len(header.tokens_per_stream)}I", *header.tokens_per_stream)
    body = fields + lengths + header.stream_index
    return seal_header(CHUNK_MAGIC, header.header_bytes, header.file_bytes, body, checksum, TRANSFORM_FORMAT_VERSION)


def unpack_component_chunk_header(content: Buffer, checksum: Checksum) -> ComponentChunkHeader:
    """Parse and check the header of a whole chunk file.

    Raises:
        BitstreamError: the bytes are not a whole, unchanged chunk file's (the streams' own checksums aside).
        UnsupportedVersionError: the version, method, coder or dtype is not one this release reads.
    """
    header_bytes = open_header(content, CHUNK_MAGIC, "chunk", checksum, TRANSFORM_FORMAT_VERSION)
    (
        first_token,
        num_tokens,
        num_layers,
        method,
        coder,
        dtype,
        level,
        reserved,
        step_log,
        model_fingerprint,
        token_hash,
        rope_hash,
        tables_hash,
        profile_hash,
        num_groups,
        reserved_group,
        refines,
        max_error,
        mean_error,
        exact_bytes,
        exact_crc,
    ) = unpack_record(_CHUNK_FIELDS, content, PREFIX.size, header_bytes)
    _check_method(method)
    _check_step(step_log, 44)
    is_clear = reserved == reserved_group == 0
    require(is_clear, "reserved bits are set, a later release may read them", 42, "reserved", unsupported=True)
    require(num_layers > 0, "must be positive", 36, "num_layers")
    require(0 < level <= MAX_LEVELS, f"must be 1 to {MAX_LEVELS}, got {level}", 41, "level")
    require(0 < num_tokens <= MAX_CHUNK_TOKENS, f"must be 1 to {MAX_CHUNK_TOKENS}, got {num_tokens}", 32, "num_tokens")
    require(0 < num_groups <= num_layers, f"must be 1 to the layers, got {num_groups}", 208, "num_groups")
    require(refines == 0 or level > 1, "must be 0 at level 1", 212, "refines")
    is_measured = 0 <= mean_error <= max_error < float("inf")
    require(is_measured, f"must be finite, 0 <= mean <= max, got {mean_error}, {max_error}", 216, "max_error")
    is_rans = known(Coder, coder, 39, "coder") is Coder.RANS
    require(is_rans, "method transform is coded with rans", 39, "coder", unsupported=True)
    lengths_at = PREFIX.size + _CHUNK_FIELDS.size
    unpack_record(struct.Struct(f"<{num_groups}I"), content, lengths_at, header_bytes)
    tokens_per_stream = struct.unpack_from(f"<{num_groups}I", content, lengths_at)
    for group, tokens in enumerate(tokens_per_stream):
        in_range = 0 < tokens <= MAX_CHUNK_TOKENS and tokens % LANES == 0
        at = lengths_at + 4 * group
        require(in_range, f"must be a multiple of {LANES}, got {tokens}", at, "tokens_per_stream")
    num_streams = sum(-(-num_tokens // tokens) for tokens in tokens_per_stream)
    expected_bytes = _chunk_header_bytes(num_groups, num_streams)
    require(header_bytes == expected_bytes, f"must be {expected_bytes}, got {header_bytes}", 12, "header_bytes")
    index_at = lengths_at + 4 * num_groups
    index_end = index_at + num_streams * STREAM.size
    require(not any(content[index_end : header_bytes - CRC.size]), "padding must be zero", index_end, "padding")
    header = ComponentChunkHeader(
        first_token=first_token,
        num_tokens=num_tokens,
        num_layers=num_layers,
        coder=Coder.RANS,
        dtype=known(Dtype, dtype, 40, "dtype"),
        level=level,
        step_log=step_log,
        model_fingerprint=model_fingerprint,
        token_hash=token_hash,
        rope_hash=rope_hash,
        tables_hash=tables_hash,
        profile_hash=profile_hash,
        tokens_per_stream=tokens_per_stream,
        stream_index=bytes(content[index_at:index_end]),
        refines=refines,
        max_error=max_error,
        mean_error=mean_error,
        exact_bytes=exact_bytes,
        exact_crc=exact_crc,
        header_crc=CRC.unpack_from(content, header_bytes - CRC.size)[0],
    )
    check_file_bytes(content, header.file_bytes)
    return header


def _check_method(method: int) -> None:
    is_transform = known(Method, method, 38, "method") is Method.TRANSFORM
    require(is_transform, "files of this version are of method transform", 38, "method", unsupported=True)


def _check_step(step_log: int, offset: int) -> None:
    in_range = -MAX_STEP_LOG <= step_log <= MAX_STEP_LOG
    require(in_range, f"must be within {MAX_STEP_LOG} of 0, got {step_log}", offset, "step_log")


def _chunk_header_bytes(num_groups: int, num_streams: int) -> int:
    fields = PREFIX.size + _CHUNK_FIELDS.size + 4 * num_groups + num_streams * STREAM.size
    return round_up(fields + CRC.size, ALIGNMENT)


def _tables_header_bytes(num_planes: int, num_chunks: int) -> int:
    return PREFIX.size + _TABLES_FIELDS.size + num_planes * _SHAPE.size + 4 * num_chunks + CRC.size
