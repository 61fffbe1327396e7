"""Types of the native CPU module; src/csrc/cpu/bindings.cpp says what the functions do."""

import enum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

class Status(enum.Enum):
    OK = ...
    TRUNCATED = ...
    CORRUPT = ...
    NO_FREQUENCY = ...
    NOT_FINITE = ...
    BAD_LOW_BITS = ...

class CpuPath(enum.Enum):
    PORTABLE = ...
    AVX2 = ...
    AVX512 = ...

class TableSet:
    @staticmethod
    def from_frequencies(frequencies: NDArray[np.uint16]) -> TableSet: ...
    @staticmethod
    def parse(
        bytes: NDArray[np.uint8],
        plane_bytes: list[int],
        plane_channels: list[int],
        alphabet_sizes: list[int],
        num_threads: int,
    ) -> TableSet: ...
    @property
    def num_tables(self) -> int: ...
    def frequencies(self) -> NDArray[np.uint16]: ...

class Plane:
    def __init__(
        self,
        *,
        values: int,
        token_stride: int,
        head_stride: int,
        num_heads: int,
        head_dim: int,
        scales: int,
        num_bins: int,
        low_bits: int,
        tokens_per_stream: int,
        tables: TableSet | None,
        first_table: int,
        num_tables: int,
        is_arithmetic: bool = False,
    ) -> None: ...

def best_path() -> CpuPath: ...
def supports(path: CpuPath) -> bool: ...
def measure(
    planes: list[Plane], dtype: int, num_tokens: int, num_threads: int, path: CpuPath
) -> tuple[NDArray[np.uint32], int, int]: ...
def encode(
    planes: list[Plane], dtype: int, num_tokens: int, num_threads: int, path: CpuPath
) -> tuple[NDArray[np.uint8], NDArray[np.uint32], int, int]: ...
def decode(
    planes: list[Plane],
    dtype: int,
    num_tokens: int,
    payload: NDArray[np.uint8],
    index: NDArray[np.uint32],
    num_threads: int,
    path: CpuPath,
) -> tuple[int, int]: ...
def checksum_streams(payload: NDArray[np.uint8], index: NDArray[np.uint32], num_threads: int) -> NDArray[np.uint32]: ...
def checksum_tokens(
    planes: list[tuple[int, int, int, int, int]], num_tokens: int, tokens_per_block: int, num_threads: int
) -> NDArray[np.uint32]: ...
def encode_symbols(
    symbols: NDArray[np.uint16],
    tables: TableSet | None,
    low_bits: int,
    table_indices: NDArray[np.uint16] | None = None,
    is_arithmetic: bool = False,
) -> tuple[bytes, int, int]: ...
def decode_symbols(
    bytes: NDArray[np.uint8],
    num_words: int,
    num_tokens: int,
    num_channels: int,
    tables: TableSet | None,
    low_bits: int,
    table_indices: NDArray[np.uint16] | None = None,
    is_arithmetic: bool = False,
) -> tuple[NDArray[np.uint16], int]: ...
def pack_tables(counts: NDArray[np.uint32], plane_channels: list[int], num_threads: int) -> list[bytes]: ...
def crc32c(content: bytes | bytearray | memoryview) -> int: ...
def encode_components(
    fine: NDArray[np.int32],
    coarse: NDArray[np.int32],
    tables: TableSet,
    table_indices: NDArray[np.uint16],
    low_bits: NDArray[np.uint8],
    num_refined: int,
    tokens_per_stream: int,
    num_threads: int,
    path: CpuPath,
) -> tuple[NDArray[np.uint8], NDArray[np.uint32], int, int]: ...
def decode_components(
    payload: NDArray[np.uint8],
    index: NDArray[np.uint32],
    groups: list[tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.uint8], int, int]],
    tables: TableSet,
    num_threads: int,
    path: CpuPath,
) -> tuple[int, int]: ...
def analysis() -> tuple[bool, bool]: ...
def gather_rows(
    planes: list[tuple[Any, ...]],
    dtype: int,
    num_tokens: int,
    means: NDArray[np.float32],
    is_bf16: bool,
    num_threads: int,
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]: ...
def multiply_bf16(
    rows: NDArray[np.uint16], matrix: NDArray[np.uint16], num_blocks: int, num_threads: int
) -> NDArray[np.float32]: ...
def measure_errors(
    planes: list[tuple[Any, ...]], dtype: int, decoded: NDArray[np.uint16], num_threads: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], float, float]: ...
def measure_synthesis(
    components: NDArray[np.int32],
    matrix: tuple[Any, ...],
    planes: list[tuple[Any, ...]],
    dtype: int,
    num_threads: int,
    path: CpuPath,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32], float, float]: ...
def pack_analysis(
    analysis: NDArray[np.float32],
    units: NDArray[np.float32],
    copies: NDArray[np.int32],
    num_fine: int,
    num_threads: int,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]: ...
def gather_bytes(
    planes: list[tuple[Any, ...]],
    dtype: int,
    num_tokens: int,
    means: NDArray[np.float32],
    inverses: NDArray[np.float32],
    copies: NDArray[np.int32],
    has_low: bool,
    num_threads: int,
    path: CpuPath,
) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]: ...
def multiply_bytes(
    rows: NDArray[np.uint8],
    excess: NDArray[np.int32],
    matrix: tuple[NDArray[Any], ...],
    num_channels: int,
    max_square: int,
    levels: list[tuple[float, NDArray[np.int32]]],
    num_threads: int,
    path: CpuPath,
) -> NDArray[np.uint8]: ...
def pack_synthesis(
    integers: NDArray[np.int16],
    row_factors: NDArray[np.float32],
    channel_factors: NDArray[np.float32],
    powers: NDArray[np.float32],
    means: NDArray[np.float32],
    variances: NDArray[np.float32],
    plane_channels: list[int],
    num_dense: int,
    step: float,
    max_share: float,
    num_threads: int,
) -> tuple[tuple[Any, ...], float]: ...
def synthesize(
    components: NDArray[np.int32],
    matrix: tuple[Any, ...],
    planes: list[tuple[Any, ...]],
    dtype: int,
    num_threads: int,
    path: CpuPath,
) -> NDArray[np.uint8]: ...

LosslessModel: TypeAlias = tuple[
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.uint8],
    NDArray[np.uint16],
    NDArray[np.uint32],
    NDArray[np.int32],
    bool,
]

def lossless_encode(
    values: NDArray[np.uint16], first_token: int, model: LosslessModel, num_threads: int
) -> list[bytes]: ...
def lossless_count(
    values: NDArray[np.uint16], first_token: int, model: LosslessModel, counts: NDArray[np.uint32]
) -> None: ...
def lossless_decode(
    payload: NDArray[np.uint8],
    index: NDArray[np.uint32],
    values: NDArray[np.uint16],
    first_token: int,
    model: LosslessModel,
    num_threads: int,
) -> tuple[int, int]: ...
