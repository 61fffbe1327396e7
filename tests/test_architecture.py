"""What a config alone says: the class that loads it, the layers that keep a cache, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from cachegen.errors import InputError
from cachegen.pipeline.architecture import (
    choose_auto_class,
    count_cached_layers,
    find_cache_argument,
    refuse_unrepresentable,
)
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import planes_of_cache, view_kv_cache
from cachegen.pipeline.prefill import prefill
from tests.fixtures.models import CONFIGS, SMALL_SIZES, make_loaded, make_token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

SHARING = transformers.Gemma3nTextConfig(
    **{**SMALL_SIZES, "num_hidden_layers": 6, "intermediate_size": [96] * 6},
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=3,
    sliding_window=16,
    laurel_rank=8,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=SMALL_SIZES["vocab_size"],
    activation_sparsity_pattern=[0.0] * 6,
)


@pytest.fixture(scope="module")
def sharing() -> LoadedModel:
    """A model of six layers, three of which use the keys and values of others."""
    return make_loaded(SHARING)


def refusal(config: transformers.PreTrainedConfig) -> str:
    with pytest.raises(InputError) as caught:
        refuse_unrepresentable("model", config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_layers_that_use_the_keys_of_others_are_not_counted(sharing):
    assert count_cached_layers(SHARING) == sharing.num_layers == 3
    assert count_cached_layers(CONFIGS["llama"]) == 3
    assert len(sharing.layers) == 6 and len(sharing.layer_devices) == 3


def test_layers_that_use_the_keys_of_others_are_left_out_of_the_cache(sharing):
    assert view_kv_cache(prefill(sharing, make_token_ids(20), 8), 20).num_layers == 3


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda: DynamicCache(config=SHARING)], ids=["plain", "own"])
def test_they_are_left_out_of_transformers_caches_too(sharing, make_cache):
    ids = make_token_ids(12)
    with torch.inference_mode():
        cache = sharing.model(ids.long()[None], past_key_values=make_cache(), use_cache=True).past_key_values
    planes = planes_of_cache(cache)
    for found, expected in zip(planes.planes, view_kv_cache(prefill(sharing, ids), 12).planes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_with_a_layer_that_counts_no_tokens_is_refused(sharing):
    hybrid = transformers.Lfm2Config(**SMALL_SIZES, layer_types=["conv", "conv", "full_attention"])
    with pytest.raises(InputError, match=r"layer 0 .* holds no keys of every token"):
        planes_of_cache(DynamicCache(config=hybrid))


def test_layers_may_only_use_the_keys_of_earlier_ones():
    config = transformers.LlamaConfig(**SMALL_SIZES)
    config.kv_sharing_modes = ["store", "reuse", None]
    assert "share keys and values before ones that keep their own" in refusal(config)


def test_states_that_do_not_grow_are_refused_as_what_is_missing():
    config = transformers.Lfm2Config(**SMALL_SIZES, layer_types=["conv", "conv", "full_attention"])
    message = refusal(config)
    assert message == (
        "model: lfm2 has layers of type conv, whose state is not keys and values: storing states that do not grow with "
        "the text is missing"
    )


def test_a_family_of_hybrids_has_members_that_are_none():
    sizes = {name: value for name, value in SMALL_SIZES.items() if name != "head_dim"}
    attention = transformers.GraniteMoeHybridConfig(**sizes, layer_types=["full_attention"] * 3, num_local_experts=0)
    refuse_unrepresentable("model", attention)
    hybrid = transformers.GraniteMoeHybridConfig(**sizes, layer_types=["linear_attention"] * 3, num_local_experts=0)
    assert "linear_attention" in refusal(hybrid)


def test_the_cache_has_the_name_that_the_model_gives_it():
    class Newer:
        def forward(self, input_ids, cache=None): ...

    class Without:
        def forward(self, input_ids): ...

    assert find_cache_argument(transformers.LlamaForCausalLM) in ("past_key_values", "cache")
    assert (find_cache_argument(Newer), find_cache_argument(Without)) == ("cache", None)


def test_models_for_images_are_loaded_whole_where_their_text_part_is_tried():
    refuse_unrepresentable("model", transformers.LlavaConfig())
    assert choose_auto_class(transformers.LlavaConfig()) is transformers.AutoModelForImageTextToText
    assert choose_auto_class(transformers.LlamaConfig()) is transformers.AutoModelForCausalLM
    assert "of a kind whose text part alone is not supported" in refusal(transformers.PaliGemmaConfig())
    assert "attend to an image and keep nothing without one" in refusal(transformers.MllamaConfig())
