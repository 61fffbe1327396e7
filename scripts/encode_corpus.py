#!/usr/bin/env python3
"""Prefill and encode every context of a folder, several at a time, and publish them to a store. Resumes.

Each worker loads the model once; no KV files are written. A context whose files are there, whole and of the same text,
model and config is passed over.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cachegen import command_line
from cachegen.device import DEVICE_NAMES, DTYPE_NAMES
from cachegen.pipeline.chunking import DEFAULT_BLOCK_SIZE, DEFAULT_CHUNK_SIZE
from cachegen.sweeps.corpus import CorpusSettings, encode_context, find_tasks, is_done, summarize
from cachegen.sweeps.executors import EXECUTORS, run_all
from cachegen.sweeps.failures import collect_errors, raise_errors

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add("path_to_contexts", type=Path, help="a folder of texts, *.txt")
    command_line.add_model_flags(parser, command_line.default_input(ROOT, "models/tiny-mistral"))
    add("--quantization_config", required=True, help="a JSON file, such as config/lossless.json")
    add("--profile", help="folder of the model's profile; None looks for what the config needs")
    add("--output_path", default="corpus", help="folder of documents/NAME and records/NAME.json")
    add("--path_to_store", help="a store's folder or URL to publish to as well")
    add("--chunk_size", type=command_line.positive_int, default=DEFAULT_CHUNK_SIZE, help="tokens per chunk")
    add("--block_size", type=command_line.positive_int, default=DEFAULT_BLOCK_SIZE, help="tokens per prefill step")
    add("--device", choices=DEVICE_NAMES, default="auto", help="auto is cuda where torch has it")
    add("--dtype", choices=DTYPE_NAMES, default="auto", help="of weights and cache; auto is the checkpoint's")
    add("--workers", type=command_line.positive_int, default=1, help="contexts at a time, each with a model in memory")
    add("--threads", type=command_line.positive_int, help="per worker; None shares all processors")
    add("--executor", choices=EXECUTORS, default="local", help="ray: on the cluster of RAY_ADDRESS")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_encode, build_parser(), argv)


def _encode(args: argparse.Namespace) -> None:
    from cachegen.pipeline.fingerprint import compute_fingerprint
    from cachegen.pipeline.gguf import name_gguf_model

    report = command_line.Reporter(args)
    model_id = name_gguf_model(args.model_id, args.gguf_file)
    settings = CorpusSettings(
        model_id=model_id,
        dtype=args.dtype,
        device=args.device,
        config=args.quantization_config,
        profile=args.profile,
        chunk_tokens=args.chunk_size,
        block_size=args.block_size,
        output=os.path.abspath(args.output_path),
        store=args.path_to_store,
        num_threads=args.threads or max(1, (os.cpu_count() or 1) // args.workers),
    )
    tasks = find_tasks(args.path_to_contexts, settings, compute_fingerprint(model_id))
    todo = [task for task in tasks if not is_done(task)]
    report.row("contexts", f"{len(tasks)}, {len(tasks) - len(todo)} done before")
    results = run_all(encode_context, todo, args.executor, args.workers, in_processes=True)
    errors = collect_errors((error for _, error in results), len(todo), "context", is_quiet=report.is_quiet)
    record = {"stage": "encode_corpus", **summarize(tasks), "errors": errors}
    report.row("encoded", f"{record['num_encoded']:,} contexts, {record['num_tokens']:,} tokens")
    if record["num_bytes"]:
        report.row(
            "size", f"{command_line.format_bytes(record['num_bytes'])}, {record['bits_per_value']:.3f} bits per value"
        )
        report.row("smaller by", f"{record['ratio_vs_fp16']:.2f}x than fp16")
    command_line.finish(args, record)
    raise_errors(errors, len(todo), "contexts")


if __name__ == "__main__":
    sys.exit(main())
