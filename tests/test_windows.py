"""Which cached tokens later ones attend to; tests/zoo compares it with what models compute."""

from __future__ import annotations

import dataclasses

import pytest
import transformers

from cachegen.errors import BitstreamError
from cachegen.fields import Fields, refuse_file
from cachegen.kv_cache import load_kv_cache, save_kv_cache
from cachegen.pipeline.windows import count_visible_values, find_first_visible
from cachegen.windows import Window, pack_windows, read_windows
from tests.fixtures.caches import make_cache, make_metadata
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


def test_without_windows_all_is_visible():
    metadata = make_metadata(40)
    assert metadata.windows is None and metadata.first_visible(40) == ()
    short = dataclasses.replace(metadata, windows=(None, Window("sliding", 41)))
    assert (short.first_visible(40), short.first_visible(41)) == ((), (0, 1))


WINDOWS = (Window("sliding", 16), None, Window("chunked", 1))


def test_a_file_keeps_windows(tmp_path):
    cache = make_cache(5, num_layers=3)
    for name, windows, expected in (("a", WINDOWS, WINDOWS), ("b", None, None), ("c", (None,) * 3, None)):
        save_kv_cache(tmp_path / name, cache, make_metadata(5, windows=windows))
        assert load_kv_cache(tmp_path / name)[1].windows == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda windows: windows.pop(), "windows"),
        (lambda windows: windows.append(None), "windows"),
        (lambda windows: windows.__setitem__(1, 7), r"windows\[1\]"),
        (lambda windows: windows[0].update(kind="round"), r"windows\[0\].kind"),
        (lambda windows: windows[0].update(num_tokens=0), r"windows\[0\].num_tokens"),
        (lambda windows: windows[2].update(num_tokens=1 << 41), r"windows\[2\].num_tokens"),
        (lambda windows: windows[2].update(num_tokens=True), r"windows\[2\].num_tokens"),
        (lambda windows: windows[0].update(more=1), r"windows\[0\]"),
        (lambda windows: windows[0].clear(), r"windows\[0\]"),
    ],
)
def test_other_windows_are_refused_by_name(change, field):
    packed = pack_windows(WINDOWS)
    change(packed)
    with pytest.raises(BitstreamError, match=rf"^field {field}: must "):
        read_windows(Fields({"windows": packed}, refuse_file()), 3)
    with pytest.raises(BitstreamError, match=r"^field windows: must be a list"):
        read_windows(Fields({"windows": {"0": None}}, refuse_file()), 3)


def test_values_are_counted_plane_by_plane():
    assert count_visible_values([(2, 4), (2, 3), (1, 5), (1, 5)], [6, 0], 10) == (4 * 14 + 10 * 10, 10 * 24)
