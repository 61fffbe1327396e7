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

from cachegen import command_line
from cachegen.calibration.calibrate import open_contexts, split_contexts
from cachegen.comparison.coding_parts import MODELS, QUANTIZERS, analyze, synthesize
from cachegen.comparison.context_loss import FIRST, ContextLoss
from cachegen.kv_cache import KVCache
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.model import load_model

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
NUM_LAST = 128  # tokens kept exact


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
    losses = [ContextLoss(loaded, context.cache, context.metadata.token_ids) for context in measured_on]
    rows: list[dict[str, Any]] = []
    report.line("| 16 log2 step | part | bits per value | KL |\n|---:|---|---:|---:|")
    for step_log in args.step_logs:
        measured: dict[str, dict[str, float]] = {}
        for context, loss in zip(measured_on, losses, strict=True):
            for part, numbers in _measure(profile, context.cache, loss, step_log).items():
                sums = measured.setdefault(part, dict.fromkeys(numbers, 0.0))
                for name, number in numbers.items():
                    sums[name] += number / len(losses)
        for part, numbers in measured.items():
            bits, kl = (f"{numbers[n]:{f}}" if n in numbers else "" for n, f in (("bits", ".4f"), ("kl", ".6f")))
            report.line(f"| {step_log} | {part} | {bits} | {kl} |")
            rows.append({"step_log": step_log, "part": part, **numbers})
    command_line.finish(args, {"rows": rows})


def _measure(profile: Profile, cache: KVCache, loss: ContextLoss, step_log: int) -> dict[str, dict[str, float]]:
    """Return, by part, bits per value and KL of one context."""
    groups = analyze(profile, cache, step_log)
    quantized = {name: [quantize(group) for group in groups] for name, quantize in QUANTIZERS.items()}
    rounded = quantized["rounding"]
    parts: dict[str, dict[str, float]] = {}
    for name, model in MODELS.items():
        bits = sum(model(integers, group) for (integers, _), group in zip(rounded, groups, strict=True))
        parts[name] = {"bits": bits / cache.num_values}
    for name, pairs in quantized.items():
        bits = sum(MODELS["logistic"](integers, group) for (integers, _), group in zip(pairs, groups, strict=True))
        decoded = synthesize(profile, [points for _, points in pairs], step_log, cache)
        parts[name] = {"bits": bits / cache.num_values, "kl": loss.measure(decoded, FIRST)}
    last = range(loss.start - NUM_LAST, loss.start)
    for name, spans in (
        ("no token kept exact", []),
        (f"last {NUM_LAST} tokens exact", [last]),
        (f"first {len(FIRST)} and last {NUM_LAST} exact", [FIRST, last]),
    ):
        decoded = synthesize(profile, [points for _, points in rounded], step_log, cache)
        parts[name] = {"kl": loss.measure(decoded, *spans)}
    return parts


if __name__ == "__main__":
    sys.exit(main())
