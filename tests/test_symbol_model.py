"""Frequency tables: normalization, the compact form, and the native reader of it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cachegen import _native
from cachegen.coder import cpu
from cachegen.coder.symbol_model import WEIGHTS, choose_weight_classes, normalize, pack_tables, unpack_tables
from cachegen.errors import BitstreamError
from cachegen.format import PlaneLayout
from tests.reference import planes as reference

Native = cpu.Tables

class_rows = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 5), st.just(32)), elements=st.sampled_from([0, 0, 0, *range(45)])
).filter(lambda classes: classes.any(axis=1).all())


def rice(difference: int) -> str:
    """The Rice code of a class difference, from docs/format.md."""
    z = 2 * difference if difference > 0 else -2 * difference - 1 if difference < 0 else 0
    return "1" * (z // 4) + "0" + f"{z % 4:02b}"


def pack_plainly(classes: np.ndarray) -> bytes:
    """`pack_tables` as docs/format.md says it, bit by bit."""
    bits = ""
    for row in classes.tolist():
        present = [symbol for symbol, weight_class in enumerate(row) if weight_class]
        bits += f"{present[0]:05b}{present[-1]:05b}"
        previous = 0
        for symbol in range(present[0], present[-1] + 1):
            bits += rice(row[symbol] - previous)
            previous = row[symbol]
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def normalize_plainly(weights: list[int]) -> list[int]:
    total = sum(weights)
    frequencies = [max(1, weight * 4096 // total) if weight else 0 for weight in weights]
    frequencies[weights.index(max(weights))] += 4096 - sum(frequencies)
    return frequencies


def parse_natively(content: bytes, num_tables: int, alphabet_size: int = 32) -> np.ndarray:
    return Native.parse(
        np.frombuffer(content, np.uint8), [len(content)], [num_tables], [alphabet_size], 1
    ).frequencies()


# --- weights and frequencies ------------------------------------------------------------------------------------------


def test_weights_have_three_significant_bits() -> None:
    expected = sorted({m << e for m in range(8) for e in range(13) if m << e <= 4096})
    assert WEIGHTS.tolist() == expected and len(expected) == 45


@settings(derandomize=True, max_examples=200, deadline=None)
@given(class_rows)
def test_frequencies_sum_to_4096_and_every_present_symbol_has_one(classes: np.ndarray) -> None:
    frequencies = normalize(classes).astype(np.int64)
    assert (frequencies.sum(axis=1) == 4096).all()
    assert np.array_equal(frequencies > 0, classes > 0)
    assert frequencies.tolist() == [normalize_plainly(WEIGHTS[row].tolist()) for row in classes]


@pytest.mark.parametrize("num_small", [1, 2, 30, 31])
def test_frequencies_of_the_most_uneven_tables(num_small: int) -> None:
    classes = np.array([[44] + [1] * num_small + [0] * (31 - num_small)])
    frequencies = normalize(classes)[0].tolist()
    assert sum(frequencies) == 4096 and frequencies[1 : 1 + num_small] == [1] * num_small


def test_first_of_the_largest_takes_the_rest() -> None:
    frequencies = normalize(np.array([[0, 5, 5, 5] + [0] * 28]))[0].tolist()
    assert frequencies[:4] == [0, 1366, 1365, 1365]


counts_rows = arrays.arrays(
    np.uint32, st.tuples(st.integers(1, 4), st.just(32)), elements=st.sampled_from([0, 0, 1, 2, 3, 50, 10**4, 10**8])
).filter(lambda counts: counts.any(axis=1).all())


@settings(derandomize=True, max_examples=100, deadline=None)
@given(counts_rows)
def test_weight_is_the_nearest_in_ratio(counts: np.ndarray) -> None:
    classes = choose_weight_classes(counts)
    assert np.array_equal(classes > 0, counts > 0)
    for row, chosen in zip(counts.tolist(), classes.tolist(), strict=True):
        for count, weight_class in zip(row, chosen, strict=True):
            if count:
                target = count * 4096 / sum(row)
                ratios = [abs(math.log(target / int(weight))) for weight in WEIGHTS[1:]]
                assert ratios[weight_class - 1] == pytest.approx(min(ratios), abs=1e-9)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(counts_rows)
def test_native_tables_are_the_same_bytes(counts: np.ndarray) -> None:
    assert _native.pack_tables(counts, [len(counts)], 1) == [pack_tables(choose_weight_classes(counts))]


def test_native_weights_are_the_same_for_every_share() -> None:
    shares = np.arange(1, 2**16, dtype=np.uint32)  # in steps of a 16th of a frequency
    counts = np.zeros((len(shares), 32), dtype=np.uint32)
    counts[:, 3], counts[:, 4] = shares, 2**16 - shares
    assert _native.pack_tables(counts, [len(counts)], 1) == [pack_tables(choose_weight_classes(counts))]


def test_counts_near_the_limit_do_not_overflow() -> None:
    counts = np.full((1, 32), 2**32 - 1, dtype=np.uint32)
    assert (WEIGHTS[choose_weight_classes(counts)] == 128).all()


def test_single_symbol_gets_the_whole_table() -> None:
    counts = np.zeros((1, 32), dtype=np.uint32)
    counts[0, 15] = 3
    assert normalize(choose_weight_classes(counts))[0, 15] == 4096


# --- the compact form -------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=200, deadline=None)
@given(class_rows)
def test_tables_round_trip_in_the_documented_bits(classes: np.ndarray) -> None:
    content = pack_tables(classes)
    assert content == pack_plainly(classes)
    assert np.array_equal(unpack_tables(content, len(classes), 32), classes)
    assert np.array_equal(parse_natively(content, len(classes)), normalize(classes))


def test_every_class_difference_round_trips() -> None:
    rows = []
    for first in range(1, 45):
        for second in range(45):
            rows.append([first, second, 1, 44] + [0] * 28)
    classes = np.array(rows)
    content = pack_tables(classes)
    assert np.array_equal(unpack_tables(content, len(classes), 4), classes)
    assert np.array_equal(parse_natively(content, len(classes), 4), normalize(classes))


def test_planes_are_read_apart_on_any_number_of_threads() -> None:
    generator = np.random.default_rng(0)
    planes = [generator.integers(1, 45, (num_tables, 32)) for num_tables in (1, 7, 3, 20)]
    contents = [pack_tables(classes) for classes in planes]
    layouts = [PlaneLayout(1, len(classes), 32, 0) for classes in planes]
    for classes in planes:
        classes[:, 31] = 0
    contents = [pack_tables(classes) for classes in planes]
    for num_threads in (1, 2, 5):
        tables = cpu.load_tables(b"".join(contents), layouts, [len(content) for content in contents], num_threads)
        assert np.array_equal(tables.frequencies(), np.concatenate([normalize(classes) for classes in planes]))


def refuse_both(content: bytes, num_tables: int, alphabet_size: int) -> None:
    with pytest.raises(BitstreamError):
        unpack_tables(content, num_tables, alphabet_size)
    with pytest.raises(ValueError, match="plane 0"):
        parse_natively(content, num_tables, alphabet_size)


def test_every_truncation_of_tables_is_refused() -> None:
    content = pack_tables(np.array([[0, 3, 44, 1] + [0] * 28, [7] + [0] * 31]))
    for length in range(len(content)):
        refuse_both(content[:length], 2, 32)
    refuse_both(content + b"\0", 2, 32)


def test_symbols_beyond_the_alphabet_are_refused() -> None:
    content = pack_tables(np.array([[5] * 16 + [0] * 16]))
    assert np.array_equal(parse_natively(content, 1, 16), normalize(unpack_tables(content, 1, 16)))
    refuse_both(content, 1, 15)


def test_reader_and_native_reader_agree_on_any_bytes() -> None:
    generator = random.Random(0)
    good = pack_tables(np.array([[1, 3, 9, 20, 9, 3, 1] + [0] * 25] * 3))
    outcomes = []
    for _ in range(3000):
        changed = bytearray(good)
        for _ in range(generator.choice([1, 1, 2, 5])):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        content = bytes(changed[: generator.choice([len(good), len(good), generator.randrange(len(good) + 1)])])
        try:
            expected = normalize(unpack_tables(content, 3, 16))
        except BitstreamError:
            refuse_both(content, 3, 16)
            outcomes.append("refused")
        else:
            assert np.array_equal(parse_natively(content, 3, 16), expected)
            outcomes.append("read")
    assert set(outcomes) == {"refused", "read"}


def test_tables_that_cannot_fit_are_refused_before_memory_is_taken() -> None:
    # 2^16 channels in each of 2^15 planes would take 256 GiB.
    layouts, sizes = [PlaneLayout(256, 256, 16, 0)] * (1 << 15), [1] * (1 << 15)
    with pytest.raises(BitstreamError, match="the tables are corrupt"):
        cpu.load_tables(bytes(1 << 15), layouts, sizes)


def test_native_kernels_pack_the_same_tables():
    generator = np.random.default_rng(11)
    planes = [PlaneLayout(1, num_channels, 32, 0) for num_channels in (1, 7, 128, 500)]
    num_tables = sum(plane.num_channels for plane in planes)
    shares = generator.dirichlet(np.full(32, 0.2), num_tables)
    counts = generator.poisson(shares * generator.choice([3, 300, 300_000], (num_tables, 1))).astype(np.uint32)
    counts[::3, 20:] = 0
    counts[5] = 0
    counts[np.arange(num_tables), generator.integers(0, 32, num_tables)] += 1
    # Shares that lie on a weight, and as near to a boundary as counts come.
    counts[8, :4] = 4_000_000_000, 1, 1402, 1403
    expected = reference.pack_tables(counts, planes)
    assert cpu.pack_tables(counts, planes) == cpu.pack_tables(counts, planes, 3) == expected


def test_native_kernels_refuse_a_channel_without_symbols():
    with pytest.raises(ValueError, match="a channel of plane 1 has no symbols"):
        cpu.pack_tables(np.array([[1] * 32, [0] * 32], np.uint32), [PlaneLayout(1, 1, 32, 0)] * 2)
