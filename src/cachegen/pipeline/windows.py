"""Which cached tokens the tokens that follow still attend to, layer by layer: windows and chunks let go of the others.

transformers' own cache layers know the size of a window; a chunk's begin is here.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from cachegen.pipeline.architecture import count_cached_layers


def find_first_visible(text_config: Any, num_tokens: int) -> list[int]:
    """Return, per layer with a cache, the first of `num_tokens` cached tokens that any token behind them attends to.

    A layer with a window of w lets a token attend to itself and the w - 1 before it; one with chunks of c to its own
    chunk, which begins at a multiple of c. Later tokens attend to no earlier ones than the next does. Where
    transformers itself keeps all tokens of a layer, all are visible: GPT-Neo has windows that its cache does not know.

    Args:
        text_config: the decoder's config, which `architecture.refuse_unrepresentable` lets pass.
        num_tokens: that the cache holds.
    """
    layer_types = getattr(text_config, "layer_types", None)
    layers = DynamicCache(config=text_config).layers[: count_cached_layers(text_config)]
    first = []
    for index, layer in enumerate(layers):
        window = getattr(layer, "sliding_window", None)
        if window is None:
            first.append(0)
        elif layer_types is not None and layer_types[index] == "chunked_attention":
            first.append(num_tokens // window * window)
        else:
            first.append(max(0, num_tokens - (window - 1)))
    return first


def count_visible_values(shapes: list[tuple[int, int]], first_visible: list[int], num_tokens: int) -> tuple[int, int]:
    """Return how many numbers of a cache the tokens behind it attend to, and how many it has.

    Args:
        shapes: (num_kv_heads, head_dim) of keys and values of layer 0, of layer 1, ...
        first_visible: per layer, from `find_first_visible`.
        num_tokens: that the cache holds.
    """
    per_token = [heads * dims for heads, dims in shapes]
    seen = sum(size * (num_tokens - first_visible[plane // 2]) for plane, size in enumerate(per_token))
    return seen, sum(per_token) * num_tokens
