"""What each part of method transform's coder brings: other probabilities, other quantizers, and tokens kept exact.

Bits are ideal code lengths of quantized components, in bits per value of the cache, without headers, states and
escapes. The components are those of the profile, quantized and put back here, not by the files' own code.

Source: the entropy of a source given a context, and rate-distortion optimized quantization (Sullivan, 1996).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.coder.component_tables import component_frequencies, plan_level, scale_indices
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.transform import BLOCK_TOKENS, GroupTransform, step_of_level

Integers = NDArray[np.int32]
Values = NDArray[np.float32]

LARGEST = 4000
"""Magnitude of a component in the ideal tables."""
SPAN = 32
"""Tokens and components that share a shift of their tables."""
LAGRANGIAN = 0.1
"""Squared error, in squares of a step, that a bit may cost: about a uniform quantizer's own exchange."""
_NUM_INDICES = 46
_SHIFTS = range(-8, 8)
_ESCAPE_BITS = 64
_CLASSES = 4  # of a neighbourhood, by its mean magnitude


@dataclass(frozen=True)
class Components:
    """The components of one group of layers that a step codes, and how they are coded.

    Attributes:
        scaled: fp32 `[num_tokens, num_components]`, in steps.
        indices: scale indices, from 1.
        table_indices, low_bits: of the format's tables.
    """

    scaled: Values
    indices: NDArray[np.int64]
    table_indices: NDArray[np.uint16]
    low_bits: NDArray[np.uint8]


def analyze(profile: Profile, cache: KVCache, step_log: int) -> list[Components]:
    """Return the components of each group of a cache whose first token is the context's first.

    Args:
        profile: loaded for encoding.
        step_log: 16 log2 of the step.
    """
    groups = []
    for group in profile.groups:
        coding = plan_level(group.scale_logs.numpy(), step_log, None)
        transform = GroupTransform(profile, group, torch.device("cpu"))
        parts = [
            transform.analyze(
                transform.join(cache.slice(start, min(start + BLOCK_TOKENS, cache.num_tokens)), start),
                coding.num_components,
            )
            for start in range(0, cache.num_tokens, BLOCK_TOKENS)
        ]
        scaled = (torch.cat(parts) / step_of_level(step_log, 1)).numpy()
        indices = scale_indices(group.scale_logs.numpy(), step_log)[: coding.num_components]
        groups.append(Components(scaled, indices, coding.table_indices, coding.low_bits))
    return groups


def synthesize(profile: Profile, points: Sequence[Values], step_log: int, like: KVCache) -> KVCache:
    """Return the cache that components stand for.

    Args:
        points: per group fp32 `[num_tokens, num_components]`, in steps; they need not be whole.
        like: a cache of the same shapes and dtype.
    """
    output = from_planes([torch.empty_like(plane) for plane in like.planes])
    for group, values in zip(profile.groups, points, strict=True):
        transform = GroupTransform(profile, group, torch.device("cpu"))
        transform.synthesize(torch.from_numpy(values), step_of_level(step_log, 1), output, 0)
    return output


Quantizer = Callable[[Components], tuple[Integers, Values]]
"""Returns the integers that are coded, and what they are decoded to, in steps."""


def _round_from(threshold: float) -> Quantizer:
    """A dead zone: magnitudes are rounded up from `threshold` behind a whole number on."""

    def quantize(components: Components) -> tuple[Integers, Values]:
        magnitudes = np.floor(np.abs(components.scaled) + (1 - threshold))
        integers = (np.sign(components.scaled) * magnitudes).astype(np.int32)
        return integers, integers.astype(np.float32)

    return quantize


def _nearer_to_zero(shift: float) -> Quantizer:
    """Plain rounding, but decoded `shift` steps nearer to zero, where values are more frequent."""

    def quantize(components: Components) -> tuple[Integers, Values]:
        integers = np.rint(components.scaled).astype(np.int32)
        return integers, (integers - shift * np.sign(integers)).astype(np.float32)

    return quantize


def _cheapest(components: Components) -> tuple[Integers, Values]:
    """Of the two whole numbers around a value, the one with the smaller squared error plus its bits' worth."""
    nearest = np.rint(components.scaled).astype(np.int32)
    smaller = nearest - np.sign(nearest)
    costs = _ideal_costs("logistic")[components.indices - 1]
    rows = np.arange(len(components.indices))

    def total(integers: Integers) -> NDArray[np.float64]:
        bits = costs[rows, np.abs(integers).clip(max=LARGEST)]
        return np.square(components.scaled - integers) + LAGRANGIAN * bits

    integers = np.where(total(smaller) < total(nearest), smaller, nearest)
    return integers, integers.astype(np.float32)


QUANTIZERS: dict[str, Quantizer] = {
    "rounding": _nearer_to_zero(0.0),
    "dead zone, rounded up from 0.55": _round_from(0.55),
    "dead zone, rounded up from 0.6": _round_from(0.6),
    "decoded 0.02 nearer to zero": _nearer_to_zero(0.02),
    "decoded 0.05 nearer to zero": _nearer_to_zero(0.05),
    "rate-distortion optimized": _cheapest,
}

Model = Callable[[Integers, Components], float]
"""Returns the bits of quantized components."""


def _ideal(distribution: str) -> Model:
    def bits(integers: Integers, components: Components) -> float:
        costs = _ideal_costs(distribution)
        return float(costs[components.indices - 1, np.abs(integers).clip(max=LARGEST)].sum())

    return bits


def _ideal_costs(distribution: str) -> NDArray[np.float64]:
    """Return the bits of magnitudes 0, 1, 2, ..., signs included, a row for each scale index from 1."""
    if distribution not in _COSTS:
        _COSTS[distribution] = np.stack(
            [_bits_of(_TAILS[distribution], 2.0 ** ((index - 8) / 4)) for index in range(1, _NUM_INDICES + 1)]
        )
    return _COSTS[distribution]


def _bits_of(
    survival: Callable[[NDArray[np.float64], float], NDArray[np.float64]], deviation: float
) -> NDArray[np.float64]:
    tails = survival(np.arange(LARGEST + 2, dtype=np.float64) - 0.5, deviation)
    probabilities = tails[:-1] - tails[1:]
    probabilities[0] = 1 - 2 * tails[1]
    return -np.log2(np.maximum(probabilities, 2.0**-40))


_COSTS: dict[str, NDArray[np.float64]] = {}
_TAILS: dict[str, Callable[[NDArray[np.float64], float], NDArray[np.float64]]] = {
    "logistic": lambda x, sd: 1 / (1 + np.exp(np.minimum(x * np.pi / (sd * 3**0.5), 700))),
    "Laplace": lambda x, sd: np.exp(-np.maximum(x, 0) * 2**0.5 / sd) / 2,
    "Gauss": lambda x, sd: torch.special.erfc(torch.from_numpy(x / (sd * 2**0.5))).numpy() / 2,
}


def _shifted(integers: Integers, components: Components) -> float:
    """Every `SPAN` tokens and components move their tables by up to eight indices, at four bits each."""
    num_tokens, width = integers.shape
    magnitudes = np.abs(integers).clip(max=LARGEST)
    costs, best = _ideal_costs("logistic"), None
    padding = ((0, -num_tokens % SPAN), (0, -width % SPAN))
    for shift in _SHIFTS:
        bits = np.pad(costs[(components.indices + shift).clip(1, _NUM_INDICES) - 1, magnitudes], padding)
        spans = bits.reshape(bits.shape[0] // SPAN, SPAN, -1, SPAN).sum((1, 3))
        best = spans if best is None else np.minimum(best, spans)
    assert best is not None
    return float(best.sum() + 4 * best.size)


def _own_counts(integers: Integers, _: Components) -> float:
    """What each component's own counts would take, which nobody has for free."""
    return sum(_entropy(column) for column in integers.T)


def _counts_given(context: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None) -> Model:
    """Counts of all components of a scale index, for each class of neighbourhoods by its mean relative magnitude."""

    def bits(integers: Integers, components: Components) -> float:
        total = 0.0
        deviations = np.exp2((components.indices - 8) / 4)
        relative = (np.abs(integers) / deviations).astype(np.float64)
        neighbours = None if context is None else context(relative)
        for index in np.unique(components.indices):
            chosen = components.indices == index
            values = integers[:, chosen].ravel()
            if neighbours is None:
                total += _entropy(values)
                continue
            around = neighbours[:, chosen].ravel()
            edges = np.quantile(around, np.arange(1, _CLASSES) / _CLASSES)
            classes = np.searchsorted(edges, around)
            total += sum(_entropy(values[classes == number]) for number in range(_CLASSES))
        return total

    return bits


def _token_before(relative: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean magnitude of the same component and its neighbours in the two tokens before."""
    padded = np.pad(relative, ((2, 0), (2, 2)))
    rows = padded[1:-1] + padded[:-2]
    width = relative.shape[1]
    return np.stack([rows[:, shift : shift + width] for shift in range(5)]).sum(0) / 10


def _components_before(relative: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean magnitude of the 16 components before, in the same token."""
    sums = np.cumsum(np.pad(relative, ((0, 0), (17, 0))), axis=1)
    return (sums[:, 16:-1] - sums[:, :-17]) / 16


def _entropy(values: NDArray[np.int32]) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return -float((counts * np.log2(counts / max(counts.sum(), 1))).sum())


def _coded(integers: Integers, components: Components) -> float:
    """By the format's tables, low bits included; what is beyond a table costs an escape of eight bytes."""
    frequencies = component_frequencies()[components.table_indices].astype(np.float64)
    low = components.low_bits.astype(np.int64)
    parts = (integers + (16 << low) + ((1 << low) >> 1)) >> low
    is_inside = (parts >= 0) & (parts < 32)
    found = frequencies[np.arange(integers.shape[1]), parts.clip(0, 31)] * is_inside
    bits = np.where(found > 0, 12 - np.log2(np.maximum(found, 1)), _ESCAPE_BITS)
    return float(bits.sum() + low.sum() * len(integers))


MODELS: dict[str, Model] = {
    "integer tables of the format": _coded,
    "logistic": _ideal("logistic"),
    "logistic, shift": _shifted,
    "Laplace": _ideal("Laplace"),
    "Gauss": _ideal("Gauss"),
    "counts of a scale index": _counts_given(None),
    "the same, by the tokens before": _counts_given(_token_before),
    "the same, by the components before": _counts_given(_components_before),
    "each component's own counts": _own_counts,
}
