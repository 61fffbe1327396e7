"""What a load did: a report per chunk, and every worker's spans of time, from which a timeline can be drawn."""

from __future__ import annotations

from dataclasses import dataclass

from cachegen.streaming.policy import Choice, Speeds, ThroughputSample


@dataclass(frozen=True)
class Span:
    """What one worker did from when to when, in seconds since the request began.

    Attributes:
        worker: "fetch", "decode", "copy" or "compute".
        level: "text" where it computed.
        outcome: "done", "cancelled", "discarded", or why it failed.
    """

    worker: str
    chunk: int
    level: Choice
    start_seconds: float
    end_seconds: float
    num_bytes: int = 0
    outcome: str = "done"


@dataclass(frozen=True)
class ChunkReport:
    """How one chunk came into the cache.

    Attributes:
        source: "text" or "store".
        level: the one that was used, or "text".
        num_bytes: of all files that were fetched for it, used or not.
        seconds: in which they were fetched.
        estimate_bytes_per_second: the throughput to count on when its last request was sent; None before any sample.
        num_queued: files that waited for the decoder when its last one arrived.
        num_exact_tokens: tokens that were computed, from the chunk's first on.
        problems: errors on the way, one line each.
    """

    chunk: int
    first_token: int
    num_tokens: int
    source: str
    level: Choice
    num_bytes: int
    seconds: float
    estimate_bytes_per_second: float | None
    num_queued: int
    num_exact_tokens: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class LoadResult:
    """What loading took and gave.

    Attributes:
        expected_loss: of the levels in the cache, as the policy counts it.
        received_bytes: of all bodies, tables and abandoned files included.
        ready_seconds: when the cache was complete and the policy content.
    """

    chunks: tuple[ChunkReport, ...]
    spans: tuple[Span, ...]
    samples: tuple[ThroughputSample, ...]
    speeds: Speeds
    expected_loss: float
    received_bytes: int
    ready_seconds: float

    @property
    def problems(self) -> list[str]:
        """All errors on the way, in the order of the chunks."""
        return [problem for chunk in self.chunks for problem in chunk.problems]
