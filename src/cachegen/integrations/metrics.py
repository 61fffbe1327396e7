"""The doors' counts under the names that Prometheus knows them by; one table for all doors.

`prometheus_client` is imported when it is needed: the extra `metrics`.
"""

# The package is in the environments of serving engines.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from cachegen.errors import BackendUnavailableError
from cachegen.integrations.counters import Counters


class Metric(NamedTuple):
    """A counter of Prometheus.

    Attributes:
        name: without `_total`.
        help: one line.
        label: what its counts are told apart by, "" where there is one only.
    """

    name: str
    help: str
    label: str = ""


METRICS: dict[str, Metric] = {
    "decoded": Metric("cachegen_loaded_blocks", "Blocks that were decoded: hits."),
    "encoded": Metric("cachegen_encoded_blocks", "Blocks that were encoded to be stored."),
    "found": Metric("cachegen_found_blocks", "Blocks of prompts that lookups found."),
    "missed": Metric("cachegen_missed_blocks", "Blocks that were not found or not loaded.", "reason"),
    "unsaved": Metric("cachegen_unsaved_blocks", "Computed blocks that were not stored.", "reason"),
    "raw_bytes": Metric("cachegen_raw_bytes", "Keys and values that were encoded."),
    "blob_bytes": Metric("cachegen_encoded_bytes", "What they were encoded to."),
    "read_bytes": Metric("cachegen_read_bytes", "Blobs that came from the store."),
    "decoded_bytes": Metric("cachegen_decoded_bytes", "Keys and values that were decoded."),
    "coded": Metric("cachegen_coded_tensors", "Tensors that the method coded."),
    "raw": Metric("cachegen_uncoded_tensors", "Tensors that are stored as they are.", "reason"),
    "position_unknown": Metric("cachegen_unplaced_blocks", "Blocks whose position was not found in their keys."),
    "tokens": Metric("cachegen_prompt_tokens", "Tokens of prompts, loaded or computed.", "source"),
    "decided": Metric("cachegen_decisions", "Requests, by what was decided for them.", "decision"),
    "seconds": Metric("cachegen_seconds", "Seconds of all threads together.", "stage"),
}
"""By the name in `Counters`, before its colon."""


def split_counts(counts: Mapping[str, float]) -> Iterator[tuple[Metric, str, float]]:
    """Yield the metric, the value of its label and the count of each name; names without a metric are left out."""
    for name, count in sorted(counts.items()):
        kind, _, reason = name.partition(":")
        if (metric := METRICS.get(kind)) is not None and bool(metric.label) == bool(reason):
            yield metric, reason, count


class CountersCollector:
    """What a registry of Prometheus collects counters from, as they are when it is asked."""

    def __init__(self, counters: Counters, door: str) -> None:
        """`door` is the value of the label of that name, such as "lmcache"."""
        self._counters, self._door = counters, door

    def describe(self) -> Iterable[Any]:
        """Return the metrics without counts: a registry refuses names that it has."""
        return self._families({})

    def collect(self) -> Iterable[Any]:
        """Return all metrics, also those that have not been counted yet and have no label."""
        return self._families(self._counters.snapshot())

    def _families(self, counts: Mapping[str, float]) -> Iterable[Any]:
        families: dict[str, Any] = {}
        for metric in METRICS.values():
            labels = ["door", metric.label] if metric.label else ["door"]
            families[metric.name] = load_client().core.CounterMetricFamily(metric.name, metric.help, labels=labels)
            if not metric.label:
                families[metric.name].add_metric([self._door], 0)
        for metric, reason, count in split_counts(counts):
            family = families[metric.name]
            if not metric.label:
                family.samples.clear()
            family.add_metric([self._door, reason] if metric.label else [self._door], count)
        return families.values()


def register(counters: Counters, door: str, registry: Any = None) -> CountersCollector:
    """Let a registry of Prometheus, by default the process's own, collect counters.

    Raises:
        BackendUnavailableError: prometheus_client is not installed.
        ValueError: the registry has metrics of these names.
    """
    client = load_client()
    collector = CountersCollector(counters, door)
    (client.REGISTRY if registry is None else registry).register(collector)
    return collector


def load_client() -> Any:
    """Import prometheus_client.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError:
        raise BackendUnavailableError(
            'metrics need the package prometheus_client: pip install "cachegen[metrics]"'
        ) from None
    return prometheus_client
