"""The inverse transform in integers: the synthesis matrix as bytes, which the native kernels multiply and add.

Quantized components are integers, and most are zero. Where the matrix is integers, too, the rows of those that are not
zero can be added several to an instruction, in sums that are exact: every processor gives the same values. What
rounding the matrix costs is bounded when it is made; `src/csrc/cpu/synthesis.h` says what the kernels do.
"""

from __future__ import annotations

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
from cachegen.methods.transform.integer_rows import IntegerRows
from cachegen.rotation import Rotation

DENSE_DEVIATION = 0.7
"""Components whose deviation is at least so many steps are dense: adding rows for each unit of theirs takes longer."""
MAX_INTEGER_SHARE = 0.0025
"""Of the error of quantizing, that rounding the matrix to bytes may add, in the mean over channels."""
HALF_BYTES = 2
LEAST_TOKENS = 64
"""Of a block whose own values tell what is usual in a channel."""
_SECTION_COMPONENTS = 511
_SECTION_UNITS = 256
"""That so many sparse components may be expected to have; the kernels take twice as many, half of either sign."""
_QUAD = 4  # dense components come by fours


@dataclass(frozen=True)
class IntegerMatrix:
    """The synthesis matrix of a group of layers for components of one step.

    Attributes:
        parts: as the kernels take them: numbers of components, of dense and of fine ones; their rows; what the sums
            are worth, and the means.
        share: of the error of quantizing, what rounding the matrix adds.
    """

    parts: tuple[Any, ...]
    share: float

    @property
    def num_components(self) -> int:
        return self.parts[0]

    @property
    def num_dense(self) -> int:
        return self.parts[1]

    @property
    def num_fine(self) -> int:
        return self.parts[2]


@cache
def has_integer_synthesis(path: str | None = None) -> bool:
    """Tell whether this processor's kernels have the inverse transform in integers: all paths but the portable one."""
    return native_path(path) != _native.CpuPath.PORTABLE


def make_integer_matrix(
    synthesis: IntegerRows,
    mean: torch.Tensor,
    deviations: torch.Tensor,
    variances: torch.Tensor,
    plane_channels: Sequence[int],
    step: float,
    num_threads: int = 1,
) -> IntegerMatrix | None:
    """Round a synthesis matrix to bytes, with a scale for each channel.

    Args:
        synthesis: `[num_components, num_channels]`, of the components that are coded.
        mean: fp32 `[num_channels]`.
        deviations: of these components, fp32, not increasing.
        variances: of the channels, fp32, by all components.
        plane_channels: channels of each plane.
        step: the quantization step.

    Returns:
        None where rounding would add more than `MAX_INTEGER_SHARE`.
    """
    num_dense = _choose_dense(deviations / step)
    parts, share = _native.pack_synthesis(
        synthesis.integers.numpy(),
        synthesis.row_factors.numpy(),
        synthesis.channel_factors.numpy(),
        deviations.square().numpy(),
        mean.contiguous().numpy(),
        variances.contiguous().numpy(),
        list(plane_channels),
        -(-num_dense // _QUAD) * _QUAD,
        step,
        MAX_INTEGER_SHARE,
        num_threads,
    )
    if share > MAX_INTEGER_SHARE:
        return None
    return IntegerMatrix(parts, share)


def _choose_dense(deviations: torch.Tensor) -> int:
    """Return how many of the first components are dense.

    Args:
        deviations: of the coded components, in steps, not increasing.
    """
    num_dense = int((deviations >= DENSE_DEVIATION).sum())
    # The mean size of a normal variable is .8 deviations. The first sections have the most units.
    units = torch.cat([torch.zeros(1), (0.8 * deviations).cumsum(0)])
    last = (torch.arange(len(units)) + _SECTION_COMPONENTS).clamp(max=len(deviations))
    fits = units[last] - units <= _SECTION_UNITS
    return max(num_dense, int(fits.to(torch.int8).argmax()))


def synthesize(
    matrix: IntegerMatrix,
    components: torch.Tensor,
    planes: Sequence[torch.Tensor],
    rotations: Sequence[Rotation | None],
    angles: Sequence[Angles | None],
    num_threads: int,
    path: str | None = None,
) -> NDArray[np.bool_]:
    """Write the keys and values that quantized components stand for.

    Args:
        components: int32 `[num_tokens, at least num_components]`, C-contiguous.
        planes: of the group, `[num_tokens, num_heads, head_dim]` of 16 bits per value; heads are contiguous.
        rotations, angles: of each plane.
        path: as for `cpu.decode`.

    Returns:
        Bool `[num_tokens]`: the tokens whose components are beyond the kernels; their values are not right.
    """
    misfits = _native.synthesize(
        np.asarray(components),
        matrix.parts,
        describe_planes(planes, rotations, angles),
        int(DTYPES[planes[0].dtype]),
        num_threads,
        native_path(path),
    )
    return misfits.astype(np.bool_)


@dataclass(frozen=True)
class ChannelSizes:
    """How large differences are in each channel of a block: fp32 `[num_channels]`.

    What is not a number or infinite shows in the sums.
    """

    largest: NDArray[np.float32]
    sums: NDArray[np.float32]

    def are_within(self, times: float, usual: NDArray[np.float32], num_tokens: int) -> bool:
        """Tell whether no difference is more than so many times what is usual in its channel.

        Args:
            usual: fp32 `[num_channels]`; where the block is long enough to tell, its own mean if that is larger.
            num_tokens: of the block.
        """
        if not np.isfinite(self.sums).all():
            return False
        limit = np.maximum(usual, self.sums / np.float32(num_tokens)) if num_tokens >= LEAST_TOKENS else usual
        return bool((self.largest <= np.float32(times) * limit).all())


@dataclass(frozen=True)
class Measured:
    """How far a block's values are from what they decode to.

    Attributes:
        errors: their sizes.
        least, greatest: decoded value, or 0.
    """

    errors: ChannelSizes
    least: float
    greatest: float


def measure_synthesis(
    matrix: IntegerMatrix,
    components: torch.Tensor,
    planes: Sequence[torch.Tensor],
    rotations: Sequence[Rotation | None],
    angles: Sequence[Angles | None],
    num_threads: int,
    path: str | None = None,
) -> Measured | None:
    """Compare planes with what quantized components stand for; arguments as for `synthesize`.

    Returns:
        None where a token's components are beyond the kernels.
    """
    misfits, largest, sums, least, greatest = _native.measure_synthesis(
        np.asarray(components),
        matrix.parts,
        describe_planes(planes, rotations, angles),
        int(DTYPES[planes[0].dtype]),
        num_threads,
        native_path(path),
    )
    if misfits.any():
        return None
    return Measured(ChannelSizes(largest, sums), least, greatest)


def describe_planes(
    planes: Sequence[torch.Tensor], rotations: Sequence[Rotation | None], angles: Sequence[Angles | None]
) -> list[tuple[Any, ...]]:
    """Return planes as the native kernels take them.

    Args:
        planes: as `synthesize` takes them; they must outlive what is returned.
        angles: of each plane; None: it is taken as it is.
    """
    nothing = np.empty((len(planes[0]), 0), np.float32)
    described: list[tuple[Any, ...]] = []
    for plane, rotation, turned in zip(planes, rotations, angles, strict=True):
        address = (plane.data_ptr(), plane.stride(0), plane.stride(1), plane.shape[1], plane.shape[2])
        if rotation is None or turned is None:
            described.append((*address, nothing, nothing, 0, False))
            continue
        cosines, sines = (part[:, 0].contiguous().numpy() for part in turned)
        described.append((*address, cosines, sines, rotation.offset, rotation.pairing == "interleaved"))
    return described


def are_native_planes(planes: Sequence[torch.Tensor]) -> bool:
    """Tell whether native kernels can read and write these planes: 16 bits per value, heads contiguous, not empty."""
    return all(
        plane.device.type == "cpu" and plane.element_size() == HALF_BYTES and plane.stride(2) == 1 and plane.numel() > 0
        for plane in planes
    )
