#!/usr/bin/env python3
"""Size, seconds and memory of the transform on synthetic caches of a large model's shape, Mistral-7B's by default.

The profile is random too: orthonormal bases, one per layer, and standard deviations that fall like a power of the
component's number. So the sizes say nothing of a real model; the seconds and the memory do not depend on the numbers.
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

from cachegen.coder.cpu import default_num_threads
from cachegen.kv_cache import ContextMetadata, KVCache, RotaryEmbedding, hash_token_prefixes
from cachegen.methods.transform import transform
from cachegen.methods.transform.codec import TransformDocument, TransformEncoder
from cachegen.methods.transform.profile import Profile, TransformGroup, load_profile, save_profile

CPU = torch.device("cpu")


def make_profile(args: argparse.Namespace, generator: torch.Generator) -> Profile:
    """One group per layer, with `args.components` orthonormal components."""
    channels = 2 * args.kv_heads * args.head_dim
    deviations = 8.0 * torch.arange(1, args.components + 1).float() ** -0.5
    groups = []
    for layer in range(args.layers):
        basis = torch.linalg.qr(torch.randn(channels, args.components, generator=generator)).Q
        logs = torch.round(16 * deviations.log2()).to(torch.int16)
        groups.append(TransformGroup(layer, 1, torch.zeros(channels), basis.T.half(), logs, basis.half()))
    frequencies = tuple(10000.0 ** (-2 * i / args.head_dim) for i in range(args.head_dim // 2))
    rotary = RotaryEmbedding("rotary_emb", "default", frequencies, 1.0)
    shapes = ((args.kv_heads, args.head_dim),) * (2 * args.layers)
    return Profile("00" * 32, (rotary,), shapes, tuple(groups), (), {"text": "none: random numbers"})


def make_cache(args: argparse.Namespace, profile: Profile, generator: torch.Generator) -> KVCache:
    """Vectors of the profile's own distribution, in fp16."""
    shape = (args.num_tokens, args.kv_heads, args.head_dim)
    keys, values = [], []
    for group in profile.groups:
        scales = 2.0 ** (group.scale_logs.float() / 16)
        components = torch.randn(args.num_tokens, len(scales), generator=generator) * scales
        vectors = (components @ group.synthesis.float()).half()
        half = vectors.shape[1] // 2
        keys.append(vectors[:, :half].reshape(shape).contiguous())
        values.append(vectors[:, half:].reshape(shape).contiguous())
    return KVCache(keys, values)


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
        save_profile(folder, make_profile(args, generator))
        cache = make_cache(args, load_profile(folder), generator)
        ids = torch.arange(args.num_tokens, dtype=torch.int32)
        profile, decoding_profile = load_profile(folder, for_encoding=True), load_profile(folder)
        files_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    metadata = ContextMetadata("synthetic", profile.model_fingerprint, ids, profile.rotary_embeddings, 512)
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
    hashes = hash_token_prefixes(ids, stops)
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
