#!/usr/bin/env python3
"""Compress a saved KV cache into chunk files: stage two of three, between main.py and run_decoding_disk.py."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SCRIPT_FOLDER = Path(__file__).resolve().parent
# In a clone that is not installed, the package is beside the script; an installed one comes first.
sys.path.append(str(SCRIPT_FOLDER / "src"))

from cachegen import command_line  # noqa: E402
from cachegen.device import DEVICE_NAMES, choose_kernels  # noqa: E402
from cachegen.format import Coder  # noqa: E402

BYTES_PER_FP16 = 2


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    config_default = command_line.default_input(SCRIPT_FOLDER, "config/quantization_tiny.json")
    add("--path_to_kv", default="data/test_kv_0.pkl", help="a KV cache file of main.py")
    add("--output_path", default="encoded", help="folder of the chunk files")
    add("--quantization_config", default=config_default, help="a JSON file, see config/README.md")
    add(
        "--num_chunks",
        type=command_line.positive_int,
        help="number of chunks; alone, they cover all tokens in equal parts",
    )
    add(
        "--chunk_size",
        type=command_line.positive_int,
        help="tokens per chunk, 1500 where --num_chunks is not given either; "
        "with --num_chunks, tokens beyond their product stay uncovered and are recomputed from text at decoding",
    )
    coder_names = [coder.name.lower() for coder in Coder]
    add("--coder", choices=coder_names, help="entropy coder; None takes the config's")
    add(
        "--device",
        choices=DEVICE_NAMES,
        default="auto",
        help="where to encode; auto is cuda where torch has it and torchac_cuda is built",
    )
    add("--threads", type=command_line.positive_int, help="CPU threads; None takes all processors")
    add("--overwrite", action="store_true", help="replace the encoding of another document or configuration")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_encode, build_parser(), argv)


def _encode(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from cachegen.codec import DocumentEncoder
    from cachegen.coder.cpu import default_num_threads
    from cachegen.config import load_quantization_config
    from cachegen.kv_cache import load_kv_cache
    from cachegen.pipeline.chunking import plan_chunks
    from cachegen.pipeline.encode import encode_document

    report = command_line.Reporter(args)
    chosen = choose_kernels(args.device)
    config = load_quantization_config(args.quantization_config)
    coder = Coder[args.coder.upper()] if args.coder else config.coder
    num_threads = args.threads or default_num_threads()
    cache, metadata = load_kv_cache(args.path_to_kv)
    chunk_tokens = plan_chunks(cache.num_tokens, args.num_chunks, args.chunk_size)
    num_tokens = sum(chunk_tokens)

    start = time.perf_counter()
    encoder = DocumentEncoder(
        cache, metadata, config, chunk_tokens, coder, num_threads=num_threads, kernels=chosen.kernels
    )
    with tqdm(total=num_tokens, unit="token", file=sys.stderr, disable=True if report.is_quiet else None) as bar:
        result = encode_document(encoder, args.output_path, overwrite=args.overwrite, progress=bar.update)
    seconds = time.perf_counter() - start

    num_values = cache.slice(0, num_tokens).num_values
    num_uncovered = cache.num_tokens - num_tokens
    sizes = result.sizes
    record = {
        "stage": "encode",
        "method": config.method.name.lower(),
        "coder": coder.name.lower(),
        "num_tokens": num_tokens,
        "num_uncovered_tokens": num_uncovered,
        "num_chunks": len(chunk_tokens),
        "num_reused_chunks": result.num_reused_chunks,
        "kv_bytes": BYTES_PER_FP16 * num_values,
        "encoded_bytes": sizes.total,
        "bytes_by_part": {
            "header": sizes.header,
            "tables": sizes.tables,
            "scales": sizes.scales,
            "payload": sizes.payload,
        },
        "bits_per_value": 8 * sizes.total / num_values,
        # What run_adaptation.py reads. Level 0: files that are not one of several levels.
        "levels": [{"level": 0, "bits_per_value": 8 * sizes.total / num_values, "expected_kl": None}],
        "levels_are_embedded": False,
        "shared_bytes": sizes.total - sum(result.chunk_bytes),
        "chunks": [
            {"first_token": stop - num, "num_tokens": num, "bytes": {"0": num_bytes}}
            for stop, num, num_bytes in zip(
                itertools.accumulate(chunk_tokens), chunk_tokens, result.chunk_bytes, strict=True
            )
        ],
        "ratio_vs_fp16": BYTES_PER_FP16 * num_values / sizes.total,
        "ratio_vs_int8": num_values / sizes.total,
        "seconds": seconds,
        "device": str(chosen.device),
        "threads": num_threads,
        "output_path": args.output_path,
        "config": command_line.effective_config(args),
        "versions": command_line.collect_versions(),
    }
    report.row("encoding on", chosen)
    _report(report, record, args)
    if args.json is not None:
        command_line.write_json(args.json, record)


def _report(report: command_line.Reporter, record: dict, args: argparse.Namespace) -> None:
    size = command_line.format_bytes
    parts = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in record["bytes_by_part"].items())
    reused = f" ({record['num_reused_chunks']} were there already)" if record["num_reused_chunks"] else ""
    report.row("KV cache", f"{args.path_to_kv}, {record['num_tokens']:,} tokens, {size(record['kv_bytes'])} as fp16")
    report.row("method", f"{record['method']} ({args.quantization_config}), coder {record['coder']}")
    report.row("chunks", f"{record['num_chunks']} in {args.output_path}{reused}")
    report.row("encoded", f"{size(record['encoded_bytes'])}: {parts}")
    report.row("bits per value", f"{record['bits_per_value']:.3f}")
    report.row(
        "smaller by",
        f"{record['ratio_vs_fp16']:.2f}x than fp16, {record['ratio_vs_int8']:.2f}x than 8-bit",
    )
    report.row("seconds", f"{record['seconds']:.2f} on {record['device']}, {record['threads']} threads")
    if record["num_uncovered_tokens"]:
        report.row(
            "not covered",
            f"the last {record['num_uncovered_tokens']:,} tokens: they are recomputed from text at decoding",
        )


if __name__ == "__main__":
    sys.exit(main())
