"""How often an objective for the time to first token is missed while bandwidth changes, simulated."""

from __future__ import annotations

from cachegen.experiments.bench import Bench
from cachegen.experiments.outcome import Column, Figure, Outcome, Published, Table, Value
from cachegen.simulation.scenario import load_level_curves, load_machine
from cachegen.simulation.study import make_cases, run_cases, summarize, systems_of_curves
from cachegen.streaming.policy import Objective

NAME = "slo-misses"
NUM_TOKENS = 9491
CHUNK_TOKENS = 1500
NUM_TRACES = 50
OBJECTIVES = (0.5, 0.75, 1.0, 1.5, 2.0)
_TITLES = {
    "text": "text, computed",
    "8-bit": "8-bit quantization",
    "cachegen": "cachegen, Algorithm 1",
    "ours (cachegen's files)": "cachegen's files, this project's policy",
    "ours": "transform, this project's policy",
}


def run(bench: Bench) -> Outcome:
    """Simulate the paper's kind of links at the shape of its model."""
    machine = load_machine(bench.config / "models.json", "mistral-7b", "a40")
    curves, statement = load_level_curves(bench.config / "levels_pessimistic.json")
    systems = systems_of_curves(curves, NUM_TOKENS, CHUNK_TOKENS, machine.values_per_token)
    systems = [system for system in systems if system.name in _TITLES]
    cases = make_cases(["uniform-per-chunk"], NUM_TRACES, (0.1, 10.0), 1)
    rows: list[dict[str, Value]] = []
    for seconds in OBJECTIVES:
        outcomes = list(
            run_cases(systems, cases, Objective(seconds, 0.0), machine.speeds, num_layers=machine.num_layers)
        )
        for summary in summarize(outcomes, seconds):
            rows.append(
                {
                    "system": _TITLES[summary["system"]],
                    "objective": seconds,
                    "missed": summary["miss_share"],
                    "mean_seconds": summary["ttft_mean_seconds"],
                    "kl": summary["expected_kl_mean"],
                }
            )
    missed = {row["system"]: row["missed"] for row in rows if row["objective"] == 1.0}
    return Outcome(
        name=NAME,
        title="Missed objectives",
        paper="Figure 13",
        question="How often does the first token come too late while bandwidth changes from chunk to chunk?",
        tables=(
            Table(
                "objectives",
                f"{NUM_TRACES} links of 0.1 to 10 Gbit/s, drawn anew for each chunk",
                (
                    Column("system", "system"),
                    Column("objective", "objective, s", 3),
                    Column("missed", "share missed", 2),
                    Column("mean_seconds", "mean time to first token, s", 3),
                    Column("kl", "expected KL", 2),
                ),
                tuple(rows),
            ),
        ),
        figures=(Figure("Share of requests that miss", "objectives", "objective", "missed", "system"),),
        published=(
            Published(
                "requests that miss 1 s",
                "8 % with CacheGen",
                "Figure 13: its models, links and decoder",
                "; ".join(f"{name}: {100 * float(share or 0):.0f} %" for name, share in missed.items()),
            ),
        ),
        notes=(
            f"Simulated, not measured: {machine.name}, {NUM_TOKENS:,} tokens in chunks of {CHUNK_TOKENS:,}.",
            machine.source,
            f"Bits and KL of the levels: {statement}",
        ),
        setting={"model": machine.name, "simulated": True},
    )
