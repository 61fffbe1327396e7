"""Outcomes as one HTML page that needs nothing else: tables that sort, figures that show values when pointed at, CSV.

Figures are drawn by Plotly, which is embedded. The page follows the reader's choice of light or dark.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from cachegen.errors import BackendUnavailableError
from cachegen.experiments.markdown import MAX_ROWS
from cachegen.experiments.outcome import Figure, Outcome, Table, Value, format_value

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#8a2be2", "#c71585", "#556b2f")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down", "pentagon", "hexagon")
_SHOWN_SETTINGS = ("model", "processor", "device", "threads", "contexts", "profile", "versions")


def write_page(outcomes: Mapping[str, Sequence[Outcome]], title: str) -> str:
    """Return the page.

    Args:
        outcomes: by the heading that they stand under, such as a model's name.

    Raises:
        BackendUnavailableError: Plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise BackendUnavailableError('the page needs Plotly: pip install "cachegen[report]"') from None
    sections, links, data = [], [], {}
    for number, (heading, found) in enumerate(outcomes.items()):
        prefix = f"r{number}-"
        links.append(f"<strong>{_text(heading)}</strong>")
        links += [f'<a href="#{prefix}{outcome.name}">{_text(outcome.title)}</a>' for outcome in found]
        sections.append(f"<h1>{_text(heading)}</h1>{_describe_setting(found)}")
        for outcome in found:
            sections.append(_write_outcome(outcome, prefix, data))
    return "".join(
        [
            "<!doctype html>\n",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{_text(title)}</title>",
            f"<style>{_read('page.css')}</style></head><body>",
            f"<header><p class=title>{_text(title)}</p><nav>{' '.join(links)}</nav></header><main>",
            *sections,
            "</main>",
            f'<script type="application/json" id="data">{_embed(data)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{_read('page.js')}</script></body></html>\n",
        ]
    )


def _describe_setting(outcomes: Sequence[Outcome]) -> str:
    settings = {name: outcomes[0].setting[name] for name in _SHOWN_SETTINGS if name in outcomes[0].setting}
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(str(value))}</dd>" for name, value in settings.items())
    return f"<dl>{rows}</dl>"


def _write_outcome(outcome: Outcome, prefix: str, data: dict[str, Any]) -> str:
    parts = [f'<section id="{prefix}{outcome.name}"><h2>{_text(outcome.title)}</h2>']
    parts.append(f"<p>{_text(outcome.question)} <span class=paper>{_text(outcome.paper)}</span></p>")
    if outcome.published:
        parts.append("<div class=scroll><table><thead><tr><th></th><th>the paper</th><th>here</th></tr></thead><tbody>")
        for published in outcome.published:
            cells = (published.what, f"{published.value} ({published.setting})", published.ours)
            parts.append(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
        parts.append("</tbody></table></div>")
    for number, figure in enumerate(outcome.figures):
        name = f"{prefix}{outcome.name}-figure{number}"
        data[name] = _draw(figure, outcome.table(figure.table))
        parts.append(f"<figure><figcaption>{_text(figure.title)}</figcaption>")
        parts.append(f'<div class=plot data-figure="{name}"></div></figure>')
    for table in outcome.tables:
        parts.append(_write_table(table, f"{prefix}{outcome.name}-{table.name}", data))
    parts += [f"<p class=note>{_text(note)}</p>" for note in outcome.notes]
    parts.append(f"<pre>{_text(str(outcome.setting.get('command', '')))}</pre></section>")
    return "".join(parts)


def _write_table(table: Table, name: str, data: dict[str, Any]) -> str:
    data[name] = {
        "columns": [column.name for column in table.columns],
        "rows": [[row[column.name] for column in table.columns] for row in table.rows],
    }
    is_long = len(table.rows) > MAX_ROWS
    parts = [f"<details{'' if is_long else ' open'}><summary>{_text(table.title)}</summary>"]
    parts.append(f'<div class=scroll><table data-table="{name}" class=sorts><thead><tr>')
    parts += [f"<th><button type=button>{_text(column.title)}</button></th>" for column in table.columns]
    parts.append("</tr></thead><tbody>")
    for number, row in enumerate(table.rows):
        cells = [_cell(row[column.name], column.digits) for column in table.columns]
        parts.append(f'<tr data-row="{number}">{"".join(cells)}</tr>')
    parts.append(
        f'</tbody></table></div><button type=button class=csv data-csv="{name}">Download CSV</button></details>'
    )
    return "".join(parts)


def _cell(value: Value, digits: int | None) -> str:
    kind = " class=number" if type(value) in (int, float) else ""
    return f"<td{kind}>{_text(format_value(value, digits))}</td>"


def _draw(figure: Figure, table: Table) -> dict[str, Any]:
    """Return a figure's traces and axes, for Plotly; what cannot stand on a logarithmic axis is left out."""
    titles = {column.name: column.title for column in table.columns}
    groups: dict[str, list[Mapping[str, Value]]] = {}
    for row in table.rows:
        if _can_stand(row[figure.x], figure.log_x) and _can_stand(row[figure.y], figure.log_y):
            groups.setdefault("" if figure.series is None else str(row[figure.series]), []).append(row)
    traces = []
    # Of all rows, so that a series looks alike in every figure of a table.
    names = list(dict.fromkeys("" if figure.series is None else str(row[figure.series]) for row in table.rows))
    for name, found in groups.items():
        number, rows = names.index(name), _break_lines(figure, found)
        color, symbol = _COLORS[number % len(_COLORS)], _SYMBOLS[number % len(_SYMBOLS)]
        trace: dict[str, Any] = {
            "x": [row and row[figure.x] for row in rows],
            "y": [row and row[figure.y] for row in rows],
            "name": name,
            "hovertemplate": "%{text}<br>%{x:.4~g}, %{y:.4~g}<extra></extra>",
            "text": [row and " ".join(filter(None, (name, *_label(figure, row)))) for row in rows],
            "marker": {"color": color, "symbol": symbol, "size": 7},
        }
        if figure.kind == "bar":
            trace |= {
                "type": "bar",
                "marker": {"color": color},
                "hovertemplate": "%{x}<br>%{text} %{y:.4~g}<extra></extra>",
            }
        else:
            many = len(rows) > 20
            modes = {"points": "markers", "line": "lines" if many else "lines+markers"}
            trace |= {"type": "scatter", "mode": modes[figure.kind], "line": {"color": color, "width": 2}}
        traces.append(trace)
    return {
        "traces": traces,
        "x": {"title": titles[figure.x], "type": _axis_type(figure, figure.log_x)},
        "y": {"title": titles[figure.y], "type": "log" if figure.log_y else "linear"},
        "has_legend": figure.series is not None,
    }


def _axis_type(figure: Figure, is_log: bool) -> str:
    return "category" if figure.kind == "bar" else "log" if is_log else "linear"


def _label(figure: Figure, row: Mapping[str, Value]) -> list[str]:
    return [str(row[column]) for column in (figure.label, figure.split) if column is not None]


def _break_lines(figure: Figure, rows: Sequence[Mapping[str, Value]]) -> list[Mapping[str, Value] | None]:
    """Put a None, where Plotly breaks a line, between rows that are not to be joined."""
    broken: list[Mapping[str, Value] | None] = []
    for row in rows:
        if figure.split is not None and broken and (last := broken[-1]) and last[figure.split] != row[figure.split]:
            broken.append(None)
        broken.append(row)
    return broken


def _can_stand(value: Value, is_log: bool) -> bool:
    if value is None:
        return False
    return not is_log or (type(value) in (int, float) and float(value) > 0)


def _text(text: str) -> str:
    return html.escape(text)


def _embed(data: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _read(name: str) -> str:
    return resources.files("cachegen.experiments").joinpath(name).read_text(encoding="utf-8")
