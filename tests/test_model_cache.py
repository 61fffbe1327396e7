"""The preallocated cache: in place, bounded, reusable, and good enough for generate()."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from cachegen.pipeline.model_cache import (
    allocate_cache,
    empty_cache,
    get_capacity,
    preserve_tokens,
    set_length,
    view_kv_cache,
)
from cachegen.pipeline.prefill import prefill
from tests.fixtures.models import CONFIGS, make_layout, make_named, make_token_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def make_states(num_tokens: int, num_heads: int = 2, head_dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, num_heads, num_tokens, head_dim, generator=torch.Generator().manual_seed(seed))


def test_update_returns_views_of_one_buffer_that_never_moves():
    cache = empty_cache(make_layout(1), capacity=10)
    first_keys, _ = cache.update(make_states(4), make_states(4, head_dim=3, seed=1), 0)
    address = first_keys.data_ptr()
    keys, values = cache.update(make_states(6, seed=2), make_states(6, head_dim=3, seed=3), 0)
    assert keys.data_ptr() == address
    assert torch.equal(keys, torch.cat([make_states(4), make_states(6, seed=2)], dim=2))
    assert torch.equal(values, torch.cat([make_states(4, head_dim=3, seed=1), make_states(6, head_dim=3, seed=3)], 2))


def test_keys_and_values_may_differ_in_heads_and_dims():
    cache = empty_cache(make_layout(1), capacity=5)
    cache.update(make_states(5, num_heads=1, head_dim=16), make_states(5, num_heads=3, head_dim=2), 0)
    kv_cache = view_kv_cache(cache, 5)
    assert kv_cache.keys[0].shape == (5, 1, 16)
    assert kv_cache.values[0].shape == (5, 3, 2)


def test_update_refuses_to_outgrow_the_capacity_and_leaves_the_cache_as_it_was():
    cache = empty_cache(make_layout(1), capacity=5)
    cache.update(make_states(4), make_states(4), 0)
    with pytest.raises(ValueError, match="allocated for 5 tokens and cannot hold 6"):
        cache.update(make_states(2), make_states(2), 0)
    assert cache.get_seq_length() == 4


def test_crop_by_a_negative_number_lets_the_next_update_overwrite_in_place():
    cache = empty_cache(make_layout(1), capacity=6)
    cache.update(make_states(6), make_states(6), 0)
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    keys, _ = cache.update(make_states(1, seed=7), make_states(1, seed=8), 0)
    assert torch.equal(keys[:, :, :4], make_states(6)[:, :, :4])
    assert torch.equal(keys[:, :, 4:], make_states(1, seed=7))
    assert torch.equal(view_kv_cache(cache, 6).keys[0][5], make_states(6)[0, :, 5])


def test_a_batch_is_refused():
    states = torch.zeros(2, 1, 3, 4)
    with pytest.raises(ValueError, match="one sequence, got a batch of 2"):
        empty_cache(make_layout(1), capacity=5).update(states, states, 0)
    with pytest.raises(NotImplementedError, match="one sequence"):
        empty_cache(make_layout(1), capacity=5).batch_repeat_interleave(2)


def test_reset_forgets_the_tokens_and_keeps_the_memory():
    cache = empty_cache(make_layout(1), capacity=5)
    address = cache.update(make_states(4), make_states(4), 0)[0].data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.update(make_states(1), make_states(1), 0)[0].data_ptr() == address


def test_a_decoder_writes_through_the_views_before_the_length_is_set():
    cache = allocate_cache(make_layout(2), [(2, 4), (1, 3), (2, 4), (2, 5)], 8, torch.bfloat16)
    assert cache.get_seq_length() == 0
    for i, plane in enumerate(view_kv_cache(cache, 6).planes):
        plane.fill_(i)
    set_length(cache, 6)
    assert cache.get_seq_length() == 6
    assert cache.layers[1].keys.shape == (1, 2, 6, 4)
    assert cache.layers[1].values.shape == (1, 2, 6, 5)
    assert [tensor.unique().tolist() for layer in cache.layers for tensor in (layer.keys, layer.values)] == [
        [0],
        [1],
        [2],
        [3],
    ]


def test_plane_shapes_must_be_two_per_layer():
    with pytest.raises(ValueError, match="`plane_shapes`"):
        allocate_cache(make_layout(1), [(2, 4)], 8, torch.float16)


def test_lengths_outside_the_capacity_are_refused():
    cache = allocate_cache(make_layout(1), [(2, 4), (2, 4)], 8, torch.float16)
    assert get_capacity(cache) == 8
    for length in (-1, 9):
        with pytest.raises(ValueError, match="`num_tokens`"):
            set_length(cache, length)
        with pytest.raises(ValueError, match="`num_tokens`"):
            view_kv_cache(cache, length)
    with pytest.raises(ValueError, match="still empty"):
        set_length(empty_cache(make_layout(1), capacity=8), 1)


def test_a_foreign_cache_is_refused():
    foreign = DynamicCache()
    foreign.update(make_states(2), make_states(2), 0)
    with pytest.raises(TypeError, match="DynamicLayer"):
        set_length(foreign, 1)


@pytest.mark.parametrize("num_held", [3, 5, 8])
def test_preserved_tokens_are_there_again_after_being_overwritten(num_held):
    cache = empty_cache(make_layout(1), capacity=10)
    cache.update(make_states(num_held), make_states(num_held, seed=1), 0)
    before = [plane.clone() for plane in view_kv_cache(cache, num_held).planes]
    with pytest.raises(RuntimeError, match="on the way"), preserve_tokens(cache, 5, num_held):
        set_length(cache, min(5, num_held))
        cache.update(make_states(5, seed=2), make_states(5, seed=3), 0)
        raise RuntimeError("on the way")
    assert cache.get_seq_length() == num_held
    assert all(torch.equal(a, b) for a, b in zip(view_kv_cache(cache, num_held).planes, before, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_with_a_prefilled_cache_equals_generate_without_one(name):
    loaded, token_ids = make_named(name), make_token_ids(50)
    inputs = token_ids.long()[None]
    arguments = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = loaded.model.generate(inputs, **arguments)
    cache = prefill(loaded, token_ids[:-1], block_size=16, capacity=80)
    for _ in range(2):  # once more on the same cache, from the same length
        set_length(cache, 49)
        assert torch.equal(loaded.model.generate(inputs, past_key_values=cache, **arguments), expected)
    assert len(set(expected[0, 50:].tolist())) > 2  # the model is not stuck on one token
