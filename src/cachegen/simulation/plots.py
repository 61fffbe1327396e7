"""Draw what a simulation gave: time to first token and loss over bandwidth, and the distribution over random traces."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from cachegen.errors import BackendUnavailableError, ConfigError
from cachegen.files import write_file
from cachegen.simulation.study import Outcome

FORMATS = ("svg", "png", "pdf")


def draw(path: str | os.PathLike[str], outcomes: Sequence[Outcome], deadline_seconds: float, title: str) -> None:
    """Write one figure: per group of traces the distribution of times, or times and losses over constant rates.

    Args:
        path: ends in one of `FORMATS`.
        outcomes: of `run_cases`.
        deadline_seconds: drawn as a line.
        title: what the figure shows and on what it rests.

    Raises:
        ConfigError: `path` has another ending.
        BackendUnavailableError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure_format = check(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.case.group, []).append(outcome)
    num_panels = sum(2 if group.startswith("constant") else 1 for group in groups)
    columns = min(3, num_panels)
    rows = math.ceil(num_panels / columns)
    with rc_context({"svg.hashsalt": "cachegen", "font.size": 8}):
        figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.5), layout="constrained")
        axes = iter(figure.subplots(rows, columns, squeeze=False).flat)
        for group, found in groups.items():
            if group.startswith("constant"):
                _draw_over_rate(next(axes), group, found, deadline_seconds)
                _draw_loss(next(axes), group, found)
            else:
                _draw_distribution(next(axes), group, found, deadline_seconds)
        for unused in axes:
            unused.set_axis_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(title, fontsize=9)
        buffer = BytesIO()
        figure.savefig(
            buffer, format=figure_format, dpi=110, metadata={"Date": None} if figure_format == "svg" else None
        )
    write_file(path, buffer.getvalue())


def check(path: str | os.PathLike[str]) -> str:
    """Return the format of a plot's path, or say what is wrong before hours are spent.

    Raises:
        ConfigError: the path ends in no known format.
        BackendUnavailableError: matplotlib is not installed.
    """
    figure_format = Path(path).suffix.removeprefix(".").lower()
    if figure_format not in FORMATS:
        raise ConfigError(f"`plot`: {path} must end in .{', .'.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BackendUnavailableError('`plot` needs matplotlib: pip install "cachegen[plots]"') from None
    return figure_format


def _by_system(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    systems: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        systems.setdefault(outcome.system, []).append(outcome)
    return systems


def _style(system: str) -> str:
    return ":" if system == "clairvoyant" else "-"


def _draw_over_rate(axes, group: str, outcomes: Sequence[Outcome], deadline_seconds: float) -> None:
    for system, found in _by_system(outcomes).items():
        axes.plot([o.case.parameter for o in found], [o.ttft_seconds for o in found], _style(system), label=system)
    axes.axhline(deadline_seconds, color="0.7", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="Gbps", ylabel="time to first token, s", title=group)


def _draw_loss(axes, group: str, outcomes: Sequence[Outcome]) -> None:
    for system, found in _by_system(outcomes).items():
        axes.plot([o.case.parameter for o in found], [o.loss for o in found], _style(system), label=system)
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set_ylim(bottom=0)
    axes.set(xscale="log", xlabel="Gbps", ylabel="expected KL, nats", title=group)


def _draw_distribution(axes, group: str, outcomes: Sequence[Outcome], deadline_seconds: float) -> None:
    for system, found in _by_system(outcomes).items():
        times = np.sort([o.ttft_seconds for o in found])
        times = np.concatenate([times[:1], times])
        axes.step(times, np.arange(len(times)) / len(found), _style(system), where="post", label=system)
    axes.axvline(deadline_seconds, color="0.7", linewidth=0.8)
    axes.set(xscale="log", xlabel="time to first token, s", ylabel="share of requests", title=group)
