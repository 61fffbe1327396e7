#!/usr/bin/env python3
"""Bytes of documents with and without what sliding windows hide, for caches of the layers of well-known models.

Caches are random, of one head of a few dims per layer: all layers of these models have equally many channels, so that
the share of what is left out is that of the model. All channels of a token's layer follow from five numbers, and noise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.extend([str(ROOT / "src"), str(ROOT)])

from cachegen import command_line  # noqa: E402
from cachegen.calibration.own import make_own_profile  # noqa: E402
from cachegen.coder.cpu_kernels import CPU  # noqa: E402
from cachegen.kv_cache import KVCache  # noqa: E402
from cachegen.methods import default_config, make_encoder, read_config  # noqa: E402
from cachegen.methods.base import MethodConfig  # noqa: E402
from cachegen.pipeline.chunking import plan_chunks  # noqa: E402
from cachegen.pipeline.encode import encode_document  # noqa: E402
from cachegen.pipeline.windows import find_windows  # noqa: E402

METHODS = ("cachegen", "uniform", "transform", "lossless")
NUM_CAUSES = 5
NOISE = 0.05


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add("--num_tokens", type=command_line.positive_int, default=9000, help="of each cache")
    add("--head_dim", type=command_line.positive_int, default=16, help="of the one head of each plane")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="to encode with")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_measure, build_parser(), argv)


def _measure(args: argparse.Namespace) -> None:
    import transformers

    from tests.fixtures.caches import make_metadata
    from tests.zoo.shapes import SHAPES

    report = command_line.Reporter(args)
    rows = []
    for name, (class_name, fields) in SHAPES.items():
        windows = find_windows(getattr(transformers, class_name)(**fields))
        cache = make_cache(len(windows), args.num_tokens, args.head_dim)
        metadata = make_metadata(args.num_tokens, rotary_embeddings=(), windows=windows)
        for method in args.methods:
            sizes = [_encode(method, cache, metadata, first) for first in ((), metadata.first_visible(args.num_tokens))]
            rows.append({"model": name, "method": method, "bytes_of_all": sizes[0], "bytes_of_visible": sizes[1]})
            share = 100 * (1 - sizes[1] / sizes[0])
            report.row(name, f"{method}: {sizes[0]:,} bytes, {sizes[1]:,} of what is visible, {share:.1f} % less")
    command_line.finish(args, {"stage": "window_bytes", "num_tokens": args.num_tokens, "rows": rows})


def make_cache(num_layers: int, num_tokens: int, head_dim: int) -> KVCache:
    """Return a random cache in bf16."""
    generator = torch.Generator().manual_seed(0)
    keys, values = [], []
    for _ in range(num_layers):
        causes = torch.randn(num_tokens, NUM_CAUSES, generator=generator)
        for planes in (keys, values):
            mixed = causes @ torch.randn(NUM_CAUSES, head_dim, generator=generator)
            mixed += NOISE * torch.randn(mixed.shape, generator=generator)
            planes.append(mixed.view(num_tokens, 1, head_dim).bfloat16())
    return KVCache(keys, values)


def _encode(method: str, cache: KVCache, metadata, first_stored: Sequence[int]) -> int:
    """Return the bytes of a document, a profile of its own included."""
    chunks = plan_chunks(cache.num_tokens, None, None)
    config = _config(method, cache.num_layers)
    profile_bytes = 0
    if config.needs_profile:
        own = make_own_profile(config, cache, metadata, chunks, CPU, max_share=float("inf"), first_stored=first_stored)
        assert own is not None
        config, profile_bytes = own.config, own.profile.num_bytes
    encoder = make_encoder(config, cache, metadata, chunks, first_stored=first_stored)
    with tempfile.TemporaryDirectory() as folder:
        return encode_document(encoder, folder).sizes.total + profile_bytes


def _config(method: str, num_layers: int) -> MethodConfig:
    if method == "cachegen":
        return default_config(num_layers)
    fields = {"uniform": {"bits": 8}, "transform": {"step_log": -16}, "lossless": {}}[method]
    return read_config({"method": method, **fields}, method)


if __name__ == "__main__":
    sys.exit(main())
