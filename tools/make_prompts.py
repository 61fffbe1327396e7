"""Make 9k_prompts: twenty long contexts with records among prose, and questions about them.

    python tools/fetch_packages.py prompts PACKAGES
    python tools/make_prompts.py PACKAGES

A context is real prose with lines `register mostly-anchor: 48213` between its paragraphs, and ends
in a question whose next tokens are the five digits. The bundled model was trained on this task
(tools/model/train.py). The same packages give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fetch_packages import PROMPT_PACKAGES, unpacked_version
from prose import SOURCES, Document, Source

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS_PER_SOURCE = {
    "bible-kjv-text": 7,
    "apache2-doc": 3,
    "postgresql-doc-15": 5,
    "python3.11-doc": 5,
}
MIN_TOKENS, TARGET_TOKENS, MAX_TOKENS = 8900, 9000, 9100
NUM_RECORDS = 40
NUM_QUESTIONS = 20
UNIQUE_SPAN_TOKENS = 50
SEED = 0

OPENING = "The record of the registers follows."
CLOSING = "The record ends."
RECORD = re.compile(r"register [a-z]+-[a-z]+: \d{5}")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Record:
    """A register's name, two words with a hyphen, and its five digits."""

    register: str
    value: str

    @property
    def line(self) -> str:
        """The record as it stands in a context."""
        return f"register {self.register}: {self.value}"

    @property
    def question(self) -> str:
        """The question whose next tokens are the value."""
        return f"What is the value of register {self.register}?\nregister {self.register}:"


@dataclass(frozen=True)
class Context:
    """One prompt: its text, the record it asks for, and the records of the further questions."""

    text: str
    asked: Record
    further: tuple[Record, ...]


class UniqueSpans:
    """Remember every span of UNIQUE_SPAN_TOKENS prose tokens that was seen."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()

    def add(self, tokens: Sequence[int]) -> bool:
        """Add the spans of `tokens`; say whether none was seen before, and add none if one was."""
        starts = range(len(tokens) - UNIQUE_SPAN_TOKENS + 1)
        spans = [tuple(tokens[i : i + UNIQUE_SPAN_TOKENS]) for i in starts]
        if len(set(spans)) < len(spans) or not self._seen.isdisjoint(spans):
            return False
        self._seen.update(spans)
        return True


def make_records(words: Sequence[str], count: int, rng: random.Random) -> list[Record]:
    """Draw `count` records with distinct registers and distinct values."""
    registers: dict[str, None] = {}
    while len(registers) < count:
        registers["-".join(rng.sample(words, 2))] = None
    values = rng.sample(range(100_000), count)
    return [Record(name, f"{value:05d}") for name, value in zip(registers, values, strict=True)]


def choose_prose(
    documents: Iterable[Document],
    num_tokens: int,
    spans: UniqueSpans,
    encode: Encode,
) -> list[str]:
    """Take paragraphs in reading order, titles before them, until `num_tokens` are nearly used.

    A paragraph that does not fit any more, or that repeats a span used before, is left out.
    """
    chosen: list[str] = []
    for document in documents:
        heading = f"{document.title}\n"
        for paragraph in document.paragraphs:
            block = heading + paragraph
            tokens = encode(block + "\n")
            if len(tokens) <= num_tokens and spans.add(tokens):
                chosen.append(block)
                heading = ""
                num_tokens -= len(tokens)
        if num_tokens < TARGET_TOKENS - MIN_TOKENS:
            return chosen
    raise ValueError(f"`documents` must hold more prose, {num_tokens} tokens are missing")


def make_context(
    documents: Iterable[Document],
    records: Sequence[Record],
    spans: UniqueSpans,
    encode: Encode,
    rng: random.Random,
) -> Context:
    """Spread `records` among prose and end in the question for one of them."""
    asked, *further = rng.sample(list(records), 1 + NUM_QUESTIONS)
    ending = f"{CLOSING}\n{asked.question}"
    frame = "\n".join([OPENING, *(record.line for record in records), ending])
    prose = choose_prose(documents, TARGET_TOKENS - len(encode(frame)), spans, encode)
    # One record at a random place of each equal part of the prose: no stretch is without records.
    part_size = len(prose) / len(records)
    places = [int((part + rng.random()) * part_size) for part in range(len(records))]
    lines = [OPENING]
    for i, block in enumerate(prose):
        lines += [r.line for r, place in zip(records, places, strict=True) if place == i]
        lines.append(block)
    return Context("\n".join([*lines, ending]), asked, tuple(further))


def make_contexts(packages: Path, words: Sequence[str], encode: Encode) -> list[Context]:
    """Make the contexts of all sources, each from its own part of its source."""
    rng = random.Random(SEED)
    count = sum(CONTEXTS_PER_SOURCE.values())
    records = make_records(words, count * NUM_RECORDS, rng)
    spans = UniqueSpans()
    contexts: list[Context] = []
    for source in SOURCES:
        documents = read_source(source, packages)
        parts = CONTEXTS_PER_SOURCE[source.package]
        for part in range(parts):
            first = len(contexts) * NUM_RECORDS
            begin, end = (len(documents) * i // parts for i in (part, part + 1))
            own_records = records[first : first + NUM_RECORDS]
            context = make_context(documents[begin:end], own_records, spans, encode, rng)
            contexts.append(context)
    return contexts


def read_source(source: Source, packages: Path) -> list[Document]:
    """Read a source's documents.

    Raises:
        ValueError: the package's version is not the one that the committed prompts were made from.
    """
    version, expected = unpacked_version(packages, source.package), PROMPT_PACKAGES[source.package]
    if version != expected:
        raise ValueError(f"{source.package} must be version {expected}, got {version}")
    return list(source.read_documents(packages / source.package))


def prose_of(text: str) -> str:
    """Leave out a context's frame and its records."""
    body = text.removeprefix(OPENING + "\n").rsplit(f"\n{CLOSING}\n", 1)[0]
    return "\n".join(line for line in body.split("\n") if not RECORD.fullmatch(line))


def check_contexts(contexts: Sequence[Context], encode: Encode) -> list[int]:
    """Check the finished contexts and return their sizes in tokens, <s> included.

    Raises:
        ValueError: a context is too short or too long or has too few registers, or a span of prose
            occurs twice.
    """
    spans = UniqueSpans()
    sizes = []
    for i, context in enumerate(contexts):
        size = len(encode(context.text)) + 1
        registers = set(re.findall(r"^register (\S+): \d{5}$", context.text, re.MULTILINE))
        if not MIN_TOKENS <= size <= MAX_TOKENS:
            raise ValueError(f"context {i} has {size} tokens, not {MIN_TOKENS} to {MAX_TOKENS}")
        if len(registers) < 1 + NUM_QUESTIONS:
            raise ValueError(f"context {i} has only {len(registers)} registers")
        if not spans.add(encode(prose_of(context.text))):
            raise ValueError(f"context {i} repeats {UNIQUE_SPAN_TOKENS} tokens of prose")
        sizes.append(size)
    return sizes


def write_contexts(contexts: Sequence[Context], output: Path) -> None:
    """Write 0.txt and so on, and questions.json."""
    output.mkdir(parents=True, exist_ok=True)
    entries = []
    for i, context in enumerate(contexts):
        (output / f"{i}.txt").write_text(context.text, encoding="utf-8", newline="\n")
        further = [{"question": f"\n{r.question}", "answer": r.value} for r in context.further]
        entries.append(
            {
                "file": f"{i}.txt",
                "question": context.asked.question,
                "answer": context.asked.value,
                "questions": further,
            }
        )
    text = json.dumps(entries, indent=1) + "\n"
    (output / "questions.json").write_text(text, encoding="utf-8", newline="\n")


def load_encoder(model: Path) -> Encode:
    """Return the function from text to tokens, without <s>, of a model's folder."""
    # Only the tokenizer is needed, and transformers takes seconds to import.
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Make the long contexts and their questions.")
    parser.add_argument("packages", type=Path, help="folder of the unpacked Debian packages")
    parser.add_argument("--output", type=Path, default=ROOT / "9k_prompts")
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny-mistral")
    parser.add_argument("--words", type=Path, default=ROOT / "tools/model/words.txt")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    encode = load_encoder(args.model)
    contexts = make_contexts(args.packages, args.words.read_text().split(), encode)
    sizes = check_contexts(contexts, encode)
    write_contexts(contexts, args.output)
    packages = [name for name, count in CONTEXTS_PER_SOURCE.items() for _ in range(count)]
    print("| file | package | tokens |\n|---|---|---:|")
    for i, (package, size) in enumerate(zip(packages, sizes, strict=True)):
        print(f"| {i}.txt | {package} | {size:,} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
