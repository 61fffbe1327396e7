"""A scheme like KVTC: undo RoPE, one PCA over all layers and heads, allocated bits, DEFLATE.

Keys (without their rotary embedding) and values each get a PCA over the channels of all layers, from calibration
caches. Components in falling order of variance are cut into groups, each with a number of bits; a token's group has a
shift and a scale of 16 bits, and the integers between. Dynamic programming over the cuts, at a Lagrange multiplier that
meets the target, minimizes the squared error on calibration tokens. The first four tokens are exempt and counted.
`pca` deflates the integers, as KVTC does; `pca-profile` codes them with tables per component from calibration caches.

What is not KVTC's: more widths and sizes of groups to choose from, and no exempt last tokens, since the measurement
recomputes the context's last 256 anyway.

Source: Staniszewski and Lancucki, "KV Cache Transform Coding for Compact Storage in LLM Inference", ICLR 2026.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.comparison.schemes.base import (
    ByteCount,
    Recoded,
    SavedCache,
    SymbolCoder,
    pack_bits,
    quantize_range,
)
from cachegen.comparison.schemes.rotary import rotate_keys
from cachegen.kv_cache import KVCache

EXEMPT_TOKENS = 4
GROUP_SIZES = (8, 16, 32, 64, 128, 256)
MAX_BITS = 8
_GROUP_OVERHEAD_BITS = 32
_ALLOCATION_TOKENS = 1200
_BISECTIONS = 30


@dataclass(frozen=True)
class _Basis:
    """Means `[D]`, principal axes `[D, D]` as columns in falling order of variance, and calibration coefficients."""

    means: NDArray[np.float32]
    axes: NDArray[np.float32]
    samples: NDArray[np.float32]


@dataclass(frozen=True)
class _Group:
    """Components `start` to `stop` at `num_bits` each; its coder has a table per component."""

    start: int
    stop: int
    num_bits: int
    coder: SymbolCoder


class PcaScheme:
    """See the module; a setting is the target in bits per value before the entropy coder."""

    name = "pca"
    settings: tuple[str, ...] = ("0.5 bit", "0.75 bit", "1 bit", "1.5 bit", "2 bit", "3 bit", "4 bit")

    def __init__(self) -> None:
        self._bases: tuple[_Basis, ...] = ()
        self._groups: dict[str, tuple[list[_Group], ...]] = {}

    @property
    def identity(self) -> str:
        return f"{self.name} {EXEMPT_TOKENS} {GROUP_SIZES} {MAX_BITS} {_ALLOCATION_TOKENS}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        self._bases = tuple(_fit_basis([_features(saved)[kind] for saved in calibration]) for kind in (0, 1))
        errors = [_measure_groups(basis.samples) for basis in self._bases]
        for setting in self.settings:
            plans = _allocate(errors, float(setting.removesuffix(" bit")))
            self._groups[setting] = tuple(
                [_fit_group(basis.samples, *part) for part in plan if part[2]]
                for basis, plan in zip(self._bases, plans, strict=True)
            )

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        decoded, deflated_bytes, coded_bytes, basis_bytes, profile_tables = [], 0, 0, 0, 0
        for features, basis, groups in zip(_features(saved), self._bases, self._groups[setting], strict=True):
            coefficients = np.matmul(features[EXEMPT_TOKENS:] - basis.means, basis.axes, dtype=np.float32)
            restored = np.zeros_like(coefficients)
            for group in groups:
                part = coefficients[:, group.start : group.stop]
                codes, shifts, scales = quantize_range(part, group.num_bits)
                read, num_coded = group.coder.recode(codes.T)
                if not np.array_equal(read.T, codes):
                    raise AssertionError(f"{setting}: the coder does not decode to the same integers")
                restored[:, group.start : group.stop] = codes * scales.astype(np.float32) + shifts.astype(np.float32)
                side = _deflate(shifts.view(np.uint8).reshape(-1, 2).T) + _deflate(
                    scales.view(np.uint8).reshape(-1, 2).T
                )
                layouts = (codes.T.astype(np.uint8), pack_bits(codes.T, group.num_bits))
                deflated_bytes += side + 1 + min(map(_deflate, layouts))  # 1: which of the two
                coded_bytes += side + num_coded
                profile_tables += group.coder.tables_bytes
            basis_bytes += basis.means.nbytes + 2 * len(basis.means) * max((group.stop for group in groups), default=0)
            values = restored @ basis.axes.T + basis.means
            decoded.append(np.concatenate([features[:EXEMPT_TOKENS], values]))
        cache = _to_cache(decoded, saved)
        exempt = saved.cache.slice(0, min(EXEMPT_TOKENS, saved.cache.num_tokens))
        for plane, original in zip(cache.planes, exempt.planes, strict=True):
            plane[: len(original)] = original
        exempt_bytes = exempt.num_values * exempt.dtype.itemsize
        counts = {
            self.name: ByteCount(deflated_bytes + exempt_bytes, 0, basis_bytes),
            f"{self.name}-profile": ByteCount(coded_bytes + exempt_bytes, 0, basis_bytes + profile_tables),
        }
        return Recoded(cache, counts)


def _features(saved: SavedCache) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return keys without rotation and values, each fp32 `[num_tokens, channels of all layers]`."""
    rotations = saved.metadata.rotations_of(saved.cache)[0::2]
    keys = [
        rotate_keys(plane, rotation, undo=True).flatten(1)
        for plane, rotation in zip(saved.cache.keys, rotations, strict=True)
    ]
    values = [plane.float().flatten(1) for plane in saved.cache.values]
    return torch.cat(keys, dim=1).numpy(), torch.cat(values, dim=1).numpy()


def _to_cache(features: Sequence[NDArray[np.float32]], saved: SavedCache) -> KVCache:
    """Undo `_features`."""
    by_kind = []
    for kind, planes in ((0, saved.cache.keys), (1, saved.cache.values)):
        sizes = [plane.shape[1] * plane.shape[2] for plane in planes]
        parts = torch.from_numpy(features[kind]).split(sizes, dim=1)
        by_kind.append([part.reshape(plane.shape) for part, plane in zip(parts, planes, strict=True)])
    dtype = saved.cache.dtype
    rotations = saved.metadata.rotations_of(saved.cache)[0::2]
    keys = [
        rotate_keys(plane, rotation, undo=False).to(dtype)
        for plane, rotation in zip(by_kind[0], rotations, strict=True)
    ]
    return KVCache(keys, [plane.to(dtype) for plane in by_kind[1]])


def _fit_basis(features: Sequence[NDArray[np.float32]]) -> _Basis:
    rows = np.concatenate([part[EXEMPT_TOKENS:] for part in features])
    means = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    rows -= means
    axes = np.linalg.eigh((rows.T @ rows).astype(np.float64))[1][:, ::-1].astype(np.float32)
    axes = axes.astype(np.float16).astype(np.float32)  # what the profile is counted as
    return _Basis(means, axes, rows[:: max(1, len(rows) // _ALLOCATION_TOKENS)] @ axes)


def _measure_groups(samples: NDArray[np.float32]) -> dict[tuple[int, int, int], float]:
    """Return the mean squared error per token of every (start, stop, num_bits) that may be a group."""
    errors, num_components = {}, samples.shape[1]
    for start in range(0, num_components, GROUP_SIZES[0]):
        for stop in {min(start + size, num_components) for size in GROUP_SIZES}:
            part = samples[:, start:stop]
            errors[start, stop, 0] = float((part**2).sum() / len(part))
            for num_bits in range(1, MAX_BITS + 1):
                codes, shifts, scales = quantize_range(part, num_bits)
                restored = codes * scales.astype(np.float32) + shifts.astype(np.float32)
                errors[start, stop, num_bits] = float(((part - restored) ** 2).sum() / len(part))
    return errors


def _allocate(
    errors: Sequence[dict[tuple[int, int, int], float]], target_bits: float
) -> list[list[tuple[int, int, int]]]:
    """Choose each basis's groups, (start, stop, num_bits), so that all together cost `target_bits` per value."""
    num_values = sum(max(stop for _, stop, _ in table) for table in errors)
    low, high = 1e-12, 1e12  # of the multiplier; the cost falls as it grows
    plans = []
    for _ in range(_BISECTIONS):
        multiplier = (low * high) ** 0.5
        plans = [_cut(table, multiplier) for table in errors]
        cost = sum(_group_bits(*group) for plan in plans for group in plan)
        low, high = (multiplier, high) if cost > target_bits * num_values else (low, multiplier)
    return [_cut(table, high) for table in errors]


def _cut(errors: dict[tuple[int, int, int], float], multiplier: float) -> list[tuple[int, int, int]]:
    """Find the groups that minimize error + multiplier * bits, from the last component backwards."""
    num_components = max(stop for _, stop, _ in errors)
    best: dict[int, tuple[float, tuple[int, int, int] | None]] = {num_components: (0.0, None)}
    by_start: dict[int, list[tuple[int, int, int]]] = {}
    for group in errors:
        by_start.setdefault(group[0], []).append(group)
    for start in sorted(by_start, reverse=True):
        best[start] = min(
            (errors[group] + multiplier * _group_bits(*group) + best[group[1]][0], group) for group in by_start[start]
        )
    plan, start = [], 0
    while (group := best[start][1]) is not None:
        plan.append(group)
        start = group[1]
    return plan


def _group_bits(start: int, stop: int, num_bits: int) -> int:
    return (stop - start) * num_bits + _GROUP_OVERHEAD_BITS if num_bits else 0


def _fit_group(samples: NDArray[np.float32], start: int, stop: int, num_bits: int) -> _Group:
    codes, _, _ = quantize_range(samples[:, start:stop], num_bits)
    return _Group(start, stop, num_bits, SymbolCoder.fit(codes.T))


def _deflate(content: bytes | NDArray[np.uint8]) -> int:
    """Return the length of a zlib stream of these bytes, with the four bytes that say it."""
    plain = content.tobytes() if isinstance(content, np.ndarray) else content
    return 4 + len(zlib.compress(plain, 9))
