"""The forward transform's passes over a cache by native kernels: its values as rows, their products, what is missed.

Which components an encoder finds is its own choice, within what quantizing loses; so its products may be in bf16 where
the processor has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.coder.cpu import DTYPES
from cachegen.methods.rotary import Angles
from cachegen.methods.transform.integers import ChannelSizes, Measured, describe_planes
from cachegen.rotation import Rotation

CAN_GATHER, CAN_MULTIPLY_BF16 = _native.analysis()
"""Whether this processor has `gather_rows` and `measure_errors`, and whether `RoundedAnalysis.multiply`."""

_BLOCK_COMPONENTS = 64
_ROUNDING = 2.0**-17 / 3
"""Mean square of the relative error of a product of which both sides are rounded to bf16."""
_MAX_SHARE = 0.01
"""Of the error of quantizing, that these may add to a component."""


def gather_rows(
    planes: Sequence[torch.Tensor],
    rotations: Sequence[Rotation | None],
    angles: Sequence[Angles | None],
    mean: torch.Tensor,
    *,
    is_bf16: bool,
    num_threads: int,
) -> tuple[NDArray[Any], ChannelSizes]:
    """Return the values of planes, their rotations undone, less their means, and the sizes of these differences.

    Args:
        planes: as `integers.are_native_planes` wants them.
        angles: cosines and sines over the attention scaling.
        mean: fp32 `[num_channels]`.

    Returns:
        Rows fp32 `[num_tokens, num_channels]`, or bf16's bits with a zero behind an odd number of channels.
    """
    rows, largest, sums = _native.gather_rows(
        describe_planes(planes, rotations, angles),
        int(DTYPES[planes[0].dtype]),
        len(planes[0]),
        mean.numpy(),
        is_bf16,
        num_threads,
    )
    return rows, ChannelSizes(largest, sums)


def measure_errors(planes: Sequence[torch.Tensor], decoded: torch.Tensor, num_threads: int) -> Measured:
    """Compare planes with what they decode to.

    Args:
        planes: as `integers.are_native_planes` wants them.
        decoded: `[num_tokens, num_channels]` of the same dtype, contiguous.
    """
    nothing = [None] * len(planes)
    bits = decoded.view(torch.int16).numpy().view(np.uint16)
    described = describe_planes(planes, nothing, nothing)
    largest, sums, least, most = _native.measure_errors(described, int(DTYPES[decoded.dtype]), bits, num_threads)
    return Measured(ChannelSizes(largest, sums), least, most)


class RoundedAnalysis:
    """An analysis matrix in bf16, as the kernels want it."""

    def __init__(self, analysis: torch.Tensor) -> None:
        """Round and order a matrix, fp32 `[num_channels, num_components]`."""
        num_channels, num_components = analysis.shape
        num_pairs, num_blocks = -(-num_channels // 2), -(-num_components // _BLOCK_COMPONENTS)
        filled = torch.zeros(num_blocks * _BLOCK_COMPONENTS, 2 * num_pairs, dtype=torch.bfloat16)
        filled[:num_components, :num_channels] = analysis.T
        blocks = filled.view(num_blocks, _BLOCK_COMPONENTS, num_pairs, 2).permute(0, 2, 1, 3).contiguous()
        self._matrix = blocks.view(torch.int16).numpy().view(np.uint16)
        self._num_channels = num_channels

    def multiply(
        self, rows: NDArray[np.uint16], num_components: int, step: float, num_threads: int
    ) -> torch.Tensor | None:
        """Return the first components of rows, fp32 `[num_tokens, num_components]`, summed in fp32.

        Returns:
            None where rounding would be noticed beside quantizing with this step: a large vector's error spreads over
            all of its components.
        """
        num_blocks = -(-num_components // _BLOCK_COMPONENTS)
        found = torch.as_tensor(_native.multiply_bf16(rows, self._matrix, num_blocks, num_threads))[:, :num_components]
        largest = math.sqrt(float(found.square().sum(1).amax())) if found.numel() else 0.0
        limit = step * math.sqrt(_MAX_SHARE / 12 / _ROUNDING * self._num_channels)
        return found if largest <= limit else None
