"""What the headers of all methods have in common: a document's and a chunk's.

A method's own headers extend these by fields of their own, which follow the common ones, and by arrays.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

from cachegen import _native
from cachegen.errors import BitstreamError
from cachegen.format.constants import (
    ALIGNMENT,
    CHUNK_MAGIC,
    MAX_CHANNELS,
    MAX_CHUNK_TOKENS,
    MAX_CHUNKS,
    MAX_LEVELS,
    MAX_STATES_BYTES,
    STREAM,
    TABLES_MAGIC,
    Coder,
    Dtype,
    StoredTokens,
    StreamEntry,
    round_up,
    streams_bytes,
)
from cachegen.format.framing import (
    CRC,
    PREFIX,
    Buffer,
    check_file_bytes,
    open_header,
    require,
    seal_header,
    unpack_record,
)
from cachegen.format.layout import Record, hash32, u8, u16, u32, u64

METHOD_OFFSET = 38
"""Where both kinds of file name their method."""


class Plane(Protocol):
    """What every method knows of one layer's keys or values."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_channels(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class DocumentHeader(Record):
    """What a document's tables file says before its tables, whatever the method. Hashes are 32 raw bytes.

    Attributes:
        planes: keys then values of layer 0, of layer 1, ...
        chunk_tokens: per chunk, its number of tokens; chunks follow each other from token 0.
        first_stored: per layer, the first token that the chunks hold of it; empty where that is 0 in every layer. No
            token behind the chunks attends to what a layer does not hold.
    """

    num_cache_tokens: int = u64("tokens of the whole cache; those that no chunk covers are recomputed from text")
    num_chunks: int = u32("1 to 2^20", least=1, most=MAX_CHUNKS, is_derived=True)
    num_layers: int = u16("1 to 65535", least=1, is_derived=True)
    method: int = u8("1 `cachegen`, 2 `uniform`, 3 `transform`, 4 `lossless`")
    coder: Coder = u8("of all chunks: 1 `rans`, 2 [`ac`](#coder-ac), 3 `packed`", values=Coder)
    dtype: Dtype = u8("of the cache: 1 fp16, 2 bf16, 3 fp32", values=Dtype)
    num_levels: int = u8("levels of the document, 1 to 4", least=1, most=MAX_LEVELS)
    stored_tokens: StoredTokens = u16(
        "0: the chunks hold all their tokens in every layer; 1: in some layers only those from "
        "[first_stored](#tokens-that-are-not-stored) on",
        values=StoredTokens,
        is_derived=True,
    )
    prefill_block_size: int = u32("tokens per prefill step that computed the cache, at least 1", least=1)
    model_fingerprint: bytes = hash32("of the model, see [Fingerprint](#fingerprint-of-the-model); only compared here")
    token_hash: bytes = hash32("hash of all num_cache_tokens token ids, each as int32")
    rope_hash: bytes = hash32("see [Hashes](#hashes-and-gates)")
    profile_hash: bytes = hash32("SHA-256 of the profile's `profile.json`; zeros for a document that needs none")
    cache_hash: bytes = hash32("[hash of the cache's values](#hashes-and-gates): what the document was encoded from")
    states_bytes: int = u32(
        "length of the [recurrent states](#recurrent-states) behind the tables",
        most=MAX_STATES_BYTES,
        default=0,
    )
    states_crc: int = u32("CRC-32C of the recurrent states; zero where there are none", default=0)
    chunk_tokens: tuple[int, ...] = ()
    first_stored: tuple[int, ...] = ()

    first_offset: ClassVar[int] = PREFIX.size

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_chunks", len(self.chunk_tokens))
        object.__setattr__(self, "num_layers", len(self.planes) // 2)
        object.__setattr__(self, "stored_tokens", _which_tokens(self.first_stored))

    @property
    @abstractmethod
    def planes(self) -> Sequence[Plane]: ...

    @property
    @abstractmethod
    def tables_bytes(self) -> int:
        """Length of the tables, which follow the header."""

    @property
    def has_states(self) -> bool:
        """Whether the model has recurrent states, which are those at the end of the context."""
        return self.states_bytes > 0

    @property
    def levels(self) -> tuple[int, ...]:
        """The numbers of the document's levels."""
        return tuple(range(1, self.num_levels + 1))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(num_kv_heads, head_dim) of every plane."""
        return [(plane.num_kv_heads, plane.head_dim) for plane in self.planes]

    @property
    def values_per_token(self) -> int:
        return sum(plane.num_channels for plane in self.planes)

    @property
    def num_covered_tokens(self) -> int:
        """Tokens of the chunks."""
        return sum(self.chunk_tokens)

    @property
    def is_whole_only(self) -> bool:
        """Whether the chunks are of use only all together.

        Layers lack tokens that those within attend to, or have states, which are known at the end alone.
        """
        return bool(self.first_stored) or self.has_states

    @property
    def stored_values_of_chunks(self) -> list[int]:
        """Numbers of keys and values that each chunk holds."""
        sizes = [plane.num_channels for plane in self.planes]
        channels = [keys + values for keys, values in zip(sizes[::2], sizes[1::2], strict=True)]
        found: list[int] = []
        first_token = 0
        for num_tokens in self.chunk_tokens:
            num_absent = self.num_absent(first_token, num_tokens) or (0,) * len(channels)
            found.append(sum(n * (num_tokens - absent) for n, absent in zip(channels, num_absent, strict=True)))
            first_token += num_tokens
        return found

    def num_absent(self, first_token: int, num_tokens: int) -> tuple[int, ...]:
        """Return, per layer, how many first tokens of a chunk are not stored; empty where none is in any layer."""
        found = tuple(min(max(first - first_token, 0), num_tokens) for first in self.first_stored)
        return found if any(found) else ()

    @cached_property
    def layers_by_first_stored(self) -> dict[int, list[int]]:
        """The layers that have the same first token, ascending by it."""
        first_stored = self.first_stored or (0,) * (len(self.planes) // 2)
        return {
            first: [layer for layer, other in enumerate(first_stored) if other == first]
            for first in sorted(set(first_stored))
        }

    @property
    def header_bytes(self) -> int:
        return self._header_bytes(len(self.planes), len(self.chunk_tokens), len(self.first_stored))

    @classmethod
    @abstractmethod
    def plane_record(cls) -> type[Record]:
        """Return what describes a plane in the file."""

    @abstractmethod
    def pack_planes(self) -> bytes: ...

    @classmethod
    @abstractmethod
    def unpack_planes(cls, records: Sequence[Any]) -> dict[str, Any]:
        """Return the fields of the header that its planes' records make."""

    @classmethod
    def _header_bytes(cls, num_planes: int, num_chunks: int, num_first_stored: int) -> int:
        planes_bytes = num_planes * cls.plane_record().num_bytes()
        return PREFIX.size + cls.num_bytes() + planes_bytes + 4 * num_chunks + 8 * num_first_stored + CRC.size

    def pack(self) -> bytes:
        """Serialize the header, its checksum included."""
        body = self.pack_record() + self.pack_planes() + struct.pack(f"<{self.num_chunks}I", *self.chunk_tokens)
        body += struct.pack(f"<{len(self.first_stored)}Q", *self.first_stored)
        file_bytes = self.header_bytes + self.tables_bytes + self.states_bytes
        return seal_header(TABLES_MAGIC, self.header_bytes, file_bytes, body, _native.crc32c)

    @classmethod
    def unpack(cls, content: Buffer) -> Self:
        """Parse and check the header of a whole tables file.

        Raises:
            BitstreamError: the bytes are not a whole, unchanged tables file's (the tables' own checksum aside).
            UnsupportedVersionError: the version, method, coder or dtype is not one this release reads.
        """
        header_bytes = open_header(content, TABLES_MAGIC, "tables", _native.crc32c)
        fields = cls.unpack_fields(content, PREFIX.size, header_bytes)
        num_planes, num_chunks = 2 * fields["num_layers"], fields["num_chunks"]
        num_first_stored = fields["num_layers"] if fields["stored_tokens"] is StoredTokens.SOME else 0
        expected_bytes = cls._header_bytes(num_planes, num_chunks, num_first_stored)
        require(header_bytes == expected_bytes, f"must be {expected_bytes}, got {header_bytes}", 12, "header_bytes")
        planes_at, record = PREFIX.size + cls.num_bytes(), cls.plane_record()
        records = [
            record.unpack_record(content, planes_at + index * record.num_bytes(), header_bytes)
            for index in range(num_planes)
        ]
        chunks_at = planes_at + num_planes * record.num_bytes()
        chunk_tokens = struct.unpack_from(f"<{num_chunks}I", content, chunks_at)
        _check_chunk_tokens(chunk_tokens, fields["num_cache_tokens"], chunks_at)
        first_at = chunks_at + 4 * num_chunks
        first_stored = struct.unpack_from(f"<{num_first_stored}Q", content, first_at)
        if num_first_stored:
            _check_first_stored(first_stored, sum(chunk_tokens), first_at, "first_stored")
        header = cls(**fields, **cls.unpack_planes(records), chunk_tokens=chunk_tokens, first_stored=first_stored)
        header.check_file()
        check_file_bytes(content, header.header_bytes + header.tables_bytes + header.states_bytes)
        header.check_states(content[header.header_bytes + header.tables_bytes :])
        return header

    def check_states(self, states: Buffer) -> None:
        """Refuse recurrent states that have changed, or that the chunks do not end with."""
        at = self.header_bytes + self.tables_bytes
        require(
            (_native.crc32c(states) if states else 0) == self.states_crc, "do not match their checksum", at, "states"
        )
        covers = not states or self.num_covered_tokens == self.num_cache_tokens
        require(covers, "the chunks end before the states", at, "states")

    def check_file(self) -> None:
        """Refuse fields that contradict each other; see `unpack`."""

    def check_tables(self, tables: bytes) -> None:
        """Refuse tables, which follow the header, that have changed."""


def _check_chunk_tokens(chunk_tokens: tuple[int, ...], num_cache_tokens: int, offset: int) -> None:
    """Refuse a plan of chunks that are empty, too long, or more than the cache."""
    require(min(chunk_tokens) > 0, "a chunk must have tokens", offset, "chunk_tokens")
    require(max(chunk_tokens) <= MAX_CHUNK_TOKENS, "a chunk has too many tokens", offset, "chunk_tokens")
    covers = sum(chunk_tokens) <= num_cache_tokens
    require(covers, "the chunks have more tokens than the cache", offset, "chunk_tokens")


def _which_tokens(numbers: Sequence[int]) -> StoredTokens:
    """Return what a header says that has, or has not, an array of first tokens."""
    return StoredTokens.SOME if numbers else StoredTokens.ALL


def _check_first_stored(numbers: Sequence[int], num_tokens: int, offset: int, field: str) -> None:
    """Refuse first tokens beyond the end, and an array that leaves out nothing: it must not be there."""
    require(max(numbers) <= num_tokens, f"a layer begins behind the {num_tokens} tokens", offset, field)
    require(any(numbers), "a layer must lack tokens", offset, field)


def check_channels(num_kv_heads: int, head_dim: int, offset: int) -> None:
    """Refuse a plane of no channels, or of too many."""
    num_channels = num_kv_heads * head_dim
    if not 0 < num_channels <= MAX_CHANNELS:
        raise BitstreamError(f"{num_channels} channels are not 1 to {MAX_CHANNELS}", offset=offset, field="shape")


@dataclass(frozen=True)
class PlaneShape(Record):
    """The shape of one layer's keys or values, per token: all that some methods say of them."""

    num_kv_heads: int = u16("num_kv_heads x head_dim, the number of channels, is 1 to 65536")
    head_dim: int = u16("")

    @property
    def num_channels(self) -> int:
        return self.num_kv_heads * self.head_dim

    @classmethod
    def unpack_record(cls, content: Buffer, at: int, end: int) -> Self:
        fields = cls.unpack_fields(content, at, end)
        check_channels(fields["num_kv_heads"], fields["head_dim"], at)
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class ShapesDocumentHeader(DocumentHeader):
    """The header of a method whose planes have nothing but their shapes; see `DocumentHeader`."""

    # A field of a frozen dataclass is as read-only as the property.
    planes: tuple[PlaneShape, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]

    @classmethod
    def plane_record(cls) -> type[PlaneShape]:
        return PlaneShape

    def pack_planes(self) -> bytes:
        return b"".join(plane.pack_record() for plane in self.planes)

    @classmethod
    def unpack_planes(cls, records: Sequence[PlaneShape]) -> dict[str, Any]:
        return {"planes": tuple(records)}


@dataclass(frozen=True, kw_only=True)
class ChunkHeader(Record):
    """What a chunk file says before its sections, whatever the method. Hashes are 32 raw bytes.

    Attributes:
        num_absent: per layer, or whatever the method codes together, how many of the chunk's first tokens are not
            stored; empty where that is 0 everywhere.
        stream_index: `StreamEntry` records, packed; `streams` unpacks them.
        header_crc: of the file that the header was read from; 0 before it is written.
    """

    first_token: int = u64("position in the context of the chunk's first token")
    num_tokens: int = u32("1 to 2^24", least=1, most=MAX_CHUNK_TOKENS)
    num_layers: int = u16("1 to 65535", least=1)
    method: int = u8("as in the tables file")
    coder: Coder = u8("as in the tables file", values=Coder)
    dtype: Dtype = u8("as in the tables file", values=Dtype)
    level: int = u8("1 to 4; a file of a level above 1 refines those of the levels before", least=1, most=MAX_LEVELS)
    stored_tokens: StoredTokens = u16(
        "0: the chunk holds all its tokens in every layer; 1: some layers lack its first "
        "[num_absent](#tokens-that-are-not-stored)",
        values=StoredTokens,
        is_derived=True,
    )
    refines: int = u32("header_crc of the chunk's file of the level before; zero at level 1")
    model_fingerprint: bytes = hash32("as in the tables file")
    token_hash: bytes = hash32("hash of the context's token ids from the first to the chunk's last, each as int32")
    rope_hash: bytes = hash32("as in the tables file")
    tables_hash: bytes = hash32("SHA-256 of the whole tables file")
    profile_hash: bytes = hash32("as in the tables file")
    num_absent: tuple[int, ...] = ()
    stream_index: bytes = b""
    header_crc: int = field(default=0, compare=False)

    first_offset: ClassVar[int] = PREFIX.size

    def __post_init__(self) -> None:
        object.__setattr__(self, "stored_tokens", _which_tokens(self.num_absent))

    @property
    def num_streams(self) -> int:
        return self.num_streams_of(vars(self), self.num_absent)

    @property
    @abstractmethod
    def payload_offset(self) -> int:
        """Where the streams begin."""

    @property
    def scales_bytes(self) -> int:
        """Length of what lies between header and streams, without its padding: scales, where a method has them."""
        return 0

    @property
    def trailer_bytes(self) -> int:
        """Length of what follows the streams, with its padding."""
        return 0

    @property
    def recorded_errors(self) -> tuple[float, float] | None:
        """The largest and the mean error of decoded values that the encoder measured; None where it records none."""
        return None

    def check_sections(self, before: memoryview, behind: memoryview) -> None:
        """Refuse sections before and behind the streams that have changed."""

    @abstractmethod
    def without_encoding(self) -> Self:
        """Return the header as it is before encoding has filled in what only encoding tells."""

    @cached_property
    def streams(self) -> list[StreamEntry]:
        return [StreamEntry(*fields) for fields in STREAM.iter_unpack(self.stream_index)]

    @cached_property
    def payload_bytes(self) -> int:
        return streams_bytes(self.stream_index)

    @property
    def file_bytes(self) -> int:
        return self.payload_offset + self.payload_bytes + self.trailer_bytes

    @property
    def header_bytes(self) -> int:
        arrays_bytes = self.arrays_bytes + 4 * len(self.num_absent)
        fields_bytes = PREFIX.size + self.num_bytes() + arrays_bytes + self.num_streams * STREAM.size
        return round_up(fields_bytes + CRC.size, ALIGNMENT)

    @property
    @abstractmethod
    def arrays_bytes(self) -> int:
        """Length of what `pack_arrays` returns."""

    @abstractmethod
    def pack_arrays(self) -> bytes:
        """Serialize the method's arrays, which follow the fields."""

    @classmethod
    @abstractmethod
    def unpack_arrays(
        cls, fields: dict[str, Any], content: Buffer, at: int, header_bytes: int
    ) -> tuple[dict[str, Any], int]:
        """Parse the method's arrays, and check that they lie within the header.

        Returns:
            The arrays, and where they end.
        """

    @classmethod
    @abstractmethod
    def num_streams_of(cls, fields: Mapping[str, Any], num_absent: Sequence[int]) -> int:
        """Return the number of streams that the header's fields and arrays announce.

        Args:
            num_absent: may be empty.
        """

    @classmethod
    def num_parts(cls, fields: Mapping[str, Any]) -> int:
        """Return of how many parts, each with tokens of its own, a chunk consists: the layers."""
        return fields["num_layers"]

    def pack_absent(self) -> bytes:
        """Serialize the numbers of absent tokens, if there are any."""
        return struct.pack(f"<{len(self.num_absent)}I", *self.num_absent)

    def pack(self) -> bytes:
        """Serialize the header, its checksum included."""
        body = self.pack_record() + self.pack_arrays() + self.pack_absent() + self.stream_index
        return seal_header(CHUNK_MAGIC, self.header_bytes, self.file_bytes, body, _native.crc32c)

    @classmethod
    def unpack(cls, content: Buffer) -> Self:
        """Parse and check the header of a whole chunk file.

        Raises:
            BitstreamError: the bytes are not a whole, unchanged chunk file's (the sections' own checksums aside).
            UnsupportedVersionError: the version, method, coder or dtype is not one this release reads.
        """
        header_bytes = open_header(content, CHUNK_MAGIC, "chunk", _native.crc32c)
        fields = cls.unpack_fields(content, PREFIX.size, header_bytes)
        is_first = fields["level"] == 1
        require(fields["refines"] == 0 or not is_first, "must be 0 at level 1", cls.offset_of("refines"), "refines")
        arrays_at = PREFIX.size + cls.num_bytes()
        arrays, absent_at = cls.unpack_arrays(fields, content, arrays_at, header_bytes)
        num_absent, index_at = cls._unpack_absent(fields, content, absent_at, header_bytes)
        num_streams = cls.num_streams_of({**fields, **arrays}, num_absent)
        index_end = index_at + num_streams * STREAM.size
        expected_bytes = round_up(index_end + CRC.size, ALIGNMENT)
        require(header_bytes == expected_bytes, f"must be {expected_bytes}, got {header_bytes}", 12, "header_bytes")
        require(not any(content[index_end : header_bytes - CRC.size]), "padding must be zero", index_end, "padding")
        header = cls(
            **fields,
            **arrays,
            num_absent=num_absent,
            stream_index=bytes(content[index_at:index_end]),
            header_crc=CRC.unpack_from(content, header_bytes - CRC.size)[0],
        )
        check_file_bytes(content, header.file_bytes)
        return header

    @classmethod
    def _unpack_absent(
        cls, fields: dict[str, Any], content: Buffer, at: int, header_bytes: int
    ) -> tuple[tuple[int, ...], int]:
        """Parse the numbers of absent tokens, if there are any; returns them and where they end."""
        if fields["stored_tokens"] is StoredTokens.ALL:
            return (), at
        record = struct.Struct(f"<{cls.num_parts(fields)}I")
        num_absent = unpack_record(record, content, at, header_bytes)
        _check_first_stored(num_absent, fields["num_tokens"], at, "num_absent")
        return num_absent, at + record.size
