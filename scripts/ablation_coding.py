#!/usr/bin/env python3
"""Measure what the parts of method transform's coder bring, on caches that the profile was not made from.

Ideal bits by probability model, and bits and KL by quantizer and with some tokens kept exact.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from cachegen import command_line
from cachegen.calibration.calibrate import CalibrationContext, open_contexts, split_contexts
from cachegen.comparison.coding_parts import MODELS, QUANTIZERS, Values, analyze, synthesize
from cachegen.kv_cache import KVCache
from cachegen.methods.transform.profile import Profile, load_profile
from cachegen.pipeline.model import LoadedModel, load_model
from cachegen.pipeline.model_cache import allocate_cache, fill_cache
from cachegen.pipeline.verify import compare_with_predictions, count_verified_tokens, predict_from

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FIRST, LAST = 4, 128  # tokens kept exact


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    command_line.add_model_flags(parser, str(ROOT / "models/tiny-mistral"))
    add("--path_to_kv", type=Path, required=True, help="the folder of KV caches that the profile was made from")
    add("--all_contexts", action="store_true", help="measure on all of them: the profile was made from others")
    add("--profile", default=str(ROOT / "models/tiny-mistral/profile"), help="the model's profile")
    add("--step_logs", type=int, nargs="+", default=[20, 8, -24], help="16 log2 of the steps")
    command_line.add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    return command_line.run(_ablate, build_parser(), argv)


def _ablate(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    profile = load_profile(args.profile, for_encoding=True)
    contexts = open_contexts(args.path_to_kv)
    measured_on = contexts if args.all_contexts else split_contexts(contexts)[1]
    loaded = load_model(args.model_id, device=CPU, dtype=torch.float32, gguf_file=args.gguf_file)
    benches = [_Bench(loaded, context) for context in measured_on]
    rows: list[dict[str, Any]] = []
    report.line("| 16 log2 step | part | bits per value | KL |\n|---:|---|---:|---:|")
    for step_log in args.step_logs:
        measured: dict[str, dict[str, float]] = {}
        for bench in benches:
            for part, numbers in bench.measure(profile, step_log).items():
                sums = measured.setdefault(part, dict.fromkeys(numbers, 0.0))
                for name, number in numbers.items():
                    sums[name] += number / len(benches)
        for part, numbers in measured.items():
            bits, kl = (f"{numbers[n]:{f}}" if n in numbers else "" for n, f in (("bits", ".4f"), ("kl", ".6f")))
            report.line(f"| {step_log} | {part} | {bits} | {kl} |")
            rows.append({"step_log": step_log, "part": part, **numbers})
    command_line.finish(args, {"rows": rows})


class _Bench:
    """One context, and what the model predicts from its uncompressed cache."""

    def __init__(self, loaded: LoadedModel, context: CalibrationContext) -> None:
        self._loaded, self._cache, self._token_ids = loaded, context.cache, context.metadata.token_ids
        num_tokens = context.cache.num_tokens
        self._start = num_tokens - count_verified_tokens(num_tokens)
        self._predictions = predict_from(
            loaded,
            self._token_ids[:num_tokens],
            self._fill(context.cache),
            start=self._start,
            num_held_tokens=num_tokens,
        )

    def measure(self, profile: Profile, step_log: int) -> dict[str, dict[str, float]]:
        """Return, by part, mean bits per value and KL."""
        groups, num_values = analyze(profile, self._cache, step_log), self._cache.num_values
        quantized = {name: [quantize(group) for group in groups] for name, quantize in QUANTIZERS.items()}
        rounded = quantized["rounding"]
        parts: dict[str, dict[str, float]] = {}
        for name, model in MODELS.items():
            bits = sum(model(integers, group) for (integers, _), group in zip(rounded, groups, strict=True))
            parts[name] = {"bits": bits / num_values}
        for name, pairs in quantized.items():
            bits = sum(MODELS["logistic"](integers, g) for (integers, _), g in zip(pairs, groups, strict=True))
            divergence = self._compare(profile, [points for _, points in pairs], step_log, range(FIRST))
            parts[name] = {"bits": bits / num_values, "kl": divergence}
        points = [values for _, values in rounded]
        for name, spans in self._exact().items():
            parts[name] = {"kl": self._compare(profile, points, step_log, *spans)}
        return parts

    def _exact(self) -> dict[str, list[range]]:
        first, last = range(FIRST), range(self._start - LAST, self._start)
        return {
            "no token kept exact": [],
            f"last {LAST} tokens exact": [last],
            f"first {FIRST} and last {LAST} exact": [first, last],
        }

    def _compare(self, profile: Profile, points: list[Values], step_log: int, *exact: range) -> float:
        decoded = synthesize(profile, points, step_log, self._cache)
        for span in exact:
            kept = self._cache.slice(span.start, span.stop).planes
            for target, source in zip(decoded.slice(span.start, span.stop).planes, kept, strict=True):
                target.copy_(source)
        return compare_with_predictions(
            self._loaded,
            self._token_ids[: self._cache.num_tokens],
            self._predictions,
            self._fill(decoded),
            num_decoded_tokens=self._cache.num_tokens,
        ).fidelity.kl

    def _fill(self, kv: KVCache) -> Cache:
        loaded, shapes = self._loaded, [(plane.shape[1], plane.shape[2]) for plane in kv.planes]
        cache = allocate_cache(shapes, kv.num_tokens, loaded.dtype, loaded.layer_devices, loaded.num_head_repeats)
        fill_cache(cache, kv)
        return cache


if __name__ == "__main__":
    sys.exit(main())
