#!/usr/bin/env python3
"""Write docs/models.md: what becomes of a tiny random model of every family of tests/zoo."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.extend([str(ROOT / "src"), str(ROOT)])

from cachegen import command_line  # noqa: E402
from cachegen.errors import ConfigError  # noqa: E402
from cachegen.files import write_file  # noqa: E402

BEGIN, END = "<!-- written by scripts/model_zoo.py -->", "<!-- end -->"


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    parser.add_argument("--page", default=str(ROOT / "docs/models.md"), help="the page whose table is replaced")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_write_page, build_parser(), argv)


def _write_page(args: argparse.Namespace) -> None:
    from tests.zoo.checkpoints import save_specimen
    from tests.zoo.families import FAMILIES
    from tests.zoo.report import COLUMNS, describe, format_row
    from tests.zoo.shapes import describe_shapes

    report = command_line.Reporter(args)
    page = Path(args.page)
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ConfigError(f"{page}: must have the lines {BEGIN} and {END}")
    rows = [format_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    num_works = 0
    for family in FAMILIES.values():
        if not family.is_known:
            raise ConfigError(f"transformers {version('transformers')} has no {family.class_name}: take a newer one")
        with tempfile.TemporaryDirectory() as folder:
            specimen = save_specimen(family, Path(folder))
            rows.append(describe(specimen))
        num_works += specimen.error is None
        report.row(family.name, "works" if specimen.error is None else "refused")
    shapes = "\n".join(describe_shapes())
    summary = f"{len(FAMILIES)} families with transformers {version('transformers')}: {num_works} work."
    write_file(
        page,
        "".join([before, BEGIN, "\n\n", shapes, "\n\n", summary, "\n\n", "\n".join(rows), "\n\n", END, after]).encode(),
    )
    report.row("written", page)


if __name__ == "__main__":
    sys.exit(main())
