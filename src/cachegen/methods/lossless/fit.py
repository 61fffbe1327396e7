"""Fit the model of method `lossless` on caches: which channels predict which, and how far values lie from it.

In the order in which channels are coded, the Cholesky factor of their covariance gives the best linear prediction of
each from all before it. Weights are rounded as finely as pays: a rounding error costs bits in every token, a finer
weight once. The computation runs on one thread, so that a machine fits the same cache alike every time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from types import BuiltinFunctionType
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import KVCache
from cachegen.methods.lossless.model import (
    MAX_BEFORE,
    MAX_CONTEXT,
    NO_WEIGHTS,
    NUM_SYMBOLS,
    Model,
    TurningPairs,
    describe_pairs,
    join_bits,
)
from cachegen.methods.rotary import angles_of, undo_rotation
from cachegen.rotation import PlaneRotations, Rotation

MAX_FIT_TOKENS = 8192
"""Of a longer cache every second, third, ... token is fitted on."""
MAX_SHARED_FIT_TOKENS = 16384
"""The same of a model for other caches, of all caches together."""
SHARED_TOKENS = 40_000
"""For how many tokens' sake the weights of a model for other caches are rounded no coarser."""
COUNTED_TOKENS = 1024
"""From which the frequencies of symbols are counted."""

_FREQUENCY_BITS = 12
_FIRST_TOKEN = 4  # fitted on, but in a short cache: those before it are unlike all others
_HISTORY_UNIT = 362  # between 256 and 512: standard deviations in the history's integers
_MAX_WEIGHT = 127
_LEAST_SAMPLES = 64  # to fit weights on
_DEADZONE = 0.65  # a weight of less, in steps, is left out
_CHANNEL_STEPS = (512, 1023)
# Pi to 200 bits: the turns of a token must come out alike everywhere.
_PI = Fraction(5048344754617993871973410141242436836214643421488662971535368, 1 << 200)


def fit_model(
    cache: KVCache, rotations: PlaneRotations, *, first_token: int = 0, max_layers_before: int = MAX_BEFORE
) -> Model:
    """Fit a cache's model.

    Args:
        cache: on the CPU, of 16 bits per value; values that are not finite count as zero.
        rotations: how each plane is turned.
        first_token: the position of the cache's first token.
        max_layers_before: layers before its own that a channel may be predicted from; -1 for no prediction at all.
    """
    with _one_thread():
        return _fit([cache], rotations, MAX_FIT_TOKENS, cache.num_tokens, max_layers_before, first_token)


def fit_shared_model(caches: Sequence[KVCache], rotations: PlaneRotations) -> Model:
    """Fit a model for other caches of the same language model than those it is fitted on.

    Args:
        caches: at least one; see `fit_model`.
        rotations: how each plane is turned, in all of them.
    """
    with _one_thread():
        return _fit(caches, rotations, MAX_SHARED_FIT_TOKENS, SHARED_TOKENS, MAX_BEFORE, 0)


def _fit(
    caches: Sequence[KVCache],
    rotations: PlaneRotations,
    max_fit_tokens: int,
    num_tokens: int,
    max_layers_before: int,
    first_token: int,
) -> Model:
    """Fit a model.

    Args:
        max_fit_tokens: of all caches together; of more every second, third, ... is fitted on.
        num_tokens: that the model will code: its weights are as fine as pays for these.
        first_token: the position of the caches' first token.
    """
    cache = caches[0]
    planes = [PlaneShape(plane.shape[1], plane.shape[2]) for plane in cache.planes]
    distinct = list(dict.fromkeys(rotation for rotation in rotations if rotation is not None))
    turning = tuple(
        TurningPairs(tuple(map(turn_of, rotation.inv_freq)), rotation.pairing, rotation.offset) for rotation in distinct
    )
    numbers = tuple(0 if rotation is None else distinct.index(rotation) + 1 for rotation in rotations)
    # The first tokens of a context are unlike all others.
    num_unlike = 0 if first_token else _FIRST_TOKEN
    firsts = [num_unlike if cache.num_tokens > 16 * _FIRST_TOKEN else 0 for cache in caches]
    stride = -(-sum(cache.num_tokens - first for cache, first in zip(caches, firsts, strict=True)) // max_fit_tokens)
    places = [torch.arange(first, cache.num_tokens, stride) for cache, first in zip(caches, firsts, strict=True)]
    orders = [
        _coding_order(describe_pairs(planes[i : i + 2], turning, numbers[i : i + 2])[:, 0].tolist())
        for i in range(0, len(planes), 2)
    ]
    fitted: list[_Layer] = []
    covariances = _Covariances()
    for layer, order in enumerate(orders):
        vectors = torch.cat(
            [_vectors(cache, layer, at, rotations, first_token) for cache, at in zip(caches, places, strict=True)]
        )
        fitted.append(_fit_layer(vectors, fitted, covariances, order, num_tokens, max_layers_before))
    model = Model(
        channels=np.concatenate([layer.channels for layer in fitted]),
        layers_before=tuple(layer.before for layer in fitted),
        weights=np.concatenate([layer.weights.reshape(-1) for layer in fitted]).view(np.uint8),
        frequencies=_normalize(np.zeros((len(planes), NUM_SYMBOLS), np.int64)),
        rotations=turning,
        plane_rotations=numbers,
    )
    counts = np.zeros((len(planes), NUM_SYMBOLS), np.uint32)
    native = model.for_native(planes, is_float16=cache.dtype == torch.float16)
    for cache in caches:
        start = max(0, (cache.num_tokens - COUNTED_TOKENS) // 2)
        counted = cache.slice(start, min(start + COUNTED_TOKENS, cache.num_tokens))
        _native.lossless_count(join_bits(counted), first_token + start, native, counts)
    return dataclasses.replace(model, frequencies=_normalize(counts.astype(np.int64)))


def turn_of(frequency: float) -> int:
    """Return an angle in radians per token in 2^-64 turns per token, rounded; computed exactly."""
    return round(Fraction(frequency) / (2 * _PI) * (1 << 64)) % (1 << 64)


@dataclass(frozen=True)
class _Order:
    """The order in which a layer's channels are coded.

    Attributes:
        channels: int64 `[num_channels]`.
        partners: by place in the order: whether the channel is coded together with the one before it.
        pairs: (first channel, second channel) of those, `[num_pairs, 2]`.
    """

    channels: torch.Tensor
    partners: torch.Tensor
    pairs: torch.Tensor


def _coding_order(distances: Sequence[int]) -> _Order:
    """Return the order of a layer whose channels have their partners so far on; see `describe_pairs`."""
    channels: list[int] = []
    partners: list[bool] = []
    for channel, distance in enumerate(distances):
        if distance == 0:
            channels.append(channel)
            partners.append(False)
        elif distance > 0:
            channels += [channel, channel + distance]
            partners += [False, True]
    seconds = [place for place, is_second in enumerate(partners) if is_second]
    pairs = [(channels[place - 1], channels[place]) for place in seconds]
    return _Order(torch.tensor(channels), torch.tensor(partners), torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2))


@dataclass(frozen=True)
class _Layer:
    """What was fitted of a layer.

    Attributes:
        before: layers before it that predict it, or `NO_WEIGHTS`.
        weights: int8 `[num_channels, channels before + num_channels]`; empty without.
        channels: int32 `[num_channels, 6]`, as in `Model`.
        means: of its channels.
        units: per channel, what one in the history's integers is, in standard deviations.
    """

    before: int
    weights: NDArray[np.int8]
    channels: NDArray[np.int32]
    means: torch.Tensor
    units: torch.Tensor


class _Covariances:
    """Covariances of the standardized channels of a layer and those before it, each block computed once."""

    def __init__(self) -> None:
        self._samples: list[torch.Tensor] = []
        self._blocks: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, standard: torch.Tensor) -> None:
        """Add the next layer's channels, fp32 `[num_samples, num_channels]`."""
        self._samples.append(standard)
        oldest = len(self._samples) - 1 - MAX_BEFORE
        if oldest > 0:
            self._samples[oldest - 1] = torch.empty(0)
        self._blocks = {pair: block for pair, block in self._blocks.items() if pair[0] >= oldest}

    def inputs(self, count: int) -> torch.Tensor:
        """Return the channels of the last layer and of `count` layers before it, side by side."""
        return torch.cat(self._samples[len(self._samples) - 1 - count :], dim=1)

    def matrix(self, count: int) -> torch.Tensor:
        """Return the covariance of `inputs`, fp64."""
        layers = range(len(self._samples) - 1 - count, len(self._samples))
        return torch.cat([torch.cat([self._block(i, j) for j in layers], dim=1) for i in layers])

    def _block(self, i: int, j: int) -> torch.Tensor:
        if i > j:
            return self._block(j, i).T
        if (i, j) not in self._blocks:
            first, second = self._samples[i], self._samples[j]
            self._blocks[i, j] = (first.T @ second).double() / len(first)
        return self._blocks[i, j]


def _fit_layer(
    own: torch.Tensor,
    before: Sequence[_Layer],
    covariances: _Covariances,
    order: _Order,
    num_tokens: int,
    max_layers_before: int,
) -> _Layer:
    """Fit one layer.

    Args:
        own: its samples, fp64 `[num_samples, num_channels]`.
        before: the layers before it.
        covariances: of the layers before it; its own are added.
        num_tokens: that will be coded.
        max_layers_before: as in `fit_model`.
    """
    means = own.mean(0)
    deviations = own.std(0, correction=0)
    # Of a channel that is always the same, too, something must be said.
    deviations = torch.maximum(deviations, 2.0**-14 * own.abs().amax(0)).clamp_min(2.0**-40)
    covariances.add(((own - means) / deviations).float())
    best: _Weights | None = None
    best_count, best_bits = 0, 0.0
    for count in range(min(max_layers_before, len(before)) + 1):
        num_inputs = sum(len(layer.means) for layer in before[len(before) - count :]) + len(means)
        if len(own) < _LEAST_SAMPLES or num_inputs > MAX_CONTEXT:
            break
        units = torch.cat([*(layer.units for layer in before[len(before) - count :]), _history_units(deviations)])
        found = _fit_weights(covariances.matrix(count), units, order, len(own), num_tokens)
        if found.num_bits >= best_bits:
            break
        best, best_count, best_bits = found, count, found.num_bits
    if best is None:
        return _finish(own, means, deviations, torch.zeros_like(own), torch.zeros_like(means), order, NO_WEIGHTS, None)
    predicted = (covariances.inputs(best_count) @ best.real.float().T).double() * deviations
    weights = best.rounded.to(torch.int8).numpy()
    return _finish(own, means, deviations, predicted, best.multipliers * deviations, order, best_count, weights)


@dataclass(frozen=True)
class _Weights:
    """The weights of a layer's channels for one context.

    Attributes:
        rounded: integers `[num_channels, num_inputs]`, of the history's integers.
        real: what they are of standardized inputs.
        multipliers: what one of their sums is, in standard deviations of the channel.
        num_bits: that they save, as a negative number; those of the weights themselves are counted.
    """

    rounded: torch.Tensor
    real: torch.Tensor
    multipliers: torch.Tensor
    num_bits: float


def _fit_weights(
    covariance: torch.Tensor, units: torch.Tensor, order: _Order, num_samples: int, num_tokens: int
) -> _Weights:
    """Fit a layer's weights.

    Args:
        covariance: of the inputs, the layer's own channels last.
        units: of each input, what one in the history's integers is, in standard deviations.
    """
    num_own = len(order.channels)
    num_before = len(covariance) - num_own
    permuted = torch.cat([torch.arange(num_before), num_before + order.channels])
    covariance = covariance[permuted][:, permuted]
    covariance += torch.eye(len(covariance), dtype=covariance.dtype) * (1e-4 + 0.005 * len(covariance) / num_samples)
    # torch gives no type for it.
    factor = cast("torch.Tensor", torch.linalg.cholesky(covariance))  # pyright: ignore[reportUnknownMemberType]
    identity = torch.eye(len(factor), dtype=factor.dtype)
    inverse = cast(
        "torch.Tensor",
        torch.linalg.solve_triangular(factor, identity, upper=False),  # pyright: ignore[reportUnknownMemberType]
    )
    rows, lower = factor[num_before:], torch.tril(inverse, -1)[num_before:]
    diagonal = rows[:, num_before:].diagonal()
    weights = -diagonal[:, None] * lower
    residuals = diagonal.square()
    # The second of a pair does not see the first: what that would add is taken out again.
    seconds = torch.nonzero(order.partners)[:, 0]
    across = rows[seconds, num_before + seconds - 1]
    weights[seconds] -= across[:, None] * lower[seconds - 1]
    weights[seconds, num_before + seconds - 1] = 0
    residuals[seconds] += across.square()
    by_channel, deviations = torch.empty_like(weights), torch.empty_like(residuals)
    restored = torch.empty_like(weights)
    restored[:, permuted] = weights
    by_channel[order.channels] = restored
    deviations[order.channels] = residuals.sqrt()

    # A rounding error of all weights adds bits in every token; a step that is half as wide costs a bit per weight.
    steps = deviations * math.sqrt(12 / num_tokens)
    scaled = by_channel * (_HISTORY_UNIT * units)
    steps = torch.maximum(steps, scaled.abs().amax(1) / _MAX_WEIGHT).clamp_min(1e-9)
    scaled = scaled / steps[:, None]
    rounded = torch.where(scaled.abs() < _DEADZONE, 0.0, scaled.round())
    multipliers = steps / _HISTORY_UNIT
    real = rounded / units * multipliers[:, None]
    lost = (real - by_channel).square().sum(1)
    saved = 0.5 * (deviations.square() + lost).log2().sum().item()
    num_bits = num_tokens * min(saved, 0.0) + _entropy_bits(rounded.to(torch.int8).numpy())
    return _Weights(rounded, real, multipliers, num_bits)


def _finish(
    own: torch.Tensor,
    means: torch.Tensor,
    deviations: torch.Tensor,
    predicted: torch.Tensor,
    multipliers: torch.Tensor,
    order: _Order,
    before: int,
    weights: NDArray[np.int8] | None,
) -> _Layer:
    """Choose units and steps by how far the samples lie from their predictions."""
    distances = own - means - predicted
    # Heavy tails would make a standard deviation larger than what most values need.
    spread = torch.minimum(distances.std(0, correction=0), 1.6 * distances.abs().mean(0))
    spread = torch.maximum(spread, 2.0**-20 * deviations)
    if len(order.pairs):
        first, second = order.pairs.T
        both = ((spread[first].square() + spread[second].square()) / 2).sqrt()
        spread[first], spread[second] = both, both
    exponents = _exponents(spread, own.abs().amax(0), order)
    history_shifts = _history_shifts(deviations, exponents)
    ones = torch.exp2(exponents)
    steps = (spread * ones / 4).round().clamp(1, _CHANNEL_STEPS[1])
    scale = multipliers * ones
    shifts = (29 - scale.clamp_min(1e-30).log2().floor()).clamp(0, 62)
    columns = [
        (means * ones).round(),
        (scale * torch.exp2(shifts)).round().clamp(0, (1 << 31) - 1) if weights is not None else torch.zeros_like(ones),
        shifts if weights is not None else torch.zeros_like(ones),
        exponents,
        history_shifts,
        steps,
    ]
    channels = torch.stack(columns, dim=1).to(torch.int32).numpy()
    empty = np.zeros((0, 0), np.int8)
    units = torch.exp2(history_shifts) / (deviations * ones)
    return _Layer(before, weights if weights is not None else empty, channels, means, units)


def _exponents(spread: torch.Tensor, largest: torch.Tensor, order: _Order) -> torch.Tensor:
    """Return log2 of the units per one of each channel: a quarter of the spread is 512 to 1023 of them.

    All values stay below 2^29 units; the dims of a pair have the same.
    """
    exponents = torch.minimum((2 * _CHANNEL_STEPS[0] * 2 / spread).log2().ceil(), 29 - _ceil_log2(largest))
    if len(order.pairs):
        first, second = order.pairs.T
        both = torch.minimum(exponents[first], exponents[second])
        exponents[first], exponents[second] = both, both
    return exponents.clamp(-100, 100)


def _ceil_log2(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp_min(2.0**-100).log2().ceil() + 1


def _history_shifts(deviations: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return how far units are shifted for the history: a standard deviation is then 256 to 511."""
    return ((deviations * torch.exp2(exponents)).log2() - 8).floor().clamp(0, 40)


def _history_units(deviations: torch.Tensor) -> torch.Tensor:
    """Return what one in the history's integers is, in standard deviations: the same whatever the exponents."""
    logs = deviations.log2()
    return torch.exp2(logs.floor() - 8 - logs)


def _vectors(
    cache: KVCache, layer: int, places: torch.Tensor, rotations: PlaneRotations, first_token: int
) -> torch.Tensor:
    """Return a layer's keys and values at some places, their rotations undone: fp64 `[num_places, num_channels]`.

    Args:
        first_token: the position of the cache's first token.
    """
    planes = slice(2 * layer, 2 * layer + 2)
    parts = [
        _turned_back(plane[places].float(), rotation, first_token + places).flatten(1)
        for plane, rotation in zip(cache.planes[planes], rotations[planes], strict=True)
    ]
    return torch.cat(parts, dim=1).double().nan_to_num(0.0, 0.0, 0.0)


def _turned_back(vectors: torch.Tensor, rotation: Rotation | None, positions: torch.Tensor) -> torch.Tensor:
    """Undo the turning of a plane's vectors, but for its scaling."""
    if rotation is None:
        return vectors
    cosines, sines = angles_of(rotation, int(positions[-1]) + 1, 0, positions.device)
    unscaled = dataclasses.replace(rotation, attention_scaling=1.0)
    return undo_rotation(vectors, unscaled, (cosines[positions], sines[positions]))


def _entropy_bits(weights: NDArray[np.int8]) -> float:
    """Return about how many bits weights take in the file."""
    counts = np.bincount(weights.reshape(-1).view(np.uint8), minlength=256)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def _normalize(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Return frequencies that sum to 4096 per row, every one at least 1."""
    total = 1 << _FREQUENCY_BITS
    smoothed = 16 * counts + 1
    shares = smoothed * (total - counts.shape[1]) // smoothed.sum(1, keepdims=True) + 1
    shares[np.arange(len(shares)), shares.argmax(1)] += total - shares.sum(1)
    return shares.astype(np.uint16)


@contextmanager
def _one_thread() -> Generator[None]:
    """Let torch compute on one thread: sums then have one order.

    Not in an engine that has bound its threads to processors and put something that only warns into this function's
    place, as vLLM does on CPUs: its files may differ in their weights, which they hold, from those of others.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not isinstance(torch.set_num_threads, BuiltinFunctionType):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
