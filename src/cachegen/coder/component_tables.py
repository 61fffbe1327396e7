"""Probability tables of quantized components, by scale index: defined in integers, so that nothing has to travel.

A component's scale index says how large its standard deviation is in steps, in quarters of an octave. Index 0: not
coded. Components coded anew have a logistic distribution, those that refine the level before the one of a third of a
logistic's cell. Every machine computes the same tables from the thirty constants below.

Source: on held-out calibration caches of the bundled model, logistic distributions cost 0.5 % over each component's own
empirical entropy, Gauss's as much, Laplace's 1.7 %; the logistic one is an integer recurrence. docs/rate_distortion.md.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cachegen.coder.symbol_model import normalize_weights
from cachegen.format import MAX_LOW_BITS, TABLE_SIZE

NUM_CODED_SCALES = 13
"""Scale indices with a table of their own; larger ones halve their component until it has one of these."""
NUM_REFINED_SCALES = 24
"""Scale indices of the level before with a refinement table of their own; beyond, thirds are equally likely."""

_INDEX_OF_UNIT_SCALE = 8  # of a standard deviation of one step
_LOGS_PER_INDEX = 4
_THIRD = 6  # a step a third as large is six indices more: 2^(6 / 4) = 2.83
_UNIT = 1 << 30
_WEIGHT_SHIFT = 11  # weights sum to 2^19
_MIN_WEIGHT = 8  # 2^-16: rarer symbols are escapes
_MAX_COARSE = 255

# floor(2^30 exp(-1 / (2 s))) for the logistic scale s = sigma sqrt(3) / pi of sigma = 2^((i - 8) / 4), i = 1 to 30.
HALF_STEPS = (
    50829154, 82583111, 124203549, 175055925, 233618040, 297780020, 365188370, 433549153, 500844747, 565454562,
    626193282, 682290157, 733333452, 779199726, 819981656, 855922588, 887361706, 914690841, 938322225, 958665677,
    976113404, 991030681, 1003750874, 1014573522, 1023764517, 1031557604, 1038156681, 1043738484, 1048455425,
    1052438380,
)  # fmt: skip


@dataclass(frozen=True)
class LevelCoding:
    """How the components of one group are coded at one level; one entry per coded component.

    Attributes:
        table_indices: uint16, rows of `component_frequencies`.
        low_bits: uint8, stored raw below the table-coded high part.
        num_refined: the first so many components refine the level before.
    """

    table_indices: NDArray[np.uint16]
    low_bits: NDArray[np.uint8]
    num_refined: int

    @property
    def num_components(self) -> int:
        return len(self.table_indices)


def scale_indices(scale_logs: NDArray[np.int16], step_log: int) -> NDArray[np.int64]:
    """Return the scale indices of components at a step.

    Args:
        scale_logs: 16 log2 of the components' standard deviations.
        step_log: 16 log2 of the step.

    Returns:
        int64, 0 (not coded) to 13 + 4 * 8: the standard deviation is about 2^((index - 8) / 4) steps.
    """
    rounded = (scale_logs.astype(np.int64) - step_log + _LOGS_PER_INDEX // 2) // _LOGS_PER_INDEX
    return np.clip(rounded + _INDEX_OF_UNIT_SCALE, 0, NUM_CODED_SCALES + 4 * MAX_LOW_BITS)


def plan_level(scale_logs: NDArray[np.int16], step_log: int, coarse_step_log: int | None) -> LevelCoding:
    """Decide how a level codes a group's components.

    Args:
        scale_logs: of all components, not increasing, so that the coded ones come first.
        step_log: of the level.
        coarse_step_log: of the level before; None at level 1.
    """
    indices = scale_indices(scale_logs, step_log)
    indices = indices[indices > 0]
    low_bits = np.maximum(-(-(indices - NUM_CODED_SCALES) // 4), 0)
    tables = indices - 4 * low_bits - 1
    num_refined = 0
    if coarse_step_log is not None:
        coarse = scale_indices(scale_logs, coarse_step_log)
        coarse = coarse[coarse > 0]
        num_refined = len(coarse)
        tables[:num_refined] = NUM_CODED_SCALES + np.minimum(coarse, NUM_REFINED_SCALES) - 1
        low_bits[:num_refined] = 0
    return LevelCoding(tables.astype(np.uint16), low_bits.astype(np.uint8), num_refined)


@cache
def component_frequencies() -> NDArray[np.uint16]:
    """Return all tables, uint16 `[13 + 24, 32]`: those of components coded anew, then those of refinements."""
    weights = [_coded_weights(index) for index in range(1, NUM_CODED_SCALES + 1)]
    weights += [_refinement_weights(index) for index in range(1, NUM_REFINED_SCALES + 1)]
    return normalize_weights(np.array(weights, dtype=np.int64))


def _tail_probabilities(index: int, count: int) -> list[int]:
    """Return S[q] = P(component > q - 1/2) in units of 2^-30 for q = 0 to count - 1, of a logistic component.

    e^(-(q - 1/2) / s) is h^(2q - 1), and S[q] = h^(2q - 1) / (1 + h^(2q - 1)).
    """
    half_step = HALF_STEPS[index - 1]
    step = half_step * half_step >> 30
    tails, power = [], half_step
    for _ in range(1, count):
        tails.append((power << 30) // (_UNIT + power))
        power = power * step >> 30
    return [_UNIT - tails[0], *tails]


def _coded_weights(index: int) -> list[int]:
    """Weights of the high parts 0 to 31, for components -16 to 15."""
    tails = _tail_probabilities(index, TABLE_SIZE // 2 + 2)
    probabilities = [low - high for low, high in itertools.pairwise(tails)]  # of components 0 to 16
    middle = TABLE_SIZE // 2
    return [_weight(probabilities[abs(symbol - middle)]) for symbol in range(TABLE_SIZE)]


def _refinement_weights(index: int) -> list[int]:
    """Weights of the three thirds of a cell: towards zero, middle, away from it."""
    tails = _tail_probabilities(index + _THIRD, 3 * _MAX_COARSE + 3)
    fine = [low - high for low, high in itertools.pairwise(tails)]  # of fine components 0, 1, 2, ...
    # The cell of zero is symmetric; the others count twice, once for each sign.
    inner, middle, outer = fine[1], fine[0], fine[1]
    for coarse in range(1, _MAX_COARSE + 1):
        inner += 2 * fine[3 * coarse - 1]
        middle += 2 * fine[3 * coarse]
        outer += 2 * fine[3 * coarse + 1]
    return [_weight(part, least=1) for part in (inner, middle, outer)] + [0] * (TABLE_SIZE - 3)


def _weight(probability: int, least: int = 0) -> int:
    weight = probability >> _WEIGHT_SHIFT
    return weight if weight >= _MIN_WEIGHT else least
