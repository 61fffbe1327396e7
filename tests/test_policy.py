"""The policies as pure functions: Algorithm 1 by hand, the order of the two ends, and what must never happen."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest

from cachegen.streaming.estimator import conservative_throughput, harmonic_mean, recent_throughput
from cachegen.streaming.plan_levels import plan_levels
from cachegen.streaming.policies import POLICIES
from cachegen.streaming.policy import (
    TEXT,
    ChunkLevels,
    ChunkProgress,
    Computing,
    Decode,
    DecodeSpeed,
    Fetch,
    LoadState,
    Objective,
    PrefillSpeed,
    Speeds,
    ThroughputSample,
    Transfer,
)
from cachegen.streaming.policy_front_to_back import decide_cachegen, decide_fixed_level, decide_text
from cachegen.streaming.policy_two_ended import decide_two_ended

LOSS = (0.3, 0.1, 0.0)


def document(num_chunks: int = 4, file_bytes=(100, 200, 400), *, is_embedded: bool = False) -> tuple[ChunkLevels, ...]:
    """Chunks of 100 tokens, each level twice the one before."""
    return tuple(ChunkLevels(100 * i, 100, file_bytes, LOSS[: len(file_bytes)], is_embedded) for i in range(num_chunks))


def state(chunks=None, *, deadline: float = 10.0, tokens_per_second: float = 20.0, **changes) -> LoadState:
    """A request that has just begun; computing a chunk takes 5 s at the default speed."""
    chunks = document() if chunks is None else chunks
    progress = changes.pop("progress", (ChunkProgress(),) * len(chunks))
    objective = Objective(deadline, changes.pop("target_loss", 0.0))
    speeds = replace(Speeds(PrefillSpeed(tokens_per_second)), **changes.pop("speeds", {}))
    return LoadState(chunks, progress, objective, speeds, **changes)


def arrived(*levels: int, **changes) -> ChunkProgress:
    return ChunkProgress(arrived=frozenset(levels), **changes)


def after_one_chunk(seconds: float, num_bytes: int, level: int, **changes) -> LoadState:
    """Chunk 0 has come in `seconds` with `num_bytes`."""
    first = arrived(level, choice=level, decoded_level=level)
    return state(
        progress=(first, *(ChunkProgress(),) * 3),
        elapsed_seconds=seconds,
        finished=(Transfer(0, level, num_bytes, 0.0, seconds),),
        **changes,
    )


class TestWholeOnly:
    """Documents of which only a beginning can be computed."""

    LOST = ChunkProgress(missing=frozenset({1, 2, 3}))

    def test_a_chunk_is_computed_after_all_before_it(self):
        computed, loaded = ChunkProgress(is_computed=True), ChunkProgress(decoded_level=1)
        progress = (computed, loaded, loaded, ChunkProgress())
        assert state(progress=progress, is_whole_only=True).chunk_to_compute(3) == 1
        assert state(progress=progress, is_whole_only=True).chunk_to_compute(0) == 0
        assert state(progress=progress).chunk_to_compute(3) == 3

    def test_what_lies_before_a_lost_chunk_need_not_be_loaded(self):
        whole = state(progress=(ChunkProgress(), arrived(1), self.LOST, ChunkProgress()), is_whole_only=True)
        assert [whole.can_be_loaded(i) for i in range(4)] == [False, False, False, True]
        assert [replace(whole, is_whole_only=False).can_be_loaded(i) for i in range(4)] == [True, True, False, True]
        ready = replace(whole, progress=(ChunkProgress(), arrived(1), replace(self.LOST, decoded_level=1), arrived(1)))
        assert ready.can_be_loaded(0)

    def test_a_lost_chunk_costs_the_time_of_all_before_it(self):
        progress = (ChunkProgress(is_computed=True), ChunkProgress(), self.LOST, ChunkProgress())
        assert state(progress=progress).prefill_seconds_of([2]) == pytest.approx(5)
        assert state(progress=progress, is_whole_only=True).prefill_seconds_of([2]) == pytest.approx(10)
        computing = state(progress=progress, is_whole_only=True, computing=Computing(1, 0.0))
        assert computing.prefill_seconds_of([2]) == pytest.approx(5)
        assert state(progress=progress, is_whole_only=True).prefill_seconds_of([]) == 0

    def test_both_ends_leave_alone_what_will_be_computed(self):
        progress = (ChunkProgress(), ChunkProgress(), self.LOST, ChunkProgress())
        decision = decide_two_ended(state(progress=progress, is_whole_only=True, num_connections=4))
        assert decision.compute == 0 and {fetch.chunk for fetch in decision.fetch} == {3}
        in_flight = (Transfer(1, 1, 0, 0.0), Transfer(3, 1, 0, 0.0))
        decision = decide_two_ended(state(progress=progress, is_whole_only=True, in_flight=in_flight))
        assert decision.cancel == (Fetch(1, 1),)

    def test_a_lost_chunk_behind_loaded_ones_means_the_front(self):
        loaded = ChunkProgress(decoded_level=1, arrived=frozenset({1}))
        whole = state(progress=(loaded, loaded, self.LOST, loaded), is_whole_only=True)
        assert decide_two_ended(whole).compute == 0
        assert decide_two_ended(replace(whole, is_whole_only=False)).compute == 2


class TestData:
    """What the plain data say of themselves."""

    def test_embedded_levels_need_all_files_below(self):
        chunk = document(is_embedded=True)[0]
        assert (chunk.files_of(3), chunk.bytes_of(3)) == ((1, 2, 3), 700)
        assert [chunk.usable_level(files) for files in ({1}, {1, 3}, {2, 3}, {1, 2, 3})] == [1, 1, 0, 3]
        assert chunk.obtainable_levels({2}) == (1,)

    def test_independent_levels_stand_alone(self):
        chunk = document()[0]
        assert (chunk.files_of(3), chunk.bytes_of(3)) == ((3,), 400)
        assert [chunk.usable_level(files) for files in (set(), {1}, {1, 3}, {2})] == [0, 1, 3, 2]
        assert chunk.obtainable_levels({2}) == (1, 3)

    @pytest.mark.parametrize(
        "arguments",
        [
            (0, 0, (1,), (0.1,)),
            (-1, 5, (1,), (0.1,)),
            (0, 5, (1, 2), (0.1,)),
            (0, 5, (0,), (0.1,)),
            (0, 5, (1, 2), (0.1, 0.2)),
            (0, 5, (1,), (math.nan,)),
            (0, 5, (1,), (math.inf,)),
        ],
    )
    def test_a_chunk_that_cannot_be_is_refused(self, arguments):
        with pytest.raises(ValueError):
            ChunkLevels(*arguments, is_embedded=False)

    def test_prefill_of_chunks_adds_up_to_the_documents(self):
        speed = PrefillSpeed(7175, 3.75e-9, 1.1)
        parts = sum(speed.seconds(first, 500) for first in range(0, 9500, 500))
        assert parts == pytest.approx(speed.seconds(0, 9500)) == pytest.approx(1.1 * (9500 / 7175 + 3.75e-9 * 9500**2))

    def test_decode_seconds_count_bytes_tokens_and_the_chunk(self):
        speed = DecodeSpeed(bytes_per_second=700, tokens_per_second=50, seconds_per_chunk=0.25)
        assert speed.seconds(document(is_embedded=True)[0], 3) == pytest.approx(0.25 + 1 + 2)

    @pytest.mark.parametrize("make", [lambda: PrefillSpeed(0), lambda: DecodeSpeed(compute_slowdown=1.5)])
    def test_an_impossible_speed_is_refused(self, make):
        with pytest.raises(ValueError):
            make()


class TestEstimator:
    """What is counted on."""

    def test_the_harmonic_mean_is_that_of_equal_bytes(self):
        assert harmonic_mean([ThroughputSample(1, 100), ThroughputSample(1, 300)]) == pytest.approx(150)

    def test_a_steady_link_is_believed(self):
        steady = state(samples=(ThroughputSample(0.1, 10),) * 8)
        assert conservative_throughput(steady) == pytest.approx(100)
        assert recent_throughput(steady) == pytest.approx(100)

    def test_the_largest_recent_error_discounts(self):
        # 100 was predicted where 50 came, an error of 1; then the mean of 100 and 50.
        seen = state(samples=(ThroughputSample(1, 100), ThroughputSample(1, 50)))
        assert conservative_throughput(seen) == pytest.approx((2 / (1 / 100 + 1 / 50)) / 2)

    def test_a_stall_counts_on_nothing_and_the_first_request_on_the_prior(self):
        assert conservative_throughput(state(samples=(ThroughputSample(1, 100), ThroughputSample(1, 0)))) == 0
        assert conservative_throughput(state()) is None
        assert conservative_throughput(state(speeds={"prior_bytes_per_second": 7.0})) == 7.0


class TestAlgorithm1:
    """The paper's choices, worked out by hand: 4 chunks of 100, 200 or 400 bytes, deadline 10 s, 5 s to compute one."""

    def test_text_is_chosen_for_all_where_computing_meets_the_deadline(self):
        decision = decide_cachegen(state(tokens_per_second=40.0))
        assert decision.choices == ((0, TEXT), (1, TEXT), (2, TEXT), (3, TEXT))
        assert decision.compute == 0 and decision.fetch == ()

    def test_the_middle_level_comes_first_where_nothing_is_known(self):
        assert decide_cachegen(state()).fetch == (Fetch(0, 2),)

    def test_the_prior_chooses_the_first_level(self):
        # 4 x 400 bytes in 10 s need 160 bytes/s, 4 x 200 need 80.
        assert decide_cachegen(state(speeds={"prior_bytes_per_second": 160.0})).fetch == (Fetch(0, 3),)
        assert decide_cachegen(state(speeds={"prior_bytes_per_second": 159.0})).fetch == (Fetch(0, 2),)

    @pytest.mark.parametrize(("num_bytes", "level"), [(300, 3), (299, 2), (150, 2), (149, 1), (1, 1)])
    def test_the_best_level_that_all_remaining_chunks_meet_is_taken(self, num_bytes, level):
        # After 2 s, 3 chunks in 8 s: 1200, 600 or 300 bytes at num_bytes / 2 per second.
        decision = decide_cachegen(after_one_chunk(2.0, num_bytes, 2))
        assert decision.fetch == (Fetch(1, level),) and decision.choices == ((1, level),)

    def test_text_is_chosen_once_the_rest_can_be_computed_in_time(self):
        # 3 chunks at 4 s each are too much for 10 - 2 s, at 2.6 s they are not.
        assert decide_cachegen(after_one_chunk(2.0, 1, 2, tokens_per_second=25.0)).compute is None
        assert decide_cachegen(after_one_chunk(2.0, 1, 2, tokens_per_second=38.5)).compute == 1

    def test_the_next_choice_waits_for_the_chunk_before(self):
        waiting = state(
            progress=(ChunkProgress(choice=2), *(ChunkProgress(),) * 3), in_flight=(Transfer(0, 2, 10, 0.0),)
        )
        decision = decide_cachegen(replace(waiting, num_connections=2))
        assert decision.choices == () and decision.fetch == ()

    def test_embedded_levels_are_fetched_from_the_base(self):
        chunks = document(is_embedded=True)
        asked = decide_cachegen(state(chunks, num_connections=3, speeds={"prior_bytes_per_second": 280.0}))
        assert asked.fetch == (Fetch(0, 1), Fetch(0, 2), Fetch(0, 3)) and asked.choices == ((0, 3),)

    def test_a_missing_file_is_chosen_again(self):
        lost = ChunkProgress(choice=2, missing=frozenset({2}))
        decision = decide_cachegen(state(progress=(lost, *(ChunkProgress(),) * 3)))
        assert decision.choices[0][1] in (1, 3) and decision.fetch[0].level == decision.choices[0][1]


class TestFrontToBack:
    """Text and one level for all."""

    def test_text_computes_in_order_and_fetches_nothing(self):
        done = (ChunkProgress(is_computed=True), *(ChunkProgress(),) * 3)
        decision = decide_text(state(progress=done))
        assert (decision.compute, decision.fetch) == (1, ())

    def test_a_fixed_level_fetches_in_order_as_connections_allow(self):
        decision = decide_fixed_level(state(num_connections=2), 2)
        assert decision.fetch == (Fetch(0, 2), Fetch(1, 2)) and decision.compute is None

    def test_a_level_that_cannot_be_had_is_replaced_by_the_one_below_or_by_text(self):
        progress = (ChunkProgress(missing=frozenset({2})), ChunkProgress(missing=frozenset({1, 2, 3})))
        decision = decide_fixed_level(state(document(2), progress=progress, num_connections=2), 2)
        assert decision.fetch == (Fetch(0, 1),)


class TestTwoEnded:
    """The order of the two ends."""

    @pytest.mark.parametrize("is_embedded", [True, False])
    def test_at_the_start_the_model_takes_the_front_and_the_network_the_back(self, is_embedded):
        decision = decide_two_ended(state(document(is_embedded=is_embedded), num_connections=2))
        assert decision.compute == 0
        assert decision.fetch == (Fetch(3, 1), Fetch(2, 1))

    def test_bases_come_before_refinements(self):
        progress = (*(ChunkProgress(),) * 2, arrived(1), arrived(1))
        decision = decide_two_ended(state(document(is_embedded=True), progress=progress))
        assert decision.fetch == (Fetch(1, 1),)

    def test_refinements_come_by_loss_reduction_per_byte(self):
        chunks = list(document(3, is_embedded=True))
        chunks[1] = replace(chunks[1], loss=(0.9, 0.2, 0.0))
        progress = (ChunkProgress(is_computed=True), arrived(1, decoded_level=1), arrived(1, decoded_level=1))
        assert decide_two_ended(state(tuple(chunks), progress=progress)).fetch == (Fetch(1, 2),)

    def test_refinements_of_equal_worth_come_from_the_back(self):
        progress = (ChunkProgress(is_computed=True), *(arrived(1, decoded_level=1),) * 3)
        assert decide_two_ended(state(document(is_embedded=True), progress=progress)).fetch == (Fetch(3, 2),)

    def test_it_ends_when_all_is_ready_and_good_enough(self):
        progress = (arrived(1, decoded_level=1),) * 4
        assert decide_two_ended(state(progress=progress, target_loss=1.2)).is_finished
        assert not decide_two_ended(state(progress=progress, target_loss=1.1)).is_finished

    def test_it_ends_when_nothing_can_improve_before_the_deadline(self):
        progress = (arrived(1, decoded_level=1),) * 4
        slow = (ThroughputSample(1.0, 1),) * 5
        late = state(progress=progress, samples=slow, elapsed_seconds=6.0)
        assert decide_two_ended(late).is_finished
        assert not decide_two_ended(replace(late, elapsed_seconds=4.0)).is_finished  # a chunk can be computed by then

    def test_it_never_ends_before_all_is_ready(self):
        progress = (ChunkProgress(), *(arrived(1, decoded_level=1),) * 3)
        late = state(progress=progress, elapsed_seconds=100.0, computing=Computing(0, 99.0))
        assert not decide_two_ended(late).is_finished

    def test_a_chunk_without_files_is_computed_as_soon_as_all_before_it_are_ready(self):
        lost = ChunkProgress(missing=frozenset({1, 2, 3}))
        progress = (arrived(1, decoded_level=1), lost, arrived(1, decoded_level=1))
        assert decide_two_ended(state(document(3), progress=progress)).compute == 1

    def test_what_is_computed_needs_no_request_any_more(self):
        progress = (ChunkProgress(is_computed=True), *(ChunkProgress(),) * 3)
        decision = decide_two_ended(state(progress=progress, in_flight=(Transfer(0, 1, 5, 0.0),)))
        assert decision.cancel == (Fetch(0, 1),)

    def test_it_asks_to_be_woken_at_the_deadline_at_the_latest(self):
        wake = decide_two_ended(state()).wake_at_seconds
        assert wake is not None and 9.5 <= wake <= 10.0

    def test_a_chunk_is_completed_before_the_next_where_the_link_is_fast(self):
        progress = (*(ChunkProgress(),) * 3, arrived(1))
        fast = (ThroughputSample(1.0, 10_000),) * 5
        seen = state(document(is_embedded=True), progress=progress, samples=fast)
        assert decide_two_ended(seen).fetch == (Fetch(3, 2),)
        assert decide_two_ended(replace(seen, samples=(ThroughputSample(1.0, 100),) * 5)).fetch == (Fetch(2, 1),)

    def test_an_idle_link_brings_what_the_model_may_be_late_with(self):
        progress = (ChunkProgress(), *(arrived(1, 2, 3, decoded_level=3),) * 3)
        slow = (ThroughputSample(1.0, 10),) * 5  # 10 s for the smallest file, 5 s to compute
        seen = state(progress=progress, samples=slow, computing=Computing(0, 0.0))
        assert decide_two_ended(seen).fetch == (Fetch(0, 1),)

    def test_a_shared_device_decodes_at_once_what_is_good_enough_and_lets_the_rest_wait(self):
        speeds = {"decode": DecodeSpeed(seconds_per_chunk=0.5, compute_slowdown=1.0)}
        computing = Computing(0, 0.0)
        for level, decoded in ((1, None), (2, Decode(3, 2))):
            progress = (*(ChunkProgress(),) * 3, arrived(*range(1, level + 1)))
            seen = state(
                document(is_embedded=True), progress=progress, speeds=speeds, target_loss=0.4, computing=computing
            )
            assert decide_two_ended(seen).decode == decoded

    def test_a_decoder_that_nobody_has_timed_is_tried_at_once(self):
        progress = (*(ChunkProgress(),) * 3, arrived(1))
        seen = state(
            document(is_embedded=True),
            progress=progress,
            speeds={"decode": DecodeSpeed(compute_slowdown=1.0)},
            computing=Computing(0, 0.0),
        )
        assert decide_two_ended(seen).decode == Decode(3, 1)

    def test_what_came_is_decoded_when_it_is_too_late_to_compute_all_in_order(self):
        # Chunk 2 is decoded, chunk 3 only has its smallest level; 5 s to compute each, 20 s in all.
        speeds = {"decode": DecodeSpeed(seconds_per_chunk=0.5, compute_slowdown=1.0)}
        done = ChunkProgress(is_computed=True)
        progress = (done, done, arrived(1, 2, 3, decoded_level=3), arrived(1))
        seen = state(
            document(is_embedded=True),
            deadline=100.0,
            progress=progress,
            speeds=speeds,
            target_loss=0.2,
            in_flight=(Transfer(3, 2, 0, 9.0),),
            samples=(ThroughputSample(1.0, 1),),
        )
        early, late = replace(seen, elapsed_seconds=10.0), replace(seen, elapsed_seconds=10.5)
        assert (decide_two_ended(early).compute, decide_two_ended(early).decode) == (2, None)
        assert (decide_two_ended(late).compute, decide_two_ended(late).decode) == (None, Decode(3, 1))

    def test_nothing_is_decoded_that_is_quicker_computed(self):
        speeds = {"decode": DecodeSpeed(seconds_per_chunk=6.0, compute_slowdown=1.0)}
        progress = (*(ChunkProgress(),) * 3, arrived(1))
        assert decide_two_ended(state(progress=progress, speeds=speeds)).decode is None

    def test_never_more_requests_than_free_connections(self):
        busy = state(num_connections=3, in_flight=(Transfer(3, 1, 0, 0.0), Transfer(2, 1, 0, 0.0)))
        assert len(decide_two_ended(busy).fetch) == 1
        assert decide_two_ended(replace(busy, num_connections=2)).fetch == ()


class TestPlan:
    """The levels of independent files."""

    def plan(self, rate: int | None, **changes) -> list[int]:
        samples = () if rate is None else (ThroughputSample(1.0, rate),) * 5
        planned = plan_levels(state(samples=samples, tokens_per_second=1.0, **changes), [0, 1, 2, 3], 9.8)
        return [planned[i] for i in range(4)]

    def test_the_smallest_while_nothing_is_known(self):
        assert self.plan(None) == [1, 1, 1, 1]

    def test_all_that_fits_and_the_back_first(self):
        assert self.plan(1000) == [3, 3, 3, 3]
        assert self.plan(41) == [1, 1, 1, 1]
        # 980 bytes: level 2 for all (800) is worth more per byte than level 3, for which 180 bytes are too few.
        assert self.plan(100) == [2, 2, 2, 2]
        assert self.plan(70) == [1, 1, 2, 2]

    def test_no_better_than_asked_for(self):
        assert self.plan(1000, target_loss=0.41) == [2, 2, 2, 2]
        assert self.plan(1000, target_loss=0.81) == [1, 1, 2, 2]

    def test_embedded_levels_begin_with_the_base_where_time_is_short(self):
        # All files of all chunks are 2800 bytes; they may take a third of 9.8 s.
        assert self.plan(None, chunks=document(is_embedded=True)) == [1, 1, 1, 1]
        assert self.plan(860, chunks=document(is_embedded=True)) == [1, 1, 1, 1]
        assert self.plan(870, chunks=document(is_embedded=True)) == [3, 3, 3, 3]

    def test_embedded_levels_may_take_all_the_time_where_text_would_be_in_time(self):
        # Computing everything takes 400 s.
        assert self.plan(290, chunks=document(is_embedded=True), deadline=400.0) == [3, 3, 3, 3]
        assert self.plan(290, chunks=document(is_embedded=True), deadline=399.0) == [1, 1, 1, 1]
        assert self.plan(280, chunks=document(is_embedded=True), deadline=400.0) == [1, 1, 1, 1]

    def test_embedded_levels_are_raised_as_far_as_the_objective_asks_and_the_back_first(self):
        assert self.plan(1000, chunks=document(is_embedded=True), target_loss=0.41) == [2, 2, 2, 2]
        assert self.plan(1000, chunks=document(is_embedded=True), target_loss=0.81) == [1, 1, 2, 2]

    def test_what_is_here_of_an_embedded_chunk_is_not_requested_again(self):
        progress = (*(ChunkProgress(),) * 3, arrived(1, 2))
        changes = {"chunks": document(is_embedded=True), "progress": progress}
        # 2100 + 400 bytes are left.
        assert (self.plan(770, **changes), self.plan(780, **changes)) == ([1, 1, 1, 2], [3, 3, 3, 3])


@pytest.mark.parametrize("policy", [*POLICIES.values(), functools.partial(decide_fixed_level, level=1)])
def test_the_same_state_gives_the_same_decision(policy):
    seen = after_one_chunk(2.0, 300, 2, samples=(ThroughputSample(1.0, 150),) * 2)
    assert policy(seen) == policy(replace(seen))
