"""The simulator: exact integration, no oracle, and never slower than text, whatever the link does."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest

from cachegen.simulation import traces
from cachegen.simulation.bound import clairvoyant_bound
from cachegen.simulation.scenario import LevelCurve
from cachegen.simulation.simulator import simulate_request
from cachegen.simulation.traces import BYTES_PER_GIGABIT, SEEDED_TRACES, BandwidthTrace
from cachegen.streaming.policies import POLICIES
from cachegen.streaming.policy import (
    TEXT,
    ChunkLevels,
    Decision,
    Decode,
    DecodeSpeed,
    Fetch,
    Objective,
    PrefillSpeed,
    Speeds,
)
from cachegen.streaming.policy_front_to_back import decide_fixed_level

A40 = Speeds(PrefillSpeed(7175, 3.75e-9, 1.1), DecodeSpeed(tokens_per_second=95e3, compute_slowdown=1.0), 0.021)
H100 = Speeds(PrefillSpeed(53493, 0.408e-9, 1.1), DecodeSpeed(tokens_per_second=460e3, compute_slowdown=1.0), 0.0043)
OWN_DECODER = replace(A40, decode=DecodeSpeed(tokens_per_second=40e3))
MACHINES = {"a40": A40, "h100": H100, "own decoder": OWN_DECODER}
CURVES = {
    "embedded": LevelCurve((0.65, 1.07, 1.7, 4.82), (0.0053, 0.0017, 0.0006, 0.00004), True),
    "independent": LevelCurve((1.15, 2.26, 3.32, 4.34), (0.0112, 0.0018, 0.0004, 0.0001), False),
}
LINKS = {
    **{f"{gbps} Gbps": traces.constant(gbps) for gbps in (0.05, 0.3, 1, 5, 40, 400)},
    "zero": traces.no_bandwidth(),
    "stops at once": BandwidthTrace("stops", (1e9, 0.0), (0.0, 0.02)),
    "stops late": BandwidthTrace("stops", (4e7, 0.0), (0.0, 0.6)),
    **{f"{kind} {seed}": make(seed) for kind, make in SEEDED_TRACES.items() for seed in range(3)},
}
OBJECTIVES = (Objective(1.0), Objective(1.0, 0.0018), Objective(10.0, 0.00001), Objective(0.05))


def load(curve: str, chunk_size: int = 1500) -> tuple[ChunkLevels, ...]:
    return CURVES[curve].document(9491, chunk_size, 65536)


def one_level(num_bytes: int, num_chunks: int = 1) -> tuple[ChunkLevels, ...]:
    return tuple(ChunkLevels(10 * i, 10, (num_bytes,), (0.1,), False) for i in range(num_chunks))


fixed = functools.partial(decide_fixed_level, level=1)
SLOW_MODEL = Speeds(PrefillSpeed(1.0))


class TestWholeOnly:
    """Of a document that can only be used whole, nothing is computed behind what was loaded."""

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("curve", CURVES)
    @pytest.mark.parametrize("link", ["0.3 Gbps", "5 Gbps", "zero", "stops at once", "stops late"])
    def test_a_beginning_is_computed(self, policy, curve, link):
        arguments = (POLICIES[policy], load(curve), Objective(1.0), A40, LINKS[link])
        request = simulate_request(*arguments, is_whole_only=True)
        kinds = [level == TEXT for level in request.levels]
        assert kinds == sorted(kinds, reverse=True)

    def test_a_chunk_without_files_behind_it_is_computed_alone(self):
        chunks = (*one_level(100, 3), ChunkLevels(30, 10, (), (), False))
        link = traces.held("t", [8e-7], 1.0)
        request = simulate_request(fixed, chunks, Objective(1.0), SLOW_MODEL, link, is_whole_only=True)
        assert request.levels == (1, 1, 1, TEXT)

    def test_a_chunk_in_the_middle_costs_all_before_it(self):
        def middle(state):
            if state.is_complete:
                return Decision(is_finished=True)
            fetch = tuple(Fetch(i, 1) for i in (0, 1) if not state.expected_files(i))[: state.num_free_connections]
            decodes = [i for i in (0, 1) if state.progress[i].arrived and not state.progress[i].is_ready]
            is_due = state.progress[1].is_ready and state.computing is None
            decode = Decode(decodes[0], 1) if decodes and state.decoding is None else None
            return Decision(fetch=fetch, decode=decode, compute=2 if is_due else None)

        link = traces.held("t", [8e-7], 1.0)  # 100 bytes/s
        for is_whole_only, seconds in ((False, 2 + 10), (True, 2 + 30)):
            arguments = (middle, one_level(100, 3), Objective(1.0), SLOW_MODEL, link)
            request = simulate_request(*arguments, is_whole_only=is_whole_only)
            assert request.ttft_seconds == pytest.approx(seconds, abs=1e-9)


class TestExactness:
    """Times that can be worked out by hand come out to the last digits."""

    def test_a_transfer_ends_when_the_integral_reaches_its_bytes(self):
        link = BandwidthTrace("t", (100.0, 0.0, 50.0, 1000.0), (0.0, 1.0, 3.0, 5.0))
        # 100 bytes by 1 s, nothing until 3 s, 100 more by 5 s, the last 300 in 0.3 s.
        request = simulate_request(fixed, one_level(500), Objective(1.0), SLOW_MODEL, link)
        assert request.ttft_seconds == pytest.approx(5.3, abs=1e-12) and request.num_bytes == pytest.approx(500)

    def test_decoding_overlaps_the_next_transfer(self):
        speeds = replace(SLOW_MODEL, decode=DecodeSpeed(seconds_per_chunk=0.5), first_token_seconds=0.25)
        request = simulate_request(fixed, one_level(100, 3), Objective(1.0), speeds, traces.held("t", [8e-7], 1.0))
        # 100 bytes/s: files come at 1, 2 and 3 s; the last is decoded by 3.5 s, the question answered 0.25 s later.
        assert request.ttft_seconds == pytest.approx(3.75, abs=1e-12)

    def test_connections_share_the_link_and_each_waits_for_its_first_byte(self):
        link = BandwidthTrace("t", (100.0,), (0.0,), first_byte_seconds=(0.5, 1.5))
        request = simulate_request(fixed, one_level(100, 2), Objective(1.0), SLOW_MODEL, link, num_connections=2)
        # The first has the link to itself from 0.5 to 1.5 s and is done; the second from 1.5 to 2.5 s.
        assert request.ttft_seconds == pytest.approx(2.5, abs=1e-12)

    def test_one_connection_has_its_limit(self):
        link = BandwidthTrace("t", (100.0,), (0.0,), connection_rate=20.0)
        request = simulate_request(fixed, one_level(100, 2), Objective(1.0), SLOW_MODEL, link, num_connections=2)
        assert request.ttft_seconds == pytest.approx(5.0, abs=1e-12)

    def test_a_trace_by_chunk_gives_each_chunk_its_rate(self):
        link = BandwidthTrace("t", (100.0, 25.0))
        request = simulate_request(fixed, one_level(100, 2), Objective(1.0), SLOW_MODEL, link, num_connections=2)
        assert request.ttft_seconds == pytest.approx(1 + 4, abs=1e-12)

    def test_text_takes_what_the_formula_says_and_no_more(self):
        request = simulate_request(POLICIES["text"], load("embedded"), Objective(1.0), A40, traces.no_bandwidth())
        assert request.ttft_seconds == pytest.approx(1.1 * (9491 / 7175 + 3.75e-9 * 9491**2), rel=1e-12)
        assert set(request.levels) == {TEXT} and request.loss == 0

    def test_decoding_displaces_the_model_by_its_share(self):
        chunks = (ChunkLevels(0, 10, (), (), False), ChunkLevels(10, 10, (100,), (0.1,), False))
        speeds = Speeds(PrefillSpeed(10.0), DecodeSpeed(seconds_per_chunk=0.4, compute_slowdown=0.5))
        request = simulate_request(fixed, chunks, Objective(9.0), speeds, traces.held("t", [4e-6], 1.0))
        assert request.ttft_seconds == pytest.approx(1.0 + 0.2, abs=1e-12)

    def test_the_model_ends_its_block_before_the_first_token(self):
        chunks = tuple(ChunkLevels(100 * i, 100, (100,), (0.1,), False) for i in range(2))
        speeds = Speeds(PrefillSpeed(100.0))
        both = simulate_request(
            POLICIES["ours"], chunks, Objective(9.0, 1.0), speeds, traces.held("t", [2e-6], 1.0), block_tokens=30
        )
        # 250 bytes/s: both files are here after 0.8 s, the model is between the blocks that end at 0.6 and 0.9 s.
        assert both.ttft_seconds == pytest.approx(0.9, abs=1e-12) and both.levels == (1, 1)

    def test_the_model_ends_its_layer_where_it_has_several(self):
        chunks = tuple(ChunkLevels(100 * i, 100, (100,), (0.1,), False) for i in range(2))
        link = traces.held("t", [2e-6], 1.0)
        # As above; a block of 0.3 s has 5 layers of 0.06 s, the fourth of the third block ends at 0.84 s.
        both = simulate_request(
            POLICIES["ours"],
            chunks,
            Objective(9.0, 1.0),
            Speeds(PrefillSpeed(100.0)),
            link,
            block_tokens=30,
            num_layers=5,
        )
        assert both.ttft_seconds == pytest.approx(0.84, abs=1e-12) and both.levels == (1, 1)

    def test_what_waits_for_a_dead_link_never_comes(self):
        request = simulate_request(fixed, one_level(100), Objective(1.0), SLOW_MODEL, traces.no_bandwidth())
        assert request.ttft_seconds == math.inf

    def test_a_policy_that_waits_for_nothing_is_a_bug(self):
        with pytest.raises(RuntimeError, match="waits for nothing"):
            simulate_request(lambda _: Decision(), one_level(1), Objective(1.0), A40, traces.no_bandwidth())


class TestNeverSlowerThanText:
    """The property that the two ends are built for."""

    @pytest.mark.parametrize("machine", MACHINES)
    @pytest.mark.parametrize("curve", CURVES)
    @pytest.mark.parametrize("link", LINKS)
    def test_on_every_trace_by_at_most_two_percent(self, link, curve, machine):
        chunks, speeds = load(curve), replace(MACHINES[machine], stop_seconds=0.04 if machine != "h100" else 0.008)
        text_seconds = sum(speeds.prefill.seconds(c.first_token, c.num_tokens) for c in chunks)
        for objective in OBJECTIVES:
            request = simulate_request(POLICIES["ours"], chunks, objective, speeds, LINKS[link])
            assert request.ttft_seconds <= 1.02 * text_seconds, objective

    @pytest.mark.parametrize("link", ["zero", "stops at once", "stops late", "1 Gbps", "outage 0"])
    @pytest.mark.parametrize("chunk_size", [256, 4000])
    def test_with_short_and_long_chunks(self, link, chunk_size):
        chunks = load("embedded", chunk_size)
        text_seconds = sum(A40.prefill.seconds(c.first_token, c.num_tokens) for c in chunks)
        speeds = replace(A40, stop_seconds=0.045)
        request = simulate_request(POLICIES["ours"], chunks, Objective(1.0), speeds, LINKS[link], num_connections=2)
        assert request.ttft_seconds <= 1.02 * text_seconds

    def test_by_at_most_five_percent_where_decoding_is_half_as_fast_as_believed(self):
        true = replace(A40, decode=replace(A40.decode, tokens_per_second=A40.decode.tokens_per_second / 2))
        for link in LINKS.values():
            request = simulate_request(
                POLICIES["ours"],
                load("embedded"),
                Objective(1.0),
                replace(A40, stop_seconds=0.04),
                link,
                true_speeds=true,
            )
            assert request.ttft_seconds <= 1.05 * 1.8266

    def test_a_tail_without_files_is_computed_last(self):
        chunks = (*load("embedded")[:-1], ChunkLevels(9000, 491, (), (), True))
        request = simulate_request(POLICIES["ours"], chunks, Objective(1.0), A40, traces.constant(40))
        assert request.levels[-1] == TEXT and request.levels[3] != TEXT and request.ttft_seconds < 1.0


class TestBusyToTheEnd:
    """Decoding what is complete while the rest comes."""

    @pytest.mark.parametrize("gbps", [1, 2, 3, 5])
    def test_the_time_is_close_to_what_link_and_device_can_do_together(self, gbps):
        chunks = load("embedded", 512)
        objective = Objective(10.0, 0.0018)
        speeds = replace(A40, stop_seconds=0.002)
        request = simulate_request(POLICIES["ours"], chunks, objective, speeds, traces.constant(gbps), num_layers=32)
        bound, _ = clairvoyant_bound(chunks, objective, A40, traces.constant(gbps))
        decode_seconds = sum(A40.decode.seconds(c, 2) for c, n in zip(chunks, request.levels, strict=True) if n != TEXT)
        assert request.loss <= objective.target_loss
        # The bound decodes in no time; a device that decodes does not compute meanwhile. A chunk computes in 0.09 s.
        assert request.ttft_seconds <= bound + decode_seconds + 0.045

    @pytest.mark.parametrize("gbps", [1, 3])
    def test_nothing_is_decoded_twice_on_a_steady_link(self, gbps):
        request = simulate_request(
            POLICIES["ours"], load("embedded", 512), Objective(10.0, 0.0018), A40, traces.constant(gbps)
        )
        decoded = [span.chunk for span in request.spans if span.worker == "decode"]
        assert len(decoded) == len(set(decoded)) == sum(level != TEXT for level in request.levels)

    def test_a_link_that_may_still_fail_brings_the_smallest_levels_first(self):
        request = simulate_request(POLICIES["ours"], load("embedded", 512), Objective(1.0), A40, traces.constant(1.5))
        fetched = [span.level for span in request.spans if span.worker == "fetch" and span.outcome == "done"]
        assert fetched == sorted(fetched[: fetched.index(2)]) + fetched[fetched.index(2) :] and fetched.count(1) > 10

    def test_a_refinement_that_is_late_does_not_keep_a_chunk_from_being_decoded(self):
        # Seed 60 slows down while the last refinement is in flight.
        chunks = LevelCurve((0.82, 1.13, 3.52, 5.29), (0.0061, 0.0017, 0.000057, 0.0000057), True, "", 2.2).document(
            9491, 512, 65536
        )
        link = SEEDED_TRACES["uniform-per-chunk"](60)
        speeds = replace(A40, stop_seconds=0.0016)
        request = simulate_request(POLICIES["ours"], chunks, Objective(1.0), speeds, link, num_layers=32)
        assert request.ttft_seconds <= 1.0


class TestNoOracle:
    """A policy knows the past only."""

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("curve", CURVES)
    def test_decisions_do_not_change_with_the_future_of_the_trace(self, policy, curve):
        past = [3.0, 0.5, 2.0]
        seen = []
        for future in (0.0, 0.2, 100.0):
            states = []
            link = traces.held("t", [*past, future], 0.1)
            simulate_request(POLICIES[policy], load(curve), Objective(1.0), A40, link, observe=states.append)
            seen.append([state for state in states if state.elapsed_seconds < 0.3 - 1e-9])
        assert seen[0] and [s for s in seen[0]] == seen[1] == seen[2]
        assert len({repr([POLICIES[policy](state) for state in states]) for states in seen}) == 1


class TestBound:
    """Nothing that computes a prefix beats it."""

    @pytest.mark.parametrize("curve", CURVES)
    @pytest.mark.parametrize("link", LINKS)
    def test_no_policy_reaches_the_target_before_it(self, link, curve):
        objective = Objective(10.0, 0.0018)
        bound, _ = clairvoyant_bound(load(curve), objective, A40, LINKS[link])
        request = simulate_request(POLICIES["ours"], load(curve), objective, A40, LINKS[link])
        if request.loss <= objective.target_loss:
            assert request.ttft_seconds >= bound - 1e-9

    @pytest.mark.parametrize("link", LINKS)
    def test_no_policy_is_better_at_the_deadline(self, link):
        bound, loss = clairvoyant_bound(load("embedded"), Objective(1.0), A40, LINKS[link])
        request = simulate_request(POLICIES["ours"], load("embedded"), Objective(1.0), A40, LINKS[link])
        assert request.ttft_seconds > bound or request.loss >= loss - 1e-12

    def test_without_a_link_it_is_text(self):
        bound = clairvoyant_bound(load("embedded"), Objective(1.0), A40, traces.no_bandwidth())
        assert bound == (pytest.approx(1.8266, abs=1e-3), 0.0)

    def test_by_hand_for_two_equal_ends(self):
        # 1 s to compute all, 1 s to load all: they meet after half a second.
        chunks = one_level(100, 2)
        bound, loss = clairvoyant_bound(
            chunks, Objective(0.0, 0.3), Speeds(PrefillSpeed(20.0)), traces.held("t", [200 / BYTES_PER_GIGABIT], 1.0)
        )
        assert (bound, loss) == (pytest.approx(0.5), pytest.approx(0.1))
