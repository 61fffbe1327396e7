"""Generation from a cache: the tokens of the uncached run, and no more forward passes than needed."""

from __future__ import annotations

import pytest
import torch

from cachegen.pipeline.generate import generate_answer
from cachegen.pipeline.model_cache import empty_cache, view_kv_cache
from cachegen.pipeline.prefill import prefill
from tests.fixtures.models import CONFIGS, make_named, make_token_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def generate_uncached(loaded, token_ids: torch.Tensor, max_new_tokens: int) -> tuple[int, ...]:
    inputs = token_ids.long()[None]
    output = loaded.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=False,
        pad_token_id=0,
    )
    return tuple(output[0, len(token_ids) :].tolist())


@pytest.mark.parametrize("num_cached_tokens", [59, 55, 40, 1, 0])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_answer_from_a_cache_is_the_uncached_answer(name, num_cached_tokens):
    loaded, token_ids = make_named(name), make_token_ids(60)
    cache = prefill(loaded, token_ids[:-1], 16, capacity=80)
    answer = generate_answer(loaded, cache, num_cached_tokens, token_ids, 10, block_size=16)
    assert answer.token_ids == generate_uncached(loaded, token_ids, 10)
    assert answer.text == loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize(("num_cached_tokens", "max_new_tokens"), [(59, 1), (59, 6), (20, 6), (0, 3)])
def test_only_uncached_tokens_the_last_one_and_generated_ones_pass_through_the_model(num_cached_tokens, max_new_tokens):
    loaded, token_ids = make_named("llama"), make_token_ids(60)
    cache = prefill(loaded, token_ids[:-1], 16, capacity=80)
    passed = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: passed.append(inputs[0].numel())
    )
    answer = generate_answer(loaded, cache, num_cached_tokens, token_ids, max_new_tokens, block_size=16)
    hook.remove()
    num_recomputed = len(token_ids) - 1 - num_cached_tokens
    assert sum(passed) == num_recomputed + 1 + (len(answer.token_ids) - 1) == answer.num_forward_tokens
    assert max(passed) <= 16  # a long tail is not one quadratic step


def test_one_cache_serves_many_questions_and_keeps_the_context():
    loaded, context = make_named("llama"), make_token_ids(40)
    cache = prefill(loaded, context, 16, capacity=80)
    before = [plane.clone() for plane in view_kv_cache(cache, 40).planes]
    for seed in (1, 2, 1):
        prompt = torch.cat([context, make_token_ids(9, seed)])
        assert generate_answer(loaded, cache, 40, prompt, 8).token_ids == generate_uncached(loaded, prompt, 8)
    assert all(torch.equal(a, b) for a, b in zip(view_kv_cache(cache, 40).planes, before, strict=True))


@pytest.mark.parametrize("num_cached_tokens", [30, 31, -1])
def test_a_cache_of_the_whole_prompt_is_refused(num_cached_tokens):
    loaded, token_ids = make_named("llama"), make_token_ids(30)
    cache = prefill(loaded, token_ids, 16, capacity=80)
    with pytest.raises(ValueError, match="`num_cached_tokens` must be below the prompt's 30 tokens"):
        generate_answer(loaded, cache, num_cached_tokens, token_ids, 5)


def test_a_cache_without_room_for_the_answer_is_refused_beforehand():
    loaded, token_ids = make_named("llama"), make_token_ids(30)
    cache = prefill(loaded, token_ids[:-1], 16, capacity=34)
    assert len(generate_answer(loaded, cache, 29, token_ids, 5).token_ids) == 5
    with pytest.raises(ValueError, match="must have room for 35 tokens, it was allocated for 34"):
        generate_answer(loaded, cache, 29, token_ids, 6)


def test_max_new_tokens_must_be_positive():
    loaded = make_named("llama")
    with pytest.raises(ValueError, match="`max_new_tokens`"):
        generate_answer(loaded, empty_cache(loaded.cache_layout, 80), 0, make_token_ids(5), 0)


def test_generation_stops_at_the_end_token_which_the_text_does_not_show(monkeypatch):
    loaded, token_ids = make_named("llama"), make_token_ids(30)
    full = generate_answer(loaded, empty_cache(loaded.cache_layout, 80), 0, token_ids, 8)
    end = full.token_ids[3]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [end, 2])
    answer = generate_answer(loaded, empty_cache(loaded.cache_layout, 80), 0, token_ids, 8)
    assert answer.token_ids == full.token_ids[: full.token_ids.index(end) + 1]


def test_times_are_in_order_and_nothing_is_printed(capfd):
    loaded, token_ids = make_named("llama"), make_token_ids(30)
    answer = generate_answer(loaded, empty_cache(loaded.cache_layout, 80), 0, token_ids, 8)
    assert 0 < answer.prefill_seconds <= answer.total_seconds
    assert capfd.readouterr() == ("", "")
