"""What blocks of a KV cache take by themselves, as the serde of LMCache stores them: bytes and seconds of each method.

Every whole block of a KV file of main.py is encoded and decoded. Lossless ones must come back bit for bit; blocks whose
positions were not found, and those stored as they are, are counted. Bytes are those of the files in LMCache's tier.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cachegen.errors import CacheGenError
from cachegen.integrations.blobs import CODED, read_blob
from cachegen.integrations.block_codec import BlockCodec, read_settings
from cachegen.kv_cache import KVCache, load_kv_cache


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kv_file", type=Path, help="a KV file of main.py, in fp16 or bf16")
    parser.add_argument("--profile", help="a folder: the model's profile for method transform")
    parser.add_argument("--predictor", help="a folder: the model's profile for method lossless")
    parser.add_argument("--step_logs", type=int, nargs="*", default=[-16, 0, 16], help="16 log2 of transform's steps")
    parser.add_argument("--block_tokens", type=int, nargs="+", default=[256], help="tokens per block")
    parser.add_argument("--max_blocks", type=int, default=64, help="at most so many blocks of each size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    return parser


def list_options(args: argparse.Namespace, head_dim: int) -> list[dict[str, Any]]:
    """Return the configs to measure."""
    options: list[dict[str, Any]] = [
        {"method": "lossless", "head_dim": head_dim},
        {"method": "uniform", "bits": 8, "head_dim": head_dim},
        {"method": "cachegen", "head_dim": head_dim},
    ]
    if args.predictor:
        options.insert(1, {"method": "lossless", "profile": args.predictor})
    if args.profile:
        options += [{"method": "transform", "profile": args.profile, "step_log": step} for step in args.step_logs]
    return options


def stack_planes(cache: KVCache) -> torch.Tensor:
    """Return a cache as `[2, num_layers, num_tokens, num_channels]`."""
    return torch.stack([torch.stack([plane.flatten(1) for plane in planes]) for planes in (cache.keys, cache.values)])


def measure(cache: KVCache, options: dict[str, Any], block_tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return a row: bytes over those of the values, the tables' share of them, seconds per block, the error."""
    codec = BlockCodec(read_settings({**options, "threads": args.threads}))
    starts = range(0, cache.num_tokens - block_tokens + 1, block_tokens)[: args.max_blocks]
    table_bytes = num_misplaced = 0
    seconds = {"encode": 0.0, "decode": 0.0}
    error = size = 0.0
    for start in starts:
        block = stack_planes(cache.slice(start, start + block_tokens))
        key = start.to_bytes(4, "little")
        begin = time.perf_counter()
        blob = codec.encode(key, [block])
        seconds["encode"] += time.perf_counter() - begin
        output = torch.empty_like(block)
        begin = time.perf_counter()
        codec.decode(key, blob, [output])
        seconds["decode"] += time.perf_counter() - begin
        if options["method"] == "lossless" and not torch.equal(output.view(torch.int16), block.view(torch.int16)):
            raise SystemExit(f"lmcache_blocks: the block at token {start} did not come back bit for bit")
        (section,) = read_blob(blob, codec.identify(key, [block.shape], [block.dtype]))
        table_bytes += len(section.parts[1]) if section.kind == CODED else 0
        num_misplaced += "profile" in options and section.position != start
        error += (output.float() - block.float()).square().sum().item()
        size += block.float().square().sum().item()
    counts = codec.counters.snapshot()
    return {
        **options,
        "block_tokens": block_tokens,
        "blocks": len(starts),
        "of_raw": counts["blob_bytes"] / counts["raw_bytes"],
        "tables_of_blob": table_bytes / counts["blob_bytes"],
        "relative_error": (error / size) ** 0.5,
        "encode_seconds": seconds["encode"] / len(starts),
        "decode_seconds": seconds["decode"] / len(starts),
        "misplaced": num_misplaced,
        "stored_raw": sum(count for name, count in counts.items() if name.startswith("raw:")),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        rows = measure_all(args)
    except CacheGenError as error:
        raise SystemExit(f"lmcache_blocks: {error}") from None
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print every row."""
    cache, _ = load_kv_cache(args.kv_file)
    rows: list[dict[str, Any]] = []
    print("tokens  method                of raw  tables  error   encode    decode    misplaced  raw")
    for block_tokens in args.block_tokens:
        for options in list_options(args, cache.planes[0].shape[2]):
            row = measure(cache, options, block_tokens, args)
            rows.append(row)
            name = row["method"] + "".join(f" {row[key]}" for key in ("bits", "step_log") if key in row)
            name += " +profile" if "profile" in row and "step_log" not in row else ""
            print(
                f"{block_tokens:6}  {name:20}  {row['of_raw']:.4f}  {row['tables_of_blob']:.3f}  "
                f"{row['relative_error']:.4f}  {1000 * row['encode_seconds']:6.1f} ms "
                f"{1000 * row['decode_seconds']:6.1f} ms  {row['misplaced']:9}  {row['stored_raw']:3}",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
