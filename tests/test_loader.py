"""The loader: whatever workers and policy do, every token is written, by one thread at a time, and never wrongly."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping

import pytest

from cachegen.errors import BitstreamError, StoreError
from cachegen.streaming.loader import Loader
from cachegen.streaming.policies import POLICIES
from cachegen.streaming.policy import (
    TEXT,
    ChunkLevels,
    Decision,
    DecodeSpeed,
    Fetch,
    LoadState,
    Objective,
    PrefillSpeed,
    Speeds,
)
from cachegen.streaming.policy_front_to_back import decide_fixed_level
from cachegen.streaming.remote import FetchedFile

NUM_CHUNKS, CHUNK_TOKENS = 6, 40
CHUNKS = tuple(
    ChunkLevels(i * CHUNK_TOKENS, CHUNK_TOKENS, (1000, 2000, 3000), (0.03, 0.02, 0.01), is_embedded=False)
    for i in range(NUM_CHUNKS)
)
NEVER = 60.0


class FakeWorkers:
    """Workers over a list that says for every token who wrote it: ("text", None) or ("store", level).

    Each takes the time it is told. Computing checks what the model relies on: all tokens before are there.
    """

    block_size = 16

    def __init__(
        self, *, fetch=0.0, decode=0.0, compute=0.0, failing: Callable[[int, int], Exception | None] | None = None
    ):
        self.fetch_seconds, self.decode_seconds, self.block_seconds = fetch, decode, compute
        self.failing = failing or (lambda chunk, level: None)
        self.tokens: list[tuple[str, int] | None] = [None] * (NUM_CHUNKS * CHUNK_TOKENS)
        self.fetched: list[tuple[int, int]] = []
        self._writing: set[int] = set()
        self._lock = threading.Lock()

    def fetch(self, chunk: int, level: int, on_bytes: Callable[[int], object]) -> FetchedFile:
        size = CHUNKS[chunk].file_bytes[level - 1]
        for _ in range(4):
            time.sleep(self.fetch_seconds / 4)
            on_bytes(size // 4)
        error = self.failing(chunk, level)
        if error is not None:
            raise error
        self.fetched.append((chunk, level))
        return FetchedFile(bytearray(size), ())

    def decode(self, chunk: int, level: int, contents: Mapping[int, bytearray]) -> Callable[[int], object]:
        assert set(contents) == set(CHUNKS[chunk].files_of(level))
        time.sleep(self.decode_seconds)
        return lambda start: self.write(start, CHUNKS[chunk].end_token, ("store", level))

    def prepare(self) -> None:
        assert self.tokens == [None] * len(self.tokens)

    def compute(self, start: int, stop: int, should_stop: Callable[[], bool]) -> bool:
        assert None not in self.tokens[:start]
        for _ in range(3):
            time.sleep(self.block_seconds / 3)
            if should_stop():
                return False
        self.write(start, stop, ("text", TEXT))
        return True

    def write(self, start: int, stop: int, who: tuple[str, int]) -> None:
        span = set(range(start, stop))
        with self._lock:
            assert not self._writing & span, "two threads write the same tokens"
            self._writing |= span
        time.sleep(0.0005)
        self.tokens[start:stop] = [who] * (stop - start)
        with self._lock:
            self._writing -= span


def load(workers: FakeWorkers, policy, *, slo: float = 0.05, prefill_speed: float = 2000.0, **flags):
    speeds = Speeds(PrefillSpeed(prefill_speed), DecodeSpeed(compute_slowdown=0.5))
    with Loader(CHUNKS, workers, policy, Objective(slo), speeds, **flags) as loader:
        return loader.run()


def check(workers: FakeWorkers, result) -> None:
    """The report says what is in the cache."""
    for report in result.chunks:
        tokens = workers.tokens[report.first_token : report.first_token + report.num_tokens]
        exact = [("text", TEXT)] * report.num_exact_tokens
        assert tokens[: len(exact)] == exact
        assert set(tokens[len(exact) :]) <= {("store", report.level)}
        assert (report.source == "text") == (report.num_exact_tokens == report.num_tokens)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(8))
def test_any_timing_and_any_failure_gives_a_whole_cache(name, seed):
    generator = random.Random(seed)
    times = [generator.choice([0.0, 0.002, 0.01]) for _ in range(3)]

    def fail(chunk, level):
        if (chunk * 7 + level * 3 + seed) % 4:
            return None
        return StoreError("gone") if level % 2 else BitstreamError("corrupt")

    workers = FakeWorkers(fetch=times[0], decode=times[1], compute=times[2], failing=fail if seed % 2 else None)
    flags = {"num_connections": generator.choice([1, 3]), "slo": generator.choice([0.001, 0.05, 0.2])}
    check(workers, load(workers, POLICIES[name], **flags))


class WholeOnlyWorkers(FakeWorkers):
    """Workers of a document that can only be used whole: what is computed needs all before it computed."""

    def compute(self, start: int, stop: int, should_stop: Callable[[], bool]) -> bool:
        assert set(self.tokens[:start]) <= {("text", TEXT)}
        return super().compute(start, stop, should_stop)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(12))
def test_of_a_document_that_can_only_be_used_whole_a_beginning_is_computed(name, seed):
    generator = random.Random(seed)
    times = [generator.choice([0.0, 0.002, 0.01]) for _ in range(3)]
    lost = {generator.randrange(NUM_CHUNKS) for _ in range(generator.choice([0, 1, 2]))}
    workers = WholeOnlyWorkers(
        fetch=times[0],
        decode=times[1],
        compute=times[2],
        failing=lambda chunk, level: StoreError("gone") if chunk in lost else None,
    )
    flags = {"num_connections": generator.choice([1, 3]), "slo": generator.choice([0.001, 0.05, 0.2])}
    result = load(workers, POLICIES[name], is_whole_only=True, **flags)
    check(workers, result)
    sources = [report.source for report in result.chunks]
    assert sources == sorted(sources, reverse=True)  # text, then store
    assert sources[: max(lost, default=-1) + 1] == ["text"] * (max(lost, default=-1) + 1)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "text"])
def test_a_dead_store_means_text(name):
    workers = FakeWorkers(failing=lambda chunk, level: StoreError(f"no {chunk}.{level}"))
    result = load(workers, POLICIES[name])
    assert {report.source for report in result.chunks} == {"text"} and set(workers.tokens) == {("text", TEXT)}
    assert all(problem.startswith("no ") for problem in result.problems)


def test_a_silent_store_means_text():
    workers = FakeWorkers(fetch=NEVER)
    started = time.perf_counter()
    result = load(workers, lambda state: decide_fixed_level(state, 1), silence_seconds=0.05)
    assert {report.source for report in result.chunks} == {"text"}
    assert "given up after" in result.problems[0] and time.perf_counter() - started < NEVER / 4


def test_a_slow_network_is_met_by_the_model():
    workers = FakeWorkers(fetch=NEVER, compute=0.001)
    result = load(workers, POLICIES["ours"], silence_seconds=NEVER)
    assert {report.source for report in result.chunks} == {"text"}


def test_a_fast_network_leaves_little_to_compute():
    workers = FakeWorkers(compute=0.5)
    result = load(workers, POLICIES["ours"], slo=0.001, prefill_speed=32.0)
    assert {report.source for report in result.chunks} == {"store"}
    check(workers, result)


def test_one_level_for_all_computes_nothing():
    workers = FakeWorkers()
    result = load(workers, lambda state: decide_fixed_level(state, 2))
    assert set(workers.tokens) == {("store", 2)} and result.expected_loss == pytest.approx(0.12)
    assert workers.fetched == [(i, 2) for i in range(NUM_CHUNKS)]
    assert result.received_bytes == 2000 * NUM_CHUNKS


def test_a_missing_level_is_replaced_by_the_one_below():
    workers = FakeWorkers(failing=lambda chunk, level: StoreError("gone") if (chunk, level) == (2, 3) else None)
    result = load(workers, lambda state: decide_fixed_level(state, 3))
    assert [report.level for report in result.chunks] == [3, 3, 2, 3, 3, 3]
    assert result.problems == ["gone"]


def test_a_file_that_does_not_decode_is_not_used():
    class Corrupt(FakeWorkers):
        def decode(self, chunk, level, contents):
            if (chunk, level) == (1, 2):
                raise BitstreamError("bad scales")
            return super().decode(chunk, level, contents)

    workers = Corrupt()
    result = load(workers, lambda state: decide_fixed_level(state, 2))
    assert [report.level for report in result.chunks] == [2, 1, 2, 2, 2, 2] and result.problems == ["bad scales"]


def test_what_was_computed_of_a_chunk_is_kept_when_its_file_comes():
    arrived = threading.Event()

    class Waiting(FakeWorkers):
        def fetch(self, chunk, level, on_bytes):
            if chunk == 0:
                arrived.wait(NEVER)
            return super().fetch(chunk, level, on_bytes)

        def compute(self, start, stop, should_stop):
            if start == 16:  # the second block: let the file come, and be broken off
                arrived.set()
                while not should_stop():
                    time.sleep(0.001)
                return False
            return super().compute(start, stop, should_stop)

    workers = Waiting()

    def policy(state: LoadState) -> Decision:
        decision = decide_fixed_level(state, 1)
        is_begun = state.computing is not None or state.progress[0].is_ready
        return decision if is_begun or decision.is_finished else Decision(decision.fetch, compute=0)

    result = load(workers, policy)
    assert workers.tokens[:40] == [("text", TEXT)] * 16 + [("store", 1)] * 24
    assert result.chunks[0].num_exact_tokens == 16 and result.chunks[0].source == "store"


def test_a_cancelled_request_brings_nothing():
    workers = FakeWorkers(fetch=0.2)

    def policy(state: LoadState) -> Decision:
        if state.is_complete:
            return Decision(is_finished=True)
        if state.in_flight:
            return Decision(cancel=(Fetch(0, 1),), compute=0)
        compute = state.first_not_ready() if state.computing is None else None
        return Decision(fetch=(Fetch(0, 1),) if compute == 0 else (), compute=None if compute == 0 else compute)

    result = load(workers, policy)
    assert workers.fetched == [] and {span.outcome for span in result.spans if span.worker == "fetch"} == {"cancelled"}


def test_a_policy_that_does_nothing_is_met_with_text():
    workers = FakeWorkers()
    result = load(workers, lambda state: Decision())
    assert set(workers.tokens) == {("text", TEXT)} and result.received_bytes == 0


def test_a_policy_that_ends_too_early_is_a_bug():
    with pytest.raises(RuntimeError, match="before every chunk was ready"):
        load(FakeWorkers(), lambda state: Decision(is_finished=True))


@pytest.mark.parametrize("where", ["fetch", "decode", "compute", "policy"])
def test_a_bug_of_a_worker_or_policy_is_raised(where):
    class Broken(FakeWorkers):
        pass

    def fail(*_):
        raise ZeroDivisionError

    setattr(Broken, where, fail)
    policy = fail if where == "policy" else POLICIES["text" if where == "compute" else "cachegen"]
    with pytest.raises(ZeroDivisionError):
        load(Broken(), policy, prefill_speed=1.0)


def test_the_log_has_every_workers_spans_and_the_throughput():
    workers = FakeWorkers(fetch=0.12, decode=0.001)
    result = load(workers, lambda state: decide_fixed_level(state, 1), elapsed_seconds=3.0)
    assert {span.worker for span in result.spans} == {"fetch", "decode", "copy"}
    assert all(3.0 <= span.start_seconds <= span.end_seconds <= result.ready_seconds for span in result.spans)
    assert sum(sample.num_bytes for sample in result.samples) <= result.received_bytes == 6000
    assert len(result.samples) >= 6 and result.chunks[-1].estimate_bytes_per_second
    assert result.speeds.decode.tokens_per_second < float("inf")
