"""Which cached tokens later ones attend to; tests/zoo compares it with what models compute."""

from __future__ import annotations

import pytest
import transformers

from cachegen.pipeline.windows import count_visible_values, find_first_visible
from tests.fixtures.models import CONFIGS, SMALL_SIZES


@pytest.mark.parametrize(
    ("name", "num_tokens", "expected"),
    [
        ("llama", 40, [0, 0, 0]),
        ("mistral with a sliding window", 40, [25, 25, 25]),
        ("mistral with a sliding window", 16, [1, 1, 1]),
        ("mistral with a sliding window", 15, [0, 0, 0]),
        ("gemma3 with local and global layers", 40, [25, 0, 25]),
        ("gpt2 with learned positions", 40, [0, 0]),
    ],
)
def test_a_window_keeps_one_token_less_than_its_size(name, num_tokens, expected):
    assert list(find_first_visible(CONFIGS[name], num_tokens)) == expected


@pytest.mark.parametrize(("num_tokens", "first"), [(15, 0), (16, 16), (17, 16), (40, 32)])
def test_a_chunk_keeps_what_is_of_the_next_tokens_own(num_tokens, first):
    config = transformers.Llama4TextConfig(
        **SMALL_SIZES, attention_chunk_size=16, layer_types=["chunked_attention", "chunked_attention", "full_attention"]
    )
    assert find_first_visible(config, num_tokens) == (first, first, 0)


def test_values_are_counted_plane_by_plane():
    assert count_visible_values([(2, 4), (2, 3), (1, 5), (1, 5)], [6, 0], 10) == (4 * 14 + 10 * 10, 10 * 24)
