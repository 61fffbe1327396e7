"""All experiments by name, in the order of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cachegen.experiments import (
    bandwidth,
    breakdown,
    chunk_length,
    insights,
    interference,
    layer_sensitivity,
    size_quality,
    slo_misses,
    storage_cost,
    token_dropping,
)
from cachegen.experiments.bench import Bench
from cachegen.experiments.outcome import Outcome

EXPERIMENTS: Mapping[str, Callable[[Bench], Outcome]] = {
    module.NAME: module.run
    for module in (
        size_quality,
        insights,
        layer_sensitivity,
        chunk_length,
        token_dropping,
        bandwidth,
        slo_misses,
        breakdown,
        interference,
        storage_cost,
    )
}


def in_order(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return outcomes in the order of the experiments, those of experiments that are gone last."""
    names = list(EXPERIMENTS)
    return sorted(outcomes, key=lambda outcome: names.index(outcome.name) if outcome.name in names else len(names))
