#!/usr/bin/env python3
"""Measure bytes against quality: every context, by every method and setting, against its uncompressed cache.

Writes results.csv (a row per method and setting), contexts.csv (and context), table.md and plot.png, and answers.csv
with --answers. An interrupted run resumes where it stopped; results are measured anew when what they depend on has
changed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cachegen import command_line
from cachegen.comparison.datasets import fit_contexts, read_contexts, tokenize_context
from cachegen.comparison.rate_distortion import PROTOCOLS, Study, measure
from cachegen.comparison.report import (
    format_table,
    summarize,
    write_answers_csv,
    write_csv,
    write_per_context_csv,
    write_plot,
)
from cachegen.comparison.schemes import UncompressedScheme, choose_schemes, make_schemes
from cachegen.device import resolve_device, resolve_dtype
from cachegen.files import write_file
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.hybrids import refuse_states
from cachegen.pipeline.model import LoadedModel, load_model

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    command_line.add_model_flags(parser, str(ROOT / "models/tiny-mistral"))
    add(
        "--path_to_context",
        type=Path,
        default=ROOT / "9k_prompts",
        help="a folder of N.txt with or without questions.json, records of a data set (.jsonl), or a text",
    )
    add("--output_path", type=Path, required=True, help="folder of the results")
    add("--kv_folder", type=Path, help="folder of saved caches, test/ and calibration/; None: OUTPUT_PATH/kv")
    add("--num_contexts", type=command_line.positive_int, help="measure only the first contexts")
    add("--num_calibration", type=command_line.positive_int, help="fit on the first calibration contexts only")
    add(
        "--schemes",
        nargs="+",
        metavar="NAME[=SETTING,...]",
        help="measure only these, at all their settings or at those given; None: all",
    )
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="tail",
        help="encode all but the last 256 tokens and compare on those, or the first half and compare on the second",
    )
    add("--noise_floor", action="store_true", help="measure the uncompressed cache in the checkpoint's dtype, too")
    add("--answers", action="store_true", help="let the model answer in its own words, from each cache")
    add(
        "--continue_tokens",
        type=command_line.positive_int,
        help="let the model write so many tokens greedily from where the encoded part ends, and count those before the "
        "first that it writes otherwise from a decoded cache",
    )
    add("--no_retrieval", action="store_true", help="ask no questions; a later run without it asks them")
    add("--no_plot", action="store_true", help="draw no plot (it needs matplotlib)")
    command_line.add_study_flags(parser, ROOT)
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_measure, build_parser(), argv)


def _measure(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    profile = load_profile(args.profile, for_encoding=True) if args.profile != "none" else None
    schemes = make_schemes(profile)
    if args.schemes is not None:
        schemes = choose_schemes(schemes, args.schemes)
    if args.noise_floor:
        schemes.insert(0, UncompressedScheme())
    contexts = read_contexts(args.path_to_context, args.num_contexts, args.num_questions)
    calibration = read_contexts(args.path_to_calibration, args.num_calibration)
    device = resolve_device(args.device)
    load: Callable[..., LoadedModel] = functools.partial(
        load_model, args.model_id, device=device, gguf_file=args.gguf_file
    )
    loaded = load(dtype=resolve_dtype(args.dtype))
    refuse_states(loaded, "measuring")
    fit = functools.partial(fit_contexts, loaded=loaded, context_tokens=args.context_tokens)
    # A prompts folder has further questions, which no template has a place for; the default calibration is one.
    has_template = args.chat_template and args.path_to_calibration.suffix == ".jsonl"
    study = Study(
        loaded=loaded,
        load_for_prefill=functools.cache(load),
        contexts=fit(contexts, count=args.num_contexts, chat_template=args.chat_template),
        calibration=fit(calibration, count=args.num_calibration, chat_template=has_template),
        schemes=schemes,
        output=args.output_path,
        kv_folder=args.kv_folder or args.output_path / "kv",
        with_retrieval=not args.no_retrieval,
        block_size=args.block_size,
        protocol=args.protocol,
        with_answers=args.answers,
        continued_tokens=args.continue_tokens or 0,
    )
    for context in study.contexts:
        num_tokens = len(tokenize_context(loaded, context))
        if loaded.max_tokens is not None and num_tokens > loaded.max_tokens:
            made_for = f"more than the {loaded.max_tokens} the model is made for"
            report.warn(f"{context.name}: {num_tokens} tokens, {made_for}; give `context_tokens`")
    results = measure(study, report.line)
    rows = summarize(results)
    table = format_table(rows)
    write_csv(args.output_path / "results.csv", rows)
    write_per_context_csv(args.output_path / "contexts.csv", results)
    if args.answers:
        write_answers_csv(args.output_path / "answers.csv", results)
    write_file(args.output_path / "table.md", table.encode())
    if not args.no_plot:
        write_plot(args.output_path / "plot.png", rows)
    report.line(table)
    command_line.finish(args, {"results": rows})


if __name__ == "__main__":
    sys.exit(main())
