"""Numbers and names that files are made of; standard library only."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

CHUNK_MAGIC = b"\x89KVC\r\n\x1a\n"
TABLES_MAGIC = b"\x89KVT\r\n\x1a\n"
NO_HASH = bytes(32)

TABLE_SIZE = 32  # symbols of a frequency table
LANES = 32  # tokens of a row
ALIGNMENT = 16  # of sections and streams, in bytes
MAX_LOW_BITS = 8
MAX_CHANNELS = 1 << 16
MAX_LAYERS = MAX_HEADS = (1 << 16) - 1  # and dims of a head: fields have 16 bits
MAX_CHUNK_TOKENS = 1 << 24
MAX_CHUNKS = 1 << 20
MAX_STATES_BYTES = 128 << 20
MAX_LEVELS = 4
MAX_CODE_TOKENS = 1 << 14  # of a stream of coder `ac`: a code's length in bytes must fit in 16 bits

STREAM = struct.Struct("<III")


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


class StoredTokens(IntEnum):
    """Which tokens of its layers a file has."""

    ALL = 0
    SOME = 1


EXPONENT_BITS = {Dtype.FLOAT16: 0x7C00, Dtype.BFLOAT16: 0x7F80, Dtype.FLOAT32: 0x7F800000}
"""All set in infinities and NaNs, and in no other number."""


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """One layer's keys or values: its shape, its quantizer and how its streams are cut.

    Attributes:
        num_bins: bins of the quantizer; symbols run from 0 to num_bins - 2.
        low_bits: bits of a symbol that are stored raw, below the table-coded high part.
        tokens_per_stream: a multiple of 32; 0 where there are no streams.
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


def check_num_bins(num_bins: int) -> None:
    """Refuse a number of bins that no quantizer of ours has.

    Raises:
        ValueError: it is odd or not within 4 to 256.
    """
    if not 4 <= num_bins <= 256 or num_bins % 2:
        raise ValueError(f"`num_bins` must be an even number from 4 to 256, got {num_bins}")


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def streams_bytes(stream_index: bytes) -> int:
    """Return the length of the streams of an index of `StreamEntry` records, each with its padding."""
    return sum(round_up(num_bytes, ALIGNMENT) for num_bytes, _, _ in STREAM.iter_unpack(stream_index))
