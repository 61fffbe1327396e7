#!/usr/bin/env python3
"""Peak memory of decoding a document of method `transform`, over its cache and its profile.

A synthetic document of a large model's shape is encoded into a folder. Another process, which has decoded a tiny one
before, so that all code is loaded, loads the profile, allocates the cache and decodes, as the scripts do; what it takes
at most beyond what it had is its peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from synthetic import Shape, make_cache, make_metadata, make_profile

from cachegen.kv_cache import from_planes
from cachegen.methods import make_encoder, read_config
from cachegen.methods.transform.profile_storage import load_profile, save_profile
from cachegen.pipeline.chunking import plan_chunks
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document

TINY = {"layers": 1, "components": 64, "num_tokens": 64}
GOALS = (1.3, 1.1)
"""Floor and goal of the peak over cache and profile."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--components", type=int, default=1024, help="of each layer's keys and values together")
    parser.add_argument("--num_tokens", type=int, default=4096)
    parser.add_argument("--step_log", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.decode is not None:
        json.dump(decode(args, args.decode), sys.stdout)
        return 0
    with tempfile.TemporaryDirectory() as name:
        encode(args, Path(name))
        encode(argparse.Namespace(**vars(args) | TINY), Path(name) / "tiny")
        sizes = [f"--{flag}={getattr(args, flag)}" for flag in ("layers", "num_tokens", "threads")]
        done = subprocess.run([sys.executable, __file__, *sizes, "--decode", name], stdout=subprocess.PIPE, check=True)
    record = json.loads(done.stdout)
    print(json.dumps(record, indent=1))
    found, (floor, goal) = record["peak_over_cache_and_profile"], GOALS
    verdict = "met" if found <= goal else "floor met" if found <= floor else "MISSED"
    print(f"  peak over cache and profile {found:.2f}   goal {goal}, floor {floor}: {verdict}", file=sys.stderr)
    return 0


def encode(args: argparse.Namespace, folder: Path) -> None:
    """Write a profile and a document that is encoded with it."""
    shape, generator = Shape(args.layers), torch.Generator().manual_seed(0)
    save_profile(folder / "profile", make_profile(shape, args.components, generator), compression=1)
    profile = load_profile(folder / "profile", for_encoding=True)
    cache = make_cache(profile, args.num_tokens, generator)
    config = read_config({"method": "transform", "step_log": args.step_log}, "").with_flags({"profile": profile})
    chunks = plan_chunks(args.num_tokens, None, None)
    encoder = make_encoder(config, cache, make_metadata(shape, args.num_tokens), chunks, num_threads=args.threads)
    encode_document(encoder, folder / "document")


def decode(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Decode the document; returns what that took."""
    if args.num_tokens != TINY["num_tokens"]:
        decode(argparse.Namespace(**vars(args) | TINY), folder / "tiny")
    shape = Shape(args.layers)
    token_ids = make_metadata(shape, args.num_tokens).token_ids
    size = (args.num_tokens, shape.kv_heads, shape.head_dim)
    gc.collect()
    before = _read_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    profile = load_profile(folder / "profile")
    loading = _read_bytes("VmHWM") - before
    opened = EncodedFolder(folder / "document", args.threads, find_profile=lambda _: profile)
    opened.document.prepare()
    output = from_planes([torch.zeros(size, dtype=torch.float16) for _ in range(2 * args.layers)])
    opened.decode_into(output, token_ids, opened.select_chunks(None))
    peak = _read_bytes("VmHWM") - before
    cache_bytes = 2 * output.num_values
    return {
        "shape": [args.layers, shape.kv_heads, shape.head_dim],
        "num_tokens": args.num_tokens,
        "cache_bytes": cache_bytes,
        "profile_bytes": profile.num_bytes,
        "peak_bytes_of_loading_the_profile": loading,
        "peak_bytes": peak,
        "peak_over_cache_and_profile": peak / (cache_bytes + profile.num_bytes),
    }


def _read_bytes(field: str) -> int:
    """Return a size of this process, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    sys.exit(main())
