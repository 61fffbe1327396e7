#!/usr/bin/env python3
"""nvCOMP's ANS on the symbols of method `cachegen`, as a peer on a GPU: entropy coding alone, from and to its memory.

Source: https://docs.nvidia.com/cuda/nvcomp/py_api.html (package nvidia-nvcomp of PyPI).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from synthetic import Shape, make_cache, make_profile

from cachegen.kv_cache import KVCache

GIGA = 1e9
MAX_SYMBOLS = 1 << 28
NOT_THERE = "nvCOMP was not there, or not run: no figures of its ANS (pip install nvidia-nvcomp-cu12 or -cu13)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--num_tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    nvcomp = find_nvcomp()
    if nvcomp is None:
        print(NOT_THERE, file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("nvcomp_ans: torch sees no CUDA GPU", file=sys.stderr)
        return 1
    generator, device = torch.Generator().manual_seed(0), torch.device("cuda", torch.cuda.current_device())
    cache = make_cache(make_profile(Shape(args.layers), 64, generator), args.num_tokens, generator)
    found = measure_ans(nvcomp, make_symbols(cache, device), args.rounds, torch.cuda.synchronize)
    print(describe_ans(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def find_nvcomp() -> ModuleType | None:
    """Return the package's module; None where it is not installed."""
    try:
        return importlib.import_module("nvidia.nvcomp")
    except ImportError:
        return None


def make_symbols(cache: KVCache, device: torch.device, num_bins: int = 32) -> torch.Tensor:
    """Quantize the first tokens of a cache as method `cachegen` does, by each token's largest magnitude.

    Returns:
        uint8, channel after channel of each plane, at most `MAX_SYMBOLS`.
    """
    num_tokens = max(min(cache.num_tokens, MAX_SYMBOLS * cache.num_tokens // cache.num_values), 1)
    zero = num_bins // 2 - 1
    parts: list[torch.Tensor] = []
    for plane in cache.planes:
        values = plane[:num_tokens].to(device).float().flatten(1)
        largest = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-9)
        parts.append((values * (zero / largest)).round().add_(zero).to(torch.uint8).T.flatten())
    return torch.cat(parts)


def measure_ans(nvcomp: Any, symbols: torch.Tensor, rounds: int, wait: Callable[[], object]) -> dict[str, Any]:
    """Encode and decode symbols; all of them come back.

    Args:
        nvcomp: the package's module.
        wait: for the device.

    Raises:
        SystemExit: other symbols come back.
    """
    codec = nvcomp.Codec(algorithm="ANS")
    source = nvcomp.as_array(symbols)

    def time_of(call: Callable[[], Any]) -> tuple[float, Any]:
        wait()
        start = time.perf_counter()
        made = call()
        wait()
        return time.perf_counter() - start, made

    encode_seconds, decode_seconds = [], []
    encoded = decoded = None
    for _ in range(rounds + 1):  # the first one warms up
        seconds, encoded = time_of(lambda: codec.encode(source))
        encode_seconds.append(seconds)
        seconds, decoded = time_of(lambda encoded=encoded: codec.decode(encoded))
        decode_seconds.append(seconds)
    assert encoded is not None
    found = torch.as_tensor(decoded, device=symbols.device).view(torch.uint8).flatten()
    if not torch.equal(found, symbols):
        raise SystemExit("nvCOMP's ANS: other symbols come back")
    fp16_bytes = 2 * symbols.numel()
    return {
        "version": str(nvcomp.__version__),
        "num_symbols": symbols.numel(),
        "bits_per_value": 8 * encoded.buffer_size / symbols.numel(),
        "encode_gb_per_second": fp16_bytes / min(encode_seconds[1:]) / GIGA,
        "decode_gb_per_second": fp16_bytes / min(decode_seconds[1:]) / GIGA,
    }


def describe_ans(found: dict[str, Any] | None) -> str:
    """Return a line on what was measured, or that it was not."""
    if found is None:
        return NOT_THERE
    return (
        f"nvCOMP {found['version']}, ANS on {found['num_symbols'] / 1e6:.0f} million symbols of 32 bins: "
        f"{found['bits_per_value']:.2f} bits per value; encodes {found['encode_gb_per_second']:.1f} and decodes "
        f"{found['decode_gb_per_second']:.1f} GB/s of fp16, without quantization, files and checks."
    )


if __name__ == "__main__":
    sys.exit(main())
