"""Replay one request over a bandwidth trace, with the same policy functions that the real client calls.

One request is integrated exactly: between two events all rates are constant, and the next event is computed, not
stepped to. Events are: a file's first or last byte, a change of the trace, the end of a throughput sample, the end of a
chunk's computing or decoding, and the time at which the policy wants to be asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from cachegen.simulation.traces import BandwidthTrace
from cachegen.streaming.load_report import Span
from cachegen.streaming.policy import (
    TEXT,
    Choice,
    ChunkLevels,
    ChunkProgress,
    Computing,
    Decision,
    Decoding,
    Fetch,
    LoadState,
    Objective,
    Policy,
    Speeds,
    ThroughputSample,
    Transfer,
)

SAMPLE_SECONDS = 0.1
SHORTEST_SAMPLE_SECONDS = 0.01
"""A sample also ends with a file, unless it is shorter than this."""

DEFAULT_BLOCK_TOKENS = 256
"""Tokens that the model computes in one go; it can break off between two layers."""

_TINY = 1e-9


@dataclass(frozen=True)
class SimulatedRequest:
    """How one request went.

    Attributes:
        ttft_seconds: time to the first token; infinite where the policy waits for a link that gives nothing any more.
        loss: expected loss of the cache that the model then had; of what was ready, where there is no first token.
        num_bytes: received, whether used or not.
        levels: of each chunk in that cache; `TEXT` where it was computed, 0 where it is not ready.
        spans: what the workers did, by the time at which it ended.
        num_decisions: how often the policy was asked.
    """

    ttft_seconds: float
    loss: float
    num_bytes: float
    levels: tuple[Choice, ...]
    spans: tuple[Span, ...]
    num_decisions: int


def simulate_request(
    policy: Policy,
    chunks: tuple[ChunkLevels, ...],
    objective: Objective,
    speeds: Speeds,
    trace: BandwidthTrace,
    *,
    true_speeds: Speeds | None = None,
    num_connections: int = 1,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    num_layers: int = 1,
    is_whole_only: bool = False,
    observe: Callable[[LoadState], None] | None = None,
) -> SimulatedRequest:
    """Load one document over `trace` and return when its first token came.

    All connections share the link equally. Files of a trace indexed by chunk travel one after the other.

    Args:
        policy: what to do after each event.
        chunks: the document.
        objective: handed to the policy.
        speeds: what the policy believes of the machine.
        trace: what the link gives; the policy sees only what has arrived.
        true_speeds: how fast the machine is; None for as fast as `speeds` says.
        num_connections: requests that may be in flight together.
        block_tokens: tokens that the model computes in one go.
        num_layers: of the model. When the policy ends while the model computes, the first token waits for the end of
            the layer, whose time is its part of the block's; 1 for a model that cannot leave a block half-way.
        is_whole_only: as in `LoadState`.
        observe: called with each state before the policy is.

    Raises:
        RuntimeError: the policy neither ends nor waits for anything: a bug in it.
    """
    world = _World(chunks, objective, speeds, true_speeds or speeds, trace, num_connections, is_whole_only)
    num_decisions = 0
    while True:
        state = world.state()
        if observe is not None:
            observe(state)
        decision = policy(state)
        num_decisions += 1
        if decision.is_finished:
            return world.finish(state, block_tokens, num_layers, num_decisions)
        world.apply(decision)
        if decision.cancel:
            continue  # connections are free again
        if not world.advance(decision.wake_at_seconds):
            return replace(world.finish(state, block_tokens, num_layers, num_decisions), ttft_seconds=math.inf)


@dataclass
class _Request:
    """One file on its way."""

    fetch: Fetch
    started_seconds: float
    first_byte_at: float
    num_bytes: int
    bytes_left: float


class _World:
    """Everything that moves: the link, the model and the decoder, and what the client has noted of them."""

    def __init__(
        self,
        chunks: tuple[ChunkLevels, ...],
        objective: Objective,
        believed: Speeds,
        true: Speeds,
        trace: BandwidthTrace,
        num_connections: int,
        is_whole_only: bool,
    ) -> None:
        self._known = LoadState(
            chunks,
            (ChunkProgress(),) * len(chunks),
            objective,
            believed,
            num_connections=num_connections,
            is_whole_only=is_whole_only,
        )
        self._chunks = chunks
        self._true = true
        self._trace = trace
        self._now = 0.0
        self._progress = list(self._known.progress)
        self._requests: list[_Request] = []
        self._num_requests = 0
        self._finished: list[Transfer] = []
        self._samples: list[ThroughputSample] = []
        self._sample_started: float | None = None
        self._sample_bytes = 0.0
        self._computing: Computing | None = None
        self._decoding: Decoding | None = None
        self._compute_left = 0.0
        self._decode_left = 0.0
        self._received = 0.0
        self._spans: list[Span] = []

    def state(self) -> LoadState:
        """Return what the client knows now."""
        return replace(
            self._known,
            progress=tuple(self._progress),
            elapsed_seconds=self._now,
            in_flight=tuple(
                Transfer(r.fetch.chunk, r.fetch.level, int(r.num_bytes - r.bytes_left), r.started_seconds)
                for r in self._requests
            ),
            finished=tuple(self._finished),
            samples=tuple(self._samples),
            computing=self._computing,
            decoding=self._decoding,
        )

    def apply(self, decision: Decision) -> None:
        """Start and cancel what the policy says."""
        for chunk, level in decision.choices:
            self._progress[chunk] = replace(self._progress[chunk], choice=level)
        for request in [r for r in self._requests if r.fetch in decision.cancel]:
            self._requests.remove(request)
            self._note_fetch(request, "cancelled")
        for fetch in decision.fetch:
            times = self._trace.first_byte_seconds
            first_byte_at = self._now + times[self._num_requests % len(times)]
            size = self._chunks[fetch.chunk].file_bytes[fetch.level - 1]
            self._requests.append(_Request(fetch, self._now, first_byte_at, size, float(size)))
            self._num_requests += 1
        if decision.compute is not None:
            chunk = self.state().chunk_to_compute(decision.compute)
            self._computing = Computing(chunk, self._now)
            self._compute_left = self._prefill_seconds(chunk)
        if decision.decode is not None:
            chunk, level = decision.decode.chunk, decision.decode.level
            self._decoding = Decoding(chunk, level, self._now)
            self._decode_left = self._true.decode.seconds(self._chunks[chunk], level)
        if self._requests and self._sample_started is None:
            self._sample_started, self._sample_bytes = self._now, 0.0

    def advance(self, wake_at: float | None) -> bool:
        """Go to the next event; return False where the only thing waited for is a link that gives nothing any more."""
        if not self._requests and self._sample_started is not None:
            self._end_sample()
            self._sample_started = None
        rates = self._link_rates()
        compute_rate = 1.0 - (self._true.decode.compute_slowdown if self._decoding is not None else 0.0)
        waits = [r.bytes_left / rate if rate > 0 else math.inf for r, rate in zip(self._requests, rates, strict=True)]
        waits += [r.first_byte_at - self._now for r in self._requests if r.first_byte_at > self._now]
        if self._requests and not self._trace.is_per_chunk:
            waits.append(self._trace.next_change(self._now) - self._now)
        if self._computing is not None:
            waits.append(self._compute_left / compute_rate if compute_rate > 0 else math.inf)
        if self._decoding is not None:
            waits.append(self._decode_left)
        if wake_at is not None and wake_at > self._now:
            waits.append(wake_at - self._now)
        if not waits:
            raise RuntimeError(f"the policy waits for nothing at {self._now:.3f} s")
        if min(waits) == math.inf:
            return False
        if self._sample_started is not None:
            waits.append(max(0.0, self._sample_started + SAMPLE_SECONDS - self._now))
        step = max(0.0, min(waits))

        self._now += step
        for request, rate in zip(self._requests, rates, strict=True):
            moved = min(request.bytes_left, rate * step)
            request.bytes_left -= moved
            self._received += moved
            self._sample_bytes += moved
        self._compute_left -= step * compute_rate
        if self._computing is not None and compute_rate < 1:
            delayed = self._computing.delayed_seconds + step * (1 - compute_rate)
            self._computing = replace(self._computing, delayed_seconds=delayed)
        self._decode_left -= step
        self._end_work()
        self._end_requests()
        return True

    def finish(self, state: LoadState, block_tokens: int, num_layers: int, num_decisions: int) -> SimulatedRequest:
        """Return the result; the model first ends the layer that it is in, the question then needs its time.

        Where the document's last tokens were computed last, the question was computed with them.
        """
        end = self._now
        last = self._spans[-1] if self._spans else None
        ended_by_computing = last is not None and last.worker == "compute" and last.chunk == len(self._chunks) - 1
        if self._computing is not None:
            end += self._stop_seconds(block_tokens, num_layers)
            work = self._computing
            self._spans.append(Span("compute", work.chunk, TEXT, work.started_seconds, end, outcome="cancelled"))
        for request in self._requests:
            self._note_fetch(request, "cancelled")
        if not ended_by_computing:
            end += self._true.first_token_seconds
        return SimulatedRequest(
            ttft_seconds=end,
            loss=state.loss,
            num_bytes=self._received,
            levels=tuple(TEXT if p.is_computed else p.decoded_level for p in self._progress),
            spans=tuple(self._spans),
            num_decisions=num_decisions,
        )

    def _link_rates(self) -> list[float]:
        """Return the bytes per second of each request."""
        is_active = [r.first_byte_at <= self._now for r in self._requests]
        if self._trace.is_per_chunk:
            first = is_active.index(True) if True in is_active else -1
            return [
                self._trace.rate_of_chunk(r.fetch.chunk) if i == first else 0.0 for i, r in enumerate(self._requests)
            ]
        share = self._trace.rate_at(self._now) / max(1, sum(is_active))
        rate = min(share, self._trace.connection_rate)
        return [rate if active else 0.0 for active in is_active]

    def _end_work(self) -> None:
        if self._decoding is not None and self._decode_left <= _TINY:
            work = self._decoding
            self._progress[work.chunk] = replace(self._progress[work.chunk], decoded_level=work.level)
            self._spans.append(Span("decode", work.chunk, work.level, work.started_seconds, self._now))
            self._decoding = None
        if self._computing is not None and self._compute_left <= _TINY:
            work = self._computing
            self._progress[work.chunk] = replace(self._progress[work.chunk], is_computed=True)
            self._spans.append(Span("compute", work.chunk, TEXT, work.started_seconds, self._now))
            self._computing = None

    def _end_requests(self) -> None:
        done = [r for r in self._requests if r.bytes_left <= 1e-3 and r.first_byte_at <= self._now]
        for request in done:
            self._requests.remove(request)
            chunk, level = request.fetch.chunk, request.fetch.level
            progress = self._progress[chunk]
            self._progress[chunk] = replace(progress, arrived=progress.arrived | {level})
            self._finished.append(Transfer(chunk, level, request.num_bytes, request.started_seconds, self._now))
            self._note_fetch(request, "done")
        if self._sample_started is None:
            return
        length = self._now - self._sample_started
        if length >= SAMPLE_SECONDS - _TINY or (done and length >= SHORTEST_SAMPLE_SECONDS):
            self._end_sample()

    def _end_sample(self) -> None:
        """Note the sample and begin the next."""
        assert self._sample_started is not None
        length = self._now - self._sample_started
        if length > 0:
            self._samples.append(ThroughputSample(length, int(self._sample_bytes)))
        self._sample_started, self._sample_bytes = self._now, 0.0

    def _note_fetch(self, request: _Request, outcome: str) -> None:
        num_bytes = int(request.num_bytes - request.bytes_left)
        fetch = request.fetch
        self._spans.append(
            Span("fetch", fetch.chunk, fetch.level, request.started_seconds, self._now, num_bytes, outcome)
        )

    def _prefill_seconds(self, chunk: int, num_tokens: int | None = None) -> float:
        levels = self._chunks[chunk]
        return self._true.prefill.seconds(levels.first_token, levels.num_tokens if num_tokens is None else num_tokens)

    def _stop_seconds(self, block_tokens: int, num_layers: int) -> float:
        """Return the seconds until the model is through the layer of the block that it computes now."""
        assert self._computing is not None
        chunk = self._computing.chunk
        whole = self._prefill_seconds(chunk)
        done = whole - self._compute_left
        if done <= _TINY:
            return 0.0
        begin = 0.0
        for stop in range(block_tokens, self._chunks[chunk].num_tokens + block_tokens, block_tokens):
            end = self._prefill_seconds(chunk, min(stop, self._chunks[chunk].num_tokens))
            if end >= done - _TINY:
                layer_seconds = (end - begin) / num_layers
                layers_done = math.ceil((done - begin) / layer_seconds - 1e-6)
                return max(0.0, begin + layers_done * layer_seconds - done)
            begin = end
        return self._compute_left
