"""Recurrent states: stored bit for bit, put back, and nothing served without those of the right place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import DynamicCache

import cachegen
import main
import run_calibration
import run_decoding_disk
import run_decoding_remote
import run_encoding
import run_publishing
from cachegen.api.compressing import CompressedCache
from cachegen.errors import BitstreamError, ConfigError, InputError, MismatchError
from cachegen.inspection import inspect
from cachegen.kv_cache import load_kv_cache, save_kv_cache
from cachegen.methods import make_encoder, open_document, parse_document, read_config
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from cachegen.pipeline.hybrids import continues_in_blocks
from cachegen.pipeline.kept import KeptEncoding
from cachegen.pipeline.model_cache import allocate_cache, is_whole_only, set_length
from cachegen.pipeline.prefill import (
    extend_cache,
    measure_plane_shapes,
    prefill,
    prefill_context,
    recompute_first_tokens,
)
from cachegen.pipeline.state_layers import keep_states, state_layers, states_of_cache
from cachegen.states import pack_states, unpack_states
from cachegen.store.store import open_store
from cachegen.streaming.client import (
    ModelWorkers,
    choose_policy,
    find_for_model,
    finish_cache,
    make_loader,
    measure_speeds,
)
from cachegen.streaming.policies import POLICIES
from cachegen.streaming.policy import Objective, PrefillSpeed, Speeds
from tests.fixtures.caches import are_equal, make_cache, make_metadata
from tests.fixtures.models import VOCABULARY_SIZE
from tests.zoo.checkpoints import Specimen, make_ids, save_specimen
from tests.zoo.checks import EXACT_TOLERANCE, difference, name_cache, predict_from, predict_plainly
from tests.zoo.families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

STATES = {"0.conv.0": torch.arange(6.0).view(1, 2, 3), "11.recurrent.0": torch.ones(1, 2, dtype=torch.bfloat16)}
UNIFORM_8 = {"method": "uniform", "bits": 8}
UNIFORM = read_config(UNIFORM_8, "test")


def make_tables(**fields: Any) -> bytes:
    """The tables file of a document of 20 tokens with states."""
    return make_encoder(UNIFORM, make_cache(20), make_metadata(20, states=STATES, **fields), [12, 8]).tables_file


# --- the bytes --------------------------------------------------------------------------------------------------------


def test_states_are_a_safetensors_file_and_come_back_bit_for_bit():
    states = STATES | {"2.conv.1": torch.tensor([torch.nan, -0.0, torch.inf])}
    content = pack_states(states)
    found = unpack_states(content)
    assert list(found) == ["0.conv.0", "2.conv.1", "11.recurrent.0"]
    for name, state in safetensors.torch.load(content).items():
        assert state.dtype == states[name].dtype
        assert state.view(torch.uint8).equal(states[name].view(torch.uint8))
        assert found[name].view(torch.uint8).equal(states[name].view(torch.uint8))
    assert pack_states(dict(reversed(states.items()))) == content
    assert pack_states({}) == b"" and unpack_states(b"") == {}


@pytest.mark.parametrize(
    "states",
    [
        {"conv.0": torch.ones(1)},
        {"0.keys.0": torch.ones(1)},
        {"00.conv.0": torch.ones(1)},
        {"0.conv.0\n": torch.ones(1)},
        {"100000.conv.0": torch.ones(1)},
        {"0.conv.0": torch.ones(1, dtype=torch.int64)},
        {"0.conv.0": torch.tensor(1.0)},
        {"0.conv.0": torch.ones([1] * 9)},
    ],
)
def test_other_tensors_are_no_states(states):
    with pytest.raises(BitstreamError, match="states"):
        unpack_states(safetensors.torch.save(states))


def test_other_bytes_are_no_states():
    content = pack_states(STATES)
    for wrong in (b"no", content[:-1], content + b"\0", b"\xff" * 8 + content[8:], b"\0" * 100):
        with pytest.raises(BitstreamError, match="states"):
            unpack_states(wrong)


def test_a_tables_file_ends_with_the_states_and_notices_each_byte_of_them():
    content = make_tables()
    header = parse_document(content)
    assert header.has_states and header.is_whole_only
    assert content.endswith(pack_states(STATES))
    assert are_same(open_document(content).read_states(), STATES)
    for position in range(len(content) - header.states_bytes, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1
        with pytest.raises(BitstreamError, match="states"):
            parse_document(bytes(damaged))


def test_chunks_that_end_before_the_states_are_neither_written_nor_read():
    cache, metadata = make_cache(20), make_metadata(20, states=STATES)
    with pytest.raises(ConfigError, match="end after 12 of 20 tokens"):
        make_encoder(UNIFORM, cache, metadata, [12])
    shorter = dataclasses.replace(metadata, states={})
    encoder = make_encoder(UNIFORM, cache, shorter, [12])
    states = pack_states(STATES)
    from cachegen import _native

    header = dataclasses.replace(encoder.document.header, states_bytes=len(states), states_crc=_native.crc32c(states))
    tables = encoder.tables_file[encoder.document.header.header_bytes :]
    with pytest.raises(BitstreamError, match="end before the states"):
        parse_document(header.pack() + tables + states)


def test_a_kv_file_holds_the_states_and_notices_where_they_change(tmp_path):
    path = tmp_path / "test_kv_0.pkl"
    save_kv_cache(path, make_cache(20), make_metadata(20, states=STATES))
    cache, metadata = load_kv_cache(path)
    assert are_equal(cache, make_cache(20)) and are_same(metadata.states, STATES)
    content = path.read_bytes()
    state = STATES["0.conv.0"].numpy().tobytes()
    assert content.count(state) == 1
    path.write_bytes(content.replace(state, state[:-1] + b"\x41"))
    with pytest.raises(BitstreamError, match="states_hash: does not match the states"):
        load_kv_cache(path)


def are_same(found: Any, expected: Any) -> bool:
    return set(found) == set(expected) and all(found[name].equal(expected[name]) for name in expected)


# --- a model ----------------------------------------------------------------------------------------------------------


def make_specimen(name: str, folder: Path) -> Specimen:
    # A vocabulary for the tokenizer, which the zoo never asks.
    fields = FAMILIES[name].fields() | {"vocab_size": VOCABULARY_SIZE}
    found = save_specimen(dataclasses.replace(FAMILIES[name], fields=lambda: fields), folder)
    if found.error is not None:
        pytest.skip(f"this transformers cannot: {found.error}")
    return found


@pytest.fixture(scope="module")
def specimen(tmp_path_factory, one_thread) -> Iterator[Specimen]:
    yield make_specimen("Qwen3-Next", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory, one_thread) -> Iterator[Specimen]:
    """A model that starts from states of zero wherever it is given two tokens."""
    yield make_specimen("Jamba", tmp_path_factory.mktemp("forgetful"))


def test_a_length_leads_back_to_the_end_of_the_context_and_to_nothing_else(specimen):
    loaded, prompt = specimen.exact, make_ids(40)
    cache = prefill(loaded, prompt[:30], 7, capacity=40)
    assert is_whole_only(cache)
    expected = predict_plainly(loaded.model, prompt)[30:]
    for _ in range(2):  # the first leaves the states of token 40
        assert difference(expected, predict_from(loaded, cache, 30, prompt)) < EXACT_TOLERANCE
    set_length(cache, 40)  # is what it holds
    for num_tokens in (1, 29, 31, 39):
        with pytest.raises(ValueError, match="recurrent states after other tokens are not known"):
            set_length(cache, num_tokens)
    set_length(cache, 0)
    extend_cache(loaded, cache, prompt[:30], 7)
    assert difference(expected, predict_from(loaded, cache, 30, prompt)) < EXACT_TOLERANCE


def test_recomputed_first_tokens_leave_the_states_alone(specimen):
    loaded, prompt = specimen.exact, make_ids(40)
    cache = prefill(loaded, prompt[:30], 7, capacity=40)
    before = states_of_cache(cache)
    recompute_first_tokens(loaded, cache, prompt, 4, 30)
    assert are_same(states_of_cache(cache), before)
    assert is_whole_only(cache)


def test_a_cache_without_its_states_has_no_length(specimen):
    loaded = specimen.exact
    cache = prefill(loaded, make_ids(9), capacity=20)
    states = states_of_cache(cache)
    for layer in state_layers(cache):
        layer.kept_tokens = None
    with pytest.raises(ValueError, match="not known"):
        set_length(cache, 8)
    with pytest.raises(ValueError, match=r"`states` has none of layer 0"):
        keep_states(cache, {name: state for name, state in states.items() if not name.startswith("0.")}, 9)
    with pytest.raises(ValueError, match=r"layer 2 has no states"):
        keep_states(cache, states | {"2.conv.0": torch.ones(1)}, 9)


def test_whether_several_tokens_may_follow_is_found(specimen, forgetful):
    assert continues_in_blocks(specimen.exact)
    assert not continues_in_blocks(forgetful.exact)
    assert not continues_in_blocks(forgetful.half)


def test_a_model_that_forgets_is_given_one_token_at_a_time(forgetful):
    loaded, prompt = forgetful.exact, make_ids(40)
    cache, metadata = prefill_context(loaded, prompt[:30], block_size=7)
    assert metadata.block_size == cache.num_tokens == 29
    held = prefill(loaded, prompt[:29], 7, capacity=40)
    expected = predict_plainly(loaded.model, prompt)[29:]
    assert difference(expected, predict_from(loaded, held, 29, prompt)) < EXACT_TOLERANCE


def test_a_document_of_other_states_is_refused_before_anything_is_decoded(specimen, tmp_path):
    loaded = specimen.half
    cache, metadata = prefill_context(loaded, make_ids(21))
    first = next(iter(metadata.states))
    wider = {**metadata.states, first: torch.cat([metadata.states[first]] * 2, 1)}
    for number, states in enumerate((wider, {})):
        folder = tmp_path / str(number)
        encode_document(make_encoder(UNIFORM, cache, dataclasses.replace(metadata, states=states), [20]), folder)
        with pytest.raises(MismatchError, match=rf"tables.cgt: states: {first} is "):
            EncodedFolder(folder, 1).check_model(loaded)


# --- the scripts ------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {"lossless": {}, "uniform": {"bits": 8}, "transform": {"step_log": -64}}
TEXT = "The river ran low that summer, and the mill stood still for most of it. " * 6


@pytest.fixture(scope="module")
def prefilled(specimen, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("document")
    (folder / "0.txt").write_text(TEXT)
    assert main.main([*model_flags(specimen), "--path_to_context", str(folder / "0.txt"), *saved(folder)]) == 0
    return folder


def model_flags(specimen: Specimen) -> list[str]:
    return ["--model_id", str(specimen.folder), "--dtype", "bfloat16", "--quiet"]


def saved(folder: Path) -> list[str]:
    return ["--save_dir", str(folder)]


def encode(folder: Path, method: str, *flags: str) -> int:
    config = folder / f"{method}.json"
    config.write_text(json.dumps({"method": method, **OPTIONS[method]}))
    argv = ["--path_to_kv", str(folder / "test_kv_0.pkl"), "--quantization_config", str(config)]
    return run_encoding.main([*argv, "--output_path", str(folder / method), "--chunk_size", "50", "--quiet", *flags])


def decode(specimen: Specimen, folder: Path, method: str, *flags: str) -> int:
    argv = [*model_flags(specimen), "--path_to_context", str(folder / "0.txt"), "--max_new_tokens", "6"]
    return run_decoding_disk.main([*argv, "--path_to_encoded_kv", str(folder / method), *flags])


def publish(folder: Path) -> int:
    paths = {"--path_to_encoded_kv": "lossless", "--path_to_kv": "test_kv_0.pkl", "--path_to_store": "store"}
    flags = [part for flag, name in paths.items() for part in (flag, str(folder / name))]
    return run_publishing.main([*flags, "--quiet"])


@pytest.mark.parametrize(("method", "most_kl"), [("lossless", 1e-4), ("uniform", 0.01), ("transform", 0.1)])
def test_the_scripts_answer_from_states_and_say_so(specimen, prefilled, capsys, method, most_kl):
    assert encode(prefilled, method) == 0
    capsys.readouterr()
    assert decode(specimen, prefilled, method, "--verify", "--json", "-", "--question", "And the mill?") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kl"] < most_kl and (method == "lossless") == record["bit_exact"]
    if method == "lossless":
        assert record["greedy_match"]
    found = inspect(str(prefilled / method))
    assert found["bytes_by_part"]["states"] > 0 and found["is_whole_only"] and not found["problems"]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda s, f: decode(s, f, "lossless", "--num_chunks", "1"), "can only be used whole"),
        (lambda s, f: encode(f, "uniform", "--num_chunks", "1", "--overwrite"), "encode the whole context"),
        (
            lambda s, f: run_calibration.main(
                [
                    "--model_id",
                    str(s.folder),
                    "--path_to_kv",
                    str(f),
                    "--output_path",
                    str(f / "profile"),
                    "--no_curve",
                    "--quiet",
                ]
            ),
            "has recurrent states",
        ),
    ],
    ids=["part", "uncovered", "calibration"],
)
def test_what_cannot_be_done_is_one_line(specimen, prefilled, capsys, run, reason):
    assert encode(prefilled, "lossless") == 0
    capsys.readouterr()
    assert run(specimen, prefilled) != 0
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_other_states_are_another_document(specimen, prefilled, tmp_path):
    cache, metadata = load_kv_cache(prefilled / "test_kv_0.pkl")
    encode_document(make_encoder(UNIFORM, cache, metadata, [cache.num_tokens]), tmp_path)
    states = {name: state + 1 for name, state in metadata.states.items()}
    encoder = make_encoder(UNIFORM, cache, dataclasses.replace(metadata, states=states), [cache.num_tokens])
    with pytest.raises(cachegen.errors.OutputError, match="another cache or configuration"):
        encode_document(encoder, tmp_path)


# --- Python -----------------------------------------------------------------------------------------------------------


def test_a_cache_of_another_model_or_without_states_is_refused(specimen):
    model, ids = specimen.plain, make_ids(20)
    with torch.inference_mode():
        cache = model(ids[None], use_cache=True)
    compressed = cachegen.compress(cache, ids, model, {"method": "lossless"})
    assert compressed.num_tokens == 20
    with pytest.raises(InputError, match="has recurrent states, the cache has none"):
        cachegen.compress(prefill_context(specimen.half, make_ids(21))[0], ids, model, {"method": "lossless"})
    with pytest.raises(InputError, match="recurrent states"):
        cachegen.calibrate(model, [ids, ids])


def test_a_decoded_cache_cannot_be_cropped(specimen, tmp_path):
    model, ids = specimen.plain, make_ids(30)
    with torch.inference_mode():
        cache = model(ids[None, :20], **name_cache(model, DynamicCache(config=model.config)), use_cache=True)
    cachegen.compress(cache, ids[:20], model, {"method": "lossless"}).save(tmp_path)
    decoded = cachegen.load(tmp_path).to_cache(model, ids)
    with pytest.raises((RuntimeError, ValueError)):
        decoded.crop(-1)


# --- stores -----------------------------------------------------------------------------------------------------------

NUM_CONTEXT = 300
NUM_CHUNKS = 5
LONG_PROMPT = make_ids(NUM_CONTEXT + 9)


@pytest.fixture
def store(specimen, tmp_path) -> Path:
    """A store of 300 tokens in chunks of 60."""
    loaded = specimen.exact
    cache = prefill(loaded, LONG_PROMPT[:NUM_CONTEXT], 16)
    chunks = {"chunk_tokens": NUM_CONTEXT // NUM_CHUNKS, "block_size": 16}
    cachegen.publish(tmp_path, cachegen.compress(cache, LONG_PROMPT[:NUM_CONTEXT], loaded, UNIFORM_8, **chunks))
    return tmp_path


def damage(store: Path, chunk: int) -> None:
    (manifest,) = (json.loads(path.read_bytes()) for path in store.rglob("documents/*/*/*.json"))
    path = store / manifest["chunks"][chunk]["files"][0]["name"]
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("damaged", [None, 0, 2, 4])
def test_every_policy_gives_the_right_answer_whatever_is_damaged(specimen, store, policy, damaged):
    if damaged is not None:
        damage(store, damaged)
    loaded = specimen.exact
    document = find_for_model(open_store(store), loaded, LONG_PROMPT, num_threads=1)
    assert document.is_whole_only and document.manifest.has_states
    cache = allocate_cache(loaded.cache_layout, measure_plane_shapes(loaded), len(LONG_PROMPT), loaded.dtype)
    # What measuring leaves in the cache is of no document.
    measured = measure_speeds(loaded, cache, NUM_CONTEXT, LONG_PROMPT, 16, torch.device("cpu"))
    speeds = measured if policy == "text" else Speeds(PrefillSpeed(1e5))
    loader = make_loader(
        document, loaded, cache, LONG_PROMPT, choose_policy(document, policy), Objective(0.001), speeds
    )
    with loader:
        result = loader.run()
    finish_cache(loaded, cache, document, result)
    sources = [chunk.source for chunk in result.chunks]
    assert sources == sorted(sources, reverse=True)  # text first, then the store
    if damaged is not None:
        assert sources[: damaged + 1] == ["text"] * (damaged + 1)
    expected = predict_plainly(loaded.model, LONG_PROMPT)[NUM_CONTEXT:]
    assert difference(expected, predict_from(loaded, cache, NUM_CONTEXT, LONG_PROMPT)) < 0.1
    for layer in state_layers(cache):
        layer.keep({name: -state for name, state in layer.kept.items()}, NUM_CONTEXT)
    assert difference(expected, predict_from(loaded, cache, NUM_CONTEXT, LONG_PROMPT)) > 0.5


def test_a_block_that_is_broken_off_leaves_no_states(specimen, store):
    loaded = specimen.exact
    document = find_for_model(open_store(store), loaded, LONG_PROMPT, num_threads=1)
    cache = allocate_cache(loaded.cache_layout, measure_plane_shapes(loaded), len(LONG_PROMPT), loaded.dtype)
    workers = ModelWorkers(document, loaded, cache, LONG_PROMPT, 16, torch.device("cpu"))
    assert workers.compute(0, 16, lambda: False) and workers.compute(16, 32, lambda: False)
    for place in (1, 2):  # the first layers have seen the block by then
        calls = iter(range(9))
        assert not workers.compute(32, 48, lambda calls=calls, place=place: next(calls) == place)
    assert workers.compute(32, NUM_CONTEXT, lambda: False)
    keep_states(cache, states_of_cache(cache), NUM_CONTEXT)
    expected = predict_plainly(loaded.model, LONG_PROMPT)[NUM_CONTEXT:]
    assert difference(expected, predict_from(loaded, cache, NUM_CONTEXT, LONG_PROMPT)) < EXACT_TOLERANCE


def test_a_store_of_other_states_is_refused(specimen, store):
    loaded = specimen.exact
    cache, metadata = prefill_context(loaded, LONG_PROMPT[: NUM_CONTEXT + 1], block_size=16)
    first = next(iter(metadata.states))
    wider = {**metadata.states, first: torch.cat([metadata.states[first]] * 2, 1)}
    encoder = make_encoder(UNIFORM, cache, dataclasses.replace(metadata, states=wider), [NUM_CONTEXT])
    cachegen.publish(store, CompressedCache(KeptEncoding(encoder), metadata))
    with pytest.raises(MismatchError, match=f"states: {first} is "):
        cachegen.load(store, level=1).to_cache(loaded, LONG_PROMPT)


def test_the_scripts_answer_from_a_store(specimen, prefilled, capsys):
    assert encode(prefilled, "lossless") == 0
    assert publish(prefilled) == 0
    capsys.readouterr()
    flags = [
        "--path_to_context",
        str(prefilled / "0.txt"),
        "--path_to_encoded_kv",
        str(prefilled / "store"),
        "--level",
        "1",
    ]
    assert run_decoding_remote.main([*model_flags(specimen), *flags, "--verify", "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kl"] < 1e-4 and record["greedy_match"]
    assert {chunk["source"] for chunk in record["chunks"]} == {"store"}


def test_a_model_that_forgets_is_refused_its_cache_from_a_store_too(forgetful, tmp_path):
    loaded = forgetful.exact
    cache = prefill(loaded, LONG_PROMPT[:NUM_CONTEXT])
    cachegen.publish(tmp_path, cachegen.compress(cache, LONG_PROMPT[:NUM_CONTEXT], loaded, UNIFORM_8))
    with pytest.raises(InputError, match="forgets its recurrent states"):
        cachegen.load(tmp_path).to_cache(loaded, LONG_PROMPT)
