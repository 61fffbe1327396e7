"""The forward transform in integers: values of a cache and the analysis matrix as bytes, which native kernels multiply.

Each channel's values are integers of seven bits in a unit of their own, and what is beyond these is kept apart; each
component's entries are bytes. A real model's channels and components are not alike: channels with large entries are
there several times, each with a part of them, and the first components, which vary most, have a second digit. Sums are
exact, so that AVX2, AVX-512 and any number of threads find the same components. What rounding adds to the error of
quantizing is bounded when the matrix is made, and for each token when it is used; `src/csrc/cpu/byte_analysis.h` says
what the kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.coder.cpu import DTYPES, native_path
from cachegen.methods.rotary import Angles
from cachegen.methods.transform.integers import ChannelSizes, describe_planes
from cachegen.rotation import Rotation

MAX_SHARE = 0.005
"""Of the error of quantizing, in the mean over components: that rounding values may add, and rounding the matrix."""
MAX_TOKEN_SHARE = 0.02
"""The same of the matrix for one token, which may be larger than is to be expected."""
LARGEST_UNIT, SMALLEST_UNIT = 1 / 8, 1 / 24
"""Of a channel, in standard deviations: seven bits reach as far as 8 of them, or 2.7."""
_FLOOR = 1e-3
"""A channel's deviation over the mean one, at least: next to nothing hangs on channels that hardly move."""
_FINE_CHOICES = (0, 64, 128)
"""How many of the first components may have a second digit."""
_COPIED_CHANNELS = 1 / 8
"""Of all channels, as many copies as there may be."""
_DIGIT = 128  # a unit of the second digit is a 128th
_BLOCK_COMPONENTS, _QUAD = 64, 4
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
        parts: as the kernels take them: entries and low entries, what the sums are worth in steps of the first level,
            and what the bytes' bias adds to the sums and to the low sums.
        inverses: fp32 `[num_channels]`, of the channels' units.
        copies: int32, the channels that are there once more; -1 fills up.
        max_square: that the squares of a token's integers may sum to.
    """

    parts: tuple[NDArray[Any], ...]
    inverses: NDArray[np.float32]
    copies: NDArray[np.int32]
    max_square: int

    @property
    def num_fine(self) -> int:
        """Components with a second digit."""
        return len(self.parts[4])


@dataclass(frozen=True)
class ByteRows:
    """Values as bytes.

    Attributes:
        rows: uint8 `[num_tokens, any]`: of all channels, of copied ones, and of second digits.
        excess: int32 `[any, 3]`: token, place in the row, and what seven bits lack of its integer.
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
    spread = (analysis * deviations[:, None]).square().sum(0)
    for num_fine in _FINE_CHOICES:
        mean_spread = (spread[num_fine:].sum() + spread[:num_fine].sum() / _DIGIT**2).item() / num_components
        unit = min(LARGEST_UNIT, steps[-1] * math.sqrt(MAX_SHARE / mean_spread)) if mean_spread > 0 else LARGEST_UNIT
        if unit < SMALLEST_UNIT:
            continue
        num_fine = min(num_fine, -(-num_components // _BLOCK_COMPONENTS) * _BLOCK_COMPONENTS)
        for has_copies in (False, True):
            made = _round(analysis, deviations * unit, steps, num_fine, has_copies, num_threads)
            # What is to be expected of a token.
            if made.max_square * MAX_SHARE >= num_channels / unit**2 * MAX_TOKEN_SHARE:
                return made
    return None


def _round(
    analysis: torch.Tensor,
    units: torch.Tensor,
    steps: Sequence[float],
    num_fine: int,
    has_copies: bool,
    num_threads: int,
) -> ByteAnalysis:
    num_components = analysis.shape[1]
    scaled = (analysis * units[:, None]).abs()
    copies = _choose_copies(scaled[:, num_fine:]) if has_copies else np.empty(0, np.int32)
    entries, low_entries, worth, corrections, low_corrections = _native.pack_analysis(
        analysis.T.contiguous().numpy(), units.contiguous().numpy(), copies, num_fine, num_threads
    )
    errors = worth[:num_components].astype(np.float64)
    errors[:num_fine] /= _DIGIT
    error = float(np.square(errors).mean())
    max_square = MAX_TOKEN_SHARE * steps[-1] ** 2 / error if error > 0 else math.inf
    scales = (worth / np.float32(steps[0])).astype(np.float32)
    parts = (entries, low_entries, scales, corrections, low_corrections)
    return ByteAnalysis(parts, (1 / units).numpy(), copies, int(min(max_square, 2**62)))


def _choose_copies(entries: torch.Tensor) -> NDArray[np.int32]:
    """Return the channels that are to be there once more, so that the largest entries are halved, thirded, ...

    Args:
        entries: magnitudes `[num_channels, num_components]`.
    """
    num_channels, num_components = entries.shape
    if num_components == 0:
        return np.empty(0, np.int32)
    sizes = (entries / entries.square().mean(0).sqrt().clamp(min=1e-30)).amax(1)
    budget = int(num_channels * _COPIED_CHANNELS) // _QUAD * _QUAD
    low, high = 0.0, float(sizes.max())  # of a bound on sizes
    for _ in range(40):
        bound = (low + high) / 2
        if bound <= 0 or int((sizes / bound).ceil().sub(1).clamp(min=0).sum()) > budget:
            low = bound
        else:
            high = bound
    counts = (sizes / high).ceil().sub(1).clamp(min=0).long() if high > 0 else torch.zeros(num_channels).long()
    copies = torch.arange(num_channels).repeat_interleave(counts).to(torch.int32)
    filled = torch.full((-(-len(copies) // _QUAD) * _QUAD,), -1, dtype=torch.int32)
    filled[: len(copies)] = copies
    return filled.numpy()


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
        matrix.copies,
        matrix.num_fine > 0,
        num_threads,
        native_path(path),
    )
    return ByteRows(rows, excess, ChannelSizes(largest, sums))


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
        matrix.parts,
        len(matrix.inverses),
        matrix.max_square,
        [(float(ratio**level), components.numpy()) for level, components in enumerate(levels)],
        num_threads,
        native_path(path),
    )
    return levels, misfits.astype(np.bool_)
