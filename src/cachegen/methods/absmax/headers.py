"""The headers of methods `cachegen` and `uniform`."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from cachegen import _native
from cachegen.errors import BitstreamError
from cachegen.format.constants import (
    ALIGNMENT,
    EXPONENT_BITS,
    LANES,
    MAX_CHUNK_TOKENS,
    MAX_CODE_TOKENS,
    MAX_LOW_BITS,
    TABLE_SIZE,
    Coder,
    PlaneLayout,
    round_up,
)
from cachegen.format.framing import Buffer, require
from cachegen.format.headers import ChunkHeader, DocumentHeader, check_channels
from cachegen.format.layout import Record, reserved8, u8, u16, u32


@dataclass(frozen=True, kw_only=True)
class PlaneRecord(Record):
    """One layer's keys or values in a file."""

    num_kv_heads: int = u16("num_kv_heads x head_dim, the number of channels, is 1 to 65536")
    head_dim: int = u16("")
    num_bins: int = u16("even, 4 to 256; symbols are 0 to num_bins - 2", least=4, most=256)
    low_bits: int = u8(
        "0 to 8, and ((num_bins - 2) >> low_bits) + 1, the **alphabet size** of the high part, at most 32; with coder "
        "`packed` 1",
        most=MAX_LOW_BITS,
    )
    reserved: int = reserved8()
    last: int = u32(
        "chunk file: **tokens_per_stream**, a multiple of 32, 32 to 2^24, with coder `ac` at most 2^14; tables file: "
        "**table_bytes**, the length of the plane's frequency tables"
    )

    @classmethod
    def unpack_record(cls, content: Buffer, at: int, end: int) -> Self:
        record = super().unpack_record(content, at, end)
        check_channels(record.num_kv_heads, record.head_dim, at)
        require(record.num_bins % 2 == 0, "must be even, 4 to 256", at + 4, "num_bins")
        is_enough = (record.num_bins - 2) >> record.low_bits < TABLE_SIZE
        require(is_enough, "too few for this number of bins", at + 6, "low_bits")
        return record

    @classmethod
    def of(cls, plane: PlaneLayout, last: int) -> PlaneRecord:
        return cls(
            num_kv_heads=plane.num_kv_heads,
            head_dim=plane.head_dim,
            num_bins=plane.num_bins,
            low_bits=plane.low_bits,
            last=last,
        )

    def layout(self, tokens_per_stream: int = 0) -> PlaneLayout:
        return PlaneLayout(self.num_kv_heads, self.head_dim, self.num_bins, self.low_bits, tokens_per_stream)


@dataclass(frozen=True, kw_only=True)
class AbsmaxDocumentHeader(DocumentHeader):
    """See `DocumentHeader`.

    Attributes:
        plane_table_bytes: per plane, the length of its tables; 0 for coder `packed`.
    """

    tables_crc: int = u32("CRC of the tables")
    # A field of a frozen dataclass is as read-only as the property.
    planes: tuple[PlaneLayout, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]
    plane_table_bytes: tuple[int, ...] = ()

    @property
    def tables_bytes(self) -> int:
        return sum(self.plane_table_bytes)

    @classmethod
    def plane_record(cls) -> type[PlaneRecord]:
        return PlaneRecord

    def pack_planes(self) -> bytes:
        pairs = zip(self.planes, self.plane_table_bytes, strict=True)
        return b"".join(PlaneRecord.of(plane, table_bytes).pack_record() for plane, table_bytes in pairs)

    @classmethod
    def unpack_planes(cls, records: Sequence[PlaneRecord]) -> dict[str, Any]:
        return {
            "planes": tuple(record.layout() for record in records),
            "plane_table_bytes": tuple(record.last for record in records),
        }

    def check_tables(self, tables: bytes) -> None:
        if _native.crc32c(tables) != self.tables_crc:
            problem, offset = "does not match, the tables are corrupt", self.offset_of("tables_crc")
            raise BitstreamError(problem, offset=offset, field="tables_crc")

    def check_file(self) -> None:
        levels_at = self.offset_of("num_levels")
        require(self.num_levels == 1, "must be 1 with this method", levels_at, "num_levels")
        has_tables, coder_at = self.tables_bytes > 0, self.offset_of("coder")
        require(has_tables or self.coder is Coder.PACKED, "only coder packed has no tables", coder_at, "coder")
        require(not has_tables or self.coder is not Coder.PACKED, "coder packed has no tables", coder_at, "coder")


@dataclass(frozen=True, kw_only=True)
class AbsmaxChunkHeader(ChunkHeader):
    """See `ChunkHeader`.

    Attributes:
        planes: keys then values of layer 0, of layer 1, ...
    """

    scales_crc: int = u32("CRC of the scales section with its padding")
    planes: tuple[PlaneLayout, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "num_layers", len(self.planes) // 2)

    @classmethod
    def num_streams_of(cls, fields: Mapping[str, Any], num_absent: Sequence[int]) -> int:
        planes, num_tokens = fields["planes"], fields["num_tokens"]
        if not num_absent:
            return count_streams(planes, num_tokens)
        return sum(
            -(-(num_tokens - num_absent[index // 2]) // plane.tokens_per_stream) for index, plane in enumerate(planes)
        )

    @property
    def arrays_bytes(self) -> int:
        return len(self.planes) * PlaneRecord.num_bytes()

    @property
    def scales_bytes(self) -> int:
        """Length of the scales section without its padding."""
        num_scales = len(self.planes) * self.num_tokens - 2 * sum(self.num_absent)
        return num_scales * self.dtype.num_bytes

    @property
    def payload_offset(self) -> int:
        return self.header_bytes + round_up(self.scales_bytes, ALIGNMENT)

    def check_sections(self, before: memoryview, behind: memoryview) -> None:
        if _native.crc32c(before) != self.scales_crc:
            problem, offset = "does not match, the scales are corrupt", self.offset_of("scales_crc")
            raise BitstreamError(problem, offset=offset, field="scales_crc")
        # By their exponents; torch would start its threads for so little.
        bits = np.frombuffer(before[: self.scales_bytes], f"<u{self.dtype.num_bytes}")
        exponent = EXPONENT_BITS[self.dtype]
        if ((bits & exponent) == exponent).any():
            raise BitstreamError("a scale is NaN or infinity", offset=self.header_bytes, field="scales")

    def without_encoding(self) -> AbsmaxChunkHeader:
        return dataclasses.replace(self, scales_crc=0, stream_index=b"")

    def pack_arrays(self) -> bytes:
        records = {plane: PlaneRecord.of(plane, plane.tokens_per_stream).pack_record() for plane in set(self.planes)}
        return b"".join(records[plane] for plane in self.planes)

    @classmethod
    def unpack_arrays(
        cls, fields: dict[str, Any], content: Buffer, at: int, header_bytes: int
    ) -> tuple[dict[str, Any], int]:
        planes: list[PlaneLayout] = []
        # Most planes of a model are alike, and their records, too.
        parsed: dict[bytes, PlaneLayout] = {}
        for plane_at in itertools.islice(itertools.count(at, PlaneRecord.num_bytes()), 2 * fields["num_layers"]):
            record_end = plane_at + PlaneRecord.num_bytes()
            record_bytes = bytes(content[plane_at:record_end])
            if record_bytes in parsed and record_end <= header_bytes:
                planes.append(parsed[record_bytes])
                continue
            record = PlaneRecord.unpack_record(content, plane_at, header_bytes)
            tokens = record.last
            in_range = 0 < tokens <= MAX_CHUNK_TOKENS and tokens % LANES == 0
            require(in_range, f"must be a multiple of {LANES}, got {tokens}", plane_at + 8, "tokens_per_stream")
            if fields["coder"] is Coder.PACKED:
                is_raw = record.layout().alphabet_size == 1
                require(is_raw, "coder packed has no tables for a high part", plane_at + 6, "low_bits")
            if fields["coder"] is Coder.AC:
                is_short = tokens <= MAX_CODE_TOKENS
                message = f"must be at most {MAX_CODE_TOKENS} with coder ac"
                require(is_short, message, plane_at + 8, "tokens_per_stream")
            parsed[record_bytes] = record.layout(tokens)
            planes.append(parsed[record_bytes])
        return {"planes": tuple(planes)}, at + len(planes) * PlaneRecord.num_bytes()


def count_streams(planes: Sequence[PlaneLayout], num_tokens: int) -> int:
    """Count the streams of a chunk that has all its tokens: per plane, its tokens in runs of `tokens_per_stream`."""
    alike = Counter(plane.tokens_per_stream for plane in planes)
    return sum(-(-num_tokens // tokens_per_stream) * count for tokens_per_stream, count in alike.items())
