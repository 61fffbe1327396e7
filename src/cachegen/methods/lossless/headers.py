"""The headers of method `lossless`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachegen import _native
from cachegen.errors import BitstreamError
from cachegen.format import NO_HASH
from cachegen.format.constants import Coder, Dtype
from cachegen.format.framing import Buffer, require
from cachegen.format.headers import ChunkHeader, ShapesDocumentHeader
from cachegen.format.layout import u32

BLOCK_TOKENS = 256
"""Tokens of a stream."""


def _check_coding(coder: Coder, dtype: Dtype, coder_at: int, dtype_at: int) -> None:
    require(coder is Coder.RANS, "method lossless is coded with rans", coder_at, "coder", unsupported=True)
    is_half = dtype in (Dtype.FLOAT16, Dtype.BFLOAT16)
    require(is_half, "method lossless has dtypes of 16 bits", dtype_at, "dtype", unsupported=True)


@dataclass(frozen=True, kw_only=True)
class LosslessDocumentHeader(ShapesDocumentHeader):
    """See `DocumentHeader`."""

    model_bytes: int = u32(
        "length of the compressed [model](#the-model), which follows the header; 0 where a profile is named"
    )
    model_crc: int = u32("CRC of the compressed model")

    @property
    def tables_bytes(self) -> int:
        return self.model_bytes

    def check_tables(self, tables: bytes) -> None:
        if _native.crc32c(tables) != self.model_crc:
            problem, offset = "does not match, the model is corrupt", self.offset_of("model_crc")
            raise BitstreamError(problem, offset=offset, field="model_crc")

    def check_file(self) -> None:
        has_profile = self.profile_hash != NO_HASH
        problem = "must be 0 in a document that names a profile" if has_profile else "must not be 0 without a profile"
        is_empty = min(self.first_stored, default=0) == self.num_covered_tokens
        is_right = is_empty or (self.model_bytes == 0) == has_profile
        require(is_right, problem, self.offset_of("model_bytes"), "model_bytes")
        levels_at = self.offset_of("num_levels")
        require(self.num_levels == 1, "must be 1 with this method", levels_at, "num_levels")
        _check_coding(self.coder, self.dtype, self.offset_of("coder"), self.offset_of("dtype"))


@dataclass(frozen=True, kw_only=True)
class LosslessChunkHeader(ChunkHeader):
    """See `ChunkHeader`; for each block of tokens there is a stream per layer."""

    @property
    def recorded_errors(self) -> tuple[float, float]:
        return 0.0, 0.0

    @classmethod
    def num_streams_of(cls, fields: Mapping[str, Any], num_absent: Sequence[int]) -> int:
        num_tokens = fields["num_tokens"]
        if not num_absent:
            return fields["num_layers"] * -(-num_tokens // BLOCK_TOKENS)
        return sum(-(-(num_tokens - absent) // BLOCK_TOKENS) for absent in num_absent)

    @property
    def arrays_bytes(self) -> int:
        return 0

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
    ) -> tuple[dict[str, Any], int]:
        _check_coding(fields["coder"], fields["dtype"], cls.offset_of("coder"), cls.offset_of("dtype"))
        return {}, at
