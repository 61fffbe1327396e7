"""A scheduler's requests: what is looked up, loaded, computed and saved of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cachegen.integrations.block_store import BlockStore, Namespace, chain_hashes
from cachegen.integrations.counters import Counters
from cachegen.integrations.load_policy import LoadPolicy, Rates
from cachegen.integrations.request_plans import RequestPlans
from tests.fixtures.web_server import Misbehaviour, serve

NAMESPACE = Namespace(model="a")
ENGINE_TOKENS, BLOCK_TOKENS = 4, 8
PROMPT = list(range(30))  # three whole blocks and some
HASHES = chain_hashes(PROMPT, BLOCK_TOKENS)


def fill(folder: Path, num_blocks: int) -> None:
    store = BlockStore(str(folder))
    for block_hash in HASHES[:num_blocks]:
        store.put(NAMESPACE, block_hash, b"blob")


def make_plans(location: str, policy: LoadPolicy | None = None, **options) -> RequestPlans:
    return RequestPlans(
        "scheduler",
        BlockStore(location),
        NAMESPACE,
        BLOCK_TOKENS,
        ENGINE_TOKENS,
        policy or LoadPolicy("always"),
        Counters(),
        **options,
    )


def ask(plans: RequestPlans, num_computed: int = 0, request_id: str = "r") -> int:
    """Ask until there is an answer, as a scheduler does."""
    end = time.monotonic() + 60
    while (found := plans.match(request_id, num_computed)) is None:
        assert time.monotonic() < end
    return found


def run_step(plans: RequestPlans, num_before: int, num_new: int, blocks: list[int], *, are_all: bool = True):
    return plans.step({"r": (num_before, num_new)}, {"r": (blocks, are_all)})


@pytest.mark.parametrize("there", [0, 1, 3])
def test_the_blocks_that_are_there_are_loaded_and_the_others_computed_and_saved(tmp_path, there):
    fill(tmp_path, there)
    plans = make_plans(str(tmp_path))
    plans.begin("r", PROMPT, len(PROMPT))
    assert ask(plans) == there * BLOCK_TOKENS
    plans.allocate("r", [9, 8, 7, 6, 5, 4, 3, 2], there * BLOCK_TOKENS)
    loads = plans.step({}, {}).loads
    assert [[(load.block_hash, load.engine_blocks) for load in task.blocks] for task in loads] == [
        [(HASHES[index], [9 - 2 * index, 8 - 2 * index]) for index in range(there)]
    ] * bool(there)
    step = run_step(plans, there * BLOCK_TOKENS, 30 - there * BLOCK_TOKENS, [9, 8, 7, 6, 5, 4, 3, 2])
    assert [(save.block_hash, list(save.engine_blocks), save.position) for save in step.saves] == [
        (HASHES[index], [9 - 2 * index, 8 - 2 * index], index * BLOCK_TOKENS) for index in range(there, 3)
    ]
    counts = plans.counters.snapshot()
    assert counts["tokens:computed"] == 30 - there * BLOCK_TOKENS and counts.get("found") == there
    assert counts.get("missed:absent", 0) == 3 - there
    assert counts["decided:load" if there else "decided:nothing"] == 1


def test_what_the_engine_has_is_not_loaded_not_even_in_the_middle_of_a_block(tmp_path):
    fill(tmp_path, 2)
    plans = make_plans(str(tmp_path))
    plans.begin("r", PROMPT, len(PROMPT))
    assert ask(plans, 12) == 4
    plans.allocate("r", [0, 1, 2, 3], 4)
    (task,) = plans.step({}, {}).loads
    assert [(load.block_hash, load.engine_blocks) for load in task.blocks] == [(HASHES[1], [3])]


def test_nothing_is_loaded_where_the_engine_has_as_much(tmp_path):
    fill(tmp_path, 2)
    plans = make_plans(str(tmp_path))
    plans.begin("r", PROMPT, len(PROMPT))
    assert ask(plans, 16) == 0


def test_a_prompt_in_several_steps_is_saved_as_its_blocks_become_whole(tmp_path):
    plans = make_plans(str(tmp_path))
    plans.begin("r", PROMPT, len(PROMPT))
    assert ask(plans) == 0
    plans.allocate("r", [0, 1, 2], 0)
    assert [save.engine_blocks for save in run_step(plans, 0, 12, [0, 1, 2]).saves] == [[0, 1]]
    assert [save.engine_blocks for save in run_step(plans, 12, 3, [3], are_all=False).saves] == []
    assert [save.engine_blocks for save in run_step(plans, 15, 16, [4, 5, 6, 7], are_all=False).saves] == [
        [2, 3],
        [4, 5],
    ]
    assert plans.counters.snapshot()["tokens:computed"] == 30  # the 31st is of the answer


def test_a_resumed_request_has_new_blocks(tmp_path):
    plans = make_plans(str(tmp_path))
    plans.begin("r", PROMPT, len(PROMPT))
    assert ask(plans) == 0
    plans.allocate("r", [0, 1], 0)
    run_step(plans, 0, 8, [0, 1])
    assert [save.engine_blocks for save in run_step(plans, 0, 16, [7, 6, 5, 4]).saves] == [[5, 4]]


def test_a_request_is_loaded_once_and_what_was_not_loaded_is_saved(tmp_path):
    fill(tmp_path, 3)
    plans = make_plans(str(tmp_path))
    plans.begin("r", PROMPT, len(PROMPT))
    assert ask(plans) == 24
    plans.allocate("r", [0, 1, 2, 3, 4, 5], 24)
    plans.step({}, {})
    plans.take_invalid({2, 3, 4, 5})
    assert plans.match("r", 0) == 0
    assert len(run_step(plans, 8, 22, [0, 1, 2, 3, 4, 5, 6, 7]).saves) == 3


def test_a_request_that_is_more_than_its_tokens_is_left_alone(tmp_path):
    fill(tmp_path, 3)
    plans = make_plans(str(tmp_path))
    plans.begin("r", None, len(PROMPT))
    assert plans.match("r", 0) == 0 and not run_step(plans, 0, 30, list(range(8))).saves
    assert plans.counters.snapshot() == {"decided:skip": 1, "tokens:computed": 30}


def test_where_computing_is_faster_nothing_is_loaded_and_nothing_saved_again(tmp_path):
    fill(tmp_path, 3)
    policy = LoadPolicy("faster")
    policy.rates = Rates(load=2.0, compute=1.0)
    plans = make_plans(str(tmp_path), policy)
    plans.begin("r", PROMPT, len(PROMPT))
    assert ask(plans) == 0
    assert not run_step(plans, 0, 30, list(range(8))).saves
    assert plans.counters.snapshot()["decided:compute"] == 1


def test_requests_before_it_decide_whether_a_prompt_is_loaded(tmp_path):
    fill(tmp_path, 3)
    policy = LoadPolicy("faster")
    policy.rates = Rates(load=2.0, compute=3.0)
    plans = make_plans(str(tmp_path), policy)
    for name in "abc":
        plans.begin(name, PROMPT, len(PROMPT))
    assert ask(plans, request_id="a") == 24
    plans.allocate("a", list(range(8)), 24)
    assert ask(plans, request_id="b") == 0  # 48 x 2 for loading both, 6 and 24 x 3 for computing it
    plans.allocate("b", list(range(8, 16)), 0)
    plans.end_loads({"a"})
    assert ask(plans, request_id="c") == 24
    plans.finish("c")
    # The others are computed; nobody waits any more.
    plans.step({"a": (24, 6), "b": (0, 30)}, {})
    plans.begin("d", PROMPT, len(PROMPT))
    policy.rates = Rates(load=3.0, compute=2.0)
    assert ask(plans, request_id="d") == 0


def test_roles_that_only_load_or_only_save_do_just_that(tmp_path):
    fill(tmp_path, 1)
    reader, writer = make_plans(str(tmp_path), saves=False), make_plans(str(tmp_path), loads=False)
    for plans in (reader, writer):
        plans.begin("r", PROMPT, len(PROMPT))
    assert ask(reader) == 8 and not run_step(reader, 8, 22, list(range(8))).saves
    assert ask(writer) == 0 and len(run_step(writer, 0, 30, list(range(8))).saves) == 3


def test_a_store_that_fails_is_a_miss_that_is_counted_with_the_request(tmp_path, caplog):
    with serve(tmp_path) as server:
        server.faults.append(Misbehaviour("", "garbage", methods=("GET", "HEAD")))
        fill(tmp_path, 3)
        plans = make_plans(server.url)
        plans.begin("r", PROMPT, len(PROMPT))
        assert ask(plans) == 0
    assert plans.counters.snapshot()["missed:outage"] == 3
    (record,) = caplog.records
    assert "was not looked up (outage)" in record.getMessage() and "\n" not in record.getMessage()


def test_a_store_that_does_not_answer_is_waited_for_no_longer_than_allowed(tmp_path):
    with serve(tmp_path) as server:
        server.faults.append(Misbehaviour("", "stall", methods=("GET", "HEAD")))
        fill(tmp_path, 3)
        plans = make_plans(server.url, lookup_seconds=0.1)
        plans.begin("r", PROMPT, len(PROMPT))
        assert ask(plans) == 0
    assert plans.counters.snapshot()["missed:late"] == 3


def test_a_finished_request_is_forgotten(tmp_path):
    plans = make_plans(str(tmp_path))
    plans.begin("r", PROMPT, len(PROMPT))
    plans.finish("r")
    plans.finish("r")
    assert plans.match("r", 0) == 0 and plans._plans == {}
