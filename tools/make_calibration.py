"""Make 9k_prompts/calibration: twelve long contexts that share no chapter and no record with 9k_prompts.

    python tools/fetch_packages.py prompts PACKAGES
    python tools/make_calibration.py PACKAGES

A model's profile is made from these, and its steps and levels are chosen on them, so that 9k_prompts
stays unseen. They look like 9k_prompts (make_prompts.py) and come from the same works: of each work
only the chapters serve that no context of 9k_prompts has a paragraph of. The same packages give the
same files, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from make_prompts import (
    CONTEXTS_PER_SOURCE,
    NUM_RECORDS,
    RECORD,
    ROOT,
    Context,
    Encode,
    UniqueSpans,
    check_contexts,
    load_encoder,
    make_context,
    make_records,
    prose_of,
    read_source,
    write_contexts,
)
from prose import SOURCES, Document

CALIBRATION_CONTEXTS_PER_SOURCE = {
    "bible-kjv-text": 4,
    "apache2-doc": 2,
    "postgresql-doc-15": 3,
    "python3.11-doc": 3,
}
SEED = 1


def read_contexts(folder: Path) -> list[str]:
    """Read the texts of a folder of contexts, in the order of its questions.json."""
    entries = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [(folder / entry["file"]).read_text(encoding="utf-8") for entry in entries]


def leave_out_used_chapters(documents: Sequence[Document], used_lines: set[str]) -> list[Document]:
    """Keep the documents none of whose paragraphs is among `used_lines`."""
    return [document for document in documents if used_lines.isdisjoint(document.paragraphs)]


def make_contexts(packages: Path, words: Sequence[str], held_out: Sequence[str], encode: Encode) -> list[Context]:
    """Make the contexts of all sources, each from its own part of what `held_out` leaves of its source.

    No chapter of theirs, no span of 50 tokens of prose, no register and no value occurs in `held_out`.
    """
    rng = random.Random(SEED)
    spans = UniqueSpans()
    used_lines: set[str] = set()
    for text in held_out:
        spans.add(encode(prose_of(text)))
        used_lines.update(text.split("\n"))
    used_names, used_values = set(), set()
    for line in filter(RECORD.fullmatch, used_lines):
        name, value = line.removeprefix("register ").split(": ")
        used_names.add(name)
        used_values.add(value)
    count = sum(CALIBRATION_CONTEXTS_PER_SOURCE.values()) * NUM_RECORDS
    # More than are needed, since some are of the held-out contexts.
    drawn = make_records(words, 2 * count, rng)
    records = [r for r in drawn if r.register not in used_names and r.value not in used_values]
    contexts: list[Context] = []
    for source in SOURCES:
        documents = leave_out_used_chapters(read_source(source, packages), used_lines)
        parts = CALIBRATION_CONTEXTS_PER_SOURCE[source.package]
        for part in range(parts):
            first = len(contexts) * NUM_RECORDS
            begin, end = (len(documents) * i // parts for i in (part, part + 1))
            own_records = records[first : first + NUM_RECORDS]
            contexts.append(make_context(documents[begin:end], own_records, spans, encode, rng))
    return contexts


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Make contexts to calibrate a model's profile on.")
    parser.add_argument("packages", type=Path, help="folder of the unpacked Debian packages")
    parser.add_argument("--output", type=Path, default=ROOT / "9k_prompts/calibration")
    parser.add_argument("--held_out", type=Path, default=ROOT / "9k_prompts")
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny-mistral")
    parser.add_argument("--words", type=Path, default=ROOT / "tools/model/words.txt")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    encode = load_encoder(args.model)
    held_out = read_contexts(args.held_out)
    if len(held_out) != sum(CONTEXTS_PER_SOURCE.values()):
        raise ValueError(f"{args.held_out} must be whole, it has {len(held_out)} contexts")
    words = args.words.read_text(encoding="utf-8").split()
    contexts = make_contexts(args.packages, words, held_out, encode)
    sizes = check_contexts(contexts, encode)
    write_contexts(contexts, args.output)
    packages = [name for name, n in CALIBRATION_CONTEXTS_PER_SOURCE.items() for _ in range(n)]
    print("| file | package | tokens |\n|---|---|---:|")
    for i, (package, size) in enumerate(zip(packages, sizes, strict=True)):
        print(f"| {i}.txt | {package} | {size:,} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
