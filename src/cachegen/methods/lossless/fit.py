"""Fit the model of method `lossless` on a cache: which channels predict which, and how far values lie from it.

In the order in which channels are coded, the Cholesky factor of their covariance gives the best linear prediction of
each from all before it. Weights are rounded as finely as pays: a rounding error costs bits in every token, a finer
weight once. The computation runs on one thread, so that a machine fits the same cache alike every time.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.kv_cache import KVCache, RotaryEmbedding
from cachegen.methods.lossless.headers import PlaneShape
from cachegen.methods.lossless.model import MAX_BEFORE, MAX_CONTEXT, NO_WEIGHTS, NUM_SYMBOLS, Model
from cachegen.methods.rotary import rotation_of, undo_rotation

MAX_FIT_TOKENS = 8192
"""Of a longer cache every second, third, ... token is fitted on."""
COUNTED_TOKENS = 1024
"""From which the frequencies of symbols are counted."""

_FREQUENCY_BITS = 12
_FIRST_TOKEN = 4  # fitted on, but in a short cache: those before it are unlike all others
_HISTORY_UNIT = 362  # between 256 and 512: standard deviations in the history's integers
_MAX_WEIGHT = 127
_DEADZONE = 0.65  # a weight of less, in steps, is left out
_CHANNEL_STEPS = (512, 1023)
# Pi to 200 bits: the turns of a token must come out alike everywhere.
_PI = Fraction(5048344754617993871973410141242436836214643421488662971535368, 1 << 200)


def fit_model(cache: KVCache, rotary: RotaryEmbedding | None) -> Model:
    """Fit a cache's model.

    Args:
        cache: on the CPU, of 16 bits per value; values that are not finite count as zero.
        rotary: what the keys were rotated with; None: nothing.
    """
    with _one_thread():
        return _fit(cache, rotary)


def _fit(cache: KVCache, rotary: RotaryEmbedding | None) -> Model:
    planes = [PlaneShape(plane.shape[1], plane.shape[2]) for plane in cache.planes]
    inv_freq = rotary.inv_freq if rotary is not None else ()
    if any(2 * len(inv_freq) > plane.head_dim for plane in planes[::2]):
        inv_freq = ()  # not of these keys
    turns = [turn_of(frequency) for frequency in inv_freq]
    first = _FIRST_TOKEN if cache.num_tokens > 16 * _FIRST_TOKEN else 0
    stride = -(-(cache.num_tokens - first) // MAX_FIT_TOKENS)
    positions = torch.arange(first, cache.num_tokens, stride)
    orders = [_coding_order(keys, values, len(turns)) for keys, values in zip(planes[::2], planes[1::2], strict=True)]
    fitted: list[_Layer] = []
    samples: list[torch.Tensor] = []
    for layer, order in enumerate(orders):
        vectors = _vectors(cache, layer, positions, rotary if turns else None)
        samples = [*samples[-MAX_BEFORE:], vectors]
        fitted.append(_fit_layer(samples, fitted, order, cache.num_tokens))
    model = Model(
        channels=np.concatenate([layer.channels for layer in fitted]),
        layers_before=tuple(layer.before for layer in fitted),
        weights=np.concatenate([layer.weights.reshape(-1) for layer in fitted]).view(np.uint8),
        frequencies=_normalize(np.zeros((len(planes), NUM_SYMBOLS), np.int64)),
        turns=np.array([[turn & 0xFFFFFFFF, turn >> 32] for turn in turns], np.uint32).reshape(-1, 2),
    )
    counts = np.zeros((len(planes), NUM_SYMBOLS), np.uint32)
    start = max(0, (cache.num_tokens - COUNTED_TOKENS) // 2)
    counted = cache.slice(start, min(start + COUNTED_TOKENS, cache.num_tokens))
    bits = torch.cat([plane.flatten(1) for plane in counted.planes], dim=1).contiguous().view(torch.uint16).numpy()
    arguments = model.native_arguments(planes, is_float16=cache.dtype == torch.float16)
    _native.lossless_count(bits, start, **arguments, counts=counts)
    return Model(model.channels, model.layers_before, model.weights, _normalize(counts.astype(np.int64)), model.turns)


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


def _coding_order(keys: PlaneShape, values: PlaneShape, num_pairs: int) -> _Order:
    channels: list[int] = []
    partners: list[bool] = []
    for head in range(keys.num_kv_heads):
        first = head * keys.head_dim
        for dim in range(num_pairs):
            channels += [first + dim, first + dim + num_pairs]
            partners += [False, True]
        rest = range(first + 2 * num_pairs, first + keys.head_dim)
        channels += rest
        partners += [False] * len(rest)
    rest = range(keys.num_channels, keys.num_channels + values.num_channels)
    channels += rest
    partners += [False] * len(rest)
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
        means, deviations: of its channels.
        units: per channel, what one in the history's integers is, in standard deviations.
    """

    before: int
    weights: NDArray[np.int8]
    channels: NDArray[np.int32]
    means: torch.Tensor
    deviations: torch.Tensor
    units: torch.Tensor


def _fit_layer(samples: Sequence[torch.Tensor], before: Sequence[_Layer], order: _Order, num_tokens: int) -> _Layer:
    """Fit one layer.

    Args:
        samples: fp64 `[num_samples, num_channels]` of some layers before it and, last, its own.
        before: the layers before it.
        num_tokens: that will be coded.
    """
    own = samples[-1]
    means = own.mean(0)
    deviations = own.std(0, correction=0)
    # Of a channel that is always the same, too, something must be said.
    deviations = torch.maximum(deviations, 2.0**-14 * own.abs().amax(0)).clamp_min(2.0**-40)
    plain = _finish(own, means, deviations, torch.zeros_like(own), deviations, order, NO_WEIGHTS, None)
    best, best_bits = plain, 0.0
    if len(own) < 64:
        return best
    standard = [((own - means) / deviations).float()]
    for count in range(MAX_BEFORE + 1):
        if count > len(samples) - 1 or count > len(before):
            break
        if count > 0:
            earlier = before[-count]
            standard.insert(0, ((samples[-1 - count] - earlier.means) / earlier.deviations).float())
        inputs = torch.cat(standard, dim=1)
        if inputs.shape[1] > MAX_CONTEXT:
            break
        layers = [*before[len(before) - count :]]
        found, bits = _fit_weights(inputs, own, means, deviations, layers, order, count, num_tokens)
        if bits >= best_bits:
            break
        best, best_bits = found, bits
    return best


def _fit_weights(
    inputs: torch.Tensor,
    own: torch.Tensor,
    means: torch.Tensor,
    deviations: torch.Tensor,
    layers: Sequence[_Layer],
    order: _Order,
    count: int,
    num_tokens: int,
) -> tuple[_Layer, float]:
    """Fit with a context, and say how many bits it saves, as a negative number: those of its weights counted."""
    num_own = own.shape[1]
    num_before = inputs.shape[1] - num_own
    permuted = torch.cat([torch.arange(num_before), num_before + order.channels])
    covariance = (inputs.T @ inputs).double()[permuted][:, permuted] / len(inputs)
    covariance += torch.eye(len(covariance), dtype=covariance.dtype) * (1e-4 + 0.005 * len(covariance) / len(inputs))
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
    restored = torch.empty_like(weights)
    restored[:, permuted] = weights
    by_channel = torch.empty_like(restored)
    by_channel[order.channels] = restored
    deviation = torch.empty_like(residuals)
    deviation[order.channels] = residuals.sqrt()

    exponents = _exponents(deviation * deviations, own.abs().amax(0), order)
    units = torch.cat([*(layer.units for layer in layers), _history(deviations, exponents)[1]])
    steps = deviation * math.sqrt(12 / num_tokens)
    scaled = by_channel * (_HISTORY_UNIT * units)
    steps = torch.maximum(steps, scaled.abs().amax(1) / _MAX_WEIGHT).clamp_min(1e-9)
    scaled = scaled / steps[:, None]
    rounded = torch.where(scaled.abs() < _DEADZONE, 0.0, scaled.round())
    multipliers = steps / _HISTORY_UNIT
    predicted = (inputs @ (rounded / units).float().T).double() * multipliers * deviations
    found = _finish(
        own, means, deviations, predicted, multipliers * deviations, order, count, rounded.to(torch.int8).numpy()
    )
    saved = ((own - means - predicted).std(0, correction=0) / deviations).clamp_min(1e-6).log2().sum().item()
    return found, num_tokens * saved + _entropy_bits(found.weights)


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
    history_shifts, units = _history(deviations, exponents)
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
    return _Layer(before, weights if weights is not None else empty, channels, means, deviations, units)


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


def _history(deviations: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far units are shifted for the history, and what one is there, in standard deviations."""
    in_units = deviations * torch.exp2(exponents)
    shifts = (in_units.log2() - 8).floor().clamp(0, 40)
    return shifts, torch.exp2(shifts) / in_units


def _vectors(cache: KVCache, layer: int, positions: torch.Tensor, rotary: RotaryEmbedding | None) -> torch.Tensor:
    """Return a layer's keys, their rotary embedding undone, and values: fp64 `[num_positions, num_channels]`."""
    keys, values = (plane[positions].float() for plane in (cache.keys[layer], cache.values[layer]))
    if rotary is not None:
        cosines, sines, _ = rotation_of(rotary, int(positions[-1]) + 1, 0, positions.device)
        keys = undo_rotation(keys, cosines[positions], sines[positions], 1.0)
    return torch.cat([keys.flatten(1), values.flatten(1)], dim=1).double().nan_to_num(0.0, 0.0, 0.0)


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
    """Let torch compute on one thread: sums then have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
