"""Grouped asymmetric integers, as caches are quantized in memory: a scale and a zero point per 64 or 32 values.

In the manner of KIVI, keys are grouped along tokens (a scale per channel and group of tokens) and values along
channels; with the setting "per token" both are grouped along channels, as transformers' QuantizedCache does by default.
Scales and zero points are fp16. The last 128 tokens and those that fill no group stay as they are, and are counted.
`grouped` packs the integers; `grouped-profile` codes them with tables per (layer, channel) from calibration caches.
`kivi` and `kivi-profile` have KIVI's groups of 32 in place of 64.

Source: Liu et al., "KIVI", ICML 2024 (groups of 32, residual 128); transformers' QuantizedCache (group 64, residual
128).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.comparison.schemes.base import (
    ByteCount,
    Recoded,
    SavedCache,
    SymbolCoder,
    channels_first,
    pack_bits,
    to_plane,
    unpack_bits,
)
from cachegen.errors import ConfigError
from cachegen.kv_cache import from_planes

RESIDUAL_TOKENS = 128


class GroupedScheme:
    """See the module."""

    name = "grouped"
    settings: tuple[str, ...] = ("2-bit", "3-bit", "4-bit", "2-bit per token", "4-bit per token")
    group_size = 64

    def __init__(self) -> None:
        self._coders: dict[str, list[SymbolCoder]] = {}

    @property
    def identity(self) -> str:
        return f"{self.name} {self.group_size} {RESIDUAL_TOKENS}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        for setting in self.settings:
            self._coders[setting] = []
            for index in range(2 * calibration[0].cache.num_layers):
                codes = [self._quantize_plane(saved.cache.planes[index], setting, index)[0] for saved in calibration]
                self._coders[setting].append(SymbolCoder.fit(np.concatenate(codes, axis=1)))

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        planes, packed_bytes, coded_bytes, profile_bytes = [], 0, 0, 0
        num_bits = int(setting[0])
        for index, plane in enumerate(saved.cache.planes):
            codes, scales, zeros = self._quantize_plane(plane, setting, index)
            packed = pack_bits(codes, num_bits)
            unpacked = unpack_bits(packed, num_bits, codes.shape)
            coder = self._coders[setting][index]
            decoded, num_coded = coder.recode(codes)
            if not (np.array_equal(unpacked, codes) and np.array_equal(decoded, codes)):
                raise AssertionError(f"{setting}: the coders do not decode to the same integers")
            values = channels_first(plane)
            grouped = self._to_groups(unpacked.astype(np.float32), _along_tokens(setting, index))
            restored = grouped * scales.astype(np.float32) + zeros.astype(np.float32)
            values[:, : codes.shape[1]] = _from_groups(restored, codes.shape, _along_tokens(setting, index))
            planes.append(to_plane(values, plane))
            exempt_bytes = plane[codes.shape[1] :].numel() * plane.element_size()
            packed_bytes += len(packed) + scales.nbytes + zeros.nbytes + exempt_bytes
            coded_bytes += num_coded + scales.nbytes + zeros.nbytes + exempt_bytes
            profile_bytes += coder.tables_bytes
        counts = {
            self.name: ByteCount(packed_bytes),
            f"{self.name}-profile": ByteCount(coded_bytes, 0, profile_bytes),
        }
        return Recoded(from_planes(planes), counts)

    def _quantize_plane(
        self, plane: torch.Tensor, setting: str, plane_index: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.float16]]:
        """Return codes `[C, num_quantized]`, and scales and zero points, one per group (last axis 1)."""
        num_quantized = max(0, plane.shape[0] - RESIDUAL_TOKENS) // self.group_size * self.group_size
        values = channels_first(plane[:num_quantized])
        if values.shape[0] % self.group_size:
            raise ConfigError(
                f"scheme {self.name} needs a multiple of {self.group_size} channels, got {values.shape[0]}"
            )
        along_tokens = _along_tokens(setting, plane_index)
        groups = self._to_groups(values, along_tokens)
        largest_code = (1 << int(setting[0])) - 1
        zeros = groups.min(axis=-1, keepdims=True, initial=0 if groups.size == 0 else np.inf).astype(np.float16)
        spans = groups.max(axis=-1, keepdims=True, initial=0 if groups.size == 0 else -np.inf) - zeros
        scales = np.maximum(spans / largest_code, np.finfo(np.float16).tiny).astype(np.float16)
        codes = np.rint((groups - zeros) / scales.astype(np.float32)).clip(0, largest_code).astype(np.int64)
        return _from_groups(codes, values.shape, along_tokens), scales, zeros

    def _to_groups(self, values: np.ndarray, along_tokens: bool) -> np.ndarray:
        """Cut `[C, T]` into rows of `group_size` values of one channel, or of one token."""
        return (values if along_tokens else values.T).reshape(-1, self.group_size)


class KiviScheme(GroupedScheme):
    """Groups of 32, as KIVI's own."""

    name = "kivi"
    settings: tuple[str, ...] = ("2-bit", "4-bit")
    group_size = 32


def _along_tokens(setting: str, plane_index: int) -> bool:
    return plane_index % 2 == 0 and not setting.endswith("per token")


def _from_groups(groups: np.ndarray, shape: tuple[int, ...], along_tokens: bool) -> np.ndarray:
    """Put groups together again to `[C, T]`."""
    return groups.reshape(shape) if along_tokens else groups.reshape(shape[::-1]).T
