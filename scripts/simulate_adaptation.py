#!/usr/bin/env python3
"""Simulate how a document's KV cache reaches the model over changing bandwidth, by several policies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In a clone that is not installed, the package is beside this folder; an installed one comes first.
sys.path.append(str(ROOT / "src"))

from cachegen import startup  # noqa: E402

startup.guard_imports(__name__)

from cachegen import command_line  # noqa: E402
from cachegen.errors import ConfigError  # noqa: E402
from cachegen.simulation import plots, scenario, study  # noqa: E402
from cachegen.simulation.simulator import DEFAULT_BLOCK_TOKENS  # noqa: E402
from cachegen.simulation.traces import load_trace  # noqa: E402
from cachegen.streaming.policy import Objective  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    positive, count = command_line.positive_float, command_line.positive_int
    models = command_line.default_input(ROOT, "config/adaptation/models.json")
    levels = command_line.default_input(ROOT, "config/adaptation/levels_pessimistic.json")
    add("--models", default=models, help="speeds of models on GPUs, with their sources")
    add("--model", default="mistral-7b", help="a model of --models")
    add("--gpu", default="a40", help="a kind of GPU that --models has a speed of the model on")
    add("--gpu_share", type=positive, default=1.0, help="of the GPUs, what this request gets, up to 1")
    add("--levels", default=levels, help="each codec's bits and KL per level, with their sources")
    add("--num_tokens", type=count, default=9491, help="of the document; without --document")
    add("--chunk_size", type=count, default=512, help="tokens per chunk; without --document")
    add(
        "--document",
        nargs="+",
        metavar="FILE",
        help="sizes from run_encoding.py --json in place of --levels; several of the same document are its levels",
    )
    add("--expected_kl", nargs="+", type=command_line.non_negative_float, help="of each level of --document, in order")
    add(
        "--traces",
        nargs="*",
        choices=study.TRACE_KINDS,
        default=list(study.TRACE_KINDS),
        help="kinds of generated traces",
    )
    add("--trace", nargs="+", metavar="FILE", default=[], help="traces as JSON lines, in addition")
    add("--seeds", type=count, default=100, help="traces per random kind")
    add("--gbps", type=positive, nargs=2, default=[0.05, 400.0], help="lowest and highest constant rate")
    add("--num_rates", type=count, default=40, help="constant rates, log-spaced")
    add(
        "--slo",
        type=positive,
        default=Objective.deadline_seconds,
        help="objective for the time to first token, in seconds",
    )
    add("--target_kl", type=command_line.non_negative_float, default=0.0, help="good enough; 0 uses the whole SLO")
    add("--num_connections", type=count, default=1, help="requests in flight together")
    add("--block_tokens", type=count, default=DEFAULT_BLOCK_TOKENS, help="that the model computes in one go")
    add("--csv", metavar="FILE", help="write every request as one row")
    add("--plot", metavar="FILE", help="draw the results; needs matplotlib")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_simulate, build_parser(), argv)


def _simulate(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    report = command_line.Reporter(args)
    _check_flags(args)
    machine = scenario.load_machine(args.models, args.model, args.gpu, args.gpu_share)
    systems, sources = _load_systems(args, machine)
    cases = study.make_cases(args.traces, args.seeds, tuple(args.gbps), args.num_rates)
    for path in args.trace:
        trace = load_trace(path)
        cases.append(study.TraceCase(trace.name, 0.0, trace))
    if not cases:
        raise ConfigError("--traces: none given, and no --trace")
    objective = Objective(args.slo, args.target_kl)

    outcomes = []
    runs = study.run_cases(
        systems,
        cases,
        objective,
        machine.speeds,
        num_connections=args.num_connections,
        block_tokens=args.block_tokens,
        num_layers=machine.num_layers,
        is_whole_only=args.document is not None and scenario.can_only_be_used_whole(args.document),
    )
    total = len(cases) * len(systems)
    for outcome in tqdm(runs, total=total, unit="request", file=sys.stderr, disable=report.is_quiet or None):
        outcomes.append(outcome)
    summaries = study.summarize(outcomes, args.slo)

    chunks = systems[0].chunks
    text_seconds = sum(machine.speeds.prefill.seconds(c.first_token, c.num_tokens) for c in chunks)
    record = {
        "stage": "adaptation",
        "machine": machine.name,
        "num_tokens": chunks[-1].end_token,
        "num_chunks": len(chunks),
        "text_seconds": text_seconds,
        "prefill_tokens_per_second": chunks[-1].end_token / text_seconds,
        "first_token_seconds": machine.speeds.first_token_seconds,
        "decode_tokens_per_second": machine.speeds.decode.tokens_per_second,
        "sources": sources,
        "summaries": summaries,
    }
    _report(report, record, args)
    if args.csv is not None:
        study.write_csv(args.csv, outcomes)
    if args.plot is not None:
        title = (
            f"{machine.name}, text {text_seconds:.2f} s, SLO {args.slo:g} s, target KL {args.target_kl:g}: simulated"
        )
        plots.draw(args.plot, outcomes, args.slo, title)
    command_line.finish(args, record)


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse what argparse cannot see, before anything is computed."""
    if args.gpu_share > 1:
        raise ConfigError(f"--gpu_share must be above 0 and at most 1, got {args.gpu_share:g}")
    if args.gbps[0] > args.gbps[1]:
        raise ConfigError(f"--gbps: the lowest rate comes first, got {args.gbps[0]:g} {args.gbps[1]:g}")
    if args.expected_kl is not None and args.document is None:
        raise ConfigError("--expected_kl goes with --document; --levels files have their own")
    if args.plot is not None:
        plots.check(args.plot)


def _load_systems(args: argparse.Namespace, machine: scenario.Machine) -> tuple[list[study.System], dict[str, str]]:
    """Return what is compared, and where its numbers come from."""
    sources = {"machine": machine.source}
    if args.document is not None:
        chunks = scenario.load_encodings(args.document, args.expected_kl)
        return study.systems_of_document(chunks), sources | {"sizes": ", ".join(args.document)}
    curves, statement = scenario.load_level_curves(args.levels)
    missing = {"ours", "cachegen", "8-bit"} - set(curves)
    if missing:
        raise ConfigError(f"{args.levels}: codecs.{min(missing)} is missing")
    systems = study.systems_of_curves(curves, args.num_tokens, args.chunk_size, machine.values_per_token)
    return systems, sources | {"levels": statement} | {f"levels of {n}": curve.source for n, curve in curves.items()}


def _report(report: command_line.Reporter, record: dict, args: argparse.Namespace) -> None:
    report.row("machine", record["machine"])
    report.row("document", f"{record['num_tokens']:,} tokens in {record['num_chunks']} chunks")
    report.row("text", f"{record['text_seconds']:.3f} s, {record['prefill_tokens_per_second']:,.0f} tokens/s")
    report.row("objective", f"{args.slo:g} s, KL {args.target_kl:g}")
    for name, source in record["sources"].items():
        report.row("from", f"{name}: {source}")
    group = None
    for row in record["summaries"]:
        if row["trace"] != group:
            group = row["trace"]
            report.line()
            report.line(f"{group} ({row['num_requests']} requests)")
            columns = f"{'mean s':>8}{'p50':>8}{'p95':>8}{'max':>8}{'misses':>9}{'KL mean':>10}{'KL max':>10}"
            report.line(f"  {'':24}{columns}{'/ours':>8}{'worst/text':>12}")
        times = "".join(f"{row[f'ttft_{name}_seconds']:8.3f}" for name in ("mean", "median", "p95", "max"))
        share = f"{100 * row['miss_share']:.1f} %"
        kl = f"{row['expected_kl_mean']:10.5f}{row['expected_kl_max']:10.5f}"
        report.line(
            f"  {row['system']:24}{times}{share:>9}{kl}{row['mean_over_ours']:8.2f}{row['worst_over_text']:12.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
