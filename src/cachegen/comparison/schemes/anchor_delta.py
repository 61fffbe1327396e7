"""The paper's scheme: an anchor every ten tokens, and the other tokens' differences to it.

Layers form three equal groups whose bins are 0.5, 1 and 1.5 wide; a level scales all three. The paper does not say in
which unit: here it is the standard deviation of the plane's deltas over calibration caches, so the steps are known
beforehand. Anchors are 8-bit by the largest magnitude of their token's vector, and deltas are against the decoded
anchor. Distributions are per (layer, channel), anchors' and deltas' apart, from calibration caches.

Source: Liu et al., SIGCOMM 2024, sections 5.1 and 5.2. The released code never had it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from cachegen.comparison.schemes.base import ByteCount, Recoded, SavedCache, SymbolCoder, channels_first, to_plane
from cachegen.kv_cache import from_planes
from cachegen.methods.absmax.quantization import dequantize, quantize

GROUP_TOKENS = 10
ANCHOR_BINS = 256
GROUP_BINS = (0.5, 1.0, 1.5)
_STEP_BYTES = 4


class AnchorDeltaScheme:
    """See the module; a setting is the factor on the three bins."""

    name = "cachegen-delta"
    settings: tuple[str, ...] = ("bins x1", "bins x1/2", "bins x1/4", "bins x1/8", "bins x1/16")

    def __init__(self) -> None:
        self._deviations: list[float] = []
        self._anchor_coders: list[SymbolCoder] = []
        self._delta_coders: dict[str, list[SymbolCoder]] = {setting: [] for setting in self.settings}

    @property
    def identity(self) -> str:
        return f"{self.name} {GROUP_TOKENS} {ANCHOR_BINS} {GROUP_BINS}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        num_layers = calibration[0].cache.num_layers
        for index in range(2 * num_layers):
            parts = [_split(saved.cache.planes[index]) for saved in calibration]
            self._anchor_coders.append(SymbolCoder.fit(np.concatenate([part[0] for part in parts], axis=1)))
            deltas = np.concatenate([part[2] for part in parts], axis=1)
            self._deviations.append(float(deltas.std(dtype=np.float64)))
            for setting in self.settings:
                step = self._step(setting, index, num_layers)
                self._delta_coders[setting].append(SymbolCoder.fit(np.rint(deltas / step).astype(np.int64)))

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        planes, num_bytes, profile_bytes = [], 0, 0
        for index, plane in enumerate(saved.cache.planes):
            symbols, scales, deltas = _split(plane)
            anchor_coder, delta_coder = self._anchor_coders[index], self._delta_coders[setting][index]
            step = self._step(setting, index, saved.cache.num_layers)
            anchors, anchor_bytes = anchor_coder.recode(symbols)
            steps, delta_bytes = delta_coder.recode(np.rint(deltas / step).astype(np.int64))
            values = np.repeat(_decode_anchors(anchors, scales), GROUP_TOKENS, axis=1)[:, : plane.shape[0]]
            values[:, _is_delta(plane.shape[0])] += steps.astype(np.float32) * np.float32(step)
            planes.append(to_plane(values, plane))
            num_bytes += anchor_bytes + delta_bytes + len(scales) * plane.element_size()
            profile_bytes += anchor_coder.tables_bytes + delta_coder.tables_bytes + _STEP_BYTES
        return Recoded(from_planes(planes), {self.name: ByteCount(num_bytes, 0, profile_bytes)})

    def _step(self, setting: str, plane_index: int, num_layers: int) -> float:
        group = plane_index // 2 * len(GROUP_BINS) // num_layers
        return GROUP_BINS[group] * self._deviations[plane_index] * float(Fraction(setting.removeprefix("bins x")))


def _is_delta(num_tokens: int) -> np.ndarray:
    return np.arange(num_tokens) % GROUP_TOKENS != 0


def _split(plane: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return anchors' symbols `[C, num_anchors]`, their scales (exact in fp32), and deltas `[C, num_deltas]`."""
    symbols, scales = quantize(plane[::GROUP_TOKENS], ANCHOR_BINS)
    symbols_by_channel = symbols.numpy().T.astype(np.int64)
    scales_array = scales.float().numpy().astype(np.float32)
    anchors = np.repeat(_decode_anchors(symbols_by_channel, scales_array), GROUP_TOKENS, axis=1)
    deltas = (channels_first(plane) - anchors[:, : plane.shape[0]])[:, _is_delta(plane.shape[0])]
    return symbols_by_channel, scales_array, deltas


def _decode_anchors(symbols: np.ndarray, scales: np.ndarray) -> np.ndarray:
    rows = torch.from_numpy(np.ascontiguousarray(symbols.T))
    return dequantize(rows, torch.from_numpy(scales), ANCHOR_BINS).numpy().T
