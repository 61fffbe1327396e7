"""The forward transform in integers: values of a cache and the analysis matrix as bytes, which native kernels multiply.

Each channel's values are integers of seven bits in a unit of their own, and what is beyond these is kept apart; each
component's entries are bytes. Sums are exact, so that AVX2, AVX-512 and any number of threads find the same components.
What rounding adds to the error of quantizing is bounded when the matrix is made, and for each token when it is used;
`src/csrc/cpu/byte_analysis.h` says what the kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.coder.cpu import DTYPES, native_path
from cachegen.methods.rotary import Angles
from cachegen.methods.transform.integers import ChannelSizes, align, describe_planes
from cachegen.rotation import Rotation

MAX_SHARE = 0.0025
"""Of the error of quantizing, in the mean over components: that rounding values may add, and rounding the matrix for a
token."""
LARGEST_UNIT, SMALLEST_UNIT = 1 / 8, 1 / 24
"""Of a channel, in standard deviations: seven bits reach as far as 8 of them, or 2.7."""
_FLOOR = 1e-3
"""A channel's deviation over the mean one, at least: next to nothing hangs on channels that hardly move."""
_SPARE = 4.0
"""Times the squares to expect of a token, that the bound on rounding the matrix must leave room for."""
_MAX_EXCESS = 1 / 64
"""Of all values, that may be beyond seven bits: adding one takes as long as multiplying some ten."""


@cache
def has_byte_analysis(path: str | None = None) -> bool:
    """Tell whether this processor's kernels have the forward transform in bytes: all paths but the portable one."""
    return native_path(path) != _native.CpuPath.PORTABLE


@dataclass(frozen=True)
class ByteAnalysis:
    """The analysis matrix of a group of layers for components of some steps.

    Attributes:
        entries: uint8 that are int8, as the kernels take them.
        scales: fp32, of the sums, in steps of the first level.
        corrections: int32, what the bytes' bias adds to the sums.
        inverses: fp32 `[num_channels]`, of the channels' units.
        max_square: that the squares of a token's integers may sum to.
    """

    entries: NDArray[np.uint8]
    scales: NDArray[np.float32]
    corrections: NDArray[np.int32]
    inverses: NDArray[np.float32]
    max_square: int


@dataclass(frozen=True)
class ByteRows:
    """Values as bytes.

    Attributes:
        rows: uint8 `[num_tokens, num_channels rounded up to 4]`.
        excess: int32 `[any, 3]`: token, channel, and what seven bits lack of its integer.
        sizes: of the differences from the mean.
    """

    rows: NDArray[np.uint8]
    excess: NDArray[np.int32]
    sizes: ChannelSizes

    @property
    def has_few_excesses(self) -> bool:
        return len(self.excess) <= _MAX_EXCESS * self.rows.size


def make_byte_analysis(
    analysis: torch.Tensor, deviations: torch.Tensor, steps: Sequence[float], num_threads: int = 1
) -> ByteAnalysis | None:
    """Round an analysis matrix to bytes.

    Args:
        analysis: fp32 `[num_channels, num_components]` on the CPU, of the components that are coded.
        deviations: of the channels, fp32 `[num_channels]`.
        steps: of the levels, decreasing.

    Returns:
        None where rounding would be noticed beside the finest step.
    """
    num_channels, num_components = analysis.shape
    mean = deviations.mean().item()
    if num_components == 0 or not 0.0 < mean < math.inf:
        return None
    deviations = deviations.clamp(min=_FLOOR * mean)
    # A value's error is that of a uniform quantizer, as a component's is.
    spread = ((analysis * deviations[:, None]).square().sum(0).mean()).item()
    unit = min(LARGEST_UNIT, steps[-1] * math.sqrt(MAX_SHARE / spread)) if spread > 0 else LARGEST_UNIT
    if unit < SMALLEST_UNIT:
        return None
    units = deviations * unit
    entries, worth, corrections = _native.pack_analysis(
        analysis.T.contiguous().numpy(), units.contiguous().numpy(), num_threads
    )
    error = float(np.square(worth[:num_components].astype(np.float64)).mean())
    max_square = MAX_SHARE * steps[-1] ** 2 / error if error > 0 else math.inf
    if max_square < _SPARE * num_channels / unit**2:
        return None
    scales = (worth / np.float32(steps[0])).astype(np.float32)
    return ByteAnalysis(align(entries), scales, corrections, (1 / units).numpy(), int(min(max_square, 2**62)))


def gather_bytes(
    matrix: ByteAnalysis,
    planes: Sequence[torch.Tensor],
    rotations: Sequence[Rotation | None],
    angles: Sequence[Angles | None],
    mean: torch.Tensor,
    num_threads: int,
    path: str | None = None,
) -> ByteRows:
    """Return the values of planes, their rotations undone, less their means, as bytes.

    Args:
        planes: as `integers.are_native_planes` wants them.
        angles: cosines and sines over the attention scaling.
        mean: fp32 `[num_channels]`.
        path: as for `cpu.decode`.
    """
    rows, excess, largest, sums = _native.gather_bytes(
        describe_planes(planes, rotations, angles),
        int(DTYPES[planes[0].dtype]),
        len(planes[0]),
        mean.numpy(),
        matrix.inverses,
        num_threads,
        native_path(path),
    )
    return ByteRows(rows, excess, ChannelSizes(torch.as_tensor(largest), torch.as_tensor(sums)))


def multiply_bytes(
    matrix: ByteAnalysis,
    values: ByteRows,
    num_coded: Sequence[int],
    ratio: int,
    num_threads: int,
    path: str | None = None,
) -> tuple[list[torch.Tensor], NDArray[np.bool_]]:
    """Return the quantized components of all levels, as `transform.quantize_components` does, and who does not fit.

    Args:
        num_coded: components of each level, not decreasing.
        ratio: of a level's step and the next one's.
        path: as for `cpu.decode`.

    Returns:
        Per level int32 `[num_tokens, num_coded of the level]`, and bool `[num_tokens]`: the tokens whose components are
        not right.
    """
    levels = [torch.empty(len(values.rows), count, dtype=torch.int32) for count in num_coded]
    misfits = _native.multiply_bytes(
        values.rows,
        values.excess,
        matrix.entries,
        matrix.scales,
        matrix.corrections,
        matrix.max_square,
        [(float(ratio**level), components.numpy()) for level, components in enumerate(levels)],
        num_threads,
        native_path(path),
    )
    return levels, misfits.astype(np.bool_)
