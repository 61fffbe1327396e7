"""Where the time to first token goes, by method, over the link that is fairest to all."""

from __future__ import annotations

import math

from cachegen.experiments.bench import Bench
from cachegen.experiments.outcome import Column, Figure, Outcome, Table, Value
from cachegen.experiments.timings import measure_times

NAME = "breakdown"
_GIGA = 1e9


def run(bench: Bench) -> Outcome:
    """Measure each stage; the link is the one over which 8-bit quantization takes as long as the text."""
    times = measure_times(bench)
    eight_bit = times.encodings[0]
    left = max(times.prefill_seconds - eight_bit.decode_seconds, times.prefill_seconds / 100)
    bits_per_second = _round(8 * eight_bit.num_bytes / left)
    stages: list[dict[str, Value]] = []
    totals: list[dict[str, Value]] = []

    def add(method: str, sending: float, computing: float, name: str) -> None:
        parts = {"sending": sending, name: computing, "first token": times.first_token_seconds}
        stages.extend({"method": method, "stage": stage, "seconds": seconds} for stage, seconds in parts.items())
        totals.append({"method": method, "seconds": sum(parts.values()), "share": computing / sum(parts.values())})

    add("text", 8 * times.text_bytes / bits_per_second, times.prefill_seconds, "prefill")
    for encoding in times.encodings:
        add(encoding.name, 8 * encoding.num_bytes / bits_per_second, encoding.decode_seconds, "decoding")
    return Outcome(
        name=NAME,
        title="Breakdown of the time to first token",
        paper="Figure 14",
        question="What takes the time: sending, decoding or computing?",
        tables=(
            Table(
                "stages",
                f"Seconds by stage, over {bits_per_second / _GIGA:g} Gbit/s",
                (Column("method", "method"), Column("stage", "stage"), Column("seconds", "seconds", 3)),
                tuple(stages),
            ),
            Table(
                "totals",
                "All stages one after the other",
                (
                    Column("method", "method"),
                    Column("seconds", "seconds", 3),
                    Column("share", "of them decoding or prefill", 2),
                ),
                tuple(totals),
            ),
        ),
        figures=(Figure("Seconds by stage", "stages", "method", "seconds", "stage", kind="bar"),),
        notes=(
            f"Sending is arithmetic, over the link at which 8-bit quantization takes about as long as the text: "
            f"{bits_per_second / _GIGA:g} Gbit/s. Nothing overlaps here; in `bandwidth` chunks do.",
        ),
        setting={"num_tokens": times.num_tokens, "gbps": bits_per_second / _GIGA},
    )


def _round(value: float) -> float:
    """Return a value with one significant digit."""
    return float(f"{value:.0e}") if math.isfinite(value) else value
