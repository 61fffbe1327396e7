"""Draw what the workers of a load did when: fetch, decode, copy and compute, per chunk, from the load's own log."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from cachegen.errors import BackendUnavailableError
from cachegen.files import write_file
from cachegen.streaming.policy import TEXT

WORKERS = ("fetch", "decode", "copy", "compute")
_TEXT_COLOR = "0.55"
_LEVEL_COLORS = ("#9ecae1", "#4292c6", "#08519c", "#08306b")


def draw_timeline(
    path: str | os.PathLike[str], spans: Sequence[Mapping[str, Any]], title: str, marks: Mapping[str, float]
) -> None:
    """Write one picture, a lane per worker, each span labelled with its chunk and coloured by its level.

    Args:
        path: a PNG.
        spans: the `timeline` of run_decoding_remote.py's JSON.
        title: what ran, over which link.
        marks: times in seconds to be marked with a line, by their label.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise BackendUnavailableError('a picture needs matplotlib: pip install "cachegen[plots]"') from None
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(WORKERS)), WORKERS)
    axes.set_ylim(len(WORKERS) - 0.4, -0.6)
    end = max([span["end_seconds"] for span in spans] + list(marks.values()))
    for span in spans:
        start, width = span["start_seconds"], span["end_seconds"] - span["start_seconds"]
        lane, is_done = WORKERS.index(span["worker"]), span["outcome"] == "done"
        color = _TEXT_COLOR if span["level"] == TEXT else _LEVEL_COLORS[min(span["level"], len(_LEVEL_COLORS)) - 1]
        axes.barh(
            lane,
            width,
            left=start,
            height=0.7,
            color=color,
            edgecolor="white",
            linewidth=0.4,
            hatch=None if is_done else "////",
            alpha=1.0 if is_done else 0.5,
        )
        if width > 0.012 * end:
            axes.text(start + width / 2, lane, str(span["chunk"]), ha="center", va="center", fontsize=6, color="black")
    for label, seconds in marks.items():
        axes.axvline(seconds, color="#cb181d", linewidth=0.8, linestyle="--")
        side = "left" if len(marks) > 1 and seconds == max(marks.values()) else "right"  # labels of near marks part
        axes.text(seconds, -0.62, label, ha=side, va="bottom", fontsize=7, color="#cb181d")
    levels = sorted({span["level"] for span in spans if span["level"] != TEXT})
    handles = [Patch(color=_LEVEL_COLORS[min(n, len(_LEVEL_COLORS)) - 1], label=f"level {n}") for n in levels]
    handles += [Patch(color=_TEXT_COLOR, label="from text"), Patch(facecolor="0.8", hatch="////", label="not used")]
    axes.legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set_xlim(0, 1.02 * end)
    axes.set_xlabel("seconds since the request; numbers are chunks", fontsize=8)
    axes.set_title(title, fontsize=8, pad=14)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue())
