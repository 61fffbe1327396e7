#!/usr/bin/env python3
"""Measure how well answers survive: every context, encoded with every config, against its uncompressed cache.

Prints one row per config: encoded size, KL, next-token agreement, and in how many contexts the greedy answer is the
uncompressed cache's, and the right one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cachegen import command_line
from cachegen.codec import DocumentEncoder, decode_chunk
from cachegen.coder.cpu import default_num_threads
from cachegen.config import load_quantization_config
from cachegen.device import resolve_device
from cachegen.kv_cache import ContextMetadata, KVCache, hash_token_prefixes
from cachegen.pipeline.chunking import plan_chunks
from cachegen.pipeline.context import read_context
from cachegen.pipeline.generate import generate_answer
from cachegen.pipeline.model import LoadedModel, load_model
from cachegen.pipeline.model_cache import allocate_cache, set_length, view_kv_cache
from cachegen.pipeline.prefill import prefill, tokenize
from cachegen.pipeline.verify import compare_caches

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIGS = ("quantization_tiny_coarse", "quantization_tiny", "quantization_tiny_fine", "uniform_8bit")


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add("--model_id", default=str(ROOT / "models/tiny-mistral"), help="Hugging Face id or local folder of the model")
    add("--path_to_context", default=str(ROOT / "9k_prompts"), help="a folder of N.txt and questions.json")
    add("--num_contexts", type=command_line.positive_int, default=20, help="how many of its contexts")
    add("--block_size", type=command_line.positive_int, default=512, help="tokens per prefill step")
    add("--max_new_tokens", type=command_line.positive_int, default=10, help="tokens to generate per answer")
    add("configs", nargs="*", default=[str(ROOT / "config" / f"{name}.json") for name in DEFAULT_CONFIGS])
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_measure, build_parser(), argv)


def _measure(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    configs = {Path(path).stem: load_quantization_config(path) for path in args.configs}
    loaded = load_model(args.model_id, device=resolve_device("auto"))
    contexts = json.loads((Path(args.path_to_context) / "questions.json").read_text())[: args.num_contexts]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    for context in tqdm(contexts, unit="context", file=sys.stderr, disable=True if report.is_quiet else None):
        token_ids = tokenize(loaded, read_context(Path(args.path_to_context) / context["file"]))
        num_cached = len(token_ids) - 1
        reference = prefill(loaded, token_ids[:-1], args.block_size, capacity=len(token_ids) + args.max_new_tokens)
        uncompressed = generate_answer(
            loaded, reference, num_cached, token_ids, args.max_new_tokens, args.block_size
        ).text.strip()
        kv = view_kv_cache(reference, num_cached)
        metadata = ContextMetadata(
            args.model_id, loaded.fingerprint, token_ids[:-1], loaded.rotary_embeddings, args.block_size
        )
        for name, config in configs.items():
            decoded = allocate_cache(
                [tuple(plane.shape[1:]) for plane in kv.planes],
                len(token_ids) + args.max_new_tokens,
                kv.dtype,
                loaded.layer_devices,
            )
            encoded_bytes = _recode(loaded, kv, metadata, config, view_kv_cache(decoded, num_cached))
            set_length(decoded, num_cached)
            answer = generate_answer(
                loaded, decoded, num_cached, token_ids, args.max_new_tokens, args.block_size
            ).text.strip()
            fidelity = compare_caches(
                loaded,
                token_ids,
                reference,
                decoded,
                num_reference_tokens=num_cached,
                num_decoded_tokens=num_cached,
                block_size=args.block_size,
            )
            rows[name].append(
                {
                    "file": context["file"],
                    "encoded_bytes": encoded_bytes,
                    "kv_bytes": 2 * kv.num_values,
                    "kl": fidelity.kl,
                    "next_token_agreement": fidelity.next_token_agreement,
                    "survived": answer[: len(context["answer"])] == uncompressed[: len(context["answer"])],
                    "right": answer.startswith(context["answer"]),
                }
            )
    summaries = [_summarize(name, measured) for name, measured in rows.items()]
    report.line("| config | bits per value | of fp16 | KL, mean (worst) | agreement | answers survive | right |")
    report.line("|---|---|---|---|---|---|---|")
    for row in summaries:
        report.line(
            f"| {row['config']} | {row['bits_per_value']:.2f} | {100 * row['share_of_fp16']:.1f} % "
            f"| {row['kl']:.5f} ({row['kl_worst']:.5f}) | {100 * row['next_token_agreement']:.1f} % "
            f"| {row['survived']} of {row['num_contexts']} | {row['right']} |"
        )
    if args.json is not None:
        command_line.write_json(
            args.json,
            {
                "summaries": summaries,
                "contexts": rows,
                "config": command_line.effective_config(args),
                "versions": command_line.collect_versions(),
            },
        )


def _recode(loaded: LoadedModel, kv: KVCache, metadata: ContextMetadata, config: Any, output: KVCache) -> int:
    """Encode a cache and decode it into `output`; returns the encoded bytes, tables included."""
    num_threads = default_num_threads()
    chunk_tokens = plan_chunks(kv.num_tokens, None, None)
    encoder = DocumentEncoder(kv, metadata, config, chunk_tokens, config.coder, num_threads=num_threads)
    encoded_bytes, stop = len(encoder.tables_file), 0
    for index, num_tokens in enumerate(chunk_tokens):
        content = b"".join(encoder.encode_chunk(index))
        start, stop = stop, stop + num_tokens
        token_hash = hash_token_prefixes(metadata.token_ids, [stop])[0]
        decode_chunk(
            content,
            encoder.document,
            output.slice(start, stop),
            first_token=start,
            token_hash=bytes.fromhex(token_hash),
            num_threads=num_threads,
        )
        encoded_bytes += len(content)
    return encoded_bytes


def _summarize(name: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    kv_bytes = sum(row["kv_bytes"] for row in measured)
    encoded_bytes = sum(row["encoded_bytes"] for row in measured)
    return {
        "config": name,
        "num_contexts": len(measured),
        "bits_per_value": 16 * encoded_bytes / kv_bytes,
        "share_of_fp16": encoded_bytes / kv_bytes,
        "kl": statistics.fmean(row["kl"] for row in measured),
        "kl_worst": max(row["kl"] for row in measured),
        "next_token_agreement": statistics.fmean(row["next_token_agreement"] for row in measured),
        "survived": sum(row["survived"] for row in measured),
        "right": sum(row["right"] for row in measured),
    }


if __name__ == "__main__":
    sys.exit(main())
