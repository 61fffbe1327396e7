"""Simulate several ways to load a document over many traces, and summarize what came of them."""

from __future__ import annotations

import csv
import functools
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cachegen.files import write_file
from cachegen.simulation import traces
from cachegen.simulation.bound import clairvoyant_bound
from cachegen.simulation.scenario import LevelCurve
from cachegen.simulation.simulator import DEFAULT_BLOCK_TOKENS, simulate_request
from cachegen.simulation.traces import BandwidthTrace
from cachegen.streaming.policies import POLICIES
from cachegen.streaming.policy import TEXT, ChunkLevels, Objective, Policy, Speeds
from cachegen.streaming.policy_front_to_back import decide_fixed_level

Document = tuple[ChunkLevels, ...]


@dataclass(frozen=True)
class System:
    """One way to load: a document as some codec encodes it, and a policy; None stands for the clairvoyant bound."""

    name: str
    chunks: Document
    policy: Policy | None


@dataclass(frozen=True)
class TraceCase:
    """A trace, the group that it is summarized in, and what tells it from the others there: a seed or Gbps."""

    group: str
    parameter: float
    trace: BandwidthTrace


@dataclass(frozen=True)
class Outcome:
    """How one request of one system went.

    Attributes:
        ttft_seconds: infinite where no first token came.
        loss: expected KL of the cache, in nats per token.
        num_bytes: received; NaN for the bound.
        computed_share: of the chunks; NaN for the bound.
    """

    case: TraceCase
    system: str
    ttft_seconds: float
    loss: float
    num_bytes: float
    computed_share: float


def systems_of_curves(
    curves: dict[str, LevelCurve], num_tokens: int, chunk_size: int, values_per_token: int
) -> list[System]:
    """Return the systems to compare: text, 8-bit quantization, CacheGen, ours, and the bound on ours.

    `ours (cachegen's files)` is our policy on the files of the paper's codec: what the policy alone gives.

    Raises:
        KeyError: `curves` lacks "ours", "cachegen" or "8-bit".
    """
    documents = {name: curves[name].document(num_tokens, chunk_size, values_per_token) for name in curves}
    return [
        System("text", documents["cachegen"], POLICIES["text"]),
        System("8-bit", documents["8-bit"], functools.partial(decide_fixed_level, level=1)),
        System("cachegen", documents["cachegen"], POLICIES["cachegen"]),
        System("ours (cachegen's files)", documents["cachegen"], POLICIES["ours"]),
        System("ours", documents["ours"], POLICIES["ours"]),
        System("clairvoyant", documents["ours"], None),
    ]


def systems_of_document(chunks: Document) -> list[System]:
    """Return the systems to compare on one encoded document."""
    named = [System(name, chunks, policy) for name, policy in POLICIES.items()]
    return [*named, System("clairvoyant", chunks, None)]


def make_cases(kinds: Iterable[str], num_seeds: int, gbps: tuple[float, float], num_rates: int) -> list[TraceCase]:
    """Return the generated traces.

    Args:
        kinds: of `TRACE_KINDS`.
        num_seeds: traces per random kind, seeds from 0.
        gbps: lowest and highest rate of kind "constant".
        num_rates: of kind "constant", log-spaced.
    """
    cases = []
    for kind in kinds:
        if kind == "constant":
            for rate in np.geomspace(*gbps, num_rates).tolist():
                cases.append(TraceCase(f"constant, {gbps[0]:g} to {gbps[1]:g} Gbps", rate, traces.constant(rate)))
        elif kind == "zero":
            cases.append(TraceCase("no bandwidth", 0.0, traces.no_bandwidth()))
        else:
            for seed in range(num_seeds):
                trace = traces.SEEDED_TRACES[kind](seed)
                cases.append(TraceCase(trace.name, seed, trace))
    return cases


TRACE_KINDS = ("constant", "zero", *traces.SEEDED_TRACES)


def run_cases(
    systems: Sequence[System],
    cases: Sequence[TraceCase],
    objective: Objective,
    speeds: Speeds,
    *,
    num_connections: int = 1,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    num_layers: int = 1,
    is_whole_only: bool = False,
) -> Iterator[Outcome]:
    """Yield the outcome of each system on each trace, trace by trace.

    Args:
        is_whole_only: the documents, as in `LoadState`.

    The model breaks off between two of its layers: `Speeds.stop_seconds` is replaced by what one layer of the
    document's last block takes.
    """
    end_token = systems[0].chunks[-1].end_token
    last_block_seconds = speeds.prefill.seconds(max(0, end_token - block_tokens), min(block_tokens, end_token))
    speeds = replace(speeds, stop_seconds=last_block_seconds / num_layers)
    for case in cases:
        for system in systems:
            if system.policy is None:
                ttft, loss = clairvoyant_bound(
                    system.chunks, objective, speeds, case.trace, num_connections=num_connections
                )
                yield Outcome(case, system.name, ttft, loss, math.nan, math.nan)
                continue
            request = simulate_request(
                system.policy,
                system.chunks,
                objective,
                speeds,
                case.trace,
                num_connections=num_connections,
                block_tokens=block_tokens,
                num_layers=num_layers,
                is_whole_only=is_whole_only,
            )
            computed = request.levels.count(TEXT) / len(request.levels)
            yield Outcome(case, system.name, request.ttft_seconds, request.loss, request.num_bytes, computed)


def summarize(outcomes: Sequence[Outcome], deadline_seconds: float) -> list[dict]:
    """Return one summary per group of traces and system, in the order of `outcomes`.

    A first token that never comes is infinitely late and misses; it is left out of the mean loss and of the mean bytes.
    "worst_over_text" is the largest ratio of a time to first token to that of `text` on the same trace,
    "mean_over_ours" the ratio of the mean time to that of `ours`.
    """
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    text = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.case.group, outcome.system), []).append(outcome)
        if outcome.system == "text":
            text[id(outcome.case)] = outcome.ttft_seconds
    rows = [
        _summarize_group(group, system, found, text, deadline_seconds) for (group, system), found in grouped.items()
    ]
    ours = {row["trace"]: row["ttft_mean_seconds"] for row in rows if row["system"] == "ours"}
    return [row | {"mean_over_ours": row["ttft_mean_seconds"] / ours.get(row["trace"], math.nan)} for row in rows]


def _summarize_group(
    group: str, system: str, outcomes: Sequence[Outcome], text: dict[int, float], deadline_seconds: float
) -> dict:
    ttft = np.array([outcome.ttft_seconds for outcome in outcomes])
    came = [outcome for outcome in outcomes if outcome.ttft_seconds < math.inf]

    def quantile(share: float) -> float:
        # The value itself, not a mean of neighbours, of which one may be infinite.
        return float(np.quantile(ttft, share, method="higher"))

    return {
        "trace": group,
        "system": system,
        "num_requests": len(outcomes),
        "ttft_mean_seconds": float(ttft.mean()),
        "ttft_median_seconds": quantile(0.5),
        "ttft_p95_seconds": quantile(0.95),
        "ttft_p99_seconds": quantile(0.99),
        "ttft_max_seconds": float(ttft.max()),
        "miss_share": float((ttft > deadline_seconds * (1 + 1e-9)).mean()),
        "expected_kl_mean": float(np.mean([outcome.loss for outcome in came])) if came else math.nan,
        "expected_kl_max": max((outcome.loss for outcome in came), default=math.nan),
        "bytes_mean": float(np.mean([outcome.num_bytes for outcome in came])) if came else math.nan,
        "computed_share_mean": float(np.mean([outcome.computed_share for outcome in came])) if came else math.nan,
        "worst_over_text": max(
            (o.ttft_seconds / text[id(o.case)] for o in outcomes if id(o.case) in text), default=math.nan
        ),
    }


def write_csv(path: str | os.PathLike[str], outcomes: Sequence[Outcome]) -> None:
    """Write one row per request, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trace", "parameter", "system", "ttft_seconds", "expected_kl", "bytes", "computed_share"])
    for o in outcomes:
        row = (o.ttft_seconds, o.loss, o.num_bytes, o.computed_share)
        writer.writerow([o.case.group, f"{o.case.parameter:g}", o.system, *(f"{value:.6g}" for value in row)])
    write_file(path, text.getvalue().encode())
