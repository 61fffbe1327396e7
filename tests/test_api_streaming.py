"""The door to stores: what `publish` puts there comes back, whole or in part, and what is wrong is said in one line."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cachegen import api
from cachegen.errors import BitstreamError, ConfigError, InputError, MismatchError, StoreError
from cachegen.kv_cache import KVCache
from cachegen.pipeline.model_cache import planes_of_cache
from cachegen.store.profiles import ProfileFetcher
from cachegen.store.store import RetryRule, open_store
from cachegen.streaming import remote
from cachegen.streaming.load_report import LoadResult
from cachegen.streaming.policy import TEXT
from tests.fixtures import REPOSITORY
from tests.fixtures.caches import are_equal
from tests.fixtures.models import (
    change_weights,
    generate_ids,
    llama,
    load_bundled,
    load_plain,
    make_named,
    make_token_ids,
    run_model,
)
from tests.fixtures.web_server import Misbehaviour, serve

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS, CHUNK_TOKENS = 600, 150
IDS = make_token_ids(NUM_TOKENS)
PROMPT = torch.cat([IDS, make_token_ids(7, seed=1)]).long()[None]
QUICK = RetryRule(max_attempts=2, first_pause_seconds=0.001, stall_seconds=0.3)
BITS = (4, 8)


@functools.cache
def compressed(bits: int) -> api.CompressedCache:
    config = {"method": "uniform", "bits": bits}
    return api.compress(run_model(llama(), IDS), IDS, llama(), config, chunk_tokens=CHUNK_TOKENS)


@pytest.fixture
def store(tmp_path) -> Path:
    """A store of the small Llama's cache of IDS at two levels."""
    api.publish(tmp_path / "store", [compressed(bits) for bits in reversed(BITS)])
    return tmp_path / "store"


def decoded(bits: int, num_tokens: int = NUM_TOKENS, *, folder: Path) -> KVCache:
    """What the files of a level hold, without any store."""
    compressed(bits).save(folder / f"{bits}")
    return planes_of_cache(api.load(folder / f"{bits}").to_cache(llama(), IDS)).slice(0, num_tokens)


def planes_from_text() -> KVCache:
    return planes_of_cache(run_model(llama(), IDS).past_key_values)


def largest_difference(found: KVCache, expected: KVCache) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found.planes, expected.planes, strict=True))


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2])
def test_a_level_comes_back_as_from_its_folder_by_url_by_folder_and_by_store(store, tmp_path, level):
    expected = decoded(BITS[level - 1], folder=tmp_path)
    with serve(store) as server:
        for place in (server.url, store, str(store), open_store(store), server.open()):
            opened = api.load(place, level=level)
            assert isinstance(opened, api.CacheStore)
            cache = opened.to_cache(llama(), PROMPT)
            assert cache.get_seq_length() == NUM_TOKENS
            assert are_equal(planes_of_cache(cache), expected)
            assert len(generate_ids(llama(), cache, PROMPT, min_new_tokens=8)) == 8


def test_within_the_objective_every_chunk_is_loaded_or_computed_and_the_report_says_which(store):
    reports: list[LoadResult] = []
    with serve(store) as server:
        cache = api.load(server.url, slo=5.0, target_kl=0.01, report=reports.append).to_cache(llama(), PROMPT)
    (report,) = reports
    assert [chunk.num_tokens for chunk in report.chunks] == [CHUNK_TOKENS] * 4
    assert report.problems == [] and all(chunk.level in (TEXT, 1, 2) for chunk in report.chunks)
    assert largest_difference(planes_of_cache(cache), planes_from_text()) < 0.1
    assert len(generate_ids(llama(), cache, PROMPT, min_new_tokens=8)) == 8


@pytest.mark.parametrize(
    ("num_shared", "num_prompt", "num_found"),
    [(600, 607, 600), (600, 600, 450), (500, 607, 450), (460, 460, 450), (450, 450, 300), (300, 607, 300)],
)
def test_the_longest_prefix_of_whole_chunks_is_taken(store, tmp_path, num_shared, num_prompt, num_found):
    prompt = torch.cat([IDS[:num_shared], make_token_ids(num_prompt - num_shared, seed=2)])
    cache = api.load(store, level=1).to_cache(llama(), prompt)
    assert cache.get_seq_length() == num_found
    assert are_equal(planes_of_cache(cache), decoded(BITS[0], num_found, folder=tmp_path))


def test_a_model_of_transformers_finds_what_was_published_for_its_checkpoint(tmp_path):
    output = run_model(load_plain(), IDS)
    for name, model in {"memory": load_plain(), "checkpoint": load_bundled()}.items():
        api.publish(tmp_path / name, api.compress(output, IDS, model, chunk_tokens=CHUNK_TOKENS))
        assert api.load(tmp_path / name).to_cache(load_plain(), PROMPT).get_seq_length() == NUM_TOKENS
        with pytest.raises(StoreError, match="no chunk of this context for this model"):
            api.load(tmp_path / name).to_cache(change_weights(load_plain()), PROMPT)
    with pytest.raises(StoreError, match="no chunk of this context for this model"):
        api.load(tmp_path / "memory").to_cache(load_bundled(), PROMPT)


@pytest.mark.parametrize("profile", [None, REPOSITORY / "models" / "tiny-mistral" / "profile"])
def test_levels_of_transform_are_published_as_they_are_with_the_loss_of_the_profile(tmp_path, profile):
    one = api.compress(
        run_model(load_plain(), IDS), IDS, load_plain(), "transform_tiny_levels", chunk_tokens=CHUNK_TOKENS
    )
    one.save(tmp_path / "folder")
    api.publish(tmp_path / "store", one)
    expected = api.load(tmp_path / "folder").to_cache(load_plain(), PROMPT)
    reports: list[LoadResult] = []
    cache = api.load(tmp_path / "store", level=3, profile=profile, report=reports.append).to_cache(load_plain(), PROMPT)
    assert are_equal(planes_of_cache(cache), planes_of_cache(expected))
    assert 0 < reports[0].expected_loss < 0.01


def test_a_profile_of_its_own_is_published_with_a_cache_and_fetched_from_there(tmp_path, monkeypatch):
    config = {"method": "transform", "step_log": 0}
    one = api.compress(run_model(load_plain(), IDS), IDS, load_plain(), config, chunk_tokens=CHUNK_TOKENS)
    assert one.own_profile is not None
    one.save(tmp_path / "folder")
    api.publish(tmp_path / "store", one)
    expected = api.load(tmp_path / "folder").to_cache(load_plain(), PROMPT)
    opened = api.load(tmp_path / "store", level=1)
    assert are_equal(planes_of_cache(opened.to_cache(load_plain(), PROMPT)), planes_of_cache(expected))
    place = tmp_path / "store" / "profiles" / one.own_profile.profile_hash
    assert sorted(path.name for path in place.iterdir()) == ["profile.json", "synthesis.zlib"]
    (place / "synthesis.zlib").write_bytes(b"damaged")
    api.load(tmp_path / "store", level=1).to_cache(load_plain(), PROMPT)  # from memory
    monkeypatch.setattr(remote, "_PROFILES", ProfileFetcher())
    reports: list[LoadResult] = []
    api.load(tmp_path / "store", level=1, report=reports.append).to_cache(load_plain(), PROMPT)
    assert {chunk.source for chunk in reports[0].chunks} == {"text"} and "has changed" in reports[0].problems[0]


def test_two_caches_of_one_store_are_two(store):
    opened = api.load(store, level=2)
    first, second = (opened.to_cache(llama(), PROMPT) for _ in range(2))
    before = copy.deepcopy(planes_of_cache(second))
    answer = generate_ids(llama(), first, PROMPT)
    assert second.get_seq_length() == NUM_TOKENS and are_equal(planes_of_cache(second), before)
    assert generate_ids(llama(), second, PROMPT) == answer


def test_threads_load_at_once_and_generate_meanwhile(store, tmp_path):
    expected, answer = decoded(8, folder=tmp_path), generate_ids(llama(), None, PROMPT)
    opened = api.load(store, slo=0.001)  # computes as much as it can, and breaks off

    def load(number: int) -> KVCache | list[int]:
        if number % 3 == 0:
            return generate_ids(llama(), None, PROMPT)
        return planes_of_cache(opened.to_cache(llama(), PROMPT))

    with ThreadPoolExecutor(4) as threads:
        for result in threads.map(load, range(12)):
            if isinstance(result, KVCache):
                assert largest_difference(result, expected) < 0.2
            else:
                assert result == answer


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_store_without_this_prompt_or_this_model_says_so(store):
    for model, prompt in (
        (llama(), make_token_ids(NUM_TOKENS, seed=5)),
        (change_weights(llama()), IDS),
        (llama(), IDS[:100]),
    ):
        with pytest.raises(StoreError, match="holds no chunk of this context for this model") as caught:
            api.load(store).to_cache(model, prompt)
        assert caught.value.is_missing


def test_a_cache_of_another_dtype_is_refused(tmp_path):
    output = run_model(load_plain(), IDS)
    api.publish(tmp_path, api.compress(output, IDS, load_bundled(), chunk_tokens=CHUNK_TOKENS))
    with pytest.raises(MismatchError, match=r"dtype is torch.bfloat16, but the model has torch.float32"):
        api.load(tmp_path).to_cache(copy.deepcopy(load_plain()).float(), PROMPT)


def test_what_is_no_store_and_no_server_is_named(store, tmp_path):
    with serve(tmp_path) as server:
        with pytest.raises(StoreError, match="not a store of cachegen"):
            api.load(server.open(QUICK)).to_cache(llama(), PROMPT)
        url = server.url
    with pytest.raises(StoreError, match=url) as caught:  # nobody listens any more
        api.load(open_store(url, retry=QUICK)).to_cache(llama(), PROMPT)
    assert not caught.value.is_missing
    with pytest.raises(ConfigError, match="a store is a folder or a URL of"):
        api.load("ftp://host/store")
    with pytest.raises(InputError, match="nowhere"):
        api.load(tmp_path / "nowhere")
    (store / "store.json").write_bytes(b"{}")
    with pytest.raises(BitstreamError, match=r"store\.json"):
        api.load(store).to_cache(llama(), PROMPT)


def test_damaged_chunks_are_computed_and_the_log_names_them(store, tmp_path, caplog):
    with serve(store) as server, caplog.at_level(logging.WARNING, "cachegen"):
        server.faults = [Misbehaviour("chunks/", "flip", position=500)]
        cache = api.load(server.open(QUICK), level=2).to_cache(llama(), PROMPT)
    assert largest_difference(planes_of_cache(cache), planes_from_text()) < 1e-4
    assert caplog.records and all("SHA-256" in record.message for record in caplog.records)
    assert server.url in caplog.text


def test_a_profile_that_is_damaged_or_not_there_is_refused_at_once(store, tmp_path):
    with pytest.raises(InputError, match=r"profile\.json: no such file"):
        api.load(store, profile=tmp_path / "nothing")
    (tmp_path / "profile.json").write_bytes(b"{")
    with pytest.raises(BitstreamError, match=r"profile\.json: not JSON"):
        api.load(store, profile=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"slo": 0}, ValueError, "`slo` must be"),
        ({"slo": float("inf")}, ValueError, "`slo` must be"),
        ({"target_kl": -1}, ValueError, "`target_kl` must be"),
        ({"level": 0}, ConfigError, "`level` must be"),
        ({"device": "gpu"}, ConfigError, "gpu"),
    ],
)
def test_wrong_arguments_are_named(store, arguments, error, message):
    with pytest.raises(error, match=message):
        api.load(store, **arguments)


def test_a_level_that_is_not_there_and_prompts_of_no_shape_are_named(store):
    with pytest.raises(ConfigError, match=r"`level` 3 asked for, .* has 2"):
        api.load(store, level=3).to_cache(llama(), PROMPT)
    with pytest.raises(ValueError, match="`token_ids` must be"):
        api.load(store).to_cache(llama(), PROMPT.repeat(2, 1))


@pytest.mark.parametrize("name", ["slo", "target_kl", "report"])
def test_what_is_for_stores_is_refused_of_folders(tmp_path, name):
    compressed(8).save(tmp_path)
    with pytest.raises(ValueError, match=f"`{name}` is for stores"):
        api.load(tmp_path, **{name: 1})


# --- publishing -------------------------------------------------------------------------------------------------------


def test_a_later_publication_of_the_same_cache_supersedes_the_earlier_one(store):
    api.publish(store, compressed(8))
    with pytest.raises(ConfigError, match="has 1"):
        api.load(store, level=2).to_cache(llama(), PROMPT)


def test_what_does_not_go_together_is_not_published(tmp_path):
    other = api.compress(run_model(llama(), IDS), IDS, llama(), chunk_tokens=100)
    with pytest.raises(MismatchError, match="chunk_tokens differs"):
        api.publish(tmp_path, [compressed(8), other])
    with pytest.raises(ConfigError, match="must have one value per level, got 1 for 2"):
        api.publish(tmp_path, [compressed(4), compressed(8)], kl=[0.1])
    with pytest.raises(ConfigError, match="must not be larger for a larger encoding"):
        api.publish(tmp_path, [compressed(8), compressed(4)], kl=[0.2, 0.1])
    levels = api.compress(
        run_model(load_plain(), IDS), IDS, load_plain(), "transform_tiny_levels", chunk_tokens=CHUNK_TOKENS
    )
    with pytest.raises(ConfigError, match="refine each other"):
        api.publish(tmp_path, [levels, compressed(8)])
    with pytest.raises(ValueError, match="at least one"):
        api.publish(tmp_path, [])
    with pytest.raises(TypeError, match="must be what `compress` returned, got PosixPath"):
        api.publish(tmp_path, [tmp_path])  # pyright: ignore[reportArgumentType]


def test_losses_that_are_given_are_those_that_are_expected(tmp_path):
    api.publish(tmp_path, [compressed(8), compressed(4)], kl=[0.001, 0.1])
    for level, loss in ((1, 0.1), (2, 0.001)):
        reports: list[LoadResult] = []
        api.load(tmp_path, level=level, report=reports.append).to_cache(llama(), PROMPT)
        assert reports[0].expected_loss == pytest.approx(loss)


# --- threads that share a model ---------------------------------------------------------------------------------------


def test_breaking_off_a_computation_does_not_touch_other_threads_passes():
    from cachegen.pipeline.model_cache import allocate_cache
    from cachegen.pipeline.prefill import measure_plane_shapes
    from cachegen.streaming.client import ModelWorkers

    loaded = make_named("llama")
    workers = ModelWorkers.__new__(ModelWorkers)
    workers.loaded, workers.token_ids, workers.block_size = loaded, IDS, 50
    workers.cache = allocate_cache(loaded.cache_layout, measure_plane_shapes(loaded), 60, loaded.dtype)
    is_unwanted, outcomes = threading.Event(), []

    def run_elsewhere() -> None:
        outcomes.append(run_model(loaded.model, IDS[:20]).logits.shape[1])

    def meanwhile(*_: object) -> None:
        if threading.current_thread() is threading.main_thread() and not is_unwanted.is_set():
            is_unwanted.set()
            other = threading.Thread(target=run_elsewhere)
            other.start()
            other.join()

    hook = loaded.layers[0].register_forward_hook(meanwhile)
    try:
        assert workers.compute(0, 50, is_unwanted.is_set) is False
    finally:
        hook.remove()
    assert outcomes == [20]
