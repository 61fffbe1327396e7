#!/usr/bin/env python3
"""Make a model's profile from a few of its KV caches, for method transform or lossless: once per model."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPT_FOLDER = Path(__file__).resolve().parent
# In a clone that is not installed, the package is beside the script; an installed one comes first.
sys.path.append(str(SCRIPT_FOLDER / "src"))

from cachegen import startup  # noqa: E402

startup.guard_imports(__name__)

from cachegen import command_line, methods  # noqa: E402
from cachegen.calibration.basis import WEIGHTS  # noqa: E402
from cachegen.calibration.settings import CalibrationSettings  # noqa: E402
from cachegen.device import DEVICE_NAMES, DTYPES, choose_kernels, resolve_device, resolve_dtype  # noqa: E402
from cachegen.errors import BitstreamError, CacheGenError, InputError, OutputError, UnsupportedVersionError  # noqa: E402
from cachegen.files import lock_folder, read_file, remove_stale_temporaries  # noqa: E402
from cachegen.methods import METHODS  # noqa: E402
from cachegen.methods.profile_files import MAX_PROFILE_BYTES, PROFILE_NAME  # noqa: E402
from cachegen.methods.transform.profile import Profile  # noqa: E402
from cachegen.methods.transform.profile_storage import save_profile  # noqa: E402
from cachegen.versions import collect_versions  # noqa: E402

WORK_FOLDER = ".work"


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add("--path_to_kv", default="data", help="a folder of KV cache files test_kv_N.pkl of main.py, or one file")
    model_default = command_line.default_input(SCRIPT_FOLDER, "models/tiny-mistral")
    command_line.add_model_flags(parser, model_default)
    add("--output_path", default="profile", help="folder of the profile")
    add(
        "--method",
        choices=("transform", "lossless"),
        default="transform",
        help="whose profile; that of lossless needs the caches alone, and no flag from --layers_per_group to --dtype",
    )
    add(
        "--layers_per_group",
        type=command_line.positive_int,
        help="layers transformed together; None takes as many as have 8192 channels, and 1.4 tokens for each",
    )
    add(
        "--weights",
        choices=WEIGHTS,
        default=CalibrationSettings.weights,
        help="quality weights: the Fisher information, its diagonal, or none, which needs no gradients",
    )
    add(
        "--fisher_tokens",
        type=command_line.positive_int,
        default=CalibrationSettings.fisher_tokens,
        help="tokens of each context whose predictions are differentiated",
    )
    add(
        "--fisher_samples",
        type=command_line.positive_int,
        default=CalibrationSettings.fisher_samples,
        help="labels drawn for each of these tokens",
    )
    add("--seed", type=command_line.non_negative_int, default=CalibrationSettings.seed, help="of the labels")
    add(
        "--finest_step",
        type=command_line.positive_float,
        default=CalibrationSettings.finest_step,
        help="the smallest quantization step to be prepared for; components too small for it are left out",
    )
    add("--max_components", type=command_line.positive_int, help="per group at most; None sets no further limit")
    add("--no_curve", action="store_true", help="fit on all caches and do not measure bits and KL at eight steps")
    add("--device", choices=DEVICE_NAMES, default="auto", help="auto is cuda where torch has it")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="that the model computes in")
    add("--threads", type=command_line.positive_int, help="CPU threads of the coder; None takes all processors")
    add("--overwrite", action="store_true", help="replace the profile that is there")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_profile, build_parser(), argv)


def _profile(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    output = Path(args.output_path)
    _make_folder(output)
    # The profile's files and the sums between runs are one run's; two would mix theirs.
    with lock_folder(output):
        _profile_into(output, args, report)


def _profile_into(output: Path, args: argparse.Namespace, report: command_line.Reporter) -> None:
    _prepare_output(output, args.overwrite, report)
    if args.method == "lossless":
        _make_predictor(output, args, report)
    else:
        _make_profile(output, args, report)


def _make_predictor(output: Path, args: argparse.Namespace, report: command_line.Reporter) -> None:
    from tqdm import tqdm

    from cachegen.calibration.calibrate import open_contexts
    from cachegen.calibration.predictor import make_predictor

    start = time.perf_counter()
    contexts = open_contexts(Path(args.path_to_kv))
    with _bar(tqdm, report, len(contexts), "reading") as bar:
        predictor = make_predictor(contexts, notes={"versions": collect_versions()}, progress=bar.update)
    predictor.save(output, overwrite=True)
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
    record = {
        "stage": "profile",
        "method": args.method,
        "profile_hash": predictor.profile_hash,
        "profile_bytes": predictor.num_bytes,
        "num_fitted_contexts": predictor.calibration["num_contexts"],
        "num_fitted_tokens": predictor.calibration["num_tokens"],
        "seconds": time.perf_counter() - start,
        "output_path": args.output_path,
    }
    report.row("fitted on", f"{record['num_fitted_contexts']} contexts, {record['num_fitted_tokens']:,} tokens")
    report.row("profile", f"{args.output_path}: {command_line.format_bytes(predictor.num_bytes)}, for method lossless")
    report.row("seconds", f"{record['seconds']:.1f}")
    command_line.finish(args, record)


def _make_profile(output: Path, args: argparse.Namespace, report: command_line.Reporter) -> None:
    device = resolve_device(args.device)

    # transformers takes seconds to import, more than it takes to say that a folder is there already.
    from tqdm import tqdm

    from cachegen.calibration.calibrate import (
        check_model,
        check_tokens,
        open_contexts,
        split_contexts,
    )
    from cachegen.calibration.complete import make_profile
    from cachegen.coder.cpu import default_num_threads
    from cachegen.pipeline.fingerprint import compute_fingerprint
    from cachegen.pipeline.frequencies import match_frequencies
    from cachegen.pipeline.gguf import name_gguf_model
    from cachegen.pipeline.hybrids import refuse_states
    from cachegen.pipeline.model import load_model

    settings = CalibrationSettings(
        args.layers_per_group,
        args.weights,
        args.fisher_tokens,
        args.fisher_samples,
        args.seed,
        args.finest_step,
        args.max_components,
    )
    start = time.perf_counter()
    contexts = open_contexts(Path(args.path_to_kv))
    fitted_on, held_out = (contexts, []) if args.no_curve else split_contexts(contexts)
    check_tokens(fitted_on, settings)
    loaded = None
    if settings.weights == "none" and args.no_curve:
        model_id = name_gguf_model(args.model_id, args.gguf_file)
        check_model(contexts, compute_fingerprint(model_id), model_id)
    else:
        loaded = load_model(args.model_id, device=device, dtype=resolve_dtype(args.dtype), gguf_file=args.gguf_file)
        check_model(contexts, loaded.fingerprint, loaded.model_id)
        refuse_states(loaded, "calibration with weights or a curve")
        loaded = match_frequencies(loaded, contexts[0].metadata.rope_hash)
    profile = make_profile(
        fitted_on,
        held_out,
        loaded,
        settings,
        device=device,
        work_folder=output / WORK_FOLDER,
        num_threads=args.threads or default_num_threads(),
        # Without a curve nothing is coded, and no GPU's kernels are needed.
        kernels=choose_kernels(args.device if held_out else "cpu").kernels,
        notes={"dtype": args.dtype, "versions": collect_versions()},
        make_bar=lambda label, total: _bar(tqdm, report, total, label),
    )
    save_profile(output, profile)
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
    record = _make_record(args, profile, str(device), time.perf_counter() - start)
    _report(report, record)
    command_line.finish(args, record)


def _bar(tqdm: Any, report: command_line.Reporter, total: int, label: str) -> Any:
    return tqdm(total=total, unit="context", desc=label, file=sys.stderr, disable=True if report.is_quiet else None)


def _make_record(args: argparse.Namespace, profile: Profile, device: str, seconds: float) -> dict[str, Any]:
    return {
        "stage": "profile",
        "method": args.method,
        "profile_hash": profile.profile_hash,
        "profile_bytes": profile.num_bytes,
        "analysis_bytes": sum(group.analysis.nbytes for group in profile.groups if group.analysis is not None),
        "num_fitted_contexts": profile.calibration["num_contexts"],
        "num_fitted_tokens": profile.calibration["num_tokens"],
        "num_held_out_contexts": profile.calibration["num_held_out_contexts"],
        "groups": [
            {
                "first_layer": group.first_layer,
                "num_layers": group.num_layers,
                "num_channels": group.num_channels,
                "num_components": group.num_components,
            }
            for group in profile.groups
        ],
        "curve": [dataclasses.asdict(point) for point in profile.curve],
        "seconds": seconds,
        "device": device,
        "output_path": args.output_path,
    }


def _report(report: command_line.Reporter, record: dict[str, Any]) -> None:
    size = command_line.format_bytes
    groups = record["groups"]
    components = sum(group["num_components"] for group in groups)
    channels = sum(group["num_channels"] for group in groups)
    report.row("fitted on", f"{record['num_fitted_contexts']} contexts, {record['num_fitted_tokens']:,} tokens")
    report.row("groups of layers", f"{len(groups)}, {components:,} components of {channels:,} channels")
    report.row(
        "profile",
        f"{record['output_path']}: {size(record['profile_bytes'])} to decode, "
        f"{size(record['analysis_bytes'])} more to encode",
    )
    if record["curve"]:
        report.row("held out", f"{record['num_held_out_contexts']} contexts")
        report.line(f"{'step':>18} {'bits per value':>16} {'KL in nats':>12}")
    for point in record["curve"]:
        step = 2 ** (point["step_log"] / 16)
        report.line(f"{step:>18.3f} {point['bits_per_value']:>16.3f} {point['kl']:>12.6f}")
    report.row("seconds", f"{record['seconds']:.1f} on {record['device']}")


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made: {error.strerror} (--output_path)") from error


def _prepare_output(output: Path, overwrite: bool, report: command_line.Reporter) -> None:
    """Refuse a folder that holds a profile, unless it is damaged; remove what killed runs left."""
    if os.path.lexists(output / PROFILE_NAME) and not overwrite:
        if not _is_damaged(output):
            raise OutputError(
                f"{output}: holds a profile already; give another --output_path, or --overwrite to replace it"
            )
        report.warn(f"{output}: the profile there was damaged: it is made again")
    try:
        (output / WORK_FOLDER).mkdir(exist_ok=True)
        for folder in (output, output / WORK_FOLDER):
            remove_stale_temporaries(folder)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror} (--output_path)") from error


def _is_damaged(output: Path) -> bool:
    """Tell whether a profile of ours is there, and is not whole."""
    try:
        methods.load_profile(output, for_encoding=True)
    except UnsupportedVersionError:
        return False
    except (BitstreamError, InputError):
        try:
            begin = read_file(output / PROFILE_NAME, MAX_PROFILE_BYTES)[:1000]
            return any(method.profile_format.encode() in begin for method in METHODS if method.profile_format)
        except CacheGenError:
            return False
    return False


if __name__ == "__main__":
    sys.exit(main())
