"""Results over contexts as a CSV file, a table and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cachegen.comparison.rate_distortion import Result
from cachegen.errors import BackendUnavailableError
from cachegen.files import atomic_write, write_file

COLUMNS = (
    "method",
    "setting",
    "contexts",
    "bits_per_value",
    "bits_per_value_without_tables",
    "encoded_bytes",
    "tables_bytes",
    "profile_bytes",
    "kl",
    "kl_worst",
    "next_token_agreement",
    "nll_delta",
    "retrieval_accuracy",
    "answers_kept",
    "answers_lost",
    "answers_gained",
    "questions",
)
_QUESTION_COLUMNS = ("retrieval_accuracy", "answers_kept", "answers_lost", "answers_gained")


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Reduce results to one row per method and setting, with the fields of COLUMNS.

    Bytes are sums over contexts, KL, agreement and NLL means over contexts, answers sums over all questions; without
    questions their columns are None.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        for method in result.bytes_of:
            groups.setdefault((method, result.setting), []).append(result)
    return [_summarize(method, setting, group) for (method, setting), group in groups.items()]


def _summarize(method: str, setting: str, group: Sequence[Result]) -> dict[str, Any]:
    counts = [result.bytes_of[method] for result in group]
    num_values = sum(result.num_values for result in group)
    encoded, tables = sum(c.encoded for c in counts), sum(c.tables for c in counts)
    asked = [result.retrieval for result in group if result.retrieval is not None]
    questions = sum(score["questions"] for score in asked) if len(asked) == len(group) else 0

    def mean(field: str) -> float:
        return sum(result.fidelity[field] for result in group) / len(group)

    row = {
        "method": method,
        "setting": setting,
        "contexts": len(group),
        "bits_per_value": 8 * encoded / num_values,
        "bits_per_value_without_tables": 8 * (encoded - tables) / num_values,
        "encoded_bytes": encoded,
        "tables_bytes": tables,
        "profile_bytes": max(c.profile for c in counts),
        "kl": mean("kl"),
        "kl_worst": max(result.fidelity["kl"] for result in group),
        "next_token_agreement": mean("next_token_agreement"),
        "nll_delta": mean("nll_delta"),
        "questions": questions,
        **dict.fromkeys(_QUESTION_COLUMNS),
    }
    if questions:
        row["retrieval_accuracy"] = sum(score["right"] for score in asked) / questions
        for column, field in zip(_QUESTION_COLUMNS[1:], ("kept", "lost", "gained"), strict=True):
            row[column] = sum(score[field] for score in asked)
    return {column: row[column] for column in COLUMNS}


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of `summarize`, whole or not at all; what was not measured is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([f"{row[c]:.6g}" if isinstance(row[c], float) else row[c] for c in COLUMNS])
    write_file(path, stream.getvalue().encode())


def write_per_context_csv(path: Path, results: Sequence[Result]) -> None:
    """Write one row per method, setting and context, so that differences can be paired."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "setting", "context", "encoded_bytes", "tables_bytes", "num_values", "kl",
                     "next_token_agreement", "nll_delta", "right", "lost", "gained", "questions"])  # fmt: skip
    for result in results:
        retrieval = result.retrieval or {}
        for method, count in result.bytes_of.items():
            fidelity = [f"{result.fidelity[f]:.6g}" for f in ("kl", "next_token_agreement", "nll_delta")]
            answers = [retrieval.get(f, "") for f in ("right", "lost", "gained", "questions")]
            writer.writerow(
                [
                    *(method, result.setting, result.context, count.encoded, count.tables, result.num_values),
                    *fidelity,
                    *answers,
                ]
            )
    write_file(path, stream.getvalue().encode())


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of `summarize` as a Markdown table, methods in their order, coarse settings first."""
    lines = [
        "| method | setting | bits per value | without tables | profile, kB | KL, mean (worst) | agreement | NLL | "
        "right | lost | gained |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = {method: i for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    for row in sorted(rows, key=lambda row: order[row["method"]]):
        right = "" if row["retrieval_accuracy"] is None else f"{100 * row['retrieval_accuracy']:.1f} %"
        lost, gained = ("" if row[c] is None else row[c] for c in ("answers_lost", "answers_gained"))
        lines.append(
            f"| {row['method']} | {row['setting']} | {row['bits_per_value']:.3f} "
            f"| {row['bits_per_value_without_tables']:.3f} | {row['profile_bytes'] / 1000:.0f} "
            f"| {row['kl']:.5f} ({row['kl_worst']:.5f}) | {100 * row['next_token_agreement']:.1f} % "
            f"| {row['nll_delta']:+.4f} | {right} | {lost} | {gained} |"
        )
    return "\n".join(lines) + "\n"


def write_plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw KL against bits per value, one line per method, as the picture format of the path's suffix.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendUnavailableError(
            'the plot needs matplotlib: pip install "cachegen[plots]", or leave it out with `no_plot`'
        ) from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xscale="log",
        yscale="log",
        xlabel="bits per value, all bytes of a document counted",
        ylabel="KL, nats per token",
    )
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted((row["bits_per_value"], row["kl"]) for row in rows if row["method"] == method)
        axes.plot(*zip(*points, strict=True), marker="osv^D*P"[number % 7], label=method, linewidth=1.2, markersize=5)
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_write(path) as stream:
        figure.savefig(stream, format=path.suffix.removeprefix("."), metadata={})
