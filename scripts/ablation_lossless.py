#!/usr/bin/env python3
"""Measure what the parts of method lossless's prediction bring: bits per value of caches by what predicts them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from cachegen import command_line
from cachegen.calibration.calibrate import CalibrationContext, open_contexts
from cachegen.kv_cache import KVCache
from cachegen.methods.lossless.codec import LosslessEncoder
from cachegen.methods.lossless.fit import fit_model
from cachegen.methods.lossless.model import MAX_BEFORE, Model
from cachegen.methods.lossless.predictor import Predictor, load_predictor
from cachegen.rotation import PlaneRotations

Fit = Callable[[KVCache, PlaneRotations], Model]

FITS: dict[str, Fit] = {
    "no prediction": lambda cache, rotations: fit_model(cache, rotations, max_layers_before=-1),
    "the layer's own channels": lambda cache, rotations: fit_model(cache, rotations, max_layers_before=0),
    **{
        f"and {count} layers before": lambda cache, rotations, count=count: fit_model(
            cache, rotations, max_layers_before=count
        )
        for count in range(1, MAX_BEFORE + 1)
    },
    f"and {MAX_BEFORE} layers before, rotation not undone": lambda cache, rotations: fit_model(
        cache, (None,) * len(rotations)
    ),
}


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add("--path_to_kv", type=Path, required=True, help="a KV cache file of 16 bits per value, or a folder of such")
    add("--profile", help="a profile of method lossless, fitted on other caches; None leaves its row out")
    command_line.add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    return command_line.run(_ablate, build_parser(), argv)


def _ablate(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    predictor = None if args.profile is None else load_predictor(args.profile)
    contexts = open_contexts(args.path_to_kv)
    rows = []
    report.line("| predicted from | bits per value | of them the weights |\n|---|---:|---:|")
    for name in [*FITS, *(["a profile"] if predictor is not None else [])]:
        sizes = [_encode(context, FITS.get(name), predictor) for context in contexts]
        num_values = sum(context.cache.num_values for context in contexts)
        bits, weights = (8 * sum(size[part] for size in sizes) / num_values for part in (0, 1))
        report.line(f"| {name} | {bits:.3f} | {weights:.3f} |")
        rows.append({"part": name, "bits_per_value": bits, "weights_bits_per_value": weights})
    command_line.finish(args, {"rows": rows})


def _encode(context: CalibrationContext, fit: Fit | None, predictor: Predictor | None) -> tuple[int, int]:
    """Return the bytes of the tables file and one chunk, and of the tables file alone."""
    cache, metadata = context.cache, context.metadata
    model = None if fit is None else fit(cache, metadata.rotations_of(cache))
    encoder = LosslessEncoder(
        cache, metadata, [cache.num_tokens], model=model, predictor=predictor if fit is None else None
    )
    tables_bytes = len(encoder.tables_file)
    return tables_bytes + sum(map(len, encoder.encode_chunk(0))), tables_bytes


if __name__ == "__main__":
    sys.exit(main())
