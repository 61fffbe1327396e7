"""The probability tables of the entropy coder: integers that are decided once, in the encoder, and travel.

A frequency table has up to 32 symbols and sums to 4096. It is made from a document's own symbol counts, one table per
(plane, channel), and is stored compactly: every frequency is rounded to a weight of three significant bits, weights
are numbered by their class, and the differences of neighbouring classes are Rice coded (docs/format.md, "Frequency
tables"). On real caches that is about 75 bits per channel at 16 bins and 115 at 32, against 528 for the original's
16-bit CDF, and the rounding costs 0.002 bits per value. src/csrc/frequency_tables.h is the fast reader.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cachegen.errors import BitstreamError
from cachegen.format import TABLE_SIZE

FREQUENCY_TOTAL = 4096
SYMBOL_INDEX_BITS = 5
RICE_BITS = 2


def _make_weights() -> NDArray[np.int64]:
    """All integers up to 4096 with at most three significant bits; a weight's index is its class."""
    weights = []
    for weight in range(FREQUENCY_TOTAL + 1):
        significant = weight
        while significant >= 8 and significant % 2 == 0:
            significant //= 2
        if significant < 8:
            weights.append(weight)
    return np.array(weights, dtype=np.int64)


WEIGHTS = _make_weights()
# Class boundaries: the geometric mean of neighbouring weights, since a table's cost depends on ratios.
_BOUNDARIES = np.sqrt(WEIGHTS[1:-1].astype(np.float64) * WEIGHTS[2:])


def choose_weight_classes(counts: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Round symbol counts to weight classes.

    Args:
        counts: `[num_tables, 32]`, each row with a non-zero sum.

    Returns:
        int64 `[num_tables, 32]`; a symbol that occurs has at least class 1.
    """
    totals = counts.sum(axis=1, keepdims=True, dtype=np.int64)
    targets = counts.astype(np.float64) * FREQUENCY_TOTAL / totals
    classes = np.searchsorted(_BOUNDARIES, targets) + 1
    return np.where(counts > 0, classes, 0)


def normalize(weight_classes: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Turn weight classes into frequencies that sum to 4096; see `normalize_weights`.

    Args:
        weight_classes: `[num_tables, 32]`, each row with a non-zero class.

    Returns:
        uint16 `[num_tables, 32]`.
    """
    return normalize_weights(WEIGHTS[weight_classes])


def normalize_weights(weights: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Turn weights into frequencies that sum to 4096.

    Args:
        weights: `[num_tables, 32]`, each row with a sum of 1 to 2^19.

    Returns:
        uint16 `[num_tables, 32]`: weights scaled to a sum of 4096 and floored, but at least 1 where the weight is not
        0; the first of the largest weights takes what is left over.
    """
    scaled = weights * FREQUENCY_TOTAL // weights.sum(axis=1, keepdims=True)
    frequencies = np.where(weights > 0, np.maximum(scaled, 1), 0)
    rows = np.arange(len(weights))
    frequencies[rows, weights.argmax(axis=1)] += FREQUENCY_TOTAL - frequencies.sum(axis=1)
    return frequencies.astype(np.uint16)


def pack_tables(weight_classes: NDArray[np.int64]) -> bytes:
    """Write the tables of one plane in their compact form.

    Args:
        weight_classes: `[num_tables, 32]`, each row with a non-zero class.

    Returns:
        Per table its first and last present symbol (5 bits each), then for each symbol from first to last the Rice
        code of the difference to the class before it (zigzag: 0, -1, 1, -2, 2, ...), the first against class 0. Bits
        fill bytes from the most significant one; the last byte is filled up with zeros.
    """
    present = weight_classes > 0
    first = present.argmax(axis=1)
    last = TABLE_SIZE - 1 - present[:, ::-1].argmax(axis=1)
    symbols = np.arange(TABLE_SIZE)
    differences = np.diff(weight_classes, axis=1, prepend=0)
    zigzag = np.where(differences > 0, 2 * differences, -2 * differences - 1)
    zigzag = np.where(differences == 0, 0, zigzag)
    quotient = zigzag >> RICE_BITS
    # One fixed-length code and its length per item: first and last together, then the symbols' Rice codes. A Rice code
    # is `quotient` ones, a zero and the remainder; its value as a number follows.
    rice_values = (((1 << quotient) - 1) << (RICE_BITS + 1)) | (zigzag & ((1 << RICE_BITS) - 1))
    rice_lengths = quotient + 1 + RICE_BITS
    is_coded = (symbols >= first[:, None]) & (symbols <= last[:, None])
    values = np.concatenate([(first << SYMBOL_INDEX_BITS | last)[:, None], rice_values], axis=1)
    lengths = np.concatenate(
        [np.full((len(first), 1), 2 * SYMBOL_INDEX_BITS), np.where(is_coded, rice_lengths, 0)], axis=1
    )
    values, lengths = values.ravel(), lengths.ravel()
    ends = np.cumsum(lengths)
    shifts = np.repeat(ends, lengths) - 1 - np.arange(ends[-1])
    return np.packbits((np.repeat(values, lengths) >> shifts) & 1).tobytes()


def unpack_tables(content: bytes, num_tables: int, alphabet_size: int) -> NDArray[np.int64]:
    """Read the tables of one plane; the inverse of `pack_tables`, in plain Python.

    Returns:
        Weight classes, int64 `[num_tables, 32]`.

    Raises:
        BitstreamError: the bytes are not such tables.
    """
    bits = np.unpackbits(np.frombuffer(content, np.uint8)).tolist()
    position = 0

    def read(count: int) -> int:
        nonlocal position
        if position + count > len(bits):
            raise BitstreamError("the tables end too early", field="tables")
        value = 0
        for bit in bits[position : position + count]:
            value = value << 1 | bit
        position += count
        return value

    classes = np.zeros((num_tables, TABLE_SIZE), dtype=np.int64)
    for table in range(num_tables):
        first, last = read(SYMBOL_INDEX_BITS), read(SYMBOL_INDEX_BITS)
        if not first <= last < alphabet_size:
            raise BitstreamError(f"symbols {first} to {last} are not within {alphabet_size}", field="tables")
        weight_class = 0
        for symbol in range(first, last + 1):
            quotient = 0
            while read(1):
                quotient += 1
            zigzag = quotient << RICE_BITS | read(RICE_BITS)
            weight_class += -((zigzag + 1) // 2) if zigzag & 1 else zigzag // 2
            if not 0 <= weight_class < len(WEIGHTS):
                raise BitstreamError(f"weight class {weight_class} does not exist", field="tables")
            classes[table, symbol] = weight_class
        if not classes[table, first] or not classes[table, last]:
            raise BitstreamError("the first or last symbol of a table is absent", field="tables")
    if len(bits) - position >= 8 or any(bits[position:]):
        raise BitstreamError("the tables do not end where they should", field="tables")
    return classes
