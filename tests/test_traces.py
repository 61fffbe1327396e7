"""Bandwidth traces: files that come back as they went, generators that are seeded, and bad lines in one line."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cachegen.errors import InputError
from cachegen.simulation import traces
from cachegen.simulation.traces import BYTES_PER_GIGABIT, SEEDED_TRACES, BandwidthTrace, load_trace, save_trace


def write(tmp_path, *lines: str):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_piecewise_constant_trace_is_integrated_exactly():
    trace = BandwidthTrace("t", (10.0, 0.0, 4.0), (0.0, 2.0, 5.0))
    assert [trace.rate_at(t) for t in (0, 1.9, 2, 4.9, 5, 1e9)] == [10, 10, 0, 0, 4, 4]
    assert [trace.next_change(t) for t in (0, 2, 5)] == [2, 5, math.inf]
    assert [trace.bytes_until(t) for t in (0, 1, 2, 5, 7)] == [0, 10, 20, 20, 28]


def test_a_file_gives_what_it_says(tmp_path):
    path = write(
        tmp_path, '{"name": "mine", "connection_gbps": 1}', '{"seconds": 0.5, "gbps": 8}', '{"seconds": 1, "gbps": 0}'
    )
    trace = load_trace(path)
    assert (trace.name, trace.starts, trace.rates) == ("mine", (0.0, 0.5), (1e9, 0.0))
    assert trace.connection_rate == BYTES_PER_GIGABIT


def test_a_file_without_a_header_is_named_after_itself(tmp_path):
    assert load_trace(write(tmp_path, '{"seconds": 1, "gbps": 2.5}')).name == "trace"


def test_a_trace_indexed_by_chunk_takes_its_rates_in_turn(tmp_path):
    trace = load_trace(write(tmp_path, '{"indexed_by": "chunk"}', '{"gbps": 8}', '{"gbps": 16}'))
    assert trace.is_per_chunk and [trace.rate_of_chunk(i) for i in range(3)] == [1e9, 2e9, 1e9]


@pytest.mark.parametrize("kind", SEEDED_TRACES)
def test_generators_are_seeded_and_their_files_come_back(kind, tmp_path):
    trace = SEEDED_TRACES[kind](3)
    assert trace == SEEDED_TRACES[kind](3) != SEEDED_TRACES[kind](4)
    save_trace(tmp_path / "t.jsonl", trace)
    read = load_trace(tmp_path / "t.jsonl")
    assert (read.name, read.is_per_chunk) == (trace.name, trace.is_per_chunk)
    np.testing.assert_allclose(read.rates, trace.rates)
    np.testing.assert_allclose(read.starts, trace.starts)
    np.testing.assert_allclose(read.first_byte_seconds, trace.first_byte_seconds)


def test_generators_keep_within_what_they_promise():
    uniform = np.array(traces.uniform_per_chunk(0).rates) / BYTES_PER_GIGABIT
    assert uniform.min() >= 0.1 and uniform.max() <= 10
    markov = set(np.round(np.array(traces.markov(0).rates) / BYTES_PER_GIGABIT, 4))
    assert markov <= {0.606, 0.1515}
    for seed in range(20):
        before, stalled, after = traces.outage(seed).starts
        assert before == 0 and stalled < 0.5 and 0.5 <= after - stalled <= 2
        assert 0 < traces.step_drop(seed).starts[1] <= 0.5


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "holds no piece"),
        (['{"name": "only a header"}'], "holds no piece"),
        (["0.1 2.5"], "line 1: not JSON"),
        (["[1, 2]"], "line 1: must be a JSON object"),
        (['{"seconds": 1, "gbps": 2}', '{"seconds": 1}'], "line 2: must be an object of gbps, seconds"),
        (['{"seconds": 1, "gbps": -1}'], "line 1: gbps must be a number"),
        (['{"seconds": 0, "gbps": 1}'], "line 1: seconds must be a number above 0"),
        (['{"seconds": 1, "gbps": NaN}'], "line 1: not JSON"),
        (['{"seconds": 1, "gbps": true}'], "line 1: gbps must be a number"),
        (['{"seconds": 1, "gbps": "2"}'], "line 1: gbps must be a number"),
        (['{"indexed_by": "moon"}', '{"gbps": 1}'], "line 1: indexed_by must be one of time, chunk"),
        (['{"indexed_by": "chunk"}', '{"gbps": 1, "seconds": 1}'], "line 2: must be an object of gbps"),
        (['{"first_byte_seconds": 0.1}', '{"seconds": 1, "gbps": 1}'], "line 1: first_byte_seconds must be a list"),
        (['{"speed": 3}'], "line 1: unknown field speed"),
        (['{"seconds": 1e11, "gbps": 1}', '{"seconds": 1e-9, "gbps": 1}', '{"seconds": 1, "gbps": 1}'], "must ascend"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, lines, says):
    path = write(tmp_path, *lines)
    with pytest.raises(InputError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(str(path)) and says in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such trace file"):
        load_trace(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_trace(tmp_path / "binary")
