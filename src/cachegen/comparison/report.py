"""Results over contexts as a CSV file, a table and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cachegen.comparison.rate_distortion import Result
from cachegen.comparison.schemes import UncompressedScheme
from cachegen.comparison.scoring import bits_per_byte, is_right, perplexity, wilson_interval
from cachegen.errors import BackendUnavailableError
from cachegen.files import atomic_write, write_file

COLUMNS = (
    "protocol",
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
    "kl_quantile",
    "next_token_agreement",
    "nll_delta",
    "perplexity",
    "perplexity_reference",
    "bits_per_byte",
    "bits_per_byte_reference",
    "retrieval_accuracy",
    "answers_kept",
    "answers_lost",
    "answers_gained",
    "questions",
    "written_questions",
    "written_right_reference",
    "written_lost",
    "written_gained",
    "written_lost_low",
    "written_lost_high",
    "continued_tokens",
    "continued_same",
)
_QUESTION_COLUMNS = ("retrieval_accuracy", "answers_kept", "answers_lost", "answers_gained")
_WRITTEN_COLUMNS = COLUMNS[-8:-2]
_CONTINUED_COLUMNS = COLUMNS[-2:]
_QUANTILE = 0.999


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Reduce results to one row per method and setting, with the fields of COLUMNS.

    Bytes are sums over contexts, KL, agreement and NLL means over contexts, `kl_quantile` the 99.9 % quantile over all
    scored tokens, perplexity and bits per byte of all scored text, answers sums over all questions; without questions
    their columns are None. `written_...` are answers in the model's own words; `written_lost_low` and `_high` bound the
    share of lost ones among those that were right uncompressed (`wilson_interval`). `continued_same` is the mean number
    of tokens before the first difference, of `continued_tokens`.
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

    def total(field: str) -> float:
        return sum(result.nll[field] for result in group)

    row = {
        "protocol": group[0].protocol,
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
        "kl_quantile": float(np.quantile(np.concatenate([result.kl_of_tokens for result in group]), _QUANTILE)),
        "next_token_agreement": mean("next_token_agreement"),
        "nll_delta": mean("nll_delta"),
        "perplexity": perplexity(total("decoded"), int(total("tokens"))),
        "perplexity_reference": perplexity(total("reference"), int(total("tokens"))),
        "bits_per_byte": bits_per_byte(total("decoded"), int(total("bytes"))),
        "bits_per_byte_reference": bits_per_byte(total("reference"), int(total("bytes"))),
        "questions": questions,
        **dict.fromkeys(_QUESTION_COLUMNS),
        **dict.fromkeys(_WRITTEN_COLUMNS),
        **dict.fromkeys(_CONTINUED_COLUMNS),
    }
    continued = [result.continued for result in group if result.continued is not None]
    if len(continued) == len(group):
        row["continued_tokens"] = continued[0]["tokens"]
        row["continued_same"] = sum(count["same"] for count in continued) / len(continued)
    if all(result.answers is not None for result in group):
        row.update(_summarize_answers([answer for result in group for answer in result.answers or ()]))
    if questions:
        row["retrieval_accuracy"] = sum(score["right"] for score in asked) / questions
        for column, field in zip(_QUESTION_COLUMNS[1:], ("kept", "lost", "gained"), strict=True):
            row[column] = sum(score[field] for score in asked)
    return {column: row[column] for column in COLUMNS}


def _summarize_answers(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pair the answers of a cache with those of the uncompressed one."""
    pairs = [(is_right(a["metric"], a["reference"]), is_right(a["metric"], a["score"])) for a in answers]
    num_right = sum(was for was, _ in pairs)
    num_lost = sum(was and not now for was, now in pairs)
    low, high = wilson_interval(num_lost, num_right) if num_right else (None, None)
    num_gained = sum(now and not was for was, now in pairs)
    return dict(zip(_WRITTEN_COLUMNS, (len(pairs), num_right, num_lost, num_gained, low, high), strict=True))


def write_answers_csv(path: Path, results: Sequence[Result]) -> None:
    """Write one row per method, setting and question that was answered in the model's own words."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "setting", "context", "question", "metric", "score_reference", "score"])
    for result in results:
        for method in result.bytes_of:
            for number, answer in enumerate(result.answers or ()):
                scores = [f"{answer[field]:.6g}" for field in ("reference", "score")]
                writer.writerow([method, result.setting, result.context, number, answer["metric"], *scores])
    write_file(path, stream.getvalue().encode())


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
    writer.writerow(["protocol", "method", "setting", "context", "encoded_bytes", "tables_bytes", "num_values", "kl",
                     "next_token_agreement", "nll_delta", "right", "lost", "gained", "questions", "kl_quantile",
                     "nll_reference", "nll_decoded", "scored_tokens", "scored_bytes", "continued_same"])  # fmt: skip
    for result in results:
        retrieval = result.retrieval or {}
        for method, count in result.bytes_of.items():
            fidelity = [f"{result.fidelity[f]:.6g}" for f in ("kl", "next_token_agreement", "nll_delta")]
            answers = [retrieval.get(f, "") for f in ("right", "lost", "gained", "questions")]
            text = [result.nll["reference"], result.nll["decoded"], result.nll["tokens"], result.nll["bytes"]]
            writer.writerow(
                [
                    *(result.protocol, method, result.setting, result.context),
                    *(count.encoded, count.tables, result.num_values),
                    *fidelity,
                    *answers,
                    f"{np.quantile(result.kl_of_tokens, _QUANTILE):.6g}",
                    *(f"{number:.8g}" for number in text),
                    (result.continued or {}).get("same", ""),
                ]
            )
    write_file(path, stream.getvalue().encode())


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of `summarize` as a Markdown table, methods in their order, coarse settings first."""
    has_written = any(row["written_questions"] for row in rows)
    lines = [
        "| method | setting | bits per value | without tables | profile, kB | KL, mean (worst) | KL, 99.9 % | "
        "agreement | NLL | perplexity | right | lost | gained |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    if has_written:
        lines[0] += " written right, uncompressed | lost (95 %) | gained |"
        lines[1] += "---:|---:|---:|"
    num_continued = max((row["continued_tokens"] or 0 for row in rows), default=0)
    if num_continued:
        lines[0] += f" same tokens, of {num_continued} |"
        lines[1] += "---:|"
    order = {method: i for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    for row in sorted(rows, key=lambda row: order[row["method"]]):
        right = "" if row["retrieval_accuracy"] is None else f"{100 * row['retrieval_accuracy']:.1f} %"
        lost, gained = ("" if row[c] is None else row[c] for c in ("answers_lost", "answers_gained"))
        continued = "" if row["continued_same"] is None else f"{row['continued_same']:.0f}"
        lines.append(
            f"| {row['method']} | {row['setting']} | {row['bits_per_value']:.3f} "
            f"| {row['bits_per_value_without_tables']:.3f} | {row['profile_bytes'] / 1000:.0f} "
            f"| {row['kl']:.5f} ({row['kl_worst']:.5f}) | {row['kl_quantile']:.4f} "
            f"| {100 * row['next_token_agreement']:.1f} % | {row['nll_delta']:+.4f} | {row['perplexity']:.3f} "
            f"| {right} | {lost} | {gained} |{_format_written(row) if has_written else ''}"
            f"{f' {continued} |' if num_continued else ''}"
        )
    return "\n".join(lines) + "\n"


def _format_written(row: Mapping[str, Any]) -> str:
    if not row["written_questions"]:
        return "  |  |  |"
    lost = str(row["written_lost"])
    if row["written_lost_low"] is not None:
        lost += f" ({100 * row['written_lost_low']:.0f} to {100 * row['written_lost_high']:.0f} %)"
    return f" {row['written_right_reference']} of {row['written_questions']} | {lost} | {row['written_gained']} |"


def write_plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw KL against bits per value, one line per method, as the picture format of the path's suffix.

    The noise floor is a dashed line across.

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
        if method == UncompressedScheme.name:
            axes.axhline(points[0][1], color="grey", linestyle="--", linewidth=1, label="noise floor")
            continue
        axes.plot(*zip(*points, strict=True), marker="osv^D*P"[number % 7], label=method, linewidth=1.2, markersize=5)
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_write(path) as stream:
        figure.savefig(stream, format=path.suffix.removeprefix("."), metadata={})
