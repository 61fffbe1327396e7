"""Load or compute: by what was measured."""

from __future__ import annotations

import pytest

from cachegen.integrations.load_policy import LoadPolicy, Rates


@pytest.mark.parametrize("rates", [Rates(), Rates(load=1.0), Rates(compute=1.0), Rates(load=1.0, compute=2.0)])
def test_what_is_faster_or_not_yet_measured_is_loaded(rates):
    policy = LoadPolicy("faster")
    policy.rates = rates
    assert policy.loads()


def test_what_is_slower_is_computed_but_for_one_in_sixteen():
    policy = LoadPolicy("faster")
    policy.rates = Rates(load=2.0, compute=1.0)
    assert [policy.loads() for _ in range(32)] == ([False] * 15 + [True]) * 2


@pytest.mark.parametrize(
    ("rates", "num_loading", "num_computing", "loads"),
    [
        (Rates(load=1.0, compute=2.0), 99, 0, True),
        (Rates(load=1.0, compute=2.0), 100, 0, False),  # too many are loaded first
        (Rates(load=2.0, compute=1.0), 0, 100, False),
        (Rates(load=2.0, compute=1.0), 0, 101, True),  # too many are computed first
        (Rates(load=2.0, compute=1.0), 10, 121, True),
    ],
)
def test_what_waits_before_it_counts(rates, num_loading, num_computing, loads):
    policy = LoadPolicy("faster")
    policy.rates = rates
    assert [policy.loads(100, num_loading, num_computing) for _ in range(3)] == [loads] * 3


def test_always_is_always():
    policy = LoadPolicy("always")
    policy.rates = Rates(load=2.0, compute=1.0)
    assert policy.loads() and policy.patience(10) is None


def test_a_block_is_waited_for_as_long_as_computing_takes():
    policy = LoadPolicy("faster")
    assert policy.patience(10) is None
    policy.rates = Rates(compute=0.5)
    assert policy.patience(10) == 5


def test_rates_follow_what_is_measured():
    rates = Rates()
    for _ in range(40):
        rates.add_load(3.0, 3)
        rates.add_compute(1.0, 2)
    assert rates.load == pytest.approx(1.0) and rates.compute == pytest.approx(0.5)
    rates.add_load(300.0, 3)
    assert 1 < rates.load < 100
