"""What a level loses of a chunk's values, measured as they will decode, and which of them must travel exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.kv_cache import KVCache
from cachegen.methods.base import ErrorMeasure
from cachegen.methods.transform.analysis import CAN_GATHER, measure_errors
from cachegen.methods.transform.exact_values import ExactValues, gather_exact_values
from cachegen.methods.transform.integers import Measured, are_native_planes
from cachegen.methods.transform.transform import usual_size

EXPECTED_ERRORS = 32.0
"""A value travels exactly where the transform misses it by more than so many times the error to expect of its channel,
the dtype's own rounding aside. Real caches stay below 21."""
_ROUNDING = 2.0**-18  # of sums in fp32, over the largest magnitude of a token
_MARGIN = 2.0**-8


class LossMeter:
    """Compares what a level decodes to with the cache, and lists the values that must travel exactly."""

    def __init__(self) -> None:
        self._largest, self._total, self._count = 0.0, 0.0, 0
        self._tokens: list[NDArray[np.int64]] = []
        self._channels: list[NDArray[np.int64]] = []

    def add(
        self,
        planes: Sequence[torch.Tensor],
        decoded: torch.Tensor,
        expected: torch.Tensor,
        first_token: int,
        first_channel: int,
        num_threads: int = 1,
    ) -> None:
        """Compare a block.

        Args:
            planes: of a group of layers.
            decoded: what they decode to, `[num_tokens, num_channels]` of their dtype.
            expected: the error to expect, `[num_channels]`.
            first_token, first_channel: of the block, in the chunk.
        """
        info = torch.finfo(decoded.dtype)
        limit = _limit_of(decoded.dtype)
        if CAN_GATHER and are_native_planes(planes):
            measured = measure_errors(planes, decoded, num_threads)
            if self.add_measured(measured, decoded.dtype, expected, len(decoded)):
                return
        values = torch.cat([plane.to(decoded.device, torch.float32).flatten(1) for plane in planes], 1)
        errors = (values - decoded.float()).abs_()
        bound = EXPECTED_ERRORS * torch.maximum(expected, usual_size(errors))
        least, greatest = torch.aminmax(decoded)
        # Not `>`: an error that is no number is out of bounds. Mostly none is, and no value need be looked at alone.
        if not bool((errors.amax(0) <= bound).all() and -limit <= least and greatest <= limit):
            magnitudes = values.abs()
            rounding = info.eps * magnitudes + _ROUNDING * magnitudes.amax(dim=1, keepdim=True)
            is_exact = ~((errors <= bound + rounding) & (decoded.abs() <= limit))
            errors.masked_fill_(is_exact, 0.0)
            self._add_places(is_exact, first_token, first_channel)
        self._largest = max(self._largest, float(errors.max()))
        self._total += float(errors.sum(dtype=torch.float64))
        self._count += errors.numel()

    def add_measured(self, measured: Measured, dtype: torch.dtype, expected: torch.Tensor, num_tokens: int) -> bool:
        """Add what was measured of a block, unless a value is out of bounds, which must be looked for; tell which.

        Args:
            dtype: of the decoded values.
            expected: the error to expect, `[num_channels]`.
        """
        sizes, limit = measured.errors, _limit_of(dtype)
        if not -limit <= measured.least <= measured.greatest <= limit:
            return False
        if not sizes.are_within(EXPECTED_ERRORS, expected.numpy(), num_tokens):
            return False
        self._largest = max(self._largest, float(sizes.largest.max()))
        self._total += float(sizes.sums.sum(dtype=np.float64))
        self._count += num_tokens * len(sizes.sums)
        return True

    def _add_places(self, is_exact: torch.Tensor, first_token: int, first_channel: int) -> None:
        """List the values of a block that must travel exactly."""
        tokens, channels = is_exact.nonzero(as_tuple=True)
        if len(tokens):
            self._tokens.append(tokens.cpu().numpy() + first_token)
            self._channels.append(channels.cpu().numpy() + first_channel)

    def gather(self, cache: KVCache) -> ExactValues:
        """Return the values that travel exactly, from the chunk's cache."""
        if not self._tokens:
            return gather_exact_values(cache, np.empty(0, np.int64), np.empty(0, np.int64))
        return gather_exact_values(cache, np.concatenate(self._tokens), np.concatenate(self._channels))

    def measure(self) -> ErrorMeasure:
        return ErrorMeasure(_round_up(self._largest), float(np.float32(self._total / max(self._count, 1))))


def _limit_of(dtype: torch.dtype) -> float:
    """Return what a decoded value may be at most.

    Another device may round away from zero where ours did not, so that what comes near the largest number of the dtype
    must not be left to it.
    """
    return torch.finfo(dtype).max * (1 - _MARGIN)


def _round_up(value: float) -> float:
    """Return the smallest fp32 number that is at least `value`."""
    rounded = np.float32(value)
    return float(rounded if rounded >= value else np.nextafter(rounded, np.float32(np.inf)))
