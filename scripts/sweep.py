#!/usr/bin/env python3
"""Run every combination of flags that a YAML file names: prefill, encode, decode. An interrupted sweep resumes.

Writes results.jsonl, a line per run in the file's order that holds nothing of the machine or the moment; times.jsonl;
and table.md. docs/sweeps.md says what the file holds.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cachegen import command_line
from cachegen.sweeps.executors import EXECUTORS
from cachegen.sweeps.failures import collect_errors, raise_errors
from cachegen.sweeps.grid import read_grid
from cachegen.sweeps.sweep import Sweep

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add("grid", type=Path, help="the YAML file")
    add(
        "--output_path",
        type=Path,
        default="sweep",
        help="folder of the results; a file changed since begins no new one",
    )
    add("--workers", type=command_line.positive_int, default=1, help="runs at a time")
    add(
        "--executor",
        choices=EXECUTORS,
        default="local",
        help="ray: on all machines of the cluster that RAY_ADDRESS names",
    )
    add(
        "--shard",
        type=_parse_shard,
        default=(0, 1),
        metavar="I/N",
        help="run only every N-th run from the I-th on, 0 first",
    )
    add("--keep_files", action="store_true", help="keep the encoded files")
    command_line.add_common_flags(parser)
    return parser


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
    return int(match[1]), int(match[2])


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_sweep, build_parser(), argv)


def _sweep(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    sweep = Sweep(read_grid(args.grid), ROOT, Path.cwd(), args.output_path, args.keep_files)
    missing, (first, step) = sweep.find_missing(), args.shard
    todo = [number for number in missing if number % step == first]
    report.row("runs", f"{len(sweep.grid.runs)}, {len(sweep.grid.runs) - len(missing)} done before")
    results = sweep.run(todo, args.executor, args.workers)
    errors = collect_errors(results, len(todo), "run", is_quiet=report.is_quiet)
    num_missing = len(sweep.find_missing())
    if not num_missing:
        report.line(sweep.write_results())
        report.row("written", f"{args.output_path}/results.jsonl, times.jsonl, table.md")
    record = {"stage": "sweep", "num_runs": len(sweep.grid.runs), "num_missing": num_missing, "errors": errors}
    command_line.finish(args, record)
    raise_errors(errors, len(todo), "runs")


if __name__ == "__main__":
    sys.exit(main())
