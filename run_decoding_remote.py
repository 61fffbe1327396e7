#!/usr/bin/env python3
"""Load a context's cache from a store over a network, in time for an objective, and answer from it.

Each chunk is fetched at the level that the policy chooses, or computed from its text, whichever is sooner.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

SCRIPT_FOLDER = Path(__file__).resolve().parent
# In a clone that is not installed, the package is beside the script; an installed one comes first.
sys.path.append(str(SCRIPT_FOLDER / "src"))

from cachegen import startup  # noqa: E402

startup.guard_imports(__name__)

from cachegen import command_line  # noqa: E402
from cachegen.answer_scripts import (  # noqa: E402
    add_answer_flags,
    check_profile_flag,
    load_model_of,
    open_session,
    report_answers,
)
from cachegen.device import choose_kernels, resolve_device, resolve_dtype  # noqa: E402
from cachegen.errors import StoreError  # noqa: E402
from cachegen.pipeline.context import read_context  # noqa: E402
from cachegen.store.store import RetryRule, open_store  # noqa: E402
from cachegen.streaming.loader import SILENT_STALLS  # noqa: E402
from cachegen.streaming.policies import POLICIES  # noqa: E402
from cachegen.streaming.policy import Objective  # noqa: E402

if TYPE_CHECKING:
    from cachegen.pipeline.model import LoadedModel
    from cachegen.pipeline.session import Session
    from cachegen.streaming.load_report import LoadResult
    from cachegen.streaming.remote import RemoteDocument


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add(
        "--path_to_encoded_kv",
        default="store",
        metavar="URL",
        help="a store of run_publishing.py: http://host:port/path, s3://bucket/path, gs://..., az://... or a folder",
    )
    add(
        "--slo",
        type=command_line.positive_float,
        default=Objective.deadline_seconds,
        help="objective: seconds to the first token",
    )
    add("--policy", choices=sorted(POLICIES), default="ours", help="what to fetch, at which level, and what to compute")
    add("--level", type=command_line.positive_int, help="fetch every chunk at this level, whatever the policy")
    add(
        "--target_kl",
        type=command_line.non_negative_float,
        default=Objective.target_loss,
        help="expected loss that is good enough, in nats per token: nothing waits to get below it",
    )
    add(
        "--max_total_tokens",
        type=command_line.positive_int,
        help="as main.py was given it; None as where it was not",
    )
    add("--num_connections", type=command_line.positive_int, default=1, help="requests in flight together")
    add(
        "--stall_seconds",
        type=command_line.positive_float,
        default=RetryRule.stall_seconds,
        help="a connection that is silent for so long is given up and tried again",
    )
    add(
        "--follow-redirects",
        "--follow_redirects",
        action="store_true",
        help="let a web server send requests on to other hosts, ports or from http to https",
    )
    add_answer_flags(parser, SCRIPT_FOLDER)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_load_and_answer, build_parser(), argv)


def _load_and_answer(args: argparse.Namespace) -> None:
    from cachegen.coder.cpu import default_num_threads
    from cachegen.pipeline.profiles import profile_finder

    report = command_line.Reporter(args)
    # Everything that needs no model comes first: a wrong path or flag shows at once.
    num_threads = args.threads or default_num_threads()
    resolve_device(args.device)
    dtype = resolve_dtype(args.dtype)
    chosen = choose_kernels(args.device)
    store = open_store(
        args.path_to_encoded_kv,
        retry=RetryRule(stall_seconds=args.stall_seconds),
        follow_redirects=args.follow_redirects,
    )
    text = read_context(Path(args.path_to_context))

    # transformers takes seconds to import, more than it takes to say that a file is missing.
    from cachegen.pipeline.frequencies import match_frequencies
    from cachegen.pipeline.model_cache import empty_cache
    from cachegen.streaming.client import choose_policy, find_for_model, finish_cache, make_loader, measure_speeds

    session = open_session(args, text, dtype, max_total_tokens=args.max_total_tokens)
    loaded, token_ids = session.loaded, session.token_ids
    find_profile = profile_finder(
        args.profile, (args.model_id, SCRIPT_FOLDER / "models"), model_fingerprint=loaded.fingerprint
    )
    lookup_start = time.perf_counter()
    try:
        document = find_for_model(
            store,
            loaded,
            token_ids,
            num_threads=num_threads,
            kernels=chosen.kernels,
            find_profile=find_profile,
        )
        lookup_seconds = time.perf_counter() - lookup_start
        document.limit_chunks(args.num_chunks)
        _check_configs(args, document)
    except StoreError as error:
        if not error.is_too_slow:
            raise
        _answer_from_text(args, report, session, lookup_start, str(error))
        return
    if dtype == "auto" and loaded.dtype != document.dtype:
        loaded = match_frequencies(load_model_of(args, document.dtype), document.manifest.rope_hash)
        session = dataclasses.replace(session, loaded=loaded)
    policy = choose_policy(document, args.policy, args.level)
    num_cached, block_size = document.num_tokens, document.manifest.prefill_block_size
    cache = empty_cache(loaded.cache_layout, session.capacity)
    speeds = measure_speeds(
        loaded, cache, num_cached, token_ids, block_size, chosen.device, num_prompt_tokens=len(session.prompts[0])
    )

    # From here on the clock runs: what a server with the model in memory would do, finding the document included.
    start = time.perf_counter() - lookup_seconds
    loader = make_loader(
        document,
        loaded,
        cache,
        token_ids,
        policy,
        Objective(args.slo, args.target_kl),
        speeds,
        kernels=chosen.kernels,
        num_connections=args.num_connections,
        elapsed_seconds=lookup_seconds,
        silence_seconds=SILENT_STALLS * args.stall_seconds,
    )
    with loader:
        loading = loader.run()
        finish_cache(loaded, cache, document, loading)
        answers = session.answer(cache, num_cached, block_size)
    ttft_seconds = answers[0].first_token_at - start
    fidelity = session.verify(answers, cache, num_cached, block_size) if args.verify else None
    record = {
        "stage": "decode_remote",
        "policy": f"level {args.level}" if args.level is not None else args.policy,
        "slo_seconds": args.slo,
        "slo_met": ttft_seconds <= args.slo,
        "ttft_seconds": ttft_seconds,
        "lookup_seconds": lookup_seconds,
        "ready_seconds": loading.ready_seconds,
        "prefill_seconds": answers[0].prefill_seconds,
        **_describe_loading(loading, len(token_ids), has_known_losses=document.has_known_losses),
        **session.describe(answers, fidelity),
        **_describe_run(document, loaded, str(chosen.device), loading),
    }
    for problem in loading.problems:
        report.warn(problem)
    report.row("decoding on", chosen)
    _report(report, record)
    command_line.finish(args, record)


def _answer_from_text(
    args: argparse.Namespace, report: command_line.Reporter, session: Session, lookup_start: float, problem: str
) -> None:
    """Answer without a document, since the store is too slow to say what it has."""
    from cachegen.pipeline.prefill import prefill

    loaded = session.loaded
    report.warn(f"{problem}; computed from the text")
    begin = time.perf_counter()
    num_prefilled = len(session.token_ids) - 1
    cache = prefill(loaded, session.token_ids[:num_prefilled], capacity=session.capacity)
    ready = time.perf_counter()
    answers = session.answer(cache, num_prefilled)
    ttft_seconds = answers[0].first_token_at - lookup_start
    fidelity = session.verify(answers, cache, num_prefilled) if args.verify else None
    record = {
        "stage": "decode_remote",
        "policy": "text",
        "slo_seconds": args.slo,
        "slo_met": ttft_seconds <= args.slo,
        "ttft_seconds": ttft_seconds,
        "lookup_seconds": begin - lookup_start,
        "ready_seconds": ready - lookup_start,
        "prefill_seconds": answers[0].prefill_seconds,
        "num_cached_tokens": 0,
        "num_recomputed_tokens": num_prefilled,
        "num_chunks": 0,
        "encoded_bytes": 0,
        "load_seconds": 0.0,
        "decode_seconds": 0.0,
        "copy_seconds": 0.0,
        "compute_seconds": ready - begin,
        "expected_kl": 0.0,
        **session.describe(answers, fidelity),
        "manifest": None,
        "chunks": [],
        "timeline": [],
        "throughput_samples": [],
        "speeds": None,
        "problems": [problem],
        "num_layers": loaded.num_layers,
        "device": str(loaded.device),
        "decoding_device": None,
    }
    _report(report, record)
    command_line.finish(args, record)


def _check_configs(args: argparse.Namespace, document: RemoteDocument) -> None:
    """Refuse a document that does not agree with the configs given; needs its tables, and fetches them."""
    from cachegen.config import load_model_config
    from cachegen.methods import check_config, load_config, method_named

    method = method_named(document.manifest.levels[0].method)
    if method is not None:
        check_profile_flag(args, method)
    checks = []
    if args.quantization_config is not None:
        config = load_config(args.quantization_config)
        checks.append(lambda header, place: check_config(config, header, place))
    if args.model_config is not None:
        model_config = load_model_config(args.model_config)
        checks.append(lambda header, place: model_config.check_shapes(header.shapes, place))
    levels = document.manifest.levels if args.level is None else document.manifest.levels[args.level - 1 : args.level]
    for level in levels if checks else []:
        header = document.open_level(level.level).header
        for check in checks:
            check(header, document.describe(level.tables))


def _describe_loading(loading: LoadResult, num_prompt_tokens: int, *, has_known_losses: bool) -> dict[str, Any]:
    """Return the counts and times of the disk script's JSON, and those that only a network has."""
    num_exact = sum(chunk.num_exact_tokens for chunk in loading.chunks if chunk.source == "text")
    num_tokens = sum(chunk.num_tokens for chunk in loading.chunks)

    def seconds_of(worker: str) -> float:
        return sum(span.end_seconds - span.start_seconds for span in loading.spans if span.worker == worker)

    return {
        "num_cached_tokens": num_tokens - num_exact,
        "num_recomputed_tokens": num_exact + num_prompt_tokens - 1 - num_tokens,
        "num_chunks": len(loading.chunks),
        "encoded_bytes": loading.received_bytes,
        "load_seconds": seconds_of("fetch"),
        "decode_seconds": seconds_of("decode"),
        "copy_seconds": seconds_of("copy"),
        "compute_seconds": seconds_of("compute"),
        "expected_kl": loading.expected_loss if has_known_losses else None,
    }


def _describe_run(
    document: RemoteDocument, loaded: LoadedModel, decoding_device: str, loading: LoadResult
) -> dict[str, Any]:
    return {
        "manifest": document.address,
        "chunks": [asdict(chunk) for chunk in loading.chunks],
        "timeline": [asdict(span) for span in loading.spans],
        "throughput_samples": [asdict(sample) for sample in loading.samples],
        "speeds": asdict(loading.speeds),
        "problems": loading.problems,
        "num_layers": loaded.num_layers,
        "device": str(loaded.device),
        "decoding_device": decoding_device,
    }


def _report(report: command_line.Reporter, record: dict[str, Any]) -> None:
    report.row(
        "tokens", f"{record['num_cached_tokens']:,} from the store, {record['num_recomputed_tokens']:,} computed"
    )
    for chunk in record["chunks"]:
        rate = f" at {8e-6 * chunk['num_bytes'] / chunk['seconds']:.1f} Mbit/s" if chunk["seconds"] > 0 else ""
        size = f", {command_line.format_bytes(chunk['num_bytes'])} fetched{rate}" if chunk["num_bytes"] else ""
        how = "computed" if chunk["source"] == "text" else f"level {chunk['level']}"
        report.row(f"chunk {chunk['chunk']}", f"{how}{size}")
    report.row("received", f"{command_line.format_bytes(record['encoded_bytes'])} in {record['load_seconds']:.3f} s")
    report.row("decoded in", f"{record['decode_seconds']:.3f} s")
    verdict = "met" if record["slo_met"] else "MISSED"
    report.row(
        "first token after", f"{record['ttft_seconds']:.3f} s; objective of {record['slo_seconds']:g} s {verdict}"
    )
    if record["expected_kl"] is not None:
        report.row("expected KL", f"{record['expected_kl']:.6f} nats")
    report_answers(report, record)


if __name__ == "__main__":
    sys.exit(main())
