"""Which models are served, by their config alone: how they are loaded, which layers keep a cache, what is refused."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from cachegen.errors import InputError

# Layers whose cache is keys and values of every token; a plain cache keeps them all, and only the mask differs.
_REPRESENTABLE_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
# Layers without attention keep nothing at all.
_CACHELESS_LAYER_TYPES = frozenset({"mlp", "moe"})
_STATE_LAYER_TYPES = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent"})
# Models of attention layers and others with recurrent states that are tried in tests/zoo, by `model_type`.
_HYBRIDS = frozenset(
    {
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
    }
)
# Models for images and text whose text part alone is tried in tests/zoo, by `model_type`.
_TEXT_OF_MULTIMODAL = frozenset(
    {
        "aya_vision",
        "cohere2_vision",
        "glm4v",
        "glm4v_moe",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
    }
)


@dataclass(frozen=True)
class LayerCache:
    """What one layer of a model keeps of the tokens before.

    Attributes:
        has_planes: keys and values of every token.
        num_states: recurrent states, and as many of convolutions, at most.
    """

    has_planes: bool
    num_states: int = 0


def find_layer_caches(text_config: Any) -> tuple[LayerCache, ...]:
    """Return what each layer keeps, but for last ones that use the keys and values of others.

    Args:
        text_config: the decoder's config, which `refuse_unrepresentable` lets pass.
    """
    if not _has_states(text_config):
        return (LayerCache(True),) * _count_own_layers(text_config)
    return tuple(
        LayerCache(isinstance(layer, DynamicLayer), getattr(layer, "number_of_states", 0))
        for layer in DynamicCache(config=text_config).layers
    )


def _has_states(text_config: Any) -> bool:
    return bool(_STATE_LAYER_TYPES & set(_list_layer_types(text_config)))


def _list_layer_types(text_config: Any) -> list[str]:
    return list(getattr(text_config, "layer_types", None) or getattr(text_config, "block_types", None) or ())


def choose_auto_class(config: Any) -> Any:
    """Return transformers' class that loads a model of a config which `refuse_unrepresentable` lets pass."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def find_cache_argument(model_class: Any) -> str | None:
    """Return the name by which a model's class takes a cache, another one from transformers 5.24 on; None: by none."""
    parameters = inspect.signature(model_class.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in parameters), None)


def _count_own_layers(text_config: Any) -> int:
    """Return how many layers keep keys and values of their own: the first ones; the others use theirs."""
    modes = getattr(text_config, "kv_sharing_modes", None)
    if modes is not None:
        return sum(mode != "reuse" for mode in modes)
    return int(text_config.num_hidden_layers) - (getattr(text_config, "num_kv_shared_layers", None) or 0)


def count_head_repeats(text_config: Any) -> int:
    """Return how often a model caches each head of its keys and values, of which one is stored.

    Once, but Falcon 40B and 180B broadcast keys and values to all query heads before they cache them.
    """
    if text_config.model_type == "falcon" and text_config.new_decoder_architecture:
        return text_config.num_attention_heads // text_config.num_kv_heads
    return 1


def refuse_unrepresentable(model_id: str, config: Any) -> None:
    """Refuse, before any weights are read, a model whose cache is not just keys and values of every token.

    Raises:
        InputError: in one line.
    """
    name = f"{model_id}: {config.model_type}"
    if config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder model; only decoders are supported")
    model_class = _find_model_class(name, config)
    text_config = config.get_text_config(decoder=True)
    _refuse_layers(name, text_config)
    if getattr(text_config, "use_bidirectional_attention", None) in (True, "all"):
        raise InputError(
            f"{name} attends to later tokens (use_bidirectional_attention): its cache depends on the question"
        )
    if find_cache_argument(model_class) is None:
        raise InputError(f"{name} is a model without a key-value cache")
    # The class of a family may have members that are not.
    if getattr(model_class, "_is_stateful", False) and getattr(text_config, "layer_types", None) is None:
        raise InputError(f"{name} is a stateful model, whose cache is not keys and values")


def _find_model_class(name: str, config: Any) -> Any:
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(f"{name} is not a causal language model")
    if config.model_type not in _TEXT_OF_MULTIMODAL:
        raise InputError(f"{name} is a model for images, of a kind whose text part alone is not supported")
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]


def _refuse_layers(name: str, text_config: Any) -> None:
    layer_types = set(_list_layer_types(text_config))
    foreign = sorted(layer_types - _REPRESENTABLE_LAYER_TYPES - _CACHELESS_LAYER_TYPES - _STATE_LAYER_TYPES)
    if foreign:
        raise InputError(f"{name} has layers of type {', '.join(foreign)}, whose state is not keys and values")
    if _has_states(text_config):
        _refuse_states(name, text_config, layer_types)
    elif layer_types & _CACHELESS_LAYER_TYPES:
        raise InputError(f"{name} has layers without attention among those with it; not supported")
    if getattr(text_config, "cross_attention_layers", None):
        raise InputError(f"{name} has layers that attend to an image and keep nothing without one; not supported")
    modes = list(getattr(text_config, "kv_sharing_modes", None) or ())
    if "reuse" in modes[: _count_own_layers(text_config)]:
        raise InputError(f"{name} has layers that share keys and values before ones that keep their own; not supported")


def _refuse_states(name: str, text_config: Any, layer_types: set[str]) -> None:
    """Refuse, of models with recurrent states, those of which no more than states is known."""
    types = ", ".join(sorted(layer_types & _STATE_LAYER_TYPES))
    if not any(layer.has_planes for layer in find_layer_caches(text_config)):
        raise InputError(f"{name} has no layer with keys and values, which are what is compressed")
    if text_config.model_type not in _HYBRIDS:
        raise InputError(f"{name} has layers of type {types}, of a kind that is not supported")
    if not hasattr(Cache, "get_conv_state"):
        raise InputError(f"{name} has layers of type {types}: install a later transformers, which names their states")
