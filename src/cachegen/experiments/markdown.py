"""Outcomes of experiments as Markdown: the same numbers as on the page, for those who read text."""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.experiments.outcome import Column, Outcome, Table, Value, format_value

MAX_ROWS = 100
"""Of a table that is written out; longer ones are named, and stand in the JSON file."""


def format_outcomes(outcomes: Sequence[Outcome]) -> str:
    """Return a document of all outcomes."""
    model = outcomes[0].setting.get("model", "")
    lines = [f"# The paper's experiments on {model}", ""]
    lines += ["Written by `scripts/paper.py` from the JSON files beside it; do not edit.", ""]
    for outcome in outcomes:
        lines += _format_outcome(outcome)
    return "\n".join(lines).rstrip() + "\n"


def format_table(table: Table) -> str:
    """Return a table in Markdown."""
    columns = table.columns
    lines = [
        "| " + " | ".join(_escape(column.title) for column in columns) + " |",
        "|" + "".join("---:|" if _is_numeric(table, column) else "---|" for column in columns),
    ]
    for row in table.rows:
        cells = [_escape(format_value(row[column.name], column.digits)) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _format_outcome(outcome: Outcome) -> list[str]:
    lines = [f"## {outcome.title}", "", f"{outcome.question} ({outcome.paper}.)", ""]
    if outcome.published:
        lines += ["| | the paper | here |", "|---|---|---|"]
        for published in outcome.published:
            said = f"{published.value} ({published.setting})"
            lines.append(f"| {_escape(published.what)} | {_escape(said)} | {_escape(published.ours)} |")
        lines.append("")
    for table in outcome.tables:
        if len(table.rows) > MAX_ROWS:
            lines += [f"{table.title}: {len(table.rows)} rows, in {outcome.name}.json.", ""]
        else:
            lines += [f"{table.title}:", "", format_table(table)]
    for note in outcome.notes:
        lines += [note, ""]
    lines += [f"    {outcome.setting.get('command', '')}", ""]
    return lines


def _is_numeric(table: Table, column: Column) -> bool:
    values: list[Value] = [row[column.name] for row in table.rows]
    return all(value is None or type(value) in (int, float) for value in values)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
