"""Gather the training text of the bundled model from unpacked Debian documentation packages.

    python tools/fetch_packages.py model PACKAGES
    python tools/model/corpus.py PACKAGES corpus.txt

Documents are HTML pages, plain text, Perl's pod files and fortunes; pages in another language than
English are left out.
"""

from __future__ import annotations

import argparse
import gzip
import html
import random
import re
from collections.abc import Sequence
from pathlib import Path

DOCUMENT_END = "\n\x01"
"""What stands between two documents of the corpus file."""

MIN_DOCUMENT_CHARS = 800
MIN_ASCII_SHARE = 0.97
FOREIGN = "/de/ /fr/ /es/ /ja/ /ru/ .ja. .ko. .tr. .fr. .es. .de. .da. .zh-".split()
INDEX = "genindex py-modindex /_static bookindex".split()


def html_to_text(page: str) -> str:
    """Drop the markup, the head, menus, scripts and tables of a page."""
    page = re.sub(r"(?is)<(script|style|head|nav|table)[^>]*>.*?</\1>", " ", page)
    page = re.sub(r"(?i)<(p|div|li|h\d|br|tr|pre|dd|dt)[^>]*>", "\n", page)
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    text = re.sub(r"[ \t\xa0]+", " ", text)
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def read_document(path: Path) -> str | None:
    """Return a file's text, or None where the file is of no kind that is read."""
    if path.name.endswith((".html", ".html.en")):
        return html_to_text(path.read_text(encoding="utf-8", errors="ignore"))
    if path.name.endswith(".txt.gz"):
        with gzip.open(path, "rt", encoding="utf-8", errors="ignore") as file:
            return file.read()
    is_fortune = path.parent.match("games/fortunes") and not path.suffix
    if path.suffix in (".txt", ".pod") or is_fortune:
        return path.read_text(encoding="utf-8", errors="ignore")
    return None


def is_english(text: str) -> bool:
    """Say whether nearly all bytes are ASCII, which other languages' pages fail."""
    data = text.encode("utf-8", "ignore")
    return sum(byte < 128 for byte in data) >= MIN_ASCII_SHARE * len(data)


def read_corpus(packages: Path) -> list[str]:
    """Read the documents of all packages in the order of their paths."""
    documents = []
    for path in sorted(packages.rglob("*")):
        name = f"/{path.relative_to(packages).as_posix()}".lower()
        # A link would bring the same text twice.
        if path.is_symlink() or not path.is_file():
            continue
        if any(part in name for part in FOREIGN + INDEX):
            continue
        text = read_document(path)
        if text and len(text) >= MIN_DOCUMENT_CHARS and is_english(text):
            documents.append(text.replace("\x00", " ").replace("\x01", " "))
    return documents


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Gather the bundled model's training text.")
    parser.add_argument("packages", type=Path, help="folder of the unpacked Debian packages")
    parser.add_argument("corpus", type=Path, help="the text file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the documents' order")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    documents = read_corpus(args.packages)
    if not documents:
        raise ValueError(f"`packages` must hold documentation, got none in {args.packages}")
    random.Random(args.seed).shuffle(documents)
    with args.corpus.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(document + DOCUMENT_END)
    num_chars = sum(map(len, documents))
    print(f"{len(documents)} documents, {num_chars / 1e6:.1f} million characters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
