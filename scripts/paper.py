#!/usr/bin/env python3
"""Do the paper's experiments, one by one or all, and write what they find: a JSON file each, and all as Markdown.

What is there already, of the same model, texts and profile, is not done again; an interrupted run resumes where it
stopped. scripts/report.py makes a page of the results.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cachegen import command_line
from cachegen.coder.cpu import default_num_threads
from cachegen.comparison.datasets import PromptContext, fit_contexts, read_contexts
from cachegen.device import resolve_device, resolve_dtype
from cachegen.errors import ConfigError, InputError, OutputError
from cachegen.experiments.bench import Bench, Prices
from cachegen.experiments.markdown import format_outcomes
from cachegen.experiments.outcome import list_outcomes
from cachegen.experiments.registry import EXPERIMENTS, in_order
from cachegen.experiments.running import find_done, run_experiment
from cachegen.files import write_file
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.hybrids import refuse_states
from cachegen.pipeline.model import LoadedModel, load_model

ROOT = Path(__file__).resolve().parent.parent
ALL = "all"
MARKDOWN_NAME = "README.md"


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add(
        "experiments", nargs="+", choices=(*EXPERIMENTS, ALL), metavar="EXPERIMENT", help=", ".join([*EXPERIMENTS, ALL])
    )
    command_line.add_model_flags(parser, str(ROOT / "models/tiny-mistral"))
    add(
        "--path_to_context",
        type=Path,
        nargs="+",
        default=[ROOT / "9k_prompts"],
        help="data sets: folders of N.txt with or without questions.json, records (.jsonl), or texts",
    )
    add("--output_path", type=Path, required=True, help="folder of the results")
    add("--work_path", type=Path, help="folder of caches and of what is measured already; None: OUTPUT_PATH/work")
    add("--num_contexts", type=command_line.positive_int, default=2, help="of each data set")
    add("--num_calibration", type=command_line.positive_int, default=4, help="contexts to fit methods on")
    add(
        "--leave_out",
        nargs="+",
        metavar="SCHEME",
        default=[],
        help="schemes of rate_distortion.py that are not measured: pca for a large model",
    )
    add("--storage_price", type=command_line.positive_float, default=0.023, help="USD per GB and month")
    add("--gpu_price", type=command_line.positive_float, default=1.0, help="USD per hour of a GPU")
    command_line.add_study_flags(parser, ROOT)
    add("--threads", type=command_line.positive_int, help="that encode and decode; None: all processors")
    add("--overwrite", action="store_true", help="do experiments again that are done")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_run, build_parser(), argv)


def _run(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    names = list(EXPERIMENTS) if ALL in args.experiments else list(dict.fromkeys(args.experiments))
    bench = _make_bench(args, report.line)
    done, kept, refused = [], [], []
    for number, name in enumerate(names, 1):
        if not args.overwrite and find_done(args.output_path, name, bench):
            report.line(f"[{number}/{len(names)}] {name}: is done")
            kept.append(name)
            continue
        report.line(f"[{number}/{len(names)}] {name}")
        command = " ".join(["python scripts/paper.py", name, *_describe_flags(args)])
        try:
            run_experiment(args.output_path, name, bench, command)
        except InputError as error:
            # What one cannot do, such as with a model of sliding windows, is no reason to leave out the others.
            report.warn(str(error))
            refused.append(name)
        else:
            done.append(name)
    outcomes = in_order(list_outcomes(args.output_path))
    write_file(args.output_path / MARKDOWN_NAME, format_outcomes(outcomes).encode())
    report.line(f"results            {args.output_path}")
    command_line.finish(args, {"output_path": args.output_path, "done": done, "kept": kept, "refused": refused})
    if refused:
        raise InputError(f"{args.output_path}: {', '.join(refused)} could not be done; what was wrong is said above")


def _make_bench(args: argparse.Namespace, say: Callable[[str], None]) -> Bench:
    profile = load_profile(args.profile, for_encoding=True) if args.profile != "none" else None
    device = resolve_device(args.device)
    load: Callable[..., LoadedModel] = functools.partial(
        load_model, args.model_id, device=device, gguf_file=args.gguf_file
    )
    loaded = load(dtype=resolve_dtype(args.dtype))
    refuse_states(loaded, "measuring")
    data_sets: dict[str, Sequence[PromptContext]] = {}
    for path in args.path_to_context:
        if path.stem in data_sets:
            raise ConfigError(f"{path}: `path_to_context` has two data sets of the name {path.stem}")
        contexts = read_contexts(path, args.num_contexts, args.num_questions)
        data_sets[path.stem] = _fit(contexts, loaded, args, args.num_contexts, args.chat_template)
    calibration = read_contexts(args.path_to_calibration, args.num_calibration)
    calibration = _fit(calibration, loaded, args, args.num_calibration, False)
    work = args.work_path or args.output_path / "work"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{work}: cannot be made: {error.strerror}") from error
    return Bench(
        loaded=loaded,
        load_for_prefill=functools.cache(load),
        data_sets=data_sets,
        calibration=calibration,
        profile=profile,
        work=work,
        left_out=frozenset(args.leave_out),
        block_size=args.block_size,
        num_threads=args.threads or default_num_threads(),
        config=ROOT / "config/adaptation",
        prices=Prices(args.storage_price, args.gpu_price),
        say=say,
    )


def _fit(
    contexts: Sequence[PromptContext], loaded: LoadedModel, args: argparse.Namespace, count: int, chat_template: bool
) -> list[PromptContext]:
    """Return `count` contexts: of a single text its windows, of several the first."""
    windows = count if len(contexts) == 1 and not contexts[0].questions else None
    fitted = fit_contexts(
        contexts, loaded, count=windows, context_tokens=args.context_tokens, chat_template=chat_template
    )
    return fitted[:count]


def _describe_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that differ from their defaults, as a reader would give them; folders without their place."""
    texts = []
    parser = build_parser()
    for name, value in vars(args).items():
        if name in ("experiments", "output_path", "work_path", "json", "quiet", "overwrite"):
            continue
        if value == parser.get_default(name):
            continue
        values = value if isinstance(value, list) else [value]
        texts.append(f"--{name}" if value is True else f"--{name} {' '.join(map(_name, values))}")
    return texts


def _name(value: object) -> str:
    path = Path(str(value))
    return path.name if path.is_absolute() else str(value)


if __name__ == "__main__":
    sys.exit(main())
