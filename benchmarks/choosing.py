#!/usr/bin/env python3
"""Seconds until a context's cache is there, over the speed of the link, by method: what docs/choosing.md shows.

Seconds are those of method_throughput.py and prefill_throughput.py, run before on one machine; bits per value are those
of a real model (docs/results/smollm2), since random numbers have others. Reading and decoding do not overlap here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachegen.files import atomic_write, write_file
from cachegen.pipeline.break_even import beats_fp16_below, beats_text_above

LINKS = (0.1, 1, 10, 100)  # Gbit/s, of the table
GIGA = 1e9


@dataclass(frozen=True)
class Choice:
    """A method as a reader would choose it.

    Attributes:
        case: whose seconds it has, of method_throughput.py; None for fp16, which is not decoded.
        bits_per_value: of SmolLM2-135M-Instruct, WikiText-2 and a novel, 3,840 tokens.
    """

    name: str
    case: str | None
    bits_per_value: float


CHOICES = (
    Choice("fp16", None, 16.0),
    Choice("uniform 8-bit", "uniform 8-bit, rans", 8.084),
    Choice("lossless, with a profile", "lossless", 7.98),
    Choice("cachegen 32/16", "cachegen 32/16 bins", 2.620),
    Choice("transform, at the KL of q4_0", "transform, 1 level", 0.353),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--methods", type=Path, required=True, help="JSON file of method_throughput.py")
    parser.add_argument("--prefill", type=Path, required=True, help="JSON file of prefill_throughput.py")
    parser.add_argument(
        "--prefill_share", type=float, default=1.0, help="of the layers of the model that was timed there"
    )
    parser.add_argument("--num_tokens", type=int, default=8192, help="of the context")
    parser.add_argument("--output_path", type=Path, required=True, help="folder of choosing.md and choosing.png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    methods, prefill = (json.loads(path.read_text()) for path in (args.methods, args.prefill))
    layers, heads, dims = methods["shape"]
    fp16_bytes = 4 * layers * heads * dims * args.num_tokens
    text_seconds = args.num_tokens / prefill["tokens_per_second"] / args.prefill_share
    rates = {row["case"]: row["decode_gb_per_second"] for row in methods["cases"]}
    table = format_table(fp16_bytes, rates, text_seconds)
    args.output_path.mkdir(parents=True, exist_ok=True)
    write_file(args.output_path / "choosing.md", table.encode())
    draw(args.output_path / "choosing.png", fp16_bytes, rates, text_seconds)
    print(table)
    return 0


def seconds_over(choice: Choice, gbit: float, fp16_bytes: int, rates: Mapping[str, float]) -> float:
    """Return the seconds until the cache is there over a link of so many Gbit/s."""
    encoded = fp16_bytes * choice.bits_per_value / 16
    decoding = 0.0 if choice.case is None else fp16_bytes / rates[choice.case] / GIGA
    return 8 * encoded / gbit / GIGA + decoding


def format_table(fp16_bytes: int, rates: Mapping[str, float], text_seconds: float) -> str:
    """Return a Markdown table: a row per method, and one for the text."""
    links = " | ".join(f"{gbit:g} Gbit/s" for gbit in LINKS)
    lines = [
        f"| method | bits per value | decode, GB/s of fp16 | {links} | faster than fp16 below | than the text above |",
        "|---|---:|---:|" + "---:|" * len(LINKS) + "---:|---:|",
    ]
    for choice in CHOICES:
        decoding = None if choice.case is None else fp16_bytes / rates[choice.case] / GIGA
        encoded = round(fp16_bytes * choice.bits_per_value / 16)
        below = "" if decoding is None else f"{beats_fp16_below(fp16_bytes, encoded, decoding) / GIGA:.2g} Gbit/s"
        above = beats_text_above(encoded, decoding or 0.0, text_seconds)
        lines.append(
            f"| {choice.name} | {choice.bits_per_value:.2f} "
            f"| {'' if choice.case is None else format(rates[choice.case], '.2f')} | "
            + " | ".join(f"{seconds_over(choice, gbit, fp16_bytes, rates):.3g} s" for gbit in LINKS)
            + f" | {below} | {'never' if above is None else f'{above / GIGA:.2g} Gbit/s'} |"
        )
    lines.append("| the text | | | " + " | ".join([f"{text_seconds:.3g} s"] * len(LINKS)) + " | | |")
    return "\n".join(lines) + "\n"


def draw(path: Path, fp16_bytes: int, rates: Mapping[str, float], text_seconds: float) -> None:
    """Draw seconds over Gbit/s, a line per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="link, Gbit/s", ylabel="seconds until the cache is there"
    )
    links = [10 ** (exponent / 20) for exponent in range(-30, 51)]
    for choice in CHOICES:
        seconds = [seconds_over(choice, gbit, fp16_bytes, rates) for gbit in links]
        axes.plot(links, seconds, label=choice.name, linewidth=1.5)
    axes.axhline(text_seconds, color="grey", linestyle="--", linewidth=1, label="computed from the text")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=110, metadata={})


if __name__ == "__main__":
    sys.exit(main())
