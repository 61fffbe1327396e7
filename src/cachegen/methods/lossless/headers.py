"""The headers of method `lossless`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from cachegen import _native
from cachegen.errors import BitstreamError
from cachegen.format.constants import Coder, Dtype
from cachegen.format.framing import Buffer, require
from cachegen.format.headers import ChunkHeader, DocumentHeader, check_channels
from cachegen.format.layout import Record, u16, u32

BLOCK_TOKENS = 256
"""Tokens of a stream."""


@dataclass(frozen=True)
class PlaneShape(Record):
    """The shape of one layer's keys or values, per token."""

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


def _check_coding(coder: Coder, dtype: Dtype, coder_at: int, dtype_at: int) -> None:
    require(coder is Coder.RANS, "method lossless is coded with rans", coder_at, "coder", unsupported=True)
    is_half = dtype in (Dtype.FLOAT16, Dtype.BFLOAT16)
    require(is_half, "method lossless has dtypes of 16 bits", dtype_at, "dtype", unsupported=True)


@dataclass(frozen=True, kw_only=True)
class LosslessDocumentHeader(DocumentHeader):
    """See `DocumentHeader`."""

    model_bytes: int = u32("length of the compressed [model](#the-model), which follows the header")
    model_crc: int = u32("CRC of the compressed model")
    # A field of a frozen dataclass is as read-only as the property.
    planes: tuple[PlaneShape, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def tables_bytes(self) -> int:
        return self.model_bytes

    @classmethod
    def plane_record(cls) -> type[PlaneShape]:
        return PlaneShape

    def pack_planes(self) -> bytes:
        return b"".join(plane.pack_record() for plane in self.planes)

    @classmethod
    def unpack_planes(cls, records: Sequence[PlaneShape]) -> dict[str, Any]:
        return {"planes": tuple(records)}

    def check_tables(self, tables: bytes) -> None:
        if _native.crc32c(tables) != self.model_crc:
            problem, offset = "does not match, the model is corrupt", self.offset_of("model_crc")
            raise BitstreamError(problem, offset=offset, field="model_crc")

    def check_file(self) -> None:
        levels_at = self.offset_of("num_levels")
        require(self.num_levels == 1, "must be 1 with this method", levels_at, "num_levels")
        _check_coding(self.coder, self.dtype, self.offset_of("coder"), self.offset_of("dtype"))


@dataclass(frozen=True, kw_only=True)
class LosslessChunkHeader(ChunkHeader):
    """See `ChunkHeader`; for each block of tokens there is a stream per layer."""

    @property
    def recorded_errors(self) -> tuple[float, float]:
        return 0.0, 0.0

    @property
    def num_streams(self) -> int:
        return self.num_layers * -(-self.num_tokens // BLOCK_TOKENS)

    @property
    def header_bytes(self) -> int:
        return self.padded_bytes(0, self.num_streams)

    @property
    def payload_offset(self) -> int:
        return self.header_bytes

    def without_encoding(self) -> LosslessChunkHeader:
        return dataclasses.replace(self, stream_index=b"")

    def pack_arrays(self) -> bytes:
        return b""

    @classmethod
    def unpack_arrays(
        cls, fields: dict[str, Any], content: Buffer, at: int, header_bytes: int
    ) -> tuple[dict[str, Any], int, int]:
        _check_coding(fields["coder"], fields["dtype"], cls.offset_of("coder"), cls.offset_of("dtype"))
        return {}, fields["num_layers"] * -(-fields["num_tokens"] // BLOCK_TOKENS), at
