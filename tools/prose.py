"""Read clean English paragraphs from unpacked Debian documentation packages.

Only packages whose text is in the public domain or permissively licensed are listed here: what they
say goes into the prompts of this repository. NOTICE names the authors and quotes the licences.
"""

from __future__ import annotations

import html.parser
import itertools
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_PARAGRAPH_CHARS = 160
MAX_PARAGRAPH_CHARS = 1400
MIN_DOCUMENT_PARAGRAPHS = 4
VERSES_PER_PARAGRAPH = 5
MIN_PLAIN_SHARE = 0.97
"""Letters, blanks and common punctuation among a paragraph's characters; with less it is code."""


BIBLE_BOOKS = (
    "Genesis, Exodus, Leviticus, Numbers, Deuteronomy, Joshua, Judges, Ruth, 1 Samuel, 2 "
    "Samuel, 1 Kings, 2 Kings, 1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther, Job, Psalm, "
    "Proverbs, Ecclesiastes, Song of Solomon, Isaiah, Jeremiah, Lamentations, Ezekiel, Daniel, "
    "Hosea, Joel, Amos, Obadiah, Jonah, Micah, Nahum, Habakkuk, Zephaniah, Haggai, Zechariah, "
    "Malachi, Matthew, Mark, Luke, John, Acts, Romans, 1 Corinthians, 2 Corinthians, Galatians, "
    "Ephesians, Philippians, Colossians, 1 Thessalonians, 2 Thessalonians, 1 Timothy, 2 "
    "Timothy, Titus, Philemon, Hebrews, James, 1 Peter, 2 Peter, 1 John, 2 John, 3 John, Jude, "
    "Revelation"
).split(", ")
"""The books in the order of the file, which abbreviates their names."""


@dataclass(frozen=True)
class Document:
    """A title and the paragraphs under it, in the order of the source."""

    title: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A Debian package that prose is taken from."""

    name: str
    package: str
    licence: str
    read_documents: Callable[[Path], Iterator[Document]]


class _ParagraphParser(html.parser.HTMLParser):
    """Collect the text of <title> and of every <p> outside tables, notes and navigation."""

    SKIPPED = frozenset({"nav", "table", "script", "style", "pre", "li", "svg", "form", "dl"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.language = "en"
        self.paragraphs: list[str] = []
        self._open_skipped: list[str] = []
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "html":
            self.language = dict(attrs).get("lang") or "en"
        elif tag in self.SKIPPED:
            self._open_skipped.append(tag)
            self._text = None
        elif tag in ("p", "title") and not self._open_skipped:
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open_skipped:
            # An unclosed tag inside a skipped one ends with it.
            del self._open_skipped[self._open_skipped.index(tag) :]
        elif tag in ("p", "title") and self._text is not None:
            text = " ".join("".join(self._text).split())
            self._text = None
            if tag == "title" and not self.title:
                self.title = text
            elif tag == "p":
                self.paragraphs.append(text)

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)


def is_clean_prose(text: str) -> bool:
    """Say whether a paragraph is whole sentences, with no code and nothing like a record."""
    if not MIN_PARAGRAPH_CHARS <= len(text) <= MAX_PARAGRAPH_CHARS:
        return False
    if not (text[0].isupper() and text[-1] in ".!?"):
        return False
    if re.search(r"regist|record|\d{5}|[<>{}|\\=_\[\]¶‣$%#*]|https?:", text, re.IGNORECASE):
        return False
    plain = sum(c.isalpha() or c in " .,;:'\"()-\u2019\u2018\u201c\u201d\u2014" for c in text)
    return plain / len(text) >= MIN_PLAIN_SHARE


def read_html(path: Path) -> Document:
    """Read the title and the clean paragraphs of a manual's page; one not in English has none."""
    parser = _ParagraphParser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    # "9. Classes - Python 3.11.2 documentation" and "Chapter 9. Classes" become "Classes".
    bare_title = re.split(r" [\u2014-] ", parser.title)[0]
    title = re.sub(r"^(Chapter |Appendix )?[\dA-Z]{0,2}[\d.]*\.\s+", "", bare_title)
    if parser.language != "en":
        return Document(title, ())
    return Document(title, tuple(p for p in parser.paragraphs if is_clean_prose(p)))


def _read_pages(paths: list[Path]) -> Iterator[Document]:
    for path in paths:
        document = read_html(path)
        if len(document.paragraphs) >= MIN_DOCUMENT_PARAGRAPHS:
            yield document


def read_apache(package: Path) -> Iterator[Document]:
    """Yield the chapters of the Apache HTTP Server manual, without its reference of directives."""
    manual = package / "usr/share/doc/apache2-doc/manual/en"
    folders = ("", "howto", "misc", "rewrite", "vhosts", "ssl", "developer", "platform")
    paths = [p for folder in folders for p in sorted((manual / folder).glob("*.html"))]
    yield from _read_pages([p for p in paths if p.name not in ("license.html", "sitemap.html")])


def read_postgresql(package: Path) -> Iterator[Document]:
    """Yield the chapters of the PostgreSQL manual, without releases and command pages."""
    manual = package / "usr/share/doc/postgresql-doc-15/html"
    skipped = re.compile(r"(release|sql-|app-|catalog-|view-|spi-|biblio|legalnotice|bookindex)")
    yield from _read_pages([p for p in sorted(manual.glob("*.html")) if not skipped.match(p.name)])


def read_python(package: Path) -> Iterator[Document]:
    """Yield the tutorial, the how-to guides, the questions and the language reference of Python."""
    manual = package / "usr/share/doc/python3.11/html"
    folders = ("tutorial", "howto", "faq", "reference", "extending", "installing", "using")
    paths = [p for folder in folders for p in sorted((manual / folder).glob("*.html"))]
    yield from _read_pages(paths)


def read_bible(package: Path) -> Iterator[Document]:
    """Yield the chapters of the King James Bible.

    `bible.data` (big-endian) holds at byte 0x58 a count of windows, then their offsets and the
    offset of its end; each window is a stream of compress(1) without its three header bytes.
    """
    data = (package / "usr/lib/bible.data").read_bytes()
    (num_windows,) = struct.unpack_from(">I", data, 0x58)
    offsets = struct.unpack_from(f">{num_windows + 1}I", data, 0x5C)
    text = b"".join(
        subprocess.run(
            ["gzip", "-dc"],
            input=b"\x1f\x9d\x90" + data[begin:end],
            capture_output=True,
            check=True,
        ).stdout
        for begin, end in itertools.pairwise(offsets)
    ).decode("ascii")
    names = iter(BIBLE_BOOKS)
    name_of_book: dict[str, str] = {}
    chapters: dict[str, list[str]] = {}
    for book, chapter, verse in re.findall(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$", text, re.MULTILINE):
        if book not in name_of_book:
            name_of_book[book] = next(names)
        chapters.setdefault(f"{name_of_book[book]} {chapter}", []).append(verse.strip())
    for title, verses in chapters.items():
        starts = range(0, len(verses), VERSES_PER_PARAGRAPH)
        yield Document(title, tuple(" ".join(verses[i : i + VERSES_PER_PARAGRAPH]) for i in starts))


SOURCES = (
    Source("King James Bible", "bible-kjv-text", "public domain", read_bible),
    Source("Apache HTTP Server manual", "apache2-doc", "Apache-2.0", read_apache),
    Source("PostgreSQL 15 manual", "postgresql-doc-15", "PostgreSQL", read_postgresql),
    Source("Python 3.11 documentation", "python3.11-doc", "PSF-2.0", read_python),
)
