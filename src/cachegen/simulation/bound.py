"""What a loader could reach that knows the trace: the bound that the simulated policies are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cachegen.simulation.traces import BandwidthTrace
from cachegen.streaming.policy import ChunkLevels, Objective, PrefillSpeed, Speeds

_NUM_BISECTIONS = 50


def clairvoyant_bound(
    chunks: Sequence[ChunkLevels],
    objective: Objective,
    speeds: Speeds,
    trace: BandwidthTrace,
    *,
    num_connections: int = 1,
) -> tuple[float, float]:
    """Return a time to first token, and the loss then, that no loader computing a prefix can be better than.

    It knows the trace, computes and loads single tokens instead of chunks, uses parts of files, decodes in no time, and
    waits for one first byte only. It aims as the policies do: for the target loss; at the deadline for what loss it
    can; and for the first time at which all is there, if that is later.
    """
    text_seconds = sum(speeds.prefill.seconds(chunk.first_token, chunk.num_tokens) for chunk in chunks)

    def loss_at(seconds: float) -> float:
        if seconds >= text_seconds:
            return 0.0
        return _smallest_loss(chunks, speeds, trace, seconds - speeds.first_token_seconds, num_connections)

    complete = _first_time(lambda seconds: loss_at(seconds) < math.inf, text_seconds)
    good_enough = _first_time(lambda seconds: loss_at(seconds) <= objective.target_loss, text_seconds)
    ttft = min(good_enough, max(complete, objective.deadline_seconds))
    return ttft, loss_at(ttft)


def _first_time(is_reached, latest: float) -> float:
    """Return the first time at which `is_reached`, which stays true once it is, and is at `latest`."""
    low, high = 0.0, latest
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_reached(middle) else (middle, high)
    return high


def _smallest_loss(
    chunks: Sequence[ChunkLevels], speeds: Speeds, trace: BandwidthTrace, seconds: float, num_connections: int
) -> float:
    """Return the smallest loss of a cache that is complete after so long; infinity where none is."""
    unloadable = [chunk for chunk in chunks if not chunk.num_levels]
    compute_seconds = seconds - sum(speeds.prefill.seconds(c.first_token, c.num_tokens) for c in unloadable)
    if compute_seconds < 0:
        return math.inf
    num_computed = _tokens_in(speeds.prefill, compute_seconds)
    budget = _budget(trace, seconds, num_connections)
    loss = 0.0
    steps: list[tuple[float, float, float]] = []  # loss reduction per cost, cost, loss reduction
    for index, chunk in enumerate(chunks):
        share = min(1.0, (chunk.end_token - num_computed) / chunk.num_tokens)
        if share <= 0 or not chunk.num_levels:
            continue
        unit = _cost_of_byte(trace, index) * share
        budget -= chunk.bytes_of(1) * unit
        loss += chunk.loss[0] * share
        for num_bytes, gain in _hull(chunk):
            steps.append((gain * share / max(num_bytes * unit, 1e-300), num_bytes * unit, gain * share))
    if budget < 0 or math.isnan(budget):
        return math.inf
    for _, cost, gain in sorted(steps, reverse=True):
        part = 1.0 if cost <= budget else budget / cost
        budget -= cost * part
        loss -= gain * part
        if part < 1:
            break
    return max(0.0, loss)


def _budget(trace: BandwidthTrace, seconds: float, num_connections: int) -> float:
    """Return what can be spent until then: bytes, or seconds of the link where the trace is indexed by chunk."""
    waited = min(trace.first_byte_seconds)
    if seconds <= waited:
        return 0.0
    if trace.is_per_chunk:
        return seconds - waited
    most = num_connections * trace.connection_rate * (seconds - waited)
    return min(most, trace.bytes_until(seconds) - trace.bytes_until(waited))


def _cost_of_byte(trace: BandwidthTrace, index: int) -> float:
    if not trace.is_per_chunk:
        return 1.0
    rate = trace.rate_of_chunk(index)
    return 1.0 / rate if rate > 0 else math.inf


def _hull(chunk: ChunkLevels) -> list[tuple[float, float]]:
    """Return the steps (bytes, loss reduction) up the lower convex hull of the chunk's levels, from level 1."""
    steps = []
    current = 1
    while True:
        options = []
        for level in range(1, chunk.num_levels + 1):
            num_bytes = chunk.bytes_of(level) - chunk.bytes_of(current)
            gain = chunk.loss[current - 1] - chunk.loss[level - 1]
            if num_bytes > 0 and gain > 0:
                options.append((gain / num_bytes, level, num_bytes, gain))
        if not options:
            return steps
        _, current, num_bytes, gain = max(options)
        steps.append((num_bytes, gain))


def _tokens_in(prefill: PrefillSpeed, seconds: float) -> float:
    """Return how many tokens are computed in so long, from the document's start: `PrefillSpeed.seconds` inverted."""
    work = seconds / prefill.overhead
    rate, k = prefill.tokens_per_second, prefill.attention_seconds
    # k x^2 + x / R = work, by the form of its root that is stable for small k.
    return 2 * work / (1 / rate + math.sqrt(1 / rate**2 + 4 * k * work))
