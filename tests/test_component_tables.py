"""Tables by scale index: those of a logistic distribution, the same on every machine, for ever."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from cachegen.coder.component_tables import (
    HALF_STEPS,
    NUM_CODED_SCALES,
    NUM_REFINED_SCALES,
    component_frequencies,
    plan_level,
    scale_indices,
)
from cachegen.methods.transform.transform import LEVEL_RATIO_LOG

CODED = range(1, NUM_CODED_SCALES + 1)
REFINED = range(1, NUM_REFINED_SCALES + 1)


def logistic_scale(index: int) -> float:
    """The logistic's own scale of a standard deviation of 2^((index - 8) / 4) steps."""
    return 2 ** ((index - 8) / 4) * math.sqrt(3) / math.pi


def cell(component: int, scale: float) -> float:
    """The probability of a logistic variable between component - 1/2 and component + 1/2."""
    low, high = (min((abs(component) + side) / scale, 700.0) for side in (-0.5, 0.5))
    return 1 / (1 + math.exp(low)) - 1 / (1 + math.exp(high))  # by tails, which keep their digits far out


def frequencies_of(probabilities: list[float], *, has_cut: bool) -> list[float]:
    """What a table should be but for rounding: rare symbols cut, a sum of 4096, at least 1."""
    kept = [p if p >= 2**-16 or not has_cut else 0 for p in probabilities]
    return [max(1.0, 4096 * p / sum(kept)) if p else 0 for p in kept]


def check_table(found: list[int], expected: list[float]) -> None:
    assert sum(found) == 4096
    assert [f > 0 for f in found] == [e > 0 for e in expected]
    largest = expected.index(max(expected))
    for symbol, (frequency, exact) in enumerate(zip(found, expected, strict=True)):
        # Floored, but for the largest, which takes what all the others leave.
        assert abs(frequency - exact) <= (32 if symbol == largest else 1.001), symbol


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(1, 31))
def test_constants_are_those_of_the_logistic(index: int) -> None:
    assert abs(HALF_STEPS[index - 1] - 2**30 * math.exp(-0.5 / logistic_scale(index))) <= 1


def test_there_are_constants_for_the_finest_refinement() -> None:
    assert len(HALF_STEPS) == NUM_REFINED_SCALES + 6 == 30


@pytest.mark.parametrize("index", CODED)
def test_tables_of_components_coded_anew_are_logistic(index: int) -> None:
    probabilities = [cell(symbol - 16, logistic_scale(index)) for symbol in range(32)]
    check_table(component_frequencies()[index - 1].tolist(), frequencies_of(probabilities, has_cut=True))


@pytest.mark.parametrize("index", REFINED)
def test_refinement_tables_are_the_thirds_of_a_logistics_cells(index: int) -> None:
    # A step a third as large is taken for six indices: 2^(6 / 4) is 2.83.
    scale = logistic_scale(index + 6)
    inner, middle, outer = cell(1, scale), cell(0, scale), cell(1, scale)
    for coarse in range(1, 256):
        inner += 2 * cell(3 * coarse - 1, scale)
        middle += 2 * cell(3 * coarse, scale)
        outer += 2 * cell(3 * coarse + 1, scale)
    found = component_frequencies()[NUM_CODED_SCALES + index - 1].tolist()
    check_table(found, frequencies_of([inner, middle, outer] + [0.0] * 29, has_cut=False))


def test_every_table_sums_to_4096_and_has_the_symbol_of_zero() -> None:
    tables = component_frequencies()
    assert tables.shape == (NUM_CODED_SCALES + NUM_REFINED_SCALES, 32) and tables.dtype == np.uint16
    assert (tables.sum(axis=1) == 4096).all()
    assert (tables[:NUM_CODED_SCALES, 16] > 0).all() and (tables[NUM_CODED_SCALES:, :3] > 0).all()
    assert (tables[NUM_CODED_SCALES:, 3:] == 0).all()


def test_present_symbols_have_no_gaps() -> None:
    for table in component_frequencies()[:NUM_CODED_SCALES]:
        present = np.flatnonzero(table)
        assert (np.diff(present) == 1).all()


def test_wider_scales_have_flatter_tables() -> None:
    tables = component_frequencies()
    assert (np.diff(tables[:NUM_CODED_SCALES, 16].astype(int)) < 0).all()
    assert (np.diff(tables[NUM_CODED_SCALES:, 1].astype(int)) <= 0).all()


def test_tables_never_change() -> None:
    # Files hold no tables: another table is another format.
    content = component_frequencies().astype("<u2").tobytes()
    assert hashlib.sha256(content).hexdigest() == "807db845daeba49309251f2abf8ea341979cf592e242de3cc9031921b28c6aa9"
    constants = ",".join(map(str, HALF_STEPS)).encode()
    assert hashlib.sha256(constants).hexdigest() == "7d1829993a76540527e7cb476aa264269705843e0b3f811d48a8adf5b4053d22"


# --- scale indices ----------------------------------------------------------------------------------------------------


def test_scale_indices_grow_with_the_scale_and_are_bounded() -> None:
    logs = np.arange(-(1 << 14), (1 << 14) + 1, dtype=np.int16)
    indices = scale_indices(logs, 0)
    assert (np.diff(indices) >= 0).all() and (indices[0], indices[-1]) == (0, 45)


@pytest.mark.parametrize(
    ("scale_log", "step_log", "index"),
    [
        (0, 0, 8),
        (1, 0, 8),
        (2, 0, 9),
        (-2, 0, 8),
        (-3, 0, 7),
        (16, 0, 12),
        (16, 16, 8),
        (-30, 0, 1),
        (-31, 0, 0),
        (32767, -1024, 45),
        (-32768, 1024, 0),
    ],
)
def test_scale_indices_are_quarters_of_an_octave_above_an_eighth_one(scale_log: int, step_log: int, index: int) -> None:
    assert scale_indices(np.array([scale_log], np.int16), step_log).tolist() == [index]


def test_scales_beyond_the_tables_halve_the_component() -> None:
    logs = np.array([4 * (index - 8) for index in range(45, -3, -1)], np.int16)
    coding = plan_level(logs, 0, None)
    assert coding.num_components == 45 and coding.num_refined == 0
    for index, table, low_bits in zip(range(45, 0, -1), coding.table_indices, coding.low_bits, strict=True):
        expected = next(k for k in range(9) if index - 4 * k <= 13)
        assert (low_bits, table) == (expected, index - 4 * expected - 1)


def test_a_level_refines_what_the_one_before_codes_and_codes_the_rest_anew() -> None:
    logs = np.arange(120, -120, -5, dtype=np.int16)
    first, second = plan_level(logs, 0, None), plan_level(logs, -LEVEL_RATIO_LOG, 0)
    assert second.num_refined == first.num_components < second.num_components
    coarse = scale_indices(logs, 0)[: first.num_components]
    assert second.table_indices[: second.num_refined].tolist() == [13 + min(index, 24) - 1 for index in coarse]
    assert not second.low_bits[: second.num_refined].any()
    alone = plan_level(logs, -LEVEL_RATIO_LOG, None)
    assert (second.table_indices[second.num_refined :] == alone.table_indices[second.num_refined :]).all()
    assert (second.low_bits[second.num_refined :] == alone.low_bits[second.num_refined :]).all()


def test_nothing_is_coded_where_all_scales_are_small() -> None:
    coding = plan_level(np.full(5, -1000, np.int16), 0, None)
    assert (coding.num_components, coding.num_refined) == (0, 0)
