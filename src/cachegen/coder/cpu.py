"""The coder's native CPU kernels: checks first, then addresses and sizes to `cachegen._native`.

The kernels quantize and code in one pass over the cache's own memory, on several threads. Bytes do not depend on the
number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.errors import BackendUnavailableError, BitstreamError, NotFiniteError
from cachegen.format import (
    LANES,
    MAX_CODE_TOKENS,
    MAX_LOW_BITS,
    TABLE_SIZE,
    Coder,
    Dtype,
    PlaneLayout,
    StreamEntry,
    check_num_bins,
)
from cachegen.kv_cache import KVCache

try:
    from cachegen import _native
except ImportError as error:
    raise BackendUnavailableError(
        f"the native CPU module cachegen._native cannot be imported ({error}); build it with `pip install .`, "
        "or in a clone with `python setup.py build_ext --inplace`"
    ) from error

DTYPES = {torch.float16: Dtype.FLOAT16, torch.bfloat16: Dtype.BFLOAT16, torch.float32: Dtype.FLOAT32}
TORCH_DTYPES = {number: dtype for dtype, number in DTYPES.items()}
Tables: TypeAlias = _native.TableSet

# Of the kernels: all give the same bytes and values, so only tests and benchmarks name one.
_PATHS = {path.name.lower(): path for path in _native.CpuPath}

_PROBLEMS = {
    _native.Status.TRUNCATED: "the stream is not whole",
    _native.Status.CORRUPT: "the lanes, or the codes, do not end as the encoder leaves them",
    _native.Status.BAD_LOW_BITS: "a symbol has too many low bits",
}


def default_num_threads() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0))


def supported_paths() -> tuple[str, ...]:
    """Return the names of the kernels that this processor runs: "portable", "avx2", "avx512"."""
    return tuple(name for name, path in _PATHS.items() if _native.supports(path))


def load_tables(
    content: bytes, planes: Sequence[PlaneLayout], plane_table_bytes: Sequence[int], num_threads: int = 1
) -> Tables:
    """Read the tables section of a tables file.

    Args:
        content: the section, plane after plane.
        plane_table_bytes: the length of each plane's tables.

    Raises:
        BitstreamError: the bytes are not such tables.
    """
    try:
        return Tables.parse(
            np.frombuffer(content, np.uint8),
            list(plane_table_bytes),
            [plane.num_channels for plane in planes],
            [plane.alphabet_size for plane in planes],
            num_threads,
        )
    except ValueError as error:
        raise BitstreamError(f"the tables are corrupt ({error})", field="tables") from error


def pack_tables(counts: NDArray[np.uint32], planes: Sequence[PlaneLayout], num_threads: int = 1) -> list[bytes]:
    """Make the tables of all planes from symbol counts, in their compact form.

    Args:
        counts: uint32 `[num_tables, 32]`, as `measure` gives them.

    Returns:
        Per plane, the bytes of `symbol_model.pack_tables`.

    Raises:
        ValueError: a channel has no symbols.
    """
    channels = [plane.num_channels for plane in planes]
    return _native.pack_tables(np.ascontiguousarray(counts, np.uint32), channels, num_threads)


def measure(
    cache: KVCache, planes: Sequence[PlaneLayout], num_threads: int = 1, path: str | None = None
) -> tuple[torch.Tensor, NDArray[np.uint32]]:
    """Find the scales of all tokens and count the high parts of all symbols.

    Args:
        cache: on the CPU.
        path: as for `decode`.

    Returns:
        Scales `[num_planes, num_tokens]` in the cache's dtype, and counts uint32 `[num_tables, 32]`, one row per
        channel of each plane.

    Raises:
        InputError: the cache holds NaN or infinity.
    """
    scales = torch.empty(len(planes), cache.num_tokens, dtype=cache.dtype)
    native_planes = _native_planes(cache, scales, planes, None)
    counts, plane, token = _native.measure(
        native_planes, DTYPES[cache.dtype], cache.num_tokens, num_threads, native_path(path)
    )
    if plane >= 0:
        raise NotFiniteError(plane, token)
    return scales, counts.reshape(-1, 32)


def encode(
    cache: KVCache,
    scales: torch.Tensor,
    planes: Sequence[PlaneLayout],
    tables: Tables | None,
    num_threads: int = 1,
    *,
    coder: Coder | None = None,
    path: str | None = None,
) -> tuple[memoryview, list[StreamEntry]]:
    """Quantize and encode the tokens of a chunk.

    Args:
        cache: the chunk's tokens, on the CPU.
        scales: `[num_planes, num_tokens]`, what `measure` found for these tokens.
        tables: None for coder `packed`.
        coder: None: `rans` with tables, `packed` without.
        path: as for `decode`.

    Returns:
        The payload (streams, each padded to a multiple of 16 bytes) and its index.

    Raises:
        ValueError: the tables do not cover the symbols, or the scales are not the cache's.
    """
    native_planes = _native_planes(cache, scales, planes, tables, coder)
    payload, index, failed, status = _native.encode(
        native_planes, DTYPES[cache.dtype], cache.num_tokens, num_threads, native_path(path)
    )
    if failed >= 0:
        raise encode_error(failed, status)
    return payload.data, [StreamEntry(*row) for row in index.tolist()]


def decode(
    payload: bytes | memoryview,
    streams: Sequence[StreamEntry],
    scales: torch.Tensor,
    planes: Sequence[PlaneLayout],
    tables: Tables | None,
    output: KVCache,
    num_threads: int = 1,
    *,
    coder: Coder | None = None,
    path: str | None = None,
) -> None:
    """Decode and dequantize the tokens of a chunk.

    Args:
        payload: the streams, each padded to a multiple of 16 bytes; checksums are the container's business.
        scales: `[num_planes, num_tokens]`.
        tables: None for coder `packed`.
        output: where the tokens go, on the CPU, any strides with contiguous head dims.
        coder: None: `rans` with tables, `packed` without.
        path: one of `supported_paths()`; None: the fastest of them.

    Raises:
        BackendUnavailableError: this processor does not run `path`.
        BitstreamError: a stream is corrupt; `output` then holds no usable values.
    """
    native_planes = _native_planes(output, scales, planes, tables, coder)
    failed, status = _native.decode(
        native_planes,
        DTYPES[output.dtype],
        output.num_tokens,
        np.frombuffer(payload, np.uint8),
        _index_array(streams),
        num_threads,
        native_path(path),
    )
    if failed >= 0:
        raise decode_error(failed, status)


def checksum_streams(
    payload: bytes | memoryview, streams: Sequence[StreamEntry] | NDArray[np.uint32], num_threads: int = 1
) -> NDArray[np.uint32]:
    """Return the CRC-32C of every stream with its padding."""
    return _native.checksum_streams(np.frombuffer(payload, np.uint8), _index_array(streams), num_threads)


def crc32c(content: bytes | bytearray | memoryview) -> int:
    """Return the CRC-32C of bytes."""
    return _native.crc32c(content)


def encode_error(stream: int, status: int) -> ValueError:
    """Say why a stream could not be encoded, from the status that a kernel gave."""
    return ValueError(f"stream {stream} cannot be encoded: {_native.Status(status).name}")


def decode_error(stream: int, status: int) -> BitstreamError:
    """Say why a stream could not be decoded, from the status that a kernel gave."""
    return BitstreamError(_PROBLEMS[_native.Status(status)], field=f"stream {stream}")


def native_path(path: str | None) -> _native.CpuPath:
    """Return the kernels that a path names; None names the fastest that there are here.

    Raises:
        BackendUnavailableError: this processor does not run them.
        ValueError: there are none of that name.
    """
    if path is None:
        return _native.best_path()
    if path not in _PATHS:
        raise ValueError(f"`path` must be one of {', '.join(_PATHS)}, got {path!r}")
    if path not in supported_paths():
        raise BackendUnavailableError(
            f"this processor does not run the kernels for {path}; it runs {', '.join(supported_paths())}"
        )
    return _PATHS[path]


def _index_array(streams: Sequence[StreamEntry] | NDArray[np.uint32]) -> NDArray[np.uint32]:
    return np.array(streams, dtype=np.uint32).reshape(len(streams), 3)


def check_arithmetic_planes(planes: Sequence[PlaneLayout]) -> None:
    """Refuse streams that coder `ac` does not code.

    Raises:
        ValueError: a plane has too long streams.
    """
    if any(plane.tokens_per_stream > MAX_CODE_TOKENS for plane in planes):
        raise ValueError(f"coder ac takes at most {MAX_CODE_TOKENS} tokens per stream")


def _native_planes(
    cache: KVCache,
    scales: torch.Tensor,
    planes: Sequence[PlaneLayout],
    tables: Tables | None,
    coder: Coder | None = None,
) -> list[_native.Plane]:
    """Describe tensors to the kernels, after every check that keeps them inside their memory."""
    if coder is not None and (coder is Coder.PACKED) != (tables is None):
        raise ValueError(f"`tables` must go with the coder, got {'none' if tables is None else 'some'} with {coder!r}")
    tensors, num_tokens = cache.planes, cache.num_tokens
    if len(planes) != len(tensors):
        raise ValueError(f"`planes` must describe {len(tensors)} planes, got {len(planes)}")
    if list(scales.shape) != [len(planes), num_tokens] or scales.dtype != cache.dtype:
        raise ValueError(f"`scales` must be {cache.dtype} [{len(planes)}, {num_tokens}], got {scales.shape}")
    if not scales.is_contiguous() or scales.device.type != "cpu":
        raise ValueError("`scales` must be contiguous and on the CPU")
    num_tables = sum(plane.num_channels for plane in planes)
    if tables is not None and tables.num_tables != num_tables:
        raise ValueError(f"`tables` must hold {num_tables} tables, got {tables.num_tables}")
    if coder is Coder.AC:
        check_arithmetic_planes(planes)
    for plane in dict.fromkeys(planes):
        check_num_bins(plane.num_bins)
        if not 0 <= plane.low_bits <= MAX_LOW_BITS or plane.alphabet_size > TABLE_SIZE:
            index = planes.index(plane)
            raise ValueError(f"`low_bits` of plane {index} must fit {plane.num_bins} bins, got {plane.low_bits}")
        if plane.tokens_per_stream < 0 or plane.tokens_per_stream % LANES:
            raise ValueError(f"`tokens_per_stream` must be a multiple of {LANES}, got {plane.tokens_per_stream}")
    native_planes, first_table = [], 0
    first_scale, scales_stride = scales.data_ptr(), num_tokens * scales.itemsize
    for index, (values, plane) in enumerate(zip(tensors, planes, strict=True)):
        shape = (num_tokens, plane.num_kv_heads, plane.head_dim)
        token_stride, head_stride, dim_stride = values.stride()
        if values.shape != shape or values.device.type != "cpu" or dim_stride != 1:
            raise ValueError(f"plane {index} must be a CPU tensor {list(shape)} with contiguous head dims")
        native_planes.append(
            _native.Plane(
                values=values.data_ptr(),
                token_stride=token_stride,
                head_stride=head_stride,
                num_heads=plane.num_kv_heads,
                head_dim=plane.head_dim,
                scales=first_scale + index * scales_stride,
                num_bins=plane.num_bins,
                low_bits=plane.low_bits,
                # The measuring pass has no streams; any valid length does.
                tokens_per_stream=plane.tokens_per_stream or 32,
                tables=tables,
                first_table=first_table,
                num_tables=plane.num_channels,
                is_arithmetic=coder is Coder.AC,
            )
        )
        first_table += plane.num_channels
    return native_planes
