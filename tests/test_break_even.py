"""Over which links encoded files pay: by the times of a reader that overlaps nothing."""

from __future__ import annotations

import pytest

from cachegen.pipeline.break_even import beats_fp16_below, beats_text_above


def test_at_the_limit_both_ways_take_the_same_time():
    fp16, encoded, decode, other, text = 10_000_000, 600_000, 0.25, 0.1, 3.0
    link = beats_fp16_below(fp16, encoded, decode)
    assert 8 * encoded / link + decode == pytest.approx(8 * fp16 / link)
    slowest = beats_text_above(encoded, decode + other, text)
    assert slowest is not None and 8 * encoded / slowest + decode + other == pytest.approx(text)


def test_what_is_never_first_has_no_link():
    assert beats_fp16_below(100, 200, 0.1) == 0
    assert beats_text_above(1000, 2.0, 1.5) is None
