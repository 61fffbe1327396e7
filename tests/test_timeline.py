"""The picture of a load: every worker and outcome can be drawn, and a missing package is said."""

from __future__ import annotations

import sys
from dataclasses import asdict

import pytest

from cachegen.errors import BackendUnavailableError
from cachegen.streaming.load_report import Span
from cachegen.streaming.policy import TEXT
from cachegen.streaming.timeline import WORKERS, draw_timeline

SPANS = [
    asdict(Span(worker, chunk, level, 0.1 * chunk, 0.1 * chunk + 0.08, 1000, outcome))
    for worker in WORKERS
    for chunk, (level, outcome) in enumerate([(1, "done"), (3, "cancelled"), (9, "no such object"), (TEXT, "done")])
]


@pytest.mark.parametrize("spans", [SPANS, SPANS[:1], []], ids=["many", "one", "none"])
def test_a_timeline_becomes_a_png(tmp_path, spans):
    draw_timeline(tmp_path / "timeline.png", spans, "a title", {"first token": 0.5})
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_command_that_installs_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r'pip install "cachegen\[plots\]"'):
        draw_timeline(tmp_path / "timeline.png", SPANS, "a title", {})
    assert list(tmp_path.iterdir()) == []
