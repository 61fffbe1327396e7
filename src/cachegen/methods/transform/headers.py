"""The headers of method `transform`.

A document's tables file holds no tables: they follow from scale indices. What the profile says (shapes, components,
scales) is not repeated, but for the shapes, which tell a reader what memory to take.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachegen import _native
from cachegen.errors import BitstreamError
from cachegen.format.constants import ALIGNMENT, LANES, MAX_CHUNK_TOKENS, Coder, round_up
from cachegen.format.framing import Buffer, require, unpack_record
from cachegen.format.headers import ChunkHeader, ShapesDocumentHeader
from cachegen.format.layout import f32, i32, reserved16, u16, u32, u64

MAX_STEP_LOG = 1 << 10  # steps, and all that components of 2^24 of them stand for, stay within fp32


def _require_rans(coder: Coder, offset: int) -> None:
    require(coder is Coder.RANS, "method transform is coded with rans", offset, "coder", unsupported=True)


@dataclass(frozen=True, kw_only=True)
class TransformDocumentHeader(ShapesDocumentHeader):
    """See `DocumentHeader`.

    Attributes:
        step_log: 16 log2 of level 1's quantization step.
    """

    step_log: int = i32("16 log2 of level 1's step, -1024 to 1024", least=-MAX_STEP_LOG, most=MAX_STEP_LOG)

    @property
    def tables_bytes(self) -> int:
        return 0

    def check_file(self) -> None:
        _require_rans(self.coder, self.offset_of("coder"))


@dataclass(frozen=True, kw_only=True)
class TransformChunkHeader(ChunkHeader):
    """See `ChunkHeader`.

    Attributes:
        step_log: 16 log2 of level 1's quantization step.
        tokens_per_stream: of each group of layers, multiples of 32.
        max_error: largest difference of a value decoded at this level from the cache's, as the encoder measured it.
        mean_error: mean difference over all values of the chunk.
        exact_bytes: length of the section of exact values without its padding.
        exact_crc: CRC-32C of that section with its padding.
    """

    step_log: int = i32(
        "as in the tables file: of level 1, whatever the file's own level", least=-MAX_STEP_LOG, most=MAX_STEP_LOG
    )
    num_groups: int = u16("groups of layers, 1 to num_layers", is_derived=True)
    reserved_too: int = reserved16()
    max_error: float = f32(
        "the largest difference between a value decoded at this level and the cache's; the writer measured it",
        default=0.0,
    )
    mean_error: float = f32("the mean of the differences of all values, at most max_error", default=0.0)
    exact_bytes: int = u64(
        "length of the [exact values](#exact-values) without their padding; 0 where there are none", default=0
    )
    exact_crc: int = u32("CRC of the exact values with their padding", default=0)
    tokens_per_stream: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "num_groups", len(self.tokens_per_stream))

    @property
    def recorded_errors(self) -> tuple[float, float]:
        return self.max_error, self.mean_error

    @property
    def tokens_of_groups(self) -> list[int]:
        """The number of tokens of each group that the file holds."""
        num_absent = self.num_absent or (0,) * self.num_groups
        return [self.num_tokens - absent for absent in num_absent]

    @property
    def streams_of_groups(self) -> list[int]:
        """The number of streams of each group."""
        groups = zip(self.tokens_of_groups, self.tokens_per_stream, strict=True)
        return [-(-num_tokens // tokens) for num_tokens, tokens in groups]

    @classmethod
    def num_streams_of(cls, fields: Mapping[str, Any], num_absent: Sequence[int]) -> int:
        tokens_per_stream, num_tokens = fields["tokens_per_stream"], fields["num_tokens"]
        pairs = zip(num_absent or (0,) * len(tokens_per_stream), tokens_per_stream, strict=True)
        return sum(-(-(num_tokens - absent) // tokens) for absent, tokens in pairs)

    @classmethod
    def num_parts(cls, fields: Mapping[str, Any]) -> int:
        """Return of how many parts, each with tokens of its own, a chunk consists: the groups of layers."""
        return fields["num_groups"]

    @property
    def arrays_bytes(self) -> int:
        return 4 * len(self.tokens_per_stream)

    @property
    def payload_offset(self) -> int:
        return self.header_bytes

    @property
    def trailer_bytes(self) -> int:
        return round_up(self.exact_bytes, ALIGNMENT)

    def check_sections(self, before: memoryview, behind: memoryview) -> None:
        if _native.crc32c(behind) != self.exact_crc:
            problem, offset = "does not match, the exact values are corrupt", self.offset_of("exact_crc")
            raise BitstreamError(problem, offset=offset, field="exact_crc")

    def without_encoding(self) -> TransformChunkHeader:
        return dataclasses.replace(
            self, stream_index=b"", refines=0, max_error=0.0, mean_error=0.0, exact_bytes=0, exact_crc=0
        )

    def pack_arrays(self) -> bytes:
        return struct.pack(f"<{len(self.tokens_per_stream)}I", *self.tokens_per_stream)

    @classmethod
    def unpack_arrays(
        cls, fields: dict[str, Any], content: Buffer, at: int, header_bytes: int
    ) -> tuple[dict[str, Any], int]:
        _require_rans(fields["coder"], cls.offset_of("coder"))
        is_mean = fields["mean_error"] <= fields["max_error"]
        require(is_mean, "must be at most max_error", cls.offset_of("mean_error"), "mean_error")
        num_groups, groups_at = fields["num_groups"], cls.offset_of("num_groups")
        in_range = 0 < num_groups <= fields["num_layers"]
        require(in_range, f"must be 1 to the layers, got {num_groups}", groups_at, "num_groups")
        tokens_per_stream = unpack_record(struct.Struct(f"<{num_groups}I"), content, at, header_bytes)
        for group, tokens in enumerate(tokens_per_stream):
            in_range = 0 < tokens <= MAX_CHUNK_TOKENS and tokens % LANES == 0
            message = f"must be a multiple of {LANES}, got {tokens}"
            require(in_range, message, at + 4 * group, "tokens_per_stream")
        return {"tokens_per_stream": tokens_per_stream}, at + 4 * num_groups
