#!/usr/bin/env python3
"""What the parts of method transform's coder bring, on held-out calibration caches: bits by probability model, and KL
with some tokens kept exact.

Bits are ideal code lengths of the quantized components, in bits per value of the cache, without headers, states and
escapes. `shift` lets every 32 tokens and 32 components move their tables by up to eight indices, at four bits each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import command_line
from cachegen.calibration.calibrate import CalibrationContext, open_contexts, split_contexts
from cachegen.calibration.curve import measure_document
from cachegen.coder.component_tables import component_frequencies, plan_level, scale_indices
from cachegen.methods.transform.profile import Profile, load_profile
from cachegen.methods.transform.transform import GroupTransform, quantize_components, step_of_level
from cachegen.pipeline.model import load_model
from cachegen.pipeline.verify import count_verified_tokens

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
NUM_INDICES = 46
LARGEST = 4000  # magnitude of a component in the ideal tables
SHIFTS = range(-8, 8)
SPAN = 32  # tokens and components that share a shift


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add("--path_to_kv", type=Path, required=True, help="the folder of KV caches that the profile was made from")
    add("--model_id", default=str(ROOT / "models/tiny-mistral"), help="Hugging Face id or local folder of the model")
    add("--profile", default=str(ROOT / "models/tiny-mistral/profile"), help="the model's profile")
    add("--step_logs", type=int, nargs="+", default=[8, -24], help="16 log2 of the steps")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_ablate, build_parser(), argv)


def _ablate(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    profile = load_profile(args.profile, for_encoding=True)
    _, held_out = split_contexts(open_contexts(args.path_to_kv))
    loaded = load_model(args.model_id, device=CPU, dtype=torch.float32)
    rows = []
    for step_log in args.step_logs:
        for name, bits in measure_bits(profile, held_out, step_log).items():
            rows.append({"step_log": step_log, "part": name, "bits_per_value": bits})
        for name, spans_of in EXACT.items():
            divergences = [
                measure_document(loaded, profile, context, step_log, num_threads=1, exact_tokens=spans_of(context))[1]
                for context in held_out
            ]
            rows.append({"step_log": step_log, "part": name, "kl": float(np.mean(divergences))})
    report.line("| 16 log2 step | part | bits per value | KL |")
    report.line("|---:|---|---:|---:|")
    for row in rows:
        bits, kl = (
            f"{row[key]:{form}}" if key in row else "" for key, form in (("bits_per_value", ".4f"), ("kl", ".6f"))
        )
        report.line(f"| {row['step_log']} | {row['part']} | {bits} | {kl} |")
    command_line.finish(args, {"rows": rows})


def _last_tokens(context: CalibrationContext) -> range:
    """The 128 tokens before those that are forced."""
    stop = context.cache.num_tokens - count_verified_tokens(context.cache.num_tokens)
    return range(stop - 128, stop)


EXACT: dict[str, Callable[[CalibrationContext], list[range]]] = {
    "no token kept exact": lambda _: [],
    "first 4 tokens exact": lambda _: [range(4)],
    "last 128 tokens exact": lambda context: [_last_tokens(context)],
    "first 4 and last 128 exact": lambda context: [range(4), _last_tokens(context)],
}


def measure_bits(profile: Profile, contexts: Sequence[CalibrationContext], step_log: int) -> dict[str, float]:
    """Return ideal bits per value by probability model, all contexts and groups together."""
    totals: dict[str, float] = {}
    num_values = sum(context.cache.num_values for context in contexts)
    for group in profile.groups:
        logs = group.scale_logs.numpy()
        coding = plan_level(logs, step_log, None)
        indices = scale_indices(logs, step_log)[: coding.num_components]
        transform = GroupTransform(profile, group, CPU)
        parts = []
        for context in contexts:
            components = transform.analyze(context.cache, 0, coding.num_components)
            (quantized,) = quantize_components(components, step_of_level(step_log, 1), [coding.num_components])
            parts.append(quantized[: len(quantized) // SPAN * SPAN].numpy())
        values = np.concatenate(parts).clip(-LARGEST, LARGEST)
        for name, table in IDEAL.items():
            costs = np.stack([table(2.0 ** ((index - 8) / 4)) for index in range(1, NUM_INDICES + 1)])
            totals[name] = totals.get(name, 0.0) + costs[indices - 1, np.abs(values)].sum()
            if name == "logistic":
                shifted = _shifted_bits(costs, indices, np.abs(values))
                totals["logistic, shift"] = totals.get("logistic, shift", 0.0) + shifted
        totals["each component's own counts"] = totals.get("each component's own counts", 0.0) + _empirical_bits(values)
        totals["integer tables of the format"] = totals.get("integer tables of the format", 0.0) + _coded_bits(
            values, coding.table_indices, coding.low_bits
        )
    return {name: bits / num_values for name, bits in totals.items()}


def _ideal(
    survival: Callable[[NDArray[np.float64], float], NDArray[np.float64]],
) -> Callable[[float], NDArray[np.float64]]:
    """Return a function from a standard deviation to the bits of the magnitudes 0, 1, 2, ..., signs included."""

    def bits(deviation: float) -> NDArray[np.float64]:
        tails = survival(np.arange(LARGEST + 2) - 0.5, deviation)
        probabilities = tails[:-1] - tails[1:]
        probabilities[0] = 1 - 2 * tails[1]
        return -np.log2(np.maximum(probabilities, 2.0**-40))

    return bits


def _gauss_tail(x: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    return torch.special.erfc(torch.from_numpy(x / (deviation * 2**0.5))).numpy() / 2


IDEAL = {
    "logistic": _ideal(lambda x, sd: 1 / (1 + np.exp(np.minimum(x * np.pi / (sd * 3**0.5), 700)))),
    "Laplace": _ideal(lambda x, sd: np.exp(-np.maximum(x, 0) * 2**0.5 / sd) / 2),
    "Gauss": _ideal(_gauss_tail),
}


def _empirical_bits(values: NDArray[np.int32]) -> float:
    total = 0.0
    for column in values.T:
        counts = np.unique(column, return_counts=True)[1]
        total -= float((counts * np.log2(counts / counts.sum())).sum())
    return total


def _coded_bits(values: NDArray[np.int32], table_indices: NDArray[np.uint16], low_bits: NDArray[np.uint8]) -> float:
    """Bits by the format's tables, low bits included; what is beyond a table costs an escape of eight bytes."""
    frequencies = component_frequencies()[table_indices].astype(np.float64)
    low = low_bits.astype(np.int64)
    symbols = values + (16 << low) + ((1 << low) >> 1)
    parts = symbols >> low
    is_inside = (parts >= 0) & (parts < 32)
    found = frequencies[np.arange(values.shape[1]), parts.clip(0, 31)] * is_inside
    coded = np.where(found > 0, 12 - np.log2(np.maximum(found, 1)), 64)
    return float(coded.sum() + low.sum() * len(values))


def _shifted_bits(costs: NDArray[np.float64], indices: NDArray[np.int64], magnitudes: NDArray[np.int32]) -> float:
    """Bits where every span of tokens and components takes its best shift of the tables."""
    best: NDArray[np.float64] | None = None
    width = -(-len(indices) // SPAN) * SPAN
    for shift in SHIFTS:
        bits = costs[(indices + shift).clip(1, NUM_INDICES) - 1, magnitudes]
        padded = np.pad(bits, ((0, 0), (0, width - bits.shape[1])))
        spans = padded.reshape(len(bits) // SPAN, SPAN, width // SPAN, SPAN).sum((1, 3))
        best = spans if best is None else np.minimum(best, spans)
    return 0.0 if best is None else float(best.sum() + 4 * best.size)


if __name__ == "__main__":
    sys.exit(main())
