"""Values that travel beside the transform because it cannot represent them, bit for bit: their list as bytes.

A cache can hold values far beyond what calibration saw: massive activations, or the largest float there is. A profile's
components do not reach them, so a chunk file has a list of such values, by token and channel. Channels are counted over
all planes in file order. docs/format.md, "Exact values", has the bytes:

    u32 number of runs | runs: u32 token, u32 channel, u32 number of values | values in the cache's dtype
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.errors import BitstreamError
from cachegen.format import EXPONENT_BITS, Dtype
from cachegen.format.framing import Buffer
from cachegen.kv_cache import KVCache

_COUNT = struct.Struct("<I")
_RUN_BYTES = 12
_BITS: dict[int, Any] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_TORCH_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class ExactValues:
    """Values of a chunk by their places, in ascending order of token, then channel.

    Attributes:
        tokens: int64 `[num_values]`, from the chunk's first.
        channels: int64 `[num_values]`, counted over all planes in file order.
        bits: uint16 or uint32 `[num_values]`: the values' bits in the cache's dtype.
    """

    tokens: NDArray[np.int64]
    channels: NDArray[np.int64]
    bits: NDArray[Any]

    def __len__(self) -> int:
        return len(self.tokens)


def gather_exact_values(cache: KVCache, tokens: NDArray[np.int64], channels: NDArray[np.int64]) -> ExactValues:
    """Read values of a chunk at some places, in any order, no place twice.

    Args:
        tokens, channels: as in `ExactValues`.
    """
    order = np.lexsort((channels, tokens))
    tokens, channels = tokens[order], channels[order]
    itemsize = cache.dtype.itemsize
    bits = np.empty(len(tokens), dtype=_BITS[itemsize])
    for number, places, columns in _by_plane([plane[0].numel() for plane in cache.planes], channels):
        plane = cache.planes[number]
        heads, dims = np.divmod(columns, plane.shape[2])
        chosen = plane[tuple(torch.as_tensor(index).to(plane.device) for index in (tokens[places], heads, dims))]
        bits[places] = chosen.view(_TORCH_BITS[itemsize]).cpu().numpy().view(_BITS[itemsize])
    return ExactValues(tokens, channels, bits)


def place_exact_values(values: ExactValues, output: KVCache) -> None:
    """Write values to their places in a chunk's cache, on any device."""
    itemsize = output.dtype.itemsize
    for number, places, columns in _by_plane([plane[0].numel() for plane in output.planes], values.channels):
        plane = output.planes[number]
        heads, dims = np.divmod(columns, plane.shape[2])
        index = tuple(torch.as_tensor(part).to(plane.device) for part in (values.tokens[places], heads, dims))
        bits = np.ascontiguousarray(values.bits[places]).view(f"<i{itemsize}")
        plane[index] = torch.as_tensor(bits).view(plane.dtype).to(plane.device)


def pack_exact_values(values: ExactValues) -> bytes:
    """Serialize values: the section of a chunk file without its padding, empty where there are none."""
    if len(values) == 0:
        return b""
    tokens, channels = values.tokens, values.channels
    is_first = np.ones(len(values), dtype=bool)
    is_first[1:] = (np.diff(tokens) != 0) | (np.diff(channels) != 1)
    firsts = np.flatnonzero(is_first)
    lengths = np.diff(np.append(firsts, len(values)))
    runs = np.stack([tokens[firsts], channels[firsts], lengths], axis=1).astype("<u4")
    return _COUNT.pack(len(runs)) + runs.tobytes() + values.bits.tobytes()


def unpack_exact_values(section: Buffer, dtype: Dtype, num_tokens: int, num_channels: int) -> ExactValues:
    """Parse and check a section; takes memory for at most a few times its length.

    Args:
        section: without its padding.
        num_tokens: of the chunk.
        num_channels: of all planes.

    Raises:
        BitstreamError: it is not a list of finite values at ascending places of the chunk.
    """
    content = bytes(section)
    field = "exact values"
    if not content:
        return ExactValues(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, _BITS[dtype.num_bytes]))
    num_runs = _COUNT.unpack_from(content)[0] if len(content) >= _COUNT.size else 0
    values_at = _COUNT.size + num_runs * _RUN_BYTES
    if num_runs == 0 or len(content) < values_at:
        raise BitstreamError(f"{num_runs} runs do not fit in {len(content)} bytes", field=field)
    runs = np.frombuffer(content, "<u4", 3 * num_runs, _COUNT.size).reshape(num_runs, 3).astype(np.int64)
    tokens, firsts, lengths = runs.T
    num_values = int(lengths.sum())
    if len(content) != values_at + num_values * dtype.num_bytes or lengths.min() < 1:
        raise BitstreamError(f"{num_values} values are not what {len(content)} bytes hold", field=field)
    if tokens.max() >= num_tokens or (firsts + lengths).max() > num_channels:
        raise BitstreamError("a value lies outside the chunk", field=field)
    starts = tokens * num_channels + firsts
    if (starts[1:] < (starts + lengths)[:-1]).any():
        raise BitstreamError("the places do not ascend", field=field)
    bits: NDArray[Any] = np.frombuffer(content, _BITS[dtype.num_bytes], num_values, values_at)
    exponent = EXPONENT_BITS[dtype]
    if ((bits & exponent) == exponent).any():
        raise BitstreamError("a value is NaN or infinity", field=field)
    within_run = np.arange(num_values) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return ExactValues(np.repeat(tokens, lengths), np.repeat(firsts, lengths) + within_run, bits)


def check_stored(values: ExactValues, shapes: Sequence[tuple[int, int]], num_absent: Sequence[int]) -> None:
    """Refuse values of tokens that their layers do not hold.

    Args:
        shapes: (num_kv_heads, head_dim) of each plane.
        num_absent: per layer, first tokens of the chunk; may be empty.

    Raises:
        BitstreamError: there is one.
    """
    if not len(values) or not num_absent:
        return
    for number, places, _ in _by_plane([heads * dims for heads, dims in shapes], values.channels):
        if values.tokens[places].min() < num_absent[number // 2]:
            raise BitstreamError("a value is of a token that is not stored", field="exact values")


def _by_plane(
    widths: Sequence[int], channels: NDArray[np.int64]
) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Return, for each plane that has some of the channels, its number, their places, and the plane's own channels."""
    ends = np.array(list(itertools.accumulate(widths)))
    planes = np.searchsorted(ends, channels, side="right")
    found: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []
    for number in map(int, np.unique(planes)):
        places = np.flatnonzero(planes == number)
        found.append((number, places, channels[places] - (ends[number] - widths[number])))
    return found
