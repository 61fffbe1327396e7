#!/usr/bin/env python3
"""Load and decode chunk files, and answer from them without prefilling the context again: stage three of three."""

from __future__ import annotations

import argparse
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

from cachegen import command_line  # noqa: E402
from cachegen.answer_scripts import (  # noqa: E402
    add_answer_flags,
    check_profile_flag,
    open_session,
    report_answers,
)
from cachegen.device import choose_kernels, resolve_device, resolve_dtype  # noqa: E402
from cachegen.pipeline.context import read_context  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    parser.add_argument("--path_to_encoded_kv", default="encoded", help="a folder of run_encoding.py")
    parser.add_argument(
        "--level",
        type=command_line.positive_int,
        help="with method transform, decode levels 1 to this one; None is all",
    )
    add_answer_flags(parser, SCRIPT_FOLDER)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_decode_and_answer, build_parser(), argv)


def _decode_and_answer(args: argparse.Namespace) -> None:
    from cachegen.coder.cpu import default_num_threads
    from cachegen.config import load_model_config
    from cachegen.methods import check_config, load_config, method_of
    from cachegen.pipeline.break_even import beats_fp16_below, beats_text_above
    from cachegen.pipeline.decode import EncodedFolder
    from cachegen.pipeline.profiles import profile_finder

    report = command_line.Reporter(args)
    # Everything that needs no model comes first: a wrong path or config shows at once.
    num_threads = args.threads or default_num_threads()
    resolve_device(args.device)
    dtype = resolve_dtype(args.dtype)
    chosen = choose_kernels(args.device)
    find_profile = profile_finder(args.profile, (args.path_to_encoded_kv, args.model_id, SCRIPT_FOLDER / "models"))
    folder = EncodedFolder(
        args.path_to_encoded_kv, num_threads, chosen.kernels, find_profile=find_profile, level=args.level
    )
    header = folder.document.header
    method = method_of(header)
    check_profile_flag(args, method, header.profile_hash)
    if args.quantization_config is not None:
        check_config(load_config(args.quantization_config), header, folder.tables_path)
    if args.model_config is not None:
        load_model_config(args.model_config).check_shapes(header.shapes, folder.tables_path)
    chunk_tokens = folder.select_chunks(args.num_chunks)
    text = read_context(Path(args.path_to_context))

    # transformers takes seconds to import, more than it takes to say that a file is missing.
    from tqdm import tqdm

    from cachegen.pipeline.model_cache import allocate_cache, keep_whole, set_length, view_kv_cache
    from cachegen.pipeline.prefill import recompute_first_tokens
    from cachegen.pipeline.state_layers import keep_states
    from cachegen.pipeline.windows import find_missing

    dtype = folder.dtype if dtype == "auto" else dtype
    session = open_session(args, text, dtype, rope_hash=header.rope_hash.hex())
    loaded, token_ids = session.loaded, session.token_ids
    folder.check_model(loaded)
    num_cached = sum(chunk_tokens)
    folder.check_context(token_ids, num_cached, args.path_to_context)
    cache = allocate_cache(loaded.cache_layout, folder.plane_shapes, session.capacity, folder.dtype)

    # From here on the clock runs: what a server with the model in memory would do.
    start = time.perf_counter()
    with tqdm(total=num_cached, unit="token", file=sys.stderr, disable=True if report.is_quiet else None) as bar:
        decoded = folder.decode_into(view_kv_cache(cache, num_cached), token_ids, chunk_tokens, bar.update)
    keep_states(cache, folder.document.read_states(), num_cached)
    set_length(cache, num_cached)
    recompute_first_tokens(loaded, cache, token_ids, method.num_sink_tokens, num_cached)
    keep_whole(cache, num_cached, find_missing(loaded.text_config, header.first_stored, num_cached))
    block_size = header.prefill_block_size
    answers = session.answer(cache, num_cached, block_size)
    ttft_seconds = answers[0].first_token_at - start
    fidelity = session.verify(answers, cache, num_cached, block_size, header) if args.verify else None
    record = {
        "stage": "decode",
        "num_cached_tokens": num_cached,
        "num_recomputed_tokens": len(token_ids) - 1 - num_cached,
        "num_chunks": len(chunk_tokens),
        "level": folder.num_levels,
        "encoded_bytes": decoded.encoded_bytes,
        "load_seconds": decoded.load_seconds,
        "decode_seconds": decoded.decode_seconds,
        "prefill_seconds": answers[0].prefill_seconds,
        "ttft_seconds": ttft_seconds,
        **session.describe(answers, fidelity),
        "device": str(loaded.device),
        "decoding_device": str(chosen.device),
    }
    fp16_bytes = 2 * header.values_per_token * num_cached
    record["beats_fp16_below_gbps"] = beats_fp16_below(fp16_bytes, decoded.encoded_bytes, decoded.decode_seconds) / 1e9
    if fidelity is not None:
        above = beats_text_above(decoded.encoded_bytes, ttft_seconds, record["text_prefill_seconds"])
        record["beats_text_above_gbps"] = None if above is None else above / 1e9
    report.row("decoding on", chosen)
    _report(report, record)
    command_line.finish(args, record)


def _report(report: command_line.Reporter, record: dict[str, Any]) -> None:
    report.row("tokens", f"{record['num_cached_tokens']:,} from {record['num_chunks']} chunks")
    if record["num_recomputed_tokens"]:
        report.row("recomputed", f"{record['num_recomputed_tokens']:,} tokens that no decoded chunk covers, from text")
    report.row("read", f"{command_line.format_bytes(record['encoded_bytes'])} in {record['load_seconds']:.3f} s")
    report.row("decoded in", f"{record['decode_seconds']:.3f} s")
    report.row(
        "first token after", f"{record['ttft_seconds']:.3f} s, {record['prefill_seconds']:.3f} s of it the model"
    )
    link = f"links below {_format_link(record['beats_fp16_below_gbps'])} (beyond, fp16 as it is)"
    if "beats_text_above_gbps" in record:
        above = record["beats_text_above_gbps"]
        link += "; none, the text is faster" if above is None else f", above {_format_link(above)} (below, the text)"
    report.row("pays over", link)
    report_answers(report, record)


def _format_link(gbps: float) -> str:
    return f"{gbps:.3g} Gbit/s" if gbps >= 1 else f"{1000 * gbps:.3g} Mbit/s"


if __name__ == "__main__":
    sys.exit(main())
