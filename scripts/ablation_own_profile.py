#!/usr/bin/env python3
"""Measure what documents with a profile of their own take, by the layers that form a group: bits per value and KL."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from cachegen import command_line
from cachegen.calibration.calibrate import calibrate, open_contexts
from cachegen.calibration.own import STEP_LOG
from cachegen.calibration.settings import CalibrationSettings
from cachegen.comparison.context_loss import FIRST, ContextLoss
from cachegen.comparison.schemes import SavedCache
from cachegen.comparison.schemes.transform import recode
from cachegen.methods.transform.profile_storage import pack_profile
from cachegen.methods.transform.transform import step_of_level
from cachegen.pipeline.model import load_model

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    command_line.add_model_flags(parser, str(ROOT / "models/tiny-mistral"))
    add("--path_to_kv", type=Path, required=True, help="a KV cache file, or a folder of such: each is a document")
    add("--layers", type=command_line.positive_int, nargs="+", default=[1, 2, 3, 5], help="layers of a group")
    add("--step_logs", type=int, nargs="+", default=[STEP_LOG], help="16 log2 of the steps, in deviations of a plane")
    command_line.add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    return command_line.run(_ablate, build_parser(), argv)


def _ablate(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    contexts = open_contexts(args.path_to_kv)
    loaded = load_model(args.model_id, device=CPU, dtype=torch.float32, gguf_file=args.gguf_file)
    losses = [ContextLoss(loaded, context.cache, context.metadata.token_ids) for context in contexts]
    num_values = sum(context.cache.num_values for context in contexts)
    rows = []
    report.line("| 16 log2 step | layers | bits per value | of them the profile | KL |\n|---:|---:|---:|---:|---:|")
    for step_log in args.step_logs:
        for layers in args.layers:
            settings = CalibrationSettings(layers, weights="none", finest_step=step_of_level(step_log, 1))
            profile_bytes = document_bytes = 0
            kl = 0.0
            for context, loss in zip(contexts, losses, strict=True):
                own = pack_profile(calibrate([context], None, settings, device=CPU, work_folder=Path()))[1]
                saved, num_tokens = SavedCache(context.cache, context.metadata), context.cache.num_tokens
                decoded, num_bytes = recode(saved, own, step_log, 1, 1, num_tokens)
                profile_bytes, document_bytes = profile_bytes + own.num_bytes, document_bytes + num_bytes
                kl += loss.measure(decoded, FIRST) / len(contexts)
            row = {
                "step_log": step_log,
                "layers": layers,
                "bits_per_value": 8 * (profile_bytes + document_bytes) / num_values,
                "profile_bits_per_value": 8 * profile_bytes / num_values,
                "kl": kl,
            }
            bits, of_profile = row["bits_per_value"], row["profile_bits_per_value"]
            report.line(f"| {step_log} | {layers} | {bits:.3f} | {of_profile:.3f} | {kl:.4f} |")
            rows.append(row)
    command_line.finish(args, {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
