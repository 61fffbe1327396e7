"""Compressed caches in memory: they decode as their files do, and a prompt finds the longest that it begins with."""

from __future__ import annotations

import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cachegen import api
from cachegen.api import PrefixCache
from cachegen.errors import ConfigError, MismatchError
from cachegen.pipeline.model_cache import planes_of_cache
from tests.fixtures.caches import are_equal
from tests.fixtures.models import (
    change_weights,
    generate_ids,
    llama,
    load_plain,
    make_named,
    make_token_ids,
    run_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK_TOKENS = 20
DOCUMENTS = [make_token_ids(length, seed=length) for length in (60, 47, 30)]
QUESTION = make_token_ids(7, seed=1)
FINE: dict[str, Any] = {"method": "uniform", "bits": 8}


def prompt_of(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts).long()[None]


def add_all(prefixes: PrefixCache, model, documents=DOCUMENTS) -> None:
    for ids in documents:
        prefixes.add(run_model(model, ids), ids)


# --- a compressed cache decodes in memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", ["quantization_tiny", "uniform_8bit", "transform_tiny", "transform_tiny_levels", {"method": "lossless"}]
)
def test_a_compressed_cache_decodes_as_its_files_do(tmp_path, config):
    ids = DOCUMENTS[0]
    compressed = api.compress(run_model(load_plain(), ids), ids, load_plain(), config, chunk_tokens=CHUNK_TOKENS)
    compressed.save(tmp_path)
    prompt = prompt_of(ids, QUESTION)
    expected = api.load(tmp_path).to_cache(load_plain(), prompt)
    assert are_equal(planes_of_cache(compressed.to_cache(load_plain(), prompt)), planes_of_cache(expected))
    part = compressed.decode(load_plain(), prompt, 2)
    assert part.get_seq_length() == 2 * CHUNK_TOKENS
    cropped = [plane[: 2 * CHUNK_TOKENS] for plane in planes_of_cache(expected).planes]
    assert all(map(torch.equal, planes_of_cache(part).planes, cropped))


def test_a_compressed_cache_decodes_with_a_profile_of_its_own():
    ids = make_token_ids(700)
    cache = run_model(load_plain(), ids)
    compressed = api.compress(cache, ids, load_plain(), {"method": "transform", "target_kl": 0.03})
    assert compressed.own_profile is not None
    assert compressed.to_cache(load_plain(), ids).get_seq_length() == len(ids)


def test_another_model_or_other_tokens_are_refused():
    ids = DOCUMENTS[0]
    compressed = api.compress(run_model(llama(), ids), ids, llama())
    with pytest.raises(MismatchError, match=r"\(in memory\)/tables.cgt: model_fingerprint is"):
        compressed.to_cache(change_weights(llama()), ids)
    with pytest.raises(MismatchError, match="token_hash"):
        compressed.to_cache(llama(), make_token_ids(len(ids), seed=5))


# --- many of them -----------------------------------------------------------------------------------------------------


def test_a_prompt_finds_the_longest_context_that_it_begins_with():
    prefixes = PrefixCache(llama(), FINE, chunk_tokens=CHUNK_TOKENS)
    whole = DOCUMENTS[0]
    add_all(prefixes, llama(), [whole[:25], whole, *DOCUMENTS[1:]])
    assert len(prefixes) == 4 and prefixes.num_tokens == 25 + 60 + 47 + 30
    for prompt, num_tokens in [
        (prompt_of(whole, QUESTION), 60),
        (prompt_of(whole[:25], QUESTION), 25),  # the shorter one is there to its end
        (prompt_of(whole[:45], QUESTION), 40),  # of the longer one, the chunks before
        (prompt_of(whole), 40),  # the last token is to be computed
        (prompt_of(DOCUMENTS[2], QUESTION), 30),
    ]:
        cache = prefixes.to_cache(prompt)
        assert cache is not None and cache.get_seq_length() == num_tokens
    assert prefixes.to_cache(prompt_of(QUESTION, whole)) is None
    assert prefixes.to_cache(whole[:CHUNK_TOKENS]) is None


def test_answers_are_those_of_the_files(tmp_path):
    prefixes = PrefixCache(llama(), FINE)
    add_all(prefixes, llama())
    for number, ids in enumerate(DOCUMENTS):
        prompt = prompt_of(ids, QUESTION)
        api.compress(run_model(llama(), ids), ids, llama(), FINE).save(tmp_path / str(number))
        expected = generate_ids(llama(), api.load(tmp_path / str(number)).to_cache(llama(), prompt), prompt)
        assert generate_ids(llama(), prefixes.to_cache(prompt), prompt) == expected


def test_nothing_of_the_cache_itself_is_kept():
    prefixes = PrefixCache(llama(), FINE)
    cache = run_model(llama(), DOCUMENTS[0]).past_key_values
    planes = [weakref.ref(plane) for layer in cache.layers for plane in (layer.keys, layer.values)]
    prefixes.add(cache, DOCUMENTS[0])
    del cache
    gc.collect()
    assert all(plane() is None for plane in planes)


def test_the_same_tokens_are_compressed_once():
    prefixes = PrefixCache(llama(), FINE)
    first = prefixes.add(run_model(llama(), DOCUMENTS[0]), DOCUMENTS[0])
    assert prefixes.add(None, DOCUMENTS[0].long()[None]) is first and len(prefixes) == 1


def test_what_was_not_used_for_longest_goes_first():
    ids = [make_token_ids(40, seed=seed) for seed in range(4)]
    size = api.compress(run_model(llama(), ids[0]), ids[0], llama(), FINE).num_bytes
    prefixes = PrefixCache(llama(), FINE, max_bytes=3 * size + size // 2)
    add_all(prefixes, llama(), ids[:3])
    assert prefixes.to_cache(prompt_of(ids[0], QUESTION)) is not None
    add_all(prefixes, llama(), ids[3:])
    assert prefixes.num_bytes <= 3 * size + size // 2
    assert [prefixes.to_cache(prompt_of(one, QUESTION)) is not None for one in ids] == [True, False, True, True]
    prefixes.clear()
    assert len(prefixes) == 0 and prefixes.num_bytes == 0


def test_one_that_is_too_large_is_not_kept_and_logged(caplog):
    prefixes = PrefixCache(llama(), FINE, max_bytes=1000)
    with caplog.at_level(logging.WARNING, "cachegen"):
        assert prefixes.add(run_model(llama(), DOCUMENTS[0]), DOCUMENTS[0]).num_bytes > 1000
    assert len(prefixes) == 0 and "a context of 60 tokens is not kept" in caplog.text


def test_what_can_only_be_used_whole_is_found_by_prompts_that_go_on_from_it():
    model = make_named("mistral with a sliding window").model
    ids = DOCUMENTS[0]  # longer than the window
    prefixes = PrefixCache(model, FINE, chunk_tokens=CHUNK_TOKENS)
    compressed = prefixes.add(run_model(model, ids, past_key_values=DynamicCache()), ids)
    cache = prefixes.to_cache(prompt_of(ids, QUESTION))
    assert cache is not None and cache.get_seq_length() == len(ids)
    assert prefixes.to_cache(prompt_of(ids[:45], QUESTION)) is None
    with pytest.raises(ConfigError, match="can only be used whole"):
        compressed.decode(model, ids, 2)


def test_a_model_that_has_changed_is_refused():
    model = change_weights(llama())
    prefixes = PrefixCache(model, FINE)
    add_all(prefixes, model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(MismatchError, match="model_fingerprint"):
        prefixes.to_cache(prompt_of(DOCUMENTS[0], QUESTION))


def test_threads_may_add_and_decode_side_by_side():
    prefixes = PrefixCache(llama(), FINE, chunk_tokens=CHUNK_TOKENS, num_threads=1)
    prompts = [prompt_of(ids, QUESTION) for ids in DOCUMENTS]

    def use(number: int) -> int:
        ids = DOCUMENTS[number % 3]
        prefixes.add(run_model(llama(), ids), ids)
        cache = prefixes.to_cache(prompts[number % 3])
        return cache.get_seq_length() if cache is not None else 0

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use, range(12))) == [len(ids) for ids in DOCUMENTS] * 4
    assert len(prefixes) == 3


@pytest.mark.parametrize("field", ["max_bytes", "chunk_tokens"])
def test_a_size_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` must be at least 1, got 0"):
        PrefixCache(llama(), **{field: 0})
