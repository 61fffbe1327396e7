#!/usr/bin/env python3
"""Make prompts like RULER's from invented text, of a length in the model's tokens: a file of records per task."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cachegen import command_line
from cachegen.comparison.ruler import TASKS, make_records, pack_records
from cachegen.errors import OutputError
from cachegen.files import write_file
from cachegen.pipeline.model import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    command_line.add_model_flags(parser, str(ROOT / "models/tiny-mistral"))
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="make only these")
    add("--num_tokens", type=command_line.positive_int, default=4096, help="tokens of a prompt at most")
    add("--num_records", type=command_line.positive_int, default=50, help="prompts of each task")
    add("--seed", type=command_line.non_negative_int, default=0, help="another gives other prompts")
    add("--output_path", type=Path, required=True, help="folder of the files TASK.jsonl; those there are replaced")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_make, build_parser(), argv)


def _make(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    tokenizer = load_tokenizer(args.model_id, gguf_file=args.gguf_file)
    try:
        args.output_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{args.output_path}: cannot be made: {error.strerror}") from error
    files = {}
    for task in args.tasks:
        path = args.output_path / f"{task}.jsonl"
        records = make_records(
            task,
            args.num_tokens,
            args.num_records,
            args.seed,
            lambda text: len(tokenizer(text, verbose=False).input_ids),
        )
        write_file(path, pack_records(records))
        lengths = [record.length for record in records]
        files[task] = {"path": path, "records": len(records), "shortest": min(lengths), "longest": max(lengths)}
        report.row(task, f"{path}: {len(records)} prompts of {min(lengths)} to {max(lengths)} tokens")
    command_line.finish(args, {"files": files})


if __name__ == "__main__":
    sys.exit(main())
