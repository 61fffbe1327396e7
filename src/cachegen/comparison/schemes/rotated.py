"""Integers per token and head after a rotation of the head's dims: Hadamard at 4 bits, a calibrated one at 2.

A token's vector of a head is rotated and quantized between its smallest and largest component, with an fp16 shift and
scale. `hadamard` rotates by the normalized Hadamard matrix, in the manner of SAW-INT4. `spectral`, in the manner of
OSCAR, rotates keys and values of each head by the principal axes of calibration caches and then by Hadamard, which
spreads what the axes gather; it shrinks the range by a factor per head that errs least on calibration tokens, and keeps
the first 4 and the last 128 tokens as they are, which are counted.

What is not OSCAR's: its axes are those of queries (for keys) and of values weighted by attention, which saved caches do
not hold; these are the vectors' own. Its permutation within a head changes nothing where a head has one scale.

Source: Jia et al., "SAW-INT4" (2026); Zhou et al., "OSCAR" (2026).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.comparison.schemes.base import ByteCount, Recoded, SavedCache, pack_bits, quantize_range, unpack_bits
from cachegen.errors import ConfigError
from cachegen.kv_cache import from_planes

SINK_TOKENS = 4
WINDOW_TOKENS = 128
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Factors on the range of a vector's components, one of which each head gets; a byte says which."""
_FIT_TOKENS = 2048


class HadamardScheme:
    """See the module."""

    name = "hadamard"
    settings: tuple[str, ...] = ("4-bit",)

    @property
    def identity(self) -> str:
        return self.name

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Do nothing: the rotation is the same for all models."""

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        planes, num_bytes = [], 0
        for plane in saved.cache.planes:
            rotation = hadamard_matrix(plane.shape[2])
            values = plane.float().numpy() @ rotation
            restored, count = _recode_vectors(values, int(setting[0]), np.float32(1))
            planes.append(torch.from_numpy(restored @ rotation.T).to(plane.dtype))
            num_bytes += count
        return Recoded(from_planes(planes), {self.name: ByteCount(num_bytes)})


class SpectralScheme:
    """See the module."""

    name = "spectral"
    settings: tuple[str, ...] = ("2-bit", "4-bit")

    def __init__(self) -> None:
        self._rotations: list[NDArray[np.float32]] = []
        self._shrinks: dict[str, list[NDArray[np.float32]]] = {}

    @property
    def identity(self) -> str:
        return f"{self.name} {SINK_TOKENS} {WINDOW_TOKENS} {SHRINKS} {_FIT_TOKENS}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        self._rotations = []
        self._shrinks = {setting: [] for setting in self.settings}
        for index in range(2 * calibration[0].cache.num_layers):
            parts = [saved.cache.planes[index][SINK_TOKENS:].float().numpy() for saved in calibration]
            vectors = np.concatenate(parts)  # [num_tokens, num_kv_heads, head_dim]
            moments = np.einsum("thi,thj->hij", vectors, vectors, optimize=True).astype(np.float64)
            axes = np.linalg.eigh(moments)[1][:, :, ::-1].astype(np.float32)
            # What the profile holds is fp16.
            rotation = (axes @ hadamard_matrix(axes.shape[2])).astype(np.float16).astype(np.float32)
            self._rotations.append(rotation)
            samples = _rotate(vectors[:: max(1, len(vectors) // _FIT_TOKENS)], rotation)
            for setting in self.settings:
                errors = [_measure_error(samples, int(setting[0]), shrink) for shrink in SHRINKS]
                chosen = np.asarray(SHRINKS, np.float32)[np.argmin(errors, axis=0)]
                self._shrinks[setting].append(chosen[:, None])

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        planes, num_bytes, profile_bytes = [], 0, 0
        stop = max(SINK_TOKENS, saved.cache.num_tokens - WINDOW_TOKENS)
        for index, plane in enumerate(saved.cache.planes):
            rotation, shrink = self._rotations[index], self._shrinks[setting][index]
            values = _rotate(plane[SINK_TOKENS:stop].float().numpy(), rotation)
            restored, count = _recode_vectors(values, int(setting[0]), shrink)
            decoded = plane.clone()
            decoded[SINK_TOKENS:stop] = torch.from_numpy(_rotate(restored, rotation.transpose(0, 2, 1)))
            planes.append(decoded)
            num_exempt = len(plane) - len(values)
            num_bytes += count + num_exempt * plane[0].numel() * plane.element_size()
            profile_bytes += 2 * rotation.size + len(shrink)
        return Recoded(from_planes(planes), {self.name: ByteCount(num_bytes, 0, profile_bytes)})


def hadamard_matrix(size: int) -> NDArray[np.float32]:
    """Return the normalized Hadamard matrix of a size that is a power of two.

    Raises:
        ConfigError: it is none.
    """
    if size < 1 or size & (size - 1):
        raise ConfigError(f"a Hadamard rotation needs a head_dim that is a power of two, got {size}")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(size**0.5)


def _rotate(vectors: NDArray[np.float32], rotation: NDArray[np.float32]) -> NDArray[np.float32]:
    """Multiply vectors `[T, H, D]` by the matrix of their head, `[H, D, D]`."""
    return np.matmul(vectors.transpose(1, 0, 2), rotation).transpose(1, 0, 2)


def _restore(
    codes: NDArray[np.integer], shifts: NDArray[np.float16], scales: NDArray[np.float16]
) -> NDArray[np.float32]:
    return codes.astype(np.float32) * scales.astype(np.float32) + shifts.astype(np.float32)


def _recode_vectors(
    values: NDArray[np.float32], num_bits: int, shrink: NDArray[np.float32] | np.float32
) -> tuple[NDArray[np.float32], int]:
    """Quantize vectors `[T, H, D]`, pack them, and return what is read again and the bytes."""
    codes, shifts, scales = quantize_range(values, num_bits, shrink)
    packed = pack_bits(codes, num_bits)
    unpacked = unpack_bits(packed, num_bits, codes.shape)
    return _restore(unpacked, shifts, scales), len(packed) + shifts.nbytes + scales.nbytes


def _measure_error(samples: NDArray[np.float32], num_bits: int, shrink: float) -> NDArray[np.float32]:
    """Return the summed squared error of each head."""
    difference = samples - _restore(*quantize_range(samples, num_bits, np.float32(shrink)))
    return (difference**2).sum(axis=(0, 2))
