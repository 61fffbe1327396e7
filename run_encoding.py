#!/usr/bin/env python3
"""Compress a saved KV cache into chunk files: stage two of three, between main.py and run_decoding_disk.py."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

SCRIPT_FOLDER = Path(__file__).resolve().parent
# In a clone that is not installed, the package is beside the script; an installed one comes first.
sys.path.append(str(SCRIPT_FOLDER / "src"))

from cachegen import startup  # noqa: E402

startup.guard_imports(__name__)

from cachegen import command_line  # noqa: E402
from cachegen.device import DEVICE_NAMES, choose_kernels  # noqa: E402
from cachegen.errors import ConfigError  # noqa: E402
from cachegen.format import MAX_LEVELS, Coder  # noqa: E402
from cachegen.pipeline.chunking import DEFAULT_CHUNK_SIZE, plan_chunks  # noqa: E402

if TYPE_CHECKING:
    from cachegen.methods.base import Encoder, MethodConfig
    from cachegen.pipeline.encode import EncodeResult

BYTES_PER_FP16 = 2


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    config_default = command_line.default_input(SCRIPT_FOLDER, "config/quantization_tiny.json")
    add("--path_to_kv", default="data/test_kv_0.pkl", help="a KV cache file of main.py")
    add("--output_path", default="encoded", help="folder of the chunk files")
    add("--quantization_config", default=config_default, help="a JSON file, see config/README.md")
    add(
        "--num_chunks",
        type=command_line.positive_int,
        help="number of chunks; alone, they cover all tokens in equal parts",
    )
    add(
        "--chunk_size",
        type=command_line.positive_int,
        help=f"tokens per chunk, {DEFAULT_CHUNK_SIZE} where --num_chunks is not given either; "
        "with --num_chunks, tokens beyond their product stay uncovered and are recomputed from text at decoding",
    )
    add(
        "--profile",
        help="a profile's folder, for methods transform and lossless; None takes the config's, and for transform the "
        "model's or one made of the document alone",
    )
    add(
        "--levels",
        metavar="1,2,...",
        type=_parse_levels,
        help="levels to write, for method transform: 1,2 or 1,2,3 ...",
    )
    add(
        "--target_bits",
        type=command_line.positive_float,
        help="bits per value of level 1, for method transform, by the profile's curve; replaces the config's step",
    )
    add(
        "--target_kl",
        type=command_line.positive_float,
        help="loss of level 1 in nats per token, for method transform, by the profile's curve",
    )
    add(
        "--recompute_last",
        type=command_line.non_negative_int,
        default=0,
        metavar="TOKENS",
        help="leave so many last tokens out of the chunks: they are recomputed from text at decoding",
    )
    add(
        "--max_error",
        type=command_line.positive_float,
        help="refuse to encode where a value would decode further than this from the cache's, at the last level",
    )
    coder_names = [coder.name.lower() for coder in Coder]
    add("--coder", choices=coder_names, help="entropy coder; None takes the config's")
    add(
        "--device",
        choices=DEVICE_NAMES,
        default="auto",
        help="where to encode; auto is cuda where torch has it and torchac_cuda is built",
    )
    add(
        "--keep_all_tokens",
        action="store_true",
        help="keep what no token behind the context attends to, in layers with sliding windows or chunks: for prompts "
        "that begin with a part of the context, and for computing its middle from text. Without it, the document is "
        "smaller and can only be used whole",
    )
    add("--threads", type=command_line.positive_int, help="CPU threads; None takes all processors")
    add("--overwrite", action="store_true", help="replace the encoding of another document or configuration")
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_encode, build_parser(), argv)


def _parse_levels(text: str) -> int:
    """Return the number of levels in "1,2,...": each refines the one before, so none can be left out."""
    numbers = text.split(",")
    if numbers != [str(level) for level in range(1, len(numbers) + 1)] or len(numbers) > MAX_LEVELS:
        raise argparse.ArgumentTypeError(f"must be 1 or 1,2 and so on up to {MAX_LEVELS}, got {text!r}")
    return len(numbers)


def _encode(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from cachegen.coder.cpu import default_num_threads
    from cachegen.kv_cache import load_kv_cache
    from cachegen.methods import make_encoder
    from cachegen.pipeline.encode import encode_document

    report = command_line.Reporter(args)
    chosen = choose_kernels(args.device)
    config = _load_config(args)
    num_threads = args.threads or default_num_threads()
    cache, metadata = load_kv_cache(args.path_to_kv)
    num_coded = cache.num_tokens - args.recompute_last
    if num_coded < 1:
        raise ConfigError(
            f"--recompute_last {args.recompute_last} leaves none of the cache's {cache.num_tokens} tokens"
        )
    chunk_tokens = plan_chunks(num_coded, args.num_chunks, args.chunk_size)
    num_tokens = sum(chunk_tokens)
    first_visible = metadata.first_visible(num_tokens)
    first_stored = () if args.keep_all_tokens else first_visible
    start = time.perf_counter()
    profile = None
    if config.needs_profile:
        from cachegen.calibration.choose_profile import choose_profile  # imports transformers, which takes seconds

        profile = choose_profile(
            config,
            cache,
            metadata,
            chunk_tokens,
            chosen.kernels,
            places=(metadata.model_id, SCRIPT_FOLDER / "models"),
            num_threads=num_threads,
            folder=Path(args.output_path),
            overwrite=args.overwrite,
            first_stored=first_stored,
        )
        if profile.config.method == config.method:
            report.row("profile", profile.note)
        else:
            report.warn(profile.note)
        config = profile.config
    own = None if profile is None else profile.own
    own_bytes = 0 if own is None else own.num_bytes
    encoder = make_encoder(
        config,
        cache,
        metadata,
        chunk_tokens,
        num_threads=num_threads,
        kernels=chosen.kernels,
        first_stored=first_stored,
    )
    with tqdm(total=num_tokens, unit="token", file=sys.stderr, disable=True if report.is_quiet else None) as bar:
        result = encode_document(
            encoder,
            args.output_path,
            overwrite=args.overwrite,
            max_error=args.max_error,
            own_profile=None if profile is None or profile.is_kept else own,
            progress=bar.update,
        )
    seconds = time.perf_counter() - start

    num_values = cache.slice(0, num_tokens).num_values
    num_uncovered = cache.num_tokens - num_tokens
    channels = [layer.shape[1] * layer.shape[2] for layer in cache.planes]
    num_invisible = sum(channels[2 * i] * first + channels[2 * i + 1] * first for i, first in enumerate(first_visible))
    sizes = result.sizes
    record = {
        "stage": "encode",
        "method": config.method,
        "coder": config.coder.name.lower(),
        "num_tokens": num_tokens,
        "num_uncovered_tokens": num_uncovered,
        "num_chunks": len(chunk_tokens),
        "num_reused_chunks": result.num_reused_chunks,
        "repaired_files": list(result.repaired),
        "kv_bytes": BYTES_PER_FP16 * num_values,
        "invisible_bytes": BYTES_PER_FP16 * num_invisible,
        "left_out_bytes": BYTES_PER_FP16 * (num_values - sum(result.header.stored_values_of_chunks)),
        "is_whole_only": result.header.is_whole_only,
        "encoded_bytes": sizes.total + own_bytes,
        "bytes_by_part": {
            "header": sizes.header,
            "tables": sizes.tables,
            "scales": sizes.scales,
            "payload": sizes.payload,
            **({"states": sizes.states} if sizes.states else {}),
            **({"profile": own_bytes} if own_bytes else {}),
        },
        "bits_per_value": 8 * (sizes.total + own_bytes) / num_values,
        **_describe_levels(encoder, result, num_values),
        "ratio_vs_fp16": BYTES_PER_FP16 * num_values / (sizes.total + own_bytes),
        "ratio_vs_int8": num_values / (sizes.total + own_bytes),
        "seconds": seconds,
        "device": str(chosen.device),
        "threads": num_threads,
        "output_path": args.output_path,
    }
    report.row("encoding on", chosen)
    _report(report, record, args)
    command_line.finish(args, record)


def _load_config(args: argparse.Namespace) -> MethodConfig:
    """Read the config and put the flags that were given in the place of its values."""
    from cachegen.methods import load_config

    flags = {"profile": args.profile, "levels": args.levels, "coder": Coder[args.coder.upper()] if args.coder else None}
    flags |= {"target_bits": args.target_bits, "target_kl": args.target_kl}
    return load_config(args.quantization_config).with_flags({k: v for k, v in flags.items() if v is not None})


def _describe_levels(encoder: Encoder, result: EncodeResult, num_values: int) -> dict[str, Any]:
    """Return the size of every file and each level's expected loss, as scripts/simulate_adaptation.py reads them."""
    shared_bytes = result.sizes.total - sum(map(sum, result.chunk_bytes.values()))
    levels, num_bytes = [], shared_bytes
    for level, sizes in result.chunk_bytes.items():
        num_bytes += sum(sizes)
        expected = encoder.expected_kl(level)
        error = result.errors[level]
        levels.append(
            {
                "level": level,
                "bits_per_value": 8 * num_bytes / num_values,
                "expected_kl": expected,
                "max_error": error.largest,
                "mean_error": error.mean,
            }
        )
    tokens = result.header.chunk_tokens
    return {
        "levels": levels,
        "levels_are_embedded": len(levels) > 1,
        "shared_bytes": shared_bytes,
        "chunks": [
            {
                "first_token": stop - num_tokens,
                "num_tokens": num_tokens,
                "bytes": {str(level): sizes[index] for level, sizes in result.chunk_bytes.items()},
            }
            for index, (stop, num_tokens) in enumerate(zip(itertools.accumulate(tokens), tokens, strict=True))
        ],
        "profile_hash": result.header.profile_hash.hex() if any(result.header.profile_hash) else None,
    }


def _report(report: command_line.Reporter, record: dict, args: argparse.Namespace) -> None:
    size = command_line.format_bytes
    parts = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in record["bytes_by_part"].items())
    reused = f" ({record['num_reused_chunks']} were there already)" if record["num_reused_chunks"] else ""
    report.row("KV cache", f"{args.path_to_kv}, {record['num_tokens']:,} tokens, {size(record['kv_bytes'])} as fp16")
    if record["invisible_bytes"]:
        share = 100 * record["invisible_bytes"] / record["kv_bytes"]
        left_out = record["left_out_bytes"]
        fate = f"{size(left_out)} left out: the document can only be used whole" if left_out else "kept all the same"
        report.row("not visible", f"{share:.0f} % of it, {size(record['invisible_bytes'])}, to any later token; {fate}")
    report.row("method", f"{record['method']} ({args.quantization_config}), coder {record['coder']}")
    report.row("chunks", f"{record['num_chunks']} in {args.output_path}{reused}")
    report.row("encoded", f"{size(record['encoded_bytes'])}: {parts}")
    if record["repaired_files"]:
        names = ", ".join(record["repaired_files"][:4]) + (", ..." if len(record["repaired_files"]) > 4 else "")
        report.row("repaired", f"{len(record['repaired_files'])} damaged files were written again ({names})")
    report.row("bits per value", f"{record['bits_per_value']:.3f}")
    last = record["levels"][-1]
    mean = "" if last["mean_error"] is None else f", {last['mean_error']:.3g} on average"
    report.row("error", f"at most {last['max_error']:.3g} per value{mean}")
    report.row(
        "smaller by",
        f"{record['ratio_vs_fp16']:.2f}x than fp16, {record['ratio_vs_int8']:.2f}x than 8-bit",
    )
    report.row("seconds", f"{record['seconds']:.2f} on {record['device']}, {record['threads']} threads")
    if record["num_uncovered_tokens"]:
        report.row(
            "not covered",
            f"the last {record['num_uncovered_tokens']:,} tokens: they are recomputed from text at decoding",
        )


if __name__ == "__main__":
    sys.exit(main())
