"""Scores of answers, by values computed by hand."""

from __future__ import annotations

import math

import pytest

from cachegen.comparison.scoring import (
    bits_per_byte,
    is_right,
    normalize,
    perplexity,
    score_all,
    score_contained,
    score_exact,
    score_f1,
    score_number,
    score_topic,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a dog\nAND an ox.", "cat dog and ox"),
        ("there's another theatre", "theres another theatre"),
        ("The.", ""),
        ("U.S.A. (1,000)", "usa 1000"),
    ],
)
def test_normalizing_drops_case_punctuation_articles_and_spaces(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(("prediction", "expected"), [("a Paris!", 1), ("Paris is", 0), ("Rome", 1), ("", 0)])
def test_exact_match_is_of_whole_normalized_answers(prediction, expected):
    assert score_exact(prediction, ["Paris", "the Rome"]) == expected


@pytest.mark.parametrize(("prediction", "expected"), [("it is PARIS.", 1), ("rome", 1), ("Par is", 0)])
def test_contained_match_ignores_case_and_takes_any_answer(prediction, expected):
    assert score_contained(prediction, ["Paris", "Rome"]) == expected


def test_all_answers_count_by_their_share():
    assert score_all("12, 45 and x7", ["12", "45", "X7", "99"]) == 0.75


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("the cat sat", ["cat sat down"], 0.8),  # precision 2/2, recall 2/3
        ("cat cat dog", ["cat"], 0.5),  # precision 1/3, recall 1
        ("dog", ["cat", "dog house"], 2 / 3),  # the better answer: precision 1, recall 1/2
        ("bird", ["cat"], 0.0),
        ("the", ["the"], 0.0),  # nothing is left of either, as in LongBench
        ("", ["cat"], 0.0),
    ],
)
def test_f1_is_the_harmonic_mean_over_the_best_answer(prediction, answers, expected):
    assert score_f1(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ('The first topic was "Art of Tea-making".', 1),
        ("THE ART OF TEAMAKING", 1),
        ("It was tea.", 0),
    ],
)
def test_a_topic_is_named_whatever_its_case_punctuation_and_article(prediction, expected):
    assert score_topic(prediction, ["The art of tea-making"]) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("line 3 holds <0417>.", 1), ("417, not 5", 0), ("none", 0), ("4170", 0)],
)
def test_the_last_number_counts(prediction, expected):
    assert score_number(prediction, ["417"]) == expected


def test_perplexity_and_bits_per_byte_are_of_the_sum_over_tokens():
    nll_sum = 6 * math.log(4)
    assert perplexity(nll_sum, 6) == pytest.approx(4)
    assert bits_per_byte(nll_sum, 24) == pytest.approx(0.5)  # 12 bits
    with pytest.raises(ValueError, match="num_tokens"):
        perplexity(1.0, 0)
    with pytest.raises(ValueError, match="num_bytes"):
        bits_per_byte(1.0, 0)


@pytest.mark.parametrize(
    ("metric", "score", "expected"), [("all", 0.75, False), ("all", 1, True), ("f1", 0.5, True), ("f1", 0.4, False)]
)
def test_right_is_a_full_score_or_half_of_f1(metric, score, expected):
    assert is_right(metric, score) is expected


def test_wilsons_interval_is_that_of_its_quadratic_equation():
    for hits, trials in ((0, 10), (3, 10), (10, 10), (1, 400)):
        low, high = wilson_interval(hits, trials)
        for bound in (low, high):  # (bound - share)^2 = z^2 bound (1 - bound) / trials
            assert (bound - hits / trials) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / trials, abs=1e-9)
        assert low < high
    with pytest.raises(ValueError, match="num_trials"):
        wilson_interval(0, 0)
