#!/usr/bin/env python3
"""Seconds, memory and worth of every method on a synthetic cache of a large model's shape, on a CPU or a GPU.

Each document is encoded into a folder and decoded from it, whole files, into a cache on the device; what is decoded is
checked. All methods are measured once in every round, and the fastest round of each counts. Sizes are those of random
numbers (synthetic.py): for bits per value at some quality see docs/results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from synthetic import Shape, make_cache, make_metadata, make_profile

from cachegen.coder.cpu import default_num_threads
from cachegen.device import choose_kernels, resolve_device
from cachegen.format import Coder
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods import make_encoder, read_config
from cachegen.methods.base import MethodConfig
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import load_profile, save_profile
from cachegen.pipeline.break_even import beats_fp16_below, beats_text_above
from cachegen.pipeline.chunking import plan_chunks
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document

GIGA = 1e9


@dataclass(frozen=True)
class Case:
    """A method and how it is set.

    Attributes:
        levels: of the document, all of them decoded.
        error: what a decoded value may be off by, in units of the cache's standard deviation, on average.
    """

    name: str
    config: dict[str, Any]
    levels: int = 1
    error: float = 0.0


def list_cases(num_layers: int) -> list[Case]:
    """Return what is measured, cheapest to decode first."""
    first = max(num_layers // 3, 1)
    cachegen = {
        "key_first_layers": first,
        "key_second_layers": max(2 * num_layers // 3, first),
        "key_first_bins": 32,
        "key_second_bins": 16,
        "key_third_bins": 16,
        "value_first_layers": 1,
        "value_first_bins": 32,
        "value_second_bins": 16,
    }
    return [
        Case("uniform 8-bit, packed", {"method": "uniform", "bits": 8, "coder": "packed"}, error=0.05),
        Case("uniform 8-bit, rans", {"method": "uniform", "bits": 8}, error=0.05),
        Case("cachegen 32/16 bins", cachegen, error=0.5),
        Case("transform, 1 level", {"method": "transform", "step_log": 2}, error=0.6),
        Case("transform, 3 levels", {"method": "transform", "step_log": 32}, levels=3, error=0.6),
        Case("lossless", {"method": "lossless"}),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    record = measure(args)
    print(format_table(record))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where caches are")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--kv_heads", type=int, default=Shape.kv_heads)
    parser.add_argument("--head_dim", type=int, default=Shape.head_dim)
    parser.add_argument("--components", type=int, default=512, help="of each layer's keys and values together")
    parser.add_argument("--num_tokens", type=int, default=2048)
    parser.add_argument("--cases", nargs="+", help="measure only these; None: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_num_threads())
    parser.add_argument("--prefill_seconds", type=float, help="of as many tokens, to say when the text is faster")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases.

    Raises:
        SystemExit: a document does not decode to what it should, or there is no such case.
    """
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    device, kernels = resolve_device(args.device), choose_kernels(args.device).kernels
    shape = Shape(args.layers, args.kv_heads, args.head_dim)
    cases = list_cases(args.layers)
    if args.cases is not None:
        unknown = sorted(set(args.cases) - {case.name for case in cases})
        if unknown:
            sys.exit(f"--cases: there is no {unknown[0]} (known: {', '.join(case.name for case in cases)})")
        cases = [case for case in cases if case.name in args.cases]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_profile(folder / "profile", make_profile(shape, args.components, generator), compression=1)
        profile = load_profile(folder / "profile", for_encoding=True)
        cache = make_cache(profile, args.num_tokens, generator)
        metadata = make_metadata(shape, args.num_tokens)
        output = from_planes([torch.empty_like(plane, device=device) for plane in cache.planes])
        fp16_bytes = 2 * cache.num_values
        rows: dict[str, dict[str, Any]] = {case.name: {"case": case.name} for case in cases}
        for case in cases:
            config = _configure(case, profile)
            chunk_tokens = plan_chunks(args.num_tokens, None, None)
            # What is made of a profile once per process is no part of encoding a document.
            first = cache.slice(0, chunk_tokens[0]), make_metadata(shape, chunk_tokens[0]), chunk_tokens[:1]
            make_encoder(config, *first, num_threads=args.threads, kernels=kernels).encode_chunk(0)
            wait()
            start = time.perf_counter()
            encoder = make_encoder(config, cache, metadata, chunk_tokens, num_threads=args.threads, kernels=kernels)
            result = encode_document(encoder, folder / case.name)
            wait()
            rows[case.name] |= {
                "encode_seconds": time.perf_counter() - start,
                "encoded_bytes": result.sizes.total,
                "bits_per_value": 8 * result.sizes.total / cache.num_values,
            }
        for _ in range(args.rounds):
            for case in cases:
                opened = EncodedFolder(
                    folder / case.name, args.threads, kernels, find_profile=lambda _: profile, level=case.levels
                )
                opened.document.prepare()  # once per process, not per document
                seconds, peak = _time(lambda opened=opened: _decode(opened, output, metadata.token_ids), wait, device)
                _check(case, cache, output)
                row = rows[case.name]
                row["decode_seconds"] = min(seconds, row.get("decode_seconds", seconds))
                if peak is not None:
                    row["peak_bytes"] = peak
                _keep_fastest(row, _time_layers(opened, output, metadata.token_ids, wait))
        copy_seconds = min(_time(lambda: _copy(output), wait, device)[0] for _ in range(args.rounds))
    for row in rows.values():
        row |= _judge(row, fp16_bytes, args.prefill_seconds)
    return {
        "device": str(device),
        "shape": [args.layers, args.kv_heads, args.head_dim],
        "num_tokens": args.num_tokens,
        "components_per_layer": args.components,
        "threads": args.threads,
        "rounds": args.rounds,
        "fp16_bytes": fp16_bytes,
        "copy_gb_per_second": fp16_bytes / copy_seconds / GIGA,
        "prefill_seconds": args.prefill_seconds,
        "cases": list(rows.values()),
    }


def _configure(case: Case, profile: Profile) -> MethodConfig:
    content = dict(case.config)
    coder = content.pop("coder", None)  # a flag of the scripts, no field of a config
    config = read_config(content, case.name)
    flags: dict[str, Any] = {}
    if case.config.get("method") == "transform":
        flags |= {"profile": profile, "levels": case.levels}
    if coder is not None:
        flags["coder"] = Coder[coder.upper()]
    return config.with_flags(flags)


def _decode(opened: EncodedFolder, output: KVCache, token_ids: torch.Tensor) -> None:
    opened.decode_into(output, token_ids, opened.select_chunks(None))


def _time_layers(
    opened: EncodedFolder, output: KVCache, token_ids: torch.Tensor, wait: Callable[[], object]
) -> dict[str, float]:
    """Return the seconds until the first layers are ready, and until all are, the first layers first."""
    wait()
    start = time.perf_counter()
    layers = opened.decode_layers(output, token_ids, opened.select_chunks(None))
    first = next(layers)
    wait()
    first_seconds = time.perf_counter() - start
    for _ in layers:
        pass
    wait()
    return {
        "num_first_layers": len(first),
        "first_layers_seconds": first_seconds,
        "all_layers_seconds": time.perf_counter() - start,
    }


def _keep_fastest(row: dict[str, Any], found: dict[str, float]) -> None:
    for name, value in found.items():
        row[name] = min(value, row.get(name, value))


def _copy(output: KVCache) -> None:
    for plane in output.planes:
        torch.empty_like(plane).copy_(plane)


def _time(call: Callable[[], object], wait: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Return the seconds of a call, and on a GPU the bytes that it took at most beyond those that were there."""
    wait()
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    call()
    wait()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None


def _check(case: Case, cache: KVCache, output: KVCache) -> None:
    for plane, decoded in zip(cache.planes, output.planes, strict=True):
        expected, found = plane.float(), decoded.cpu().float()
        error = (found - expected).abs().mean() / expected.std()
        if not error <= case.error:
            raise SystemExit(f"{case.name}: decoded values are off by {error:.3g} deviations on average")
        decoded.zero_()


def _judge(row: dict[str, Any], fp16_bytes: int, prefill_seconds: float | None) -> dict[str, Any]:
    encoded, seconds = row["encoded_bytes"], row["decode_seconds"]
    text = None if prefill_seconds is None else beats_text_above(encoded, seconds, prefill_seconds)
    return {
        "encode_gb_per_second": fp16_bytes / row["encode_seconds"] / GIGA,
        "decode_gb_per_second": fp16_bytes / seconds / GIGA,
        "beats_fp16_below_gbit": beats_fp16_below(fp16_bytes, encoded, seconds) / GIGA,
        "beats_text_above_gbit": None if text is None else text / GIGA,
    }


def format_table(record: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    has_text = record["prefill_seconds"] is not None
    has_peak = any("peak_bytes" in row for row in record["cases"])
    shape = " x ".join(map(str, record["shape"]))
    lines = [
        f"{record['device']}, {record['threads']} threads, {shape}, {record['num_tokens']} tokens, "
        f"{record['fp16_bytes'] / 1e6:.0f} MB of fp16; a copy of it: {record['copy_gb_per_second']:.1f} GB/s",
        "",
        "| method | bits per value | encode, GB/s of fp16 | decode, GB/s of fp16 | first layers ready after "
        "| faster than fp16 below, Gbit/s |"
        + (" faster than the text above, Gbit/s |" if has_text else "")
        + (" memory beside the cache, MB |" if has_peak else ""),
        "|---|---:|---:|---:|---|---:|" + ("---:|" if has_text else "") + ("---:|" if has_peak else ""),
    ]
    for row in record["cases"]:
        line = f"| {row['case']} | {row['bits_per_value']:.2f} | {row['encode_gb_per_second']:.3f} "
        ready = f"{row['num_first_layers']} in {row['first_layers_seconds'] / row['decode_seconds']:.0%} of the time"
        line += f"| {row['decode_gb_per_second']:.3f} | {ready} | {row['beats_fp16_below_gbit']:.2f} |"
        if has_text:
            above = row["beats_text_above_gbit"]
            line += f" {'never' if above is None else format(above, '.3f')} |"
        if has_peak:
            line += f" {row['peak_bytes'] / 1e6:.0f} |"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
