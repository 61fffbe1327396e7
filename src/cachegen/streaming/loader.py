"""Run a policy on a real machine: fetch, decode and compute at the same time, until the cache is complete.

Four kinds of threads share one state under one lock. The controller asks the policy after every event and hands out
work; each request has a thread that fetches; one thread decodes; the caller's thread computes, since it is the one
that runs the model. A file that cannot be had, is corrupt or comes too slowly is reported to the policy as missing:
what no file gives is computed from the text.

Files of a document that can only be used whole lack, in some layers, what tokens within it attend to. What is computed
of it is a beginning: where a chunk in the middle cannot be had, all before it are computed first.

The cache is never wrong: a decoded chunk waits outside of it until no block of the same chunk is being computed, and
what was computed of the chunk by then is kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from cachegen.errors import CacheGenError
from cachegen.store.store import RetryRule
from cachegen.streaming.estimator import conservative_throughput
from cachegen.streaming.load_report import ChunkReport, LoadResult, Span
from cachegen.streaming.policy import (
    TEXT,
    Choice,
    ChunkLevels,
    ChunkProgress,
    Computing,
    Decision,
    DecodeSpeed,
    Decoding,
    Fetch,
    LoadState,
    Objective,
    Policy,
    Speeds,
    ThroughputSample,
    Transfer,
)
from cachegen.streaming.remote import FetchedFile

SAMPLE_SECONDS = 0.1
SILENT_STALLS = 2.5  # in a row, after which a request is given up for good
SILENCE_SECONDS = SILENT_STALLS * RetryRule.stall_seconds
"""Without a piece of a body, after which a request is given up: the store's own retries have had their chance."""

_SHORT_SAMPLE_SECONDS = 0.01


class Workers(Protocol):
    """What a loader needs done. Each method is called from one thread at a time, but `fetch`."""

    block_size: int

    def fetch(self, chunk: int, level: int, on_bytes: Callable[[int], object]) -> FetchedFile:
        """Return a file, whole and checked; `on_bytes` may raise to stop. Raises a CacheGenError on failure."""
        ...

    def decode(self, chunk: int, level: int, contents: Mapping[int, bytearray]) -> Callable[[int], object]:
        """Decode files outside the cache; returns what copies the chunk's tokens from a position on into it."""
        ...

    def prepare(self) -> None:
        """Do what needs no file, in the thread that computes, while the first requests are on their way."""
        ...

    def compute(self, start: int, stop: int, should_stop: Callable[[], bool]) -> bool:
        """Compute tokens `start` to `stop`, all before them being in the cache.

        Returns:
            False where it broke off because `should_stop()` was true; what it has written is then valid layer by
            layer, but not for all layers.
        """
        ...


class _Cancelled(Exception):
    """Stop a fetch whose result nobody wants any more."""


@dataclass
class _Chunk:
    """A chunk's progress, and its report in the making."""

    levels: ChunkLevels
    arrived: dict[int, bytearray] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    decoded_level: int = 0
    is_computed: bool = False
    choice: Choice | None = None
    num_exact_tokens: int = 0
    estimate: float | None = None
    num_queued: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def progress(self) -> ChunkProgress:
        return ChunkProgress(
            arrived=frozenset(self.arrived),
            missing=frozenset(self.missing),
            decoded_level=self.decoded_level,
            is_computed=self.is_computed,
            choice=self.choice,
        )


@dataclass
class _Request:
    """A request in flight."""

    chunk: int
    level: int
    started_seconds: float
    last_bytes_seconds: float
    num_bytes: int = 0
    is_cancelled: bool = False


class Loader:
    """Loads one document once; a context manager, since a fetch or a decode may outlast the loading."""

    def __init__(
        self,
        chunks: Sequence[ChunkLevels],
        workers: Workers,
        policy: Policy,
        objective: Objective,
        speeds: Speeds,
        *,
        num_connections: int = 1,
        elapsed_seconds: float = 0.0,
        silence_seconds: float = SILENCE_SECONDS,
        is_whole_only: bool = False,
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            speeds: as known before; measured ones replace them on the way.
            elapsed_seconds: that the request has taken already, for instance to find the document.
            is_whole_only: as in `LoadState`. Whatever the policy says, no chunk is computed then before all in front of
                it are.
        """
        self._is_whole_only = is_whole_only
        self._levels = tuple(chunks)
        self._workers, self._policy, self._objective = workers, policy, objective
        self._speeds, self._num_connections, self._silence_seconds = speeds, num_connections, silence_seconds
        self._origin = time.perf_counter() - elapsed_seconds
        self._changed = threading.Condition()
        self._chunks = [_Chunk(levels) for levels in chunks]
        self._requests: list[_Request] = []
        self._finished: list[Transfer] = []
        self._samples: list[ThroughputSample] = []
        self._spans: list[Span] = []
        self._computing: Computing | None = None
        self._decoding: Decoding | None = None
        self._placing: int | None = None
        self._is_compute_unwanted = False
        self._is_over = False
        self._has_news = False
        self._failure: BaseException | None = None
        self._interval_start = 0.0
        self._interval_bytes = self._received_bytes = 0
        self._computed = [0.0, 0.0]  # seconds measured, seconds predicted
        self._decoded = [0.0, 0.0]  # tokens, seconds
        self._decoder_busy = [0.0, 0.0]  # seconds until its last stop, when it began; 0 while idle
        self._decoder: threading.Thread | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all threads; one that waits for a silent server ends by itself."""
        with self._changed:
            self._end()
        if self._decoder is not None:
            self._decoder.join()

    @property
    def is_over(self) -> bool:
        """Whether the load has ended."""
        return self._is_over

    @property
    def received_bytes(self) -> int:
        """Bytes of all bodies so far."""
        return self._received_bytes

    def run(self) -> LoadResult:
        """Load until the policy is content; computes in this thread.

        Raises:
            CacheGenError: a worker's, if it is not about a file of the store.
        """
        self._decoder = self._start(self._decode_when_told)
        self._start(self._control)
        try:
            self._workers.prepare()
            while (chunk := self._wait_for_compute()) is not None:
                self._compute(chunk)
        finally:
            with self._changed:
                self._end()
                while self._placing is not None and self._failure is None:
                    self._changed.wait()  # what is being copied is in the cache, or will be, and in the report
        if self._failure is not None:
            raise self._failure
        if not all(chunk.progress.is_ready for chunk in self._chunks):
            raise RuntimeError("the policy ended the load before every chunk was ready")
        return self._report()

    # --- the caller's thread: compute ---------------------------------------------------------------------------------

    def _wait_for_compute(self) -> int | None:
        """Return the next chunk to compute; None at the end."""
        with self._changed:
            while not self._is_over and self._computing is None:
                self._changed.wait()
            return None if self._is_over or self._computing is None else self._computing.chunk

    def _compute(self, index: int) -> None:
        """Compute a chunk block by block, until it is done, decoded meanwhile, or nobody needs it any more."""
        chunk = self._chunks[index]
        first, end = chunk.levels.first_token, chunk.levels.end_token
        position = first + chunk.num_exact_tokens
        while position < end:
            stop = min(position + self._workers.block_size, end)
            start_seconds = self._now()
            busy_seconds = self._decoder_busy_seconds()
            is_whole = self._workers.compute(position, stop, self._should_stop_computing)
            with self._changed:
                if not is_whole:
                    self._log("compute", index, TEXT, start_seconds, outcome="cancelled")
                    break
                self._log("compute", index, TEXT, start_seconds)
                # What the decoder took of the processor meanwhile is not the model's own speed.
                slowdown = self._speeds.decode.compute_slowdown
                delay_seconds = slowdown * (self._decoder_busy_seconds() - busy_seconds)
                if self._computing is not None:
                    delayed = self._computing.delayed_seconds + delay_seconds
                    self._computing = replace(self._computing, delayed_seconds=delayed)
                self._computed[0] += self._now() - start_seconds - delay_seconds
                self._computed[1] += self._speeds.prefill.seconds(position, stop - position)
                chunk.num_exact_tokens = stop - first
                position = stop
                if self._should_stop_computing() and position < end:
                    break
        with self._changed:
            chunk.is_computed = chunk.is_computed or position == end
            self._computing, self._is_compute_unwanted = None, False
            self._announce()

    def _should_stop_computing(self) -> bool:
        return self._is_over or self._is_compute_unwanted

    # --- the decoder's thread -----------------------------------------------------------------------------------------

    def _decode_when_told(self) -> None:
        while True:
            with self._changed:
                while not self._is_over and self._decoding is None:
                    self._changed.wait()
                if self._is_over or self._decoding is None:
                    return
                index, level = self._decoding.chunk, self._decoding.level
                chunk = self._chunks[index]
                contents = {number: chunk.arrived[number] for number in chunk.levels.files_of(level)}
            start_seconds = self._now()
            self._decoder_busy[1] = start_seconds
            try:
                place = self._workers.decode(index, level, contents)
            except CacheGenError as error:
                with self._changed:
                    self._decoder_busy = [self._decoder_busy_seconds(), 0.0]
                    self._log("decode", index, level, start_seconds, outcome=str(error))
                    self._lose(index, level, str(error))
            else:
                with self._changed:
                    self._decoder_busy = [self._decoder_busy_seconds(), 0.0]
                    num_bytes = sum(map(len, contents.values()))
                    self._log("decode", index, level, start_seconds, num_bytes)
                    self._decoded[0] += chunk.levels.num_tokens
                    self._decoded[1] += self._now() - start_seconds
                self._place(index, level, place)
            with self._changed:
                self._decoding = None
                self._announce()

    def _decoder_busy_seconds(self) -> float:
        """Return how long the decoder has been at work."""
        total, started = self._decoder_busy
        return total + (self._now() - started if started else 0.0)

    def _place(self, index: int, level: int, place: Callable[[int], object]) -> None:
        """Copy a decoded chunk into the cache, behind what was computed of it."""
        chunk = self._chunks[index]
        with self._changed:
            self._placing = index  # from here on nobody begins to compute it
            while self._computing is not None and self._computing.chunk == index and not self._is_over:
                self._is_compute_unwanted = True
                self._changed.wait()
            if self._is_over or chunk.is_computed:
                self._placing = None
                self._log("copy", index, level, self._now(), outcome="discarded")
                return
        start_seconds = self._now()
        place(chunk.levels.first_token + chunk.num_exact_tokens)
        with self._changed:
            self._placing = None
            chunk.decoded_level = level
            self._log("copy", index, level, start_seconds)
            self._decoded[1] += self._now() - start_seconds

    # --- the fetchers' threads ----------------------------------------------------------------------------------------

    def _fetch(self, request: _Request) -> None:
        def count(num_bytes: int) -> None:
            with self._changed:
                if request.is_cancelled or self._is_over:
                    raise _Cancelled
                request.num_bytes += num_bytes
                request.last_bytes_seconds = self._now()
                self._interval_bytes += num_bytes
                self._received_bytes += num_bytes

        error, fetched = None, None
        try:
            fetched = self._workers.fetch(request.chunk, request.level, count)
        except _Cancelled:
            return
        except CacheGenError as caught:
            error = str(caught)
        with self._changed:
            if request.is_cancelled or self._is_over:
                return
            self._close_sample(_SHORT_SAMPLE_SECONDS)
            self._requests.remove(request)
            chunk = self._chunks[request.chunk]
            if fetched is None:
                self._log_fetch(request, error or "failed")
                self._lose(request.chunk, request.level, error or "failed")
            else:
                self._log_fetch(request, "done")
                chunk.problems += fetched.retries
                chunk.arrived[request.level] = fetched.content
                is_waiting = [any(level > c.decoded_level for level in c.arrived) for c in self._chunks]
                chunk.num_queued = sum(is_waiting) - 1
                now = self._now()
                num_bytes = len(fetched.content)
                self._finished.append(Transfer(request.chunk, request.level, num_bytes, request.started_seconds, now))
            self._announce()

    # --- the controller's thread --------------------------------------------------------------------------------------

    def _control(self) -> None:
        with self._changed:
            while not self._is_over:
                self._has_news = False
                self._close_sample(SAMPLE_SECONDS)
                self._abandon_silent_requests()
                decision = self._policy(self._observe())
                self._follow(decision)
                if self._is_over:
                    return
                if not self._has_news:
                    self._changed.wait(self._seconds_to_next_look(decision))

    def _observe(self) -> LoadState:
        """Return what the policy may know."""
        sizes = self._levels
        in_flight = tuple(
            Transfer(r.chunk, r.level, min(r.num_bytes, sizes[r.chunk].file_bytes[r.level - 1]), r.started_seconds)
            for r in self._requests
        )
        return LoadState(
            chunks=sizes,
            progress=tuple(chunk.progress for chunk in self._chunks),
            objective=self._objective,
            speeds=self._measured_speeds(),
            elapsed_seconds=self._now(),
            in_flight=in_flight,
            finished=tuple(self._finished),
            samples=tuple(self._samples),
            computing=self._computing,
            decoding=self._decoding,
            num_connections=self._num_connections,
            is_whole_only=self._is_whole_only,
        )

    def _follow(self, decision: Decision) -> None:
        """Do what the policy decided."""
        for index, choice in decision.choices:
            self._chunks[index].choice = choice
        for fetch in decision.cancel:
            self._cancel(fetch)
        if decision.is_finished:
            self._end()
            return
        for fetch in decision.fetch[: self._num_connections - len(self._requests)]:
            self._send(fetch)
        if decision.decode is not None and self._decoding is None:
            self._decoding = Decoding(decision.decode.chunk, decision.decode.level, self._now())
        compute = decision.compute
        is_idle = self._computing is None and self._decoding is None and not self._requests
        if compute is None and is_idle and decision.wake_at_seconds is None:
            # Nothing would ever happen again. Text always leads to an answer.
            compute = next((i for i, chunk in enumerate(self._chunks) if not chunk.progress.is_ready), None)
            if compute is None:
                self._end()
                return
        if compute is not None:
            compute = self._observe().chunk_to_compute(compute)
        if compute is not None and self._computing is None and compute != self._placing:
            self._computing = Computing(compute, self._now())
        self._changed.notify_all()

    def _send(self, fetch: Fetch) -> None:
        now = self._now()
        if not self._requests:
            self._interval_start, self._interval_bytes = now, 0
        request = _Request(fetch.chunk, fetch.level, now, now)
        self._chunks[fetch.chunk].estimate = conservative_throughput(self._observe())
        self._requests.append(request)
        self._start(self._fetch, request)

    def _cancel(self, fetch: Fetch) -> None:
        for request in [r for r in self._requests if (r.chunk, r.level) == (fetch.chunk, fetch.level)]:
            request.is_cancelled = True
            self._requests.remove(request)
            self._log_fetch(request, "cancelled")

    def _abandon_silent_requests(self) -> None:
        for request in list(self._requests):
            silence = self._now() - request.last_bytes_seconds
            if silence >= self._silence_seconds:
                self._cancel(Fetch(request.chunk, request.level))
                message = f"chunk {request.chunk}, level {request.level}: given up after {silence:.1f} s of silence"
                self._lose(request.chunk, request.level, message)

    def _lose(self, index: int, level: int, problem: str) -> None:
        """Tell the policy that a level of a chunk cannot be had."""
        chunk = self._chunks[index]
        chunk.missing.add(level)
        chunk.arrived.pop(level, None)
        chunk.problems.append(problem)

    def _seconds_to_next_look(self, decision: Decision) -> float | None:
        now = self._now()
        times = [request.last_bytes_seconds + self._silence_seconds for request in self._requests]
        if self._requests:
            times.append(self._interval_start + SAMPLE_SECONDS)
        if decision.wake_at_seconds is not None:
            times.append(decision.wake_at_seconds)
        return max(0.0, min(times) - now) + 1e-4 if times else None

    def _close_sample(self, min_seconds: float) -> None:
        """Make a throughput sample of what came since the last one, if that is long enough."""
        seconds = self._now() - self._interval_start
        if self._requests and seconds >= min_seconds:
            self._samples.append(ThroughputSample(seconds, self._interval_bytes))
            self._interval_start, self._interval_bytes = self._now(), 0

    def _measured_speeds(self) -> Speeds:
        """Return the speeds as measured so far in this load, the ones from before where there is no measurement."""
        speeds = self._speeds
        seconds, predicted = self._computed
        if predicted > 0:
            overhead = max(speeds.prefill.overhead * seconds / predicted, 1e-9)
            speeds = replace(speeds, prefill=replace(speeds.prefill, overhead=overhead))
        tokens, seconds = self._decoded
        if seconds > 0:
            decode = DecodeSpeed(tokens_per_second=tokens / seconds, compute_slowdown=speeds.decode.compute_slowdown)
            speeds = replace(speeds, decode=decode)
        return speeds

    # --- shared by all ------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.perf_counter() - self._origin

    def _start(self, target: Callable[..., None], *arguments: object) -> threading.Thread:
        """Start a thread whose exception, which would be a bug, ends the load."""

        def guarded() -> None:
            try:
                target(*arguments)
            except BaseException as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._end()

        thread = threading.Thread(target=guarded, daemon=True, name=f"cachegen-{target.__name__.strip('_')}")
        thread.start()
        return thread

    def _end(self) -> None:
        self._is_over = True
        self._announce()

    def _announce(self) -> None:
        self._has_news = True
        self._changed.notify_all()

    def _log(
        self, worker: str, chunk: int, level: Choice, start: float, num_bytes: int = 0, outcome: str = "done"
    ) -> None:
        self._spans.append(Span(worker, chunk, level, start, self._now(), num_bytes, outcome))

    def _log_fetch(self, request: _Request, outcome: str) -> None:
        self._log("fetch", request.chunk, request.level, request.started_seconds, request.num_bytes, outcome)

    def _report(self) -> LoadResult:
        with self._changed:
            ready_seconds = self._now()
            for request in list(self._requests):
                self._cancel(Fetch(request.chunk, request.level))
            state = self._observe()
            reports = tuple(self._report_chunk(i, chunk) for i, chunk in enumerate(self._chunks))
            return LoadResult(
                chunks=reports,
                spans=tuple(sorted(self._spans, key=lambda span: span.start_seconds)),
                samples=state.samples,
                speeds=state.speeds,
                expected_loss=state.loss,
                received_bytes=self._received_bytes,
                ready_seconds=ready_seconds,
            )

    def _report_chunk(self, index: int, chunk: _Chunk) -> ChunkReport:
        fetches = [span for span in self._spans if span.worker == "fetch" and span.chunk == index]
        return ChunkReport(
            chunk=index,
            first_token=chunk.levels.first_token,
            num_tokens=chunk.levels.num_tokens,
            source="text" if chunk.is_computed else "store",
            level=TEXT if chunk.is_computed else chunk.decoded_level,
            num_bytes=sum(span.num_bytes for span in fetches),
            seconds=sum(span.end_seconds - span.start_seconds for span in fetches),
            estimate_bytes_per_second=chunk.estimate,
            num_queued=chunk.num_queued,
            num_exact_tokens=chunk.num_exact_tokens,
            problems=tuple(chunk.problems),
        )
