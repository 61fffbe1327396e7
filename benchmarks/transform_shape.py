#!/usr/bin/env python3
"""Size, seconds and memory of the transform on synthetic caches of a large model's shape, Mistral-7B's by default.

The profile is random, too (synthetic.py): the sizes say nothing of a real model.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from synthetic import Shape, make_cache, make_metadata, make_profile

from cachegen.coder.cpu import default_num_threads
from cachegen.kv_cache import KVCache, hash_token_prefixes
from cachegen.methods.transform import transform
from cachegen.methods.transform.codec import TransformDocument, TransformEncoder
from cachegen.methods.transform.profile import load_profile, save_profile

CPU = torch.device("cpu")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--components", type=int, default=1024, help="of each layer's keys and values together")
    parser.add_argument("--num_tokens", type=int, default=1536)
    parser.add_argument("--chunk_size", type=int, default=512)
    parser.add_argument("--step_log", type=int, default=0)
    parser.add_argument("--threads", type=int, default=default_num_threads())
    parser.add_argument("--without_bf16", action="store_true", help="as on a processor without products in bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.without_bf16:
        transform.has_bf16_products = lambda device: False
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(args.layers, args.kv_heads, args.head_dim)
        save_profile(folder, make_profile(shape, args.components, generator))
        cache = make_cache(load_profile(folder), args.num_tokens, generator)
        metadata = make_metadata(shape, args.num_tokens)
        profile, decoding_profile = load_profile(folder, for_encoding=True), load_profile(folder)
        files_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    starts = range(0, args.num_tokens, args.chunk_size)
    chunk_tokens = [min(args.chunk_size, args.num_tokens - start) for start in starts]
    before = peak_megabytes()

    start = time.perf_counter()
    encoder = TransformEncoder(cache, metadata, profile, chunk_tokens, step_log=args.step_log, num_threads=args.threads)
    files = [b"".join(encoder.encode_chunk(index, 1)) for index in range(encoder.num_chunks)]
    encode_seconds = time.perf_counter() - start
    encode_peak = peak_megabytes()

    document = TransformDocument(encoder.document.header, encoder.document.tables_hash, decoding_profile, CPU)
    output = KVCache([torch.empty_like(k) for k in cache.keys], [torch.empty_like(v) for v in cache.values])
    start = time.perf_counter()
    document.transforms  # noqa: B018  (once per process, not per document)
    load_seconds = time.perf_counter() - start
    stops = [sum(chunk_tokens[: i + 1]) for i in range(len(chunk_tokens))]
    hashes = hash_token_prefixes(metadata.token_ids, stops)
    start = time.perf_counter()
    for index, stop in enumerate(stops):
        first = stop - chunk_tokens[index]
        document.decode(
            [files[index]],
            output.slice(first, stop),
            first_token=first,
            token_hash=bytes.fromhex(hashes[index]),
            num_threads=args.threads,
        )
    decode_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for target, source in zip(output.planes, cache.planes, strict=True):
        torch.empty_like(target).copy_(source)
    copy_seconds = time.perf_counter() - start
    error = sum((a.float() - b.float()).square().sum().item() for a, b in zip(output.planes, cache.planes, strict=True))
    kv_bytes = 2 * cache.num_values
    record = {
        "shape": [args.layers, args.kv_heads, args.head_dim],
        "num_tokens": args.num_tokens,
        "components_per_layer": args.components,
        "threads": args.threads,
        "kv_bytes": kv_bytes,
        "profile_bytes": decoding_profile.num_bytes,
        "profile_folder_bytes": files_bytes,
        "encoded_bytes": sum(map(len, files)) + len(encoder.tables_file),
        "bits_per_value": 8 * sum(map(len, files)) / cache.num_values,
        "mean_squared_error": error / cache.num_values,
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "decode_gb_per_second": kv_bytes / decode_seconds / 1e9,
        "has_bf16_products": transform.has_bf16_products(CPU),
        "copy_gb_per_second": kv_bytes / copy_seconds / 1e9,
        "matrices_seconds": load_seconds,
        "peak_mb_before_encoding": before,
        "peak_mb_encoding": encode_peak,
        "peak_mb_all": peak_megabytes(),
    }
    json.dump(record, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
