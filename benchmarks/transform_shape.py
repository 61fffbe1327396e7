#!/usr/bin/env python3
"""Size, seconds and memory of the transform on synthetic caches of a large model's shape, Mistral-7B's by default.

The profile is random, too (synthetic.py): the sizes say nothing of a real model. With --path_to_kv and --profile it
is a saved cache of a real one. Encoding, decoding and a copy of the cache take turns, and the fastest round of each
counts; ratios are of these. With --ablation, ways to decode and to encode take turns, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from synthetic import Shape, make_cache, make_metadata, make_profile

from cachegen.coder import cpu
from cachegen.coder.cpu import default_num_threads
from cachegen.coder.cpu_kernels import CpuKernels
from cachegen.kv_cache import ContextMetadata, KVCache, hash_token_prefixes, load_kv_cache
from cachegen.methods.transform import analysis, byte_analysis, integers, transform
from cachegen.methods.transform.document import TransformDocument
from cachegen.methods.transform.encoder import TransformEncoder
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import load_profile, save_profile
from cachegen.methods.transform.transform import GroupTransform

CPU = torch.device("cpu")
GIGA = 1e9
GOALS = (
    ("decode over a copy of fp16", "decode_over_copy", 1 / 16, 1 / 8, False),
    ("encode time over decode time", "encode_over_decode", 2.0, 1.2, True),
)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to decode: which products, and by which of the native paths."""

    name: str
    has_integers: bool = True
    has_bf16: bool = True
    dense_deviation: float = integers.DENSE_DEVIATION
    path: str | None = None

    def set(self) -> None:
        transform.has_integer_synthesis = lambda: self.has_integers
        transform.has_bf16_products = lambda device: self.has_bf16
        integers.DENSE_DEVIATION = self.dense_deviation
        integers.native_path = lambda asked: cpu.native_path(asked or self.path)


def list_ways(*, has_ablation: bool) -> list[Way]:
    """Return the way that is usual here, then the others."""
    ways = [Way("as usual")]
    if not has_ablation:
        return ways
    ways.append(Way("products in fp32", has_integers=False, has_bf16=False))
    if transform.has_bf16_products(CPU):
        ways.append(Way("products in bf16", has_integers=False))
    for path in cpu.supported_paths()[1:]:
        ways.append(Way(f"integers, all dense, {path}", dense_deviation=0.0, path=path))
        ways.append(Way(f"integers, dense and sparse, {path}", path=path))
    return ways


@dataclasses.dataclass(frozen=True)
class EncodingWay:
    """A way to find components: by which products."""

    name: str
    has_bytes: bool = True
    has_bf16: bool = True

    def set(self) -> None:
        transform.has_byte_analysis = lambda: self.has_bytes and byte_analysis.has_byte_analysis()
        transform.CAN_MULTIPLY_BF16 = self.has_bf16 and analysis.CAN_MULTIPLY_BF16


ENCODING_WAYS = (
    EncodingWay("as usual"),
    EncodingWay("products in bf16", has_bytes=False),
    EncodingWay("products in fp32", has_bytes=False, has_bf16=False),
)


class TimedKernels(CpuKernels):
    """The CPU's kernels, which say how long decoding components took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def start_decode_component_groups(self, *arguments: Any) -> Callable[[], None]:
        start = time.perf_counter()
        finish = super().start_decode_component_groups(*arguments)
        self.seconds += time.perf_counter() - start
        return finish


class Case:
    """A cache with its profile, encoded, and what is timed of it."""

    cache: KVCache
    metadata: ContextMetadata
    profile: Profile
    decoding_profile: Profile

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.path_to_kv is None:
            self._make_synthetic()
        else:
            self._load(args.path_to_kv, args.profile)
        starts = range(0, args.num_tokens, args.chunk_size)
        self.chunk_tokens = [min(args.chunk_size, args.num_tokens - start) for start in starts]
        self.stops = [sum(self.chunk_tokens[: i + 1]) for i in range(len(self.chunk_tokens))]
        self.hashes = hash_token_prefixes(self.metadata.token_ids, self.stops)
        self.output = KVCache(
            [torch.empty_like(k) for k in self.cache.keys], [torch.empty_like(v) for v in self.cache.values]
        )
        self.encode()

    def _make_synthetic(self) -> None:
        args = self.args
        shape = Shape(args.layers, args.kv_heads, args.head_dim)
        generator = torch.Generator().manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            made = make_profile(shape, args.components, generator)
            save_profile(folder, made, compression=1)
            self.cache = make_cache(load_profile(folder), args.num_tokens, generator)
            self._load_profiles(Path(folder))
        self.metadata = make_metadata(shape, args.num_tokens)

    def _load(self, path_to_kv: Path, folder: Path) -> None:
        cache, metadata = load_kv_cache(path_to_kv)
        self.args.num_tokens = min(self.args.num_tokens, cache.num_tokens)
        self.cache = cache.slice(0, self.args.num_tokens)
        token_ids = metadata.token_ids[: self.args.num_tokens]
        self.metadata = dataclasses.replace(metadata, token_ids=token_ids, cache_hash=None)
        self._load_profiles(folder)

    def _load_profiles(self, folder: Path) -> None:
        self.profile, self.decoding_profile = load_profile(folder, for_encoding=True), load_profile(folder)
        self.profile_folder_bytes = sum(path.stat().st_size for path in folder.iterdir())

    def encode(self) -> None:
        self.encoder = TransformEncoder(
            self.cache,
            self.metadata,
            self.profile,
            self.chunk_tokens,
            step_log=self.args.step_log,
            num_threads=self.args.threads,
        )
        self.files = [b"".join(self.encoder.encode_chunk(index, 1)) for index in range(self.encoder.num_chunks)]

    def open(self, profile: Profile) -> TransformDocument:
        document = self.encoder.document
        return TransformDocument(document.header, document.tables_hash, profile, CPU)

    def decode(self, document: TransformDocument, kernels: CpuKernels) -> None:
        for index, stop in enumerate(self.stops):
            first = stop - self.chunk_tokens[index]
            document.decode(
                [self.files[index]],
                self.output.slice(first, stop),
                first_token=first,
                token_hash=bytes.fromhex(self.hashes[index]),
                num_threads=self.args.threads,
                kernels=kernels,
            )

    def copy(self) -> None:
        for target, source in zip(self.output.planes, self.cache.planes, strict=True):
            target.copy_(source)

    def mean_squared_error(self) -> float:
        pairs = zip(self.output.planes, self.cache.planes, strict=True)
        return sum((a.float() - b.float()).square().sum().item() for a, b in pairs) / self.cache.num_values


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--components", type=int, default=1024, help="of each layer's keys and values together")
    parser.add_argument("--path_to_kv", type=Path, help="a saved cache, in place of a synthetic one")
    parser.add_argument("--profile", type=Path, help="the profile of its model")
    parser.add_argument("--num_tokens", type=int, default=1536)
    parser.add_argument("--chunk_size", type=int, default=512)
    parser.add_argument("--step_log", type=int, default=0)
    parser.add_argument("--threads", type=int, default=default_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ablation", action="store_true", help="decode in other ways, too")
    args = parser.parse_args(argv)
    if (args.path_to_kv is None) != (args.profile is None):
        parser.error("--path_to_kv and --profile go together")
    record = measure(args)
    json.dump(record, sys.stdout, indent=1)
    print()
    print_goals(record)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    case = Case(args)
    kernels = TimedKernels()
    ways = list_ways(has_ablation=args.ablation)
    documents: list[TransformDocument] = []
    rows: list[dict[str, Any]] = []
    for way in ways:
        way.set()
        documents.append(case.open(dataclasses.replace(case.decoding_profile)))
        seconds = _time(lambda: case.decode(documents[-1], kernels))
        rows.append({"way": way.name, "first_seconds": seconds, "mean_squared_error": case.mean_squared_error()})
    encoding_ways = ENCODING_WAYS if args.ablation else ENCODING_WAYS[:1]
    best: dict[str, float] = {}

    def keep(name: str, seconds: float) -> None:
        best[name] = min(seconds, best.get(name, seconds))

    for _ in range(args.rounds):
        ways[0].set()
        for encoding_way in reversed(encoding_ways):  # the usual way last: the others' files are not decoded
            encoding_way.set()
            keep(encoding_way.name, _time(case.encode))
        for way, document, row in zip(ways, documents, rows, strict=True):
            way.set()
            kernels.seconds = 0.0
            seconds = _time(lambda document=document: case.decode(document, kernels))
            if seconds <= row.get("seconds", seconds):
                row |= {"seconds": seconds, "coder_seconds": kernels.seconds}
        keep("copy", _time(case.copy))
    kv_bytes = 2 * case.cache.num_values
    for row in rows:
        row["gb_per_second"] = kv_bytes / row["seconds"] / GIGA
        row["over_copy"] = best["copy"] / row["seconds"]
    ways[0].set()
    encoded_bytes = sum(map(len, case.files)) + len(case.encoder.tables_file)
    return {
        "shape": [case.cache.num_layers, *case.cache.planes[0].shape[1:]],
        "num_tokens": args.num_tokens,
        "components_per_layer": args.components,
        "threads": args.threads,
        "rounds": args.rounds,
        "kv_bytes": kv_bytes,
        "profile_bytes": case.decoding_profile.num_bytes,
        "profile_folder_bytes": case.profile_folder_bytes,
        "encoded_bytes": encoded_bytes,
        "bits_per_value": 8 * encoded_bytes / case.cache.num_values,
        "encode_seconds": best[ENCODING_WAYS[0].name],
        "decode_seconds": rows[0]["seconds"],
        "copy_seconds": best["copy"],
        "copy_gb_per_second": kv_bytes / best["copy"] / GIGA,
        "decode_over_copy": rows[0]["over_copy"],
        "encode_over_decode": best[ENCODING_WAYS[0].name] / rows[0]["seconds"],
        "decoding": rows,
        "encoding": [{"way": way.name, "seconds": best[way.name]} for way in encoding_ways],
        "operations_per_token": count_operations(case, documents[0]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def count_operations(case: Case, document: TransformDocument) -> dict[str, float]:
    """Return the multiplications and additions of the inverse transform per token: densely, and as they are."""
    counts = {"all_coded": 0, "dense": 0, "sparse": 0}
    num_tokens = 0
    synthesize = GroupTransform.synthesize_block

    def count(group: GroupTransform, components: torch.Tensor, step: float, *rest: Any) -> None:
        nonlocal num_tokens
        channels = group.group.num_channels
        matrix = group._find_integers(step, components.shape[1])
        num_dense = components.shape[1] if matrix is None else matrix.num_dense
        num_tokens += len(components)
        counts["all_coded"] += len(components) * components.shape[1] * channels
        counts["dense"] += len(components) * num_dense * channels
        counts["sparse"] += int(components[:, num_dense:].abs().sum()) * channels
        synthesize(group, components, step, *rest)

    GroupTransform.synthesize_block = count
    try:
        case.decode(document, TimedKernels())
    finally:
        GroupTransform.synthesize_block = synthesize
    return {name: total / case.args.num_tokens for name, total in counts.items()}


def print_goals(record: dict[str, Any]) -> None:
    """Print what the issue asked for beside what was found."""
    for what, field, floor, goal, less_is_better in GOALS:
        sign = -1 if less_is_better else 1
        found = record[field]
        verdict = "met" if sign * found >= sign * goal else "floor met" if sign * found >= sign * floor else "MISSED"
        print(f"  {what:<32} {found:7.3f}   goal {goal:g}, floor {floor:g}: {verdict}", file=sys.stderr)


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
