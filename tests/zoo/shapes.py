"""Published models with windows: how much of their caches no later token sees."""

from __future__ import annotations

from typing import Any

import transformers

from cachegen.pipeline.windows import count_visible_values, find_first_visible
from tests.zoo.report import format_row

NUM_TOKENS = 9000
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 3 4B": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 34, "num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 256}
        | {"sliding_window": 1024},
    ),
    "Mistral 7B v0.1": (
        "MistralConfig",
        {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 4096},
    ),
    "GPT-OSS 20B": (
        "GptOssConfig",
        {"num_hidden_layers": 24, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128},
    ),
    "Gemma 2 9B": (
        "Gemma2Config",
        {"num_hidden_layers": 42, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096},
    ),
}
COLUMNS = ("model", "layers", "of which have a window", "window", "MB", "of these no later token sees")


def describe_shapes() -> list[str]:
    """Return the rows of a table: 16-bit caches of `NUM_TOKENS` tokens."""
    rows = [format_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    for name, (class_name, fields) in SHAPES.items():
        config = getattr(transformers, class_name)(**fields)
        first_visible = find_first_visible(config, NUM_TOKENS)
        shapes = [(config.num_key_value_heads, config.head_dim)] * (2 * len(first_visible))
        seen, held = count_visible_values(shapes, first_visible, NUM_TOKENS)
        num_windows = sum(first > 0 for first in first_visible)
        numbers = (len(first_visible), num_windows, config.sliding_window, round(2 * held / 1e6))
        rows.append(format_row([name, *map(str, numbers), f"{100 * (1 - seen / held):.0f} %"]))
    return rows
