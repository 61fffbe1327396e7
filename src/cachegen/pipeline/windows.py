"""Which cached tokens the tokens that follow still attend to, layer by layer: windows and chunks let go of the others.

transformers' own cache layers know the size of a window; a chunk's begin is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache

from cachegen.pipeline.architecture import find_layer_caches
from cachegen.windows import Window, Windows, first_visible_tokens


def find_windows(text_config: Any) -> Windows:
    """Return the window of each layer with keys and values.

    Where transformers itself keeps all tokens of a layer, it has none here: GPT-Neo has windows that its cache does not
    know.

    Args:
        text_config: the decoder's config, which `architecture.refuse_unrepresentable` lets pass.
    """
    layer_types = getattr(text_config, "layer_types", None)
    layers = DynamicCache(config=text_config).layers
    windows: list[Window | None] = []
    for index, (layer, kept) in enumerate(zip(layers, find_layer_caches(text_config), strict=False)):
        if not kept.has_planes:
            continue
        num_tokens = getattr(layer, "sliding_window", None)
        if num_tokens is None:
            windows.append(None)
        elif layer_types is not None and layer_types[index] == "chunked_attention":
            windows.append(Window("chunked", num_tokens))
        else:
            windows.append(Window("sliding", num_tokens))
    return tuple(windows)


def find_first_visible(text_config: Any, num_tokens: int) -> tuple[int, ...]:
    """Return, per layer with a cache, the first of `num_tokens` cached tokens that any token behind them attends to.

    Args:
        text_config: as for `find_windows`.
        num_tokens: that the cache holds.
    """
    return first_visible_tokens(find_windows(text_config), num_tokens)


def find_missing(text_config: Any, first_stored: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """Return, per layer, how many first tokens a decoded cache can do without: what its windows hide.

    Layers of one window are alike, though a document may hold more of some of them.

    Args:
        text_config: as for `find_windows`.
        first_stored: as in `DocumentHeader`, of a document of `num_tokens` that the model can use.

    Returns:
        Nothing for a document that holds all tokens.
    """
    return find_first_visible(text_config, num_tokens) if any(first_stored) else ()


def count_visible_values(
    shapes: Sequence[tuple[int, int]], first_visible: Sequence[int], num_tokens: int
) -> tuple[int, int]:
    """Return how many numbers of a cache the tokens behind it attend to, and how many it has.

    Args:
        shapes: (num_kv_heads, head_dim) of keys and values of layer 0, of layer 1, ...
        first_visible: per layer, from `find_first_visible`.
        num_tokens: that the cache holds.
    """
    per_token = [heads * dims for heads, dims in shapes]
    seen = sum(size * (num_tokens - first_visible[plane // 2]) for plane, size in enumerate(per_token))
    return seen, sum(per_token) * num_tokens
