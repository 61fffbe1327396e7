"""The doors' counts as Prometheus reads them; in the engines' environments, which have its client."""

from __future__ import annotations

import pytest

from cachegen.integrations.counters import Counters
from cachegen.integrations.metrics import METRICS, register, split_counts

pytestmark = pytest.mark.doors


@pytest.fixture
def registry():
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


def read_text(registry) -> dict[str, float]:
    """Samples of the OpenMetrics text, as its own parser reads them."""
    from prometheus_client.openmetrics.exposition import generate_latest
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    text = generate_latest(registry).decode()
    assert text.endswith("# EOF\n")
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "counter" and family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


def test_counts_are_told_as_they_are_when_asked(registry):
    counters = Counters()
    register(counters, "lmcache", registry)
    assert read_text(registry)["cachegen_loaded_blocks_total{door=lmcache}"] == 0
    counters.add(decoded=2, raw_bytes=1 << 40)
    counters.add_for("missed", "damaged")
    counters.add_for("seconds", "decode", 0.25)
    counters.add_for("seconds", "decode", 0.5)
    samples = read_text(registry)
    assert samples["cachegen_loaded_blocks_total{door=lmcache}"] == 2
    assert samples["cachegen_raw_bytes_total{door=lmcache}"] == 1 << 40
    assert samples["cachegen_missed_blocks_total{door=lmcache,reason=damaged}"] == 1
    assert samples["cachegen_seconds_total{door=lmcache,stage=decode}"] == 0.75


def test_a_registry_takes_the_counts_of_one_door_only_once(registry):
    register(Counters(), "lmcache", registry)
    with pytest.raises(ValueError, match="Duplicated"):
        register(Counters(), "lmcache", registry)


def test_every_count_has_a_metric():
    names = [f"{name}:reason" if metric.label else name for name, metric in METRICS.items()]
    assert len(list(split_counts(dict.fromkeys(names, 1)))) == len(METRICS)


def test_what_has_grown_is_taken_once():
    counters = Counters()
    counters.add(decoded=2)
    assert counters.take() == {"decoded": 2} and counters.take() == {}
    counters.add(decoded=1)
    counters.add_for("missed", "absent", 3)
    assert counters.take() == {"decoded": 1, "missed:absent": 3}
