"""Estimate a link's throughput from what it has delivered: plainly, and conservatively."""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.streaming.policy import LoadState, ThroughputSample

WINDOW = 5
"""Samples that an estimate looks back on: half a second at one per 100 ms."""


def harmonic_mean(samples: Sequence[ThroughputSample]) -> float:
    """Return the harmonic mean of the samples' throughputs in bytes per second; 0 where one of them is 0 or none is.

    It is the rate at which equal amounts of bytes at these throughputs would come.
    """
    if not samples or any(sample.num_bytes <= 0 or sample.seconds <= 0 for sample in samples):
        return 0.0
    return len(samples) / sum(sample.seconds / sample.num_bytes for sample in samples)


def recent_throughput(state: LoadState) -> float | None:
    """Return the bytes per second of the last samples, all bytes over all seconds; the prior where there is none.

    None where nothing is known yet.
    """
    window = [sample for sample in state.samples[-WINDOW:] if sample.seconds > 0]
    if not window:
        return state.speeds.prior_bytes_per_second
    return sum(sample.num_bytes for sample in window) / sum(sample.seconds for sample in window)


def conservative_throughput(state: LoadState) -> float | None:
    """Return the bytes per second to count on: harmonic mean of the last samples / (1 + largest recent error).

    The error of a sample is how far the harmonic mean of the samples before it overestimated or underestimated it,
    relative to it; the largest over the window counts. A stalled sample thus gives 0.

    Source: Yin et al., "A Control-Theoretic Approach for Dynamic Adaptive Video Streaming over HTTP", SIGCOMM 2015,
    section 4.3 (RobustMPC), with intervals of time in place of video chunks.
    """
    samples = state.samples
    if not samples:
        return state.speeds.prior_bytes_per_second
    estimate = harmonic_mean(samples[-WINDOW:])
    if estimate == 0:
        return 0.0
    largest_error = 0.0
    for last in range(max(1, len(samples) - WINDOW), len(samples)):
        actual = samples[last].num_bytes / samples[last].seconds
        predicted = harmonic_mean(samples[max(0, last - WINDOW) : last])
        largest_error = max(largest_error, abs(predicted - actual) / actual)
    return estimate / (1 + largest_error)
