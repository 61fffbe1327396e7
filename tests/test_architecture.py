"""What a config alone says: the class that loads it, the layers that keep a cache, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

import cachegen
from cachegen.errors import InputError, MismatchError
from cachegen.pipeline.architecture import (
    choose_auto_class,
    find_cache_argument,
    find_layer_caches,
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
    assert len(find_layer_caches(SHARING)) == sharing.num_layers == 3
    assert len(find_layer_caches(CONFIGS["llama"])) == 3
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


def test_layers_may_only_use_the_keys_of_earlier_ones():
    config = transformers.LlamaConfig(**SMALL_SIZES)
    config.kv_sharing_modes = ["store", "reuse", None]
    assert "share keys and values before ones that keep their own" in refusal(config)


def test_a_family_of_hybrids_has_members_that_are_none():
    sizes = {name: value for name, value in SMALL_SIZES.items() if name != "head_dim"}
    attention = transformers.GraniteMoeHybridConfig(**sizes, layer_types=["full_attention"] * 3, num_local_experts=0)
    refuse_unrepresentable("model", attention)
    hybrid = transformers.GraniteMoeHybridConfig(**sizes, layer_types=["linear_attention"] * 3, num_local_experts=0)
    assert "no layer with keys and values" in refusal(hybrid)


FALCON = transformers.FalconConfig(
    vocab_size=SMALL_SIZES["vocab_size"],
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    new_decoder_architecture=True,
    eos_token_id=2,
)


def test_of_heads_that_the_model_repeats_one_is_stored(tmp_path):
    loaded, ids = make_loaded(FALCON), make_token_ids(40)
    assert loaded.num_head_repeats == 2 and make_loaded(CONFIGS["llama"]).num_head_repeats == 1
    with torch.inference_mode():
        cache = loaded.model(ids.long()[None], use_cache=True).past_key_values
    assert {plane.shape[1] for plane in planes_of_cache(cache).planes} == {4}
    compressed = cachegen.compress(cache, ids, loaded.model, {"method": "uniform", "bits": 8})
    assert compressed.num_values == 2 * 2 * 40 * 2 * 16
    compressed.save(tmp_path / "encoded")
    decoded = cachegen.load(tmp_path / "encoded").to_cache(loaded.model, ids)
    assert {plane.shape[1] for plane in planes_of_cache(decoded).planes} == {4}
    ours = view_kv_cache(prefill(loaded, ids), 40)
    assert cachegen.compress(ours, ids, loaded.model, {"method": "uniform", "bits": 8}).num_values == ours.num_values


def test_heads_that_should_be_alike_and_are_not_are_refused():
    loaded, ids = make_loaded(FALCON), make_token_ids(40)
    with torch.no_grad():
        cache = loaded.model(ids.long()[None], use_cache=True).past_key_values
    cache.layers[1].values[0, 3] += 1
    with pytest.raises(MismatchError, match="must have every head 2 times"):
        cachegen.compress(cache, ids, loaded.model, {"method": "uniform", "bits": 8})


def test_a_model_that_repeats_heads_can_be_calibrated():
    loaded = make_loaded(FALCON)
    texts = [make_token_ids(300, seed) for seed in range(2)]
    caches = [(view_kv_cache(prefill(loaded, ids), 300), ids) for ids in texts]
    profile = cachegen.calibrate(loaded.model, caches)
    compressed = cachegen.compress(*caches[0], loaded.model, "transform", profile=profile)
    assert compressed.num_values == 2 * 2 * 300 * 2 * 16


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
