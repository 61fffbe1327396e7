"""What an experiment found, as data: tables, the figures that are drawn from them, and what the paper says.

One JSON file per experiment. Whatever shows numbers, a page or a document, reads them from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cachegen.errors import InputError
from cachegen.fields import Fields, parse_fields, refuse_input
from cachegen.files import read_file, write_file

OUTCOME_SUFFIX = ".json"
FIGURE_KINDS = ("line", "points", "bar")
MAX_OUTCOME_BYTES = 64 << 20
_FORMAT = 1
_MAX_ROWS = 100_000
_MAX_PARTS = 100
_MAX_DIGITS = 12

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: the key of its values in the rows.
        title: with the unit, for people.
        digits: significant digits that people are shown; None for texts and counts.
    """

    name: str
    title: str
    digits: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows of values under names.

    Attributes:
        name: unique within the outcome.
        rows: each has a value for every column; None where there is none.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Value], ...]


@dataclass(frozen=True)
class Figure:
    """How a table is drawn.

    Attributes:
        table: its name.
        x, y: names of columns.
        series: the column whose values become lines or colours; None for one.
        split: the column within whose values points are joined by a line; None joins all of a series.
        label: the column that is shown beside x and y when a point is pointed at; None for none.
        kind: one of FIGURE_KINDS.
    """

    title: str
    table: str
    x: str
    y: str
    series: str | None = None
    label: str | None = None
    split: str | None = None
    kind: str = "line"
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Published:
    """A value that the paper states, beside ours.

    Attributes:
        value: as the paper has it.
        setting: its model, data and hardware.
        ours: the same as measured here; empty where nothing here compares.
    """

    what: str
    value: str
    setting: str
    ours: str = ""


@dataclass(frozen=True)
class Outcome:
    """All of one experiment.

    Attributes:
        name: of the experiment, and of its file.
        paper: the figure, table or section that asks the same.
        question: what is asked, in one sentence.
        notes: what a reader must know, a sentence or two each.
        setting: what was measured, on what, by which command.
        key: hash of all that the numbers depend on, but for the machine.
    """

    name: str
    title: str
    paper: str
    question: str
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...] = ()
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()
    setting: Mapping[str, Value] = field(default_factory=dict)
    key: str = ""

    def table(self, name: str) -> Table:
        """Return a table by its name.

        Raises:
            KeyError: there is none.
        """
        return {table.name: table for table in self.tables}[name]


def format_value(value: Value, digits: int | None) -> str:
    """Return a value as people are shown it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _format_float(value, digits or 3)
    return str(value)


def _format_float(value: float, digits: int) -> str:
    text = f"{value:#.{digits}g}".removesuffix(".")
    if "e" not in text:
        return text
    # Thousands are written out; only what has many zeros behind the point keeps its exponent.
    return f"{float(text):,.0f}" if abs(value) >= 1 else text


def write_outcome(folder: str | os.PathLike[str], outcome: Outcome) -> Path:
    """Write an outcome's file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / f"{outcome.name}{OUTCOME_SUFFIX}"
    content = {"format": _FORMAT, **asdict(outcome)}
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


def read_outcome(path: str | os.PathLike[str]) -> Outcome:
    """Read an outcome's file.

    Raises:
        InputError: it is missing, or no such file; the line names the field.
    """
    fields = parse_fields(read_file(path, MAX_OUTCOME_BYTES), refuse_input(path))
    if fields.integer("format", 0, 1 << 31) != _FORMAT:
        raise fields.error("format", f"must be {_FORMAT}: the file is of another version")
    tables = tuple(_read_table(entry) for entry in fields.objects("tables", 0, _MAX_PARTS))
    by_name = {table.name: table for table in tables}
    return Outcome(
        name=fields.text("name"),
        title=fields.text("title"),
        paper=fields.text("paper"),
        question=fields.text("question"),
        tables=tables,
        figures=tuple(_read_figure(entry, by_name) for entry in fields.objects("figures", 0, _MAX_PARTS)),
        published=tuple(
            Published(*(entry.text(name) for name in ("what", "value", "setting", "ours")))
            for entry in fields.objects("published", 0, _MAX_PARTS)
        ),
        notes=tuple(_read_texts(fields, "notes")),
        setting=_read_values(fields, "setting"),
        key=fields.text("key"),
    )


def list_outcomes(folder: str | os.PathLike[str]) -> list[Outcome]:
    """Read all outcomes of a folder, in the order of their names.

    Raises:
        InputError: there is none, or a file is damaged.
    """
    paths = sorted(Path(folder).glob(f"*{OUTCOME_SUFFIX}"))
    if not paths:
        raise InputError(f"{folder}: has no results; scripts/paper.py writes them")
    return [read_outcome(path) for path in paths]


def _read_table(fields: Fields) -> Table:
    columns = tuple(
        Column(
            entry.text("name"),
            entry.text("title"),
            entry.integer("digits", 1, _MAX_DIGITS) if entry.has_value("digits") else None,
        )
        for entry in fields.objects("columns", 1, _MAX_PARTS)
    )
    names = [column.name for column in columns]
    rows = []
    for entry in fields.objects("rows", 0, _MAX_ROWS):
        entry.require(names)
        rows.append({name: _read_value(entry, name) for name in names})
    return Table(fields.text("name"), fields.text("title"), columns, tuple(rows))


def _read_figure(fields: Fields, tables: Mapping[str, Table]) -> Figure:
    table = fields.choice("table", list(tables))
    columns = [column.name for column in tables[table].columns]
    return Figure(
        title=fields.text("title"),
        table=table,
        x=fields.choice("x", columns),
        y=fields.choice("y", columns),
        series=fields.choice("series", columns) if fields.has_value("series") else None,
        label=fields.choice("label", columns) if fields.has_value("label") else None,
        split=fields.choice("split", columns) if fields.has_value("split") else None,
        kind=fields.choice("kind", FIGURE_KINDS),
        log_x=fields.flag("log_x"),
        log_y=fields.flag("log_y"),
    )


def _read_texts(fields: Fields, name: str) -> Sequence[str]:
    items = fields.items(name, 0, _MAX_PARTS)
    if not all(isinstance(item, str) for item in items):
        raise fields.error(name, "must be texts")
    return items


def _read_values(fields: Fields, name: str) -> Mapping[str, Value]:
    below = fields.object(name)
    return {key: _read_value(below, key) for key in below.names}


def _read_value(fields: Fields, name: str) -> Value:
    return fields.check(name, lambda value: value is None or type(value) in (str, int, float, bool), "a plain value")
