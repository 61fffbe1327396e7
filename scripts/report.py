#!/usr/bin/env python3
"""Make one HTML page of the results of scripts/paper.py: sortable tables, figures, CSV; it needs no other file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cachegen import command_line
from cachegen.experiments.outcome import Outcome, list_outcomes
from cachegen.experiments.page import write_page
from cachegen.experiments.registry import in_order
from cachegen.files import write_file


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add("results", nargs="+", type=Path, help="folders of scripts/paper.py, one for each model")
    add("--output_path", type=Path, default=Path("report.html"), help="the page")
    add("--title", default="CacheGen: the paper's experiments", help="of the page")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_run, build_parser(), argv)


def _run(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    outcomes: dict[str, Sequence[Outcome]] = {}
    for folder in args.results:
        found = in_order(list_outcomes(folder))
        heading = str(found[0].setting.get("model", folder))
        outcomes[heading if heading not in outcomes else f"{heading} ({folder})"] = found
    page = write_page(outcomes, args.title).encode()
    write_file(args.output_path, page)
    report.line(f"page               {args.output_path}, {command_line.format_bytes(len(page))}")
    command_line.finish(args, {"output_path": args.output_path, "num_bytes": len(page)})


if __name__ == "__main__":
    sys.exit(main())
