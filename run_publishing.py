#!/usr/bin/env python3
"""Put encoded folders of one context into a store, as its levels, for run_decoding_remote.py to load over a network."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

SCRIPT_FOLDER = Path(__file__).resolve().parent
# In a clone that is not installed, the package is beside the script; an installed one comes first.
sys.path.append(str(SCRIPT_FOLDER / "src"))

from cachegen import startup  # noqa: E402

startup.guard_imports(__name__)

from cachegen import command_line  # noqa: E402

if TYPE_CHECKING:
    from cachegen.store.catalog import Published


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    add(
        "--path_to_encoded_kv",
        nargs="+",
        default=["encoded"],
        metavar="FOLDER",
        help="folders of run_encoding.py, encodings of one cache in the same chunks; each becomes a level",
    )
    add("--path_to_kv", default="data/test_kv_0.pkl", help="the KV cache file that was encoded, for its tokens")
    add(
        "--path_to_store",
        default="store",
        help="a folder, to be served by any web server, or a URL: s3://bucket/path, gs://..., az://...",
    )
    add(
        "--kl",
        nargs="+",
        type=command_line.non_negative_float,
        metavar="NATS",
        help="expected loss of each folder's level, as run_decoding_disk.py --verify reports it; "
        "None lets clients weigh the levels by their bits",
    )
    add(
        "--profile",
        metavar="FOLDER",
        help="the model's profile, for methods transform and lossless: put it into the store as well, for clients that "
        "have none",
    )
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_publish, build_parser(), argv)


def _publish(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from cachegen.kv_cache import load_kv_cache
    from cachegen.pipeline.encode import read_encoded_levels
    from cachegen.store.catalog import publish_document
    from cachegen.store.store import WRITING, open_store

    report = command_line.Reporter(args)
    levels = read_encoded_levels(args.path_to_encoded_kv, args.kl, args.profile)
    _, metadata = load_kv_cache(args.path_to_kv)
    store = open_store(args.path_to_store, retry=WRITING, create=True)
    start = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, file=sys.stderr, disable=True if report.is_quiet else None) as bar:
        published = publish_document(store, levels, metadata, bar.update)
    manifest, found = published.manifest, published.found
    record = {
        "stage": "publish",
        "manifest": published.name,
        "num_tokens": manifest.num_covered_tokens,
        "num_chunks": len(manifest.chunks),
        "levels": [
            {
                "level": level.level,
                "method": level.method,
                "coder": level.coder,
                "bytes": level.tables.bytes + sum(chunk.files[level.level - 1].bytes for chunk in manifest.chunks),
                "bits_per_value": level.bits_per_value,
                "kl": level.kl,
            }
            for level in manifest.levels
        ],
        "superseded": published.superseded,
        "repaired": published.repaired,
        "clients_find": None if found is None else {"manifest": found.address, "levels": len(found.manifest.levels)},
        "num_written": published.num_written,
        "bytes_written": published.bytes_written,
        "seconds": time.perf_counter() - start,
    }
    report.row("document", f"{record['num_tokens']:,} tokens in {record['num_chunks']} chunks")
    for level in record["levels"]:
        size = command_line.format_bytes(level["bytes"])
        report.row(f"level {level['level']}", f"{size}, {level['bits_per_value']:.2f} bits per value")
    written = command_line.format_bytes(record["bytes_written"])
    report.row("written", f"{record['num_written']} objects, {written}, to {args.path_to_store}")
    for name in published.repaired:
        report.row("repaired", f"{name}, which was damaged")
    report.row("manifest", published.name)
    report.row("clients find", _describe_found(published, store.describe(published.name)))
    command_line.finish(args, record)


def _describe_found(published: Published, address: str) -> str:
    """Say what clients see now, in one line."""
    found = published.found
    if found is None:
        return "nothing yet: publish again"
    levels = _count("level", len(found.manifest.levels))
    if found.address != address:
        tokens = f"{found.manifest.num_covered_tokens:,} tokens"
        return f"another manifest, of {levels} and {tokens} ({found.address}): it covers more of this text, or is newer"
    older = [
        "a damaged manifest" if num_levels is None else f"the manifest with {_count('level', num_levels)}"
        for num_levels in published.superseded.values()
    ]
    return f"{levels}; {' and '.join(older)} {'are' if len(older) > 1 else 'is'} superseded" if older else levels


def _count(noun: str, number: int) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    sys.exit(main())
