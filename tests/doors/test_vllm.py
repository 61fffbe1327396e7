"""The connector in vLLM itself, on the CPU; `make test-doors` runs this."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cachegen.integrations.block_store import chain_hashes
from tests.fixtures.engines import Answered, Engine, find_model, make_prompt, start_engine
from tests.fixtures.web_server import Misbehaviour, serve

# Warnings of another package are its own.
pytestmark = [pytest.mark.doors, pytest.mark.filterwarnings("default")]

BLOCK_TOKENS = 256
COMMON = make_prompt(0, 700)
PROMPTS = [make_prompt(seed, length, COMMON) for seed, length in ((1, 900), (2, 1300))]
PROMPTS += [make_prompt(3, 600), make_prompt(4, 200)]
STORED = PROMPTS[1]  # of five whole blocks
NUM_ANSWERED = 8
TIMEOUT_SECONDS = 60


def num_whole(prompt: list[int]) -> int:
    """Tokens of a prompt's whole blocks."""
    return len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS


def wait_for_blocks(folder: Path, number: int) -> list[Path]:
    """Wait until so many blocks are stored."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while len(found := sorted(folder.rglob("*.kvb"))) < number:
        assert time.monotonic() < end, f"{len(found)} of {number} blocks were stored"
        time.sleep(0.05)
    assert len(found) == number
    return found


def answer_one(engine: Engine, prompt: list[int], salt: str = "") -> Answered:
    (answered,) = engine.answer([prompt], salt=salt)
    return answered


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return find_model(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def right(model) -> list[list[int]]:
    """What vLLM answers by itself."""
    with start_engine(model, None) as engine:
        answers = [answer_one(engine, prompt).tokens for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(answers)
    return answers


@pytest.fixture(scope="module")
def store(model, right, tmp_path_factory) -> Path:
    """A store that one engine has filled; nobody changes it."""
    folder = tmp_path_factory.mktemp("store")
    with start_engine(model, str(folder)) as engine:
        cold = [answer_one(engine, prompt) for prompt in PROMPTS]
        # Two blocks are common to the first two prompts.
        wait_for_blocks(folder, sum(num_whole(prompt) // BLOCK_TOKENS for prompt in PROMPTS) - 2)
    assert [answered.tokens for answered in cold] == right
    return folder


@pytest.fixture
def engine_of(model) -> Iterator:
    return lambda store, **options: start_engine(model, str(store), **options)


def test_another_engine_answers_the_same_and_computes_only_what_is_not_stored(store, engine_of, right):
    with engine_of(store) as engine:
        engine.take_forward_tokens()
        for prompt, tokens in zip(PROMPTS, right, strict=True):
            answered = answer_one(engine, prompt)
            assert answered.tokens == tokens
            assert answered.num_cached == num_whole(prompt)
            # The prompt's tail, and a token for each answered but the last.
            assert engine.take_forward_tokens() == len(prompt) - num_whole(prompt) + NUM_ANSWERED - 1
        counts = engine.counts()
        num_loaded = sum(map(num_whole, PROMPTS))
        assert counts["prompt_tokens{loaded}"] == num_loaded
        assert counts["prompt_tokens{computed}"] == sum(map(len, PROMPTS)) - num_loaded
        assert counts["loaded_blocks"] == counts["found_blocks"] == num_loaded // BLOCK_TOKENS
        assert counts["decisions{load}"] == 3 and counts["read_bytes"] < counts["decoded_bytes"]
        assert counts.get("encoded_blocks", 0) == 0 and not [name for name in counts if name.startswith("missed")]

        other = make_prompt(5, 900, PROMPTS[0][:600])  # only a part of it is stored
        assert answer_one(engine, other).num_cached == 512
        assert engine.take_forward_tokens() == len(other) - 512 + NUM_ANSWERED - 1

        assert answer_one(engine, PROMPTS[2], salt="another user").num_cached == 0
        assert [answered.tokens for answered in engine.answer(PROMPTS)] == right  # side by side


@pytest.mark.parametrize(
    "options", [{"enable_prefix_caching": True, "block_size": 32}, {"max_num_batched_tokens": 192}]
)
def test_neither_the_engines_own_cache_nor_prompts_in_parts_change_an_answer(store, engine_of, right, options):
    with engine_of(store, enable_chunked_prefill=True, **options) as engine:
        for _ in range(2):
            assert [answered.tokens for answered in engine.answer(PROMPTS)] == right


def test_a_prompt_in_parts_is_stored_as_it_is_in_one(store, model, engine_of, tmp_path):
    with engine_of(tmp_path, max_num_batched_tokens=192, enable_chunked_prefill=True) as engine:
        answer_one(engine, STORED)
        names = {path.name for path in wait_for_blocks(tmp_path, 5)}
    assert names <= {path.name for path in store.rglob("*.kvb")}


def test_requests_that_were_preempted_get_the_right_answer(model, engine_of, tmp_path):
    """Eight answers do not fit together: vLLM gives some of them up and starts them again.

    In float32, since what a step computes together changes the last bits.
    """
    prompts = [make_prompt(seed, 400) for seed in range(10, 18)]
    with start_engine(model, None, max_num_seqs=8, dtype="float32") as engine:
        right = [answered.tokens for answered in engine.answer(prompts, 130)]
    with engine_of(tmp_path, max_num_seqs=8, dtype="float32", num_gpu_blocks_override=30) as engine:
        for _ in range(2):
            assert [answered.tokens for answered in engine.answer(prompts, 130)] == right
            wait_for_blocks(tmp_path, len(prompts))
        assert engine.counts()["loaded_blocks"] >= len(prompts)
        assert engine.num_preemptions() > 0


@pytest.mark.parametrize("change", ["damaged", "foreign"])
def test_a_block_that_is_not_the_right_one_is_computed_and_stored_again(engine_of, right, tmp_path, change, capfd):
    with engine_of(tmp_path) as engine:
        answer_one(engine, STORED)
        paths = sorted(wait_for_blocks(tmp_path, 5), key=lambda path: path.stat().st_mtime_ns)
        whole = paths[2].read_bytes()
        paths[2].write_bytes(whole[:-9] + b"damaged!!" if change == "damaged" else paths[0].read_bytes())
        engine.take_forward_tokens()
        assert answer_one(engine, STORED).tokens == right[1]
        assert engine.take_forward_tokens() == len(STORED) - 2 * BLOCK_TOKENS + NUM_ANSWERED - 1
        counts = engine.counts()
        assert counts[f"missed_blocks{{{change}}}"] == 1 and counts["missed_blocks{behind}"] == 2
        end = time.monotonic() + TIMEOUT_SECONDS
        while paths[2].read_bytes() != whole:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert answer_one(engine, STORED).num_cached == num_whole(STORED)
    lines = [line for line in capfd.readouterr().err.splitlines() if "was not loaded" in line]
    assert len(lines) == 1 and f"block 3 of 5 was not loaded ({change})" in lines[0]


@pytest.mark.parametrize("how", ["hang up", "stall"])
def test_a_store_that_dies_in_the_middle_of_a_load_costs_time_only(store, engine_of, right, how, capfd):
    with serve(store) as server, engine_of(server.url) as engine:
        # Of the prompt's five blocks, the fourth does not come; two are another's, too.
        fourth = chain_hashes(STORED, BLOCK_TOKENS)[3].hex()
        server.faults.append(Misbehaviour(fourth, how))
        assert answer_one(engine, STORED).tokens == right[1]
        counts = engine.counts()
        assert sum(counts.get(f"missed_blocks{{{reason}}}", 0) for reason in ("outage", "late")) == 1
        assert counts["loaded_blocks"] == 3
        # It shows within the next request, too.
        server.faults.append(Misbehaviour("", "garbage", methods=("GET", "HEAD")))
        assert answer_one(engine, STORED).tokens == right[1]
        assert engine.counts()["missed_blocks{outage}"] > counts.get("missed_blocks{outage}", 0)
    lines = [line for line in capfd.readouterr().err.splitlines() if "was not loaded" in line]
    assert len(lines) == 1 and "block 4 of 5" in lines[0]


@pytest.mark.parametrize("fields", [{"method": "uniform", "bits": 8}, {"block_tokens": 128, "policy": "faster"}])
def test_other_methods_and_blocks_load_as_much(engine_of, right, tmp_path, fields):
    with engine_of(tmp_path, fields=fields) as engine:
        answer_one(engine, STORED)
        block_tokens = fields.get("block_tokens", BLOCK_TOKENS)
        wait_for_blocks(tmp_path, len(STORED) // block_tokens)
        answered = answer_one(engine, STORED)
        assert answered.num_cached == len(STORED) // block_tokens * block_tokens
        if "method" not in fields:
            assert answered.tokens == right[1]
    (about,) = tmp_path.rglob("about.json")
    assert json.loads(about.read_text())["method"] == fields.get("method", "lossless")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "connector cachegen: store"),
        ({"store": "s", "method": "gzip"}, "connector cachegen: .*gzip"),
        ({"store": "s", "block_tokens": 100}, "block_tokens must be a multiple of 128, got 100"),
        ({"store": "s", "policy": "best"}, "policy must be one of always, faster, got best"),
        ({"store": "s", "blok_tokens": 256}, "blok_tokens"),
    ],
)
def test_a_wrong_config_is_refused_by_the_name_of_its_field(fields, problem):
    from cachegen.errors import ConfigError
    from cachegen.integrations.vllm import read_options

    with pytest.raises(ConfigError, match=problem):
        read_options(fields, 128, 64)


def test_the_engine_must_compute_what_cannot_be_loaded():
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    from cachegen.errors import ConfigError
    from cachegen.integrations.vllm import CacheGenConnector

    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_load_failure_policy="fail"))
    with pytest.raises(ConfigError, match='kv_load_failure_policy must be "recompute"'):
        CacheGenConnector(config, KVConnectorRole.SCHEDULER, None)
