"""Coder `ac`: the reference writes known codes, and the native coder the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from cachegen import _native
from cachegen.errors import BitstreamError
from cachegen.format import MAX_CODE_TOKENS, TABLE_SIZE
from tests.reference import planes as reference
from tests.reference.arithmetic import decode_channel, decode_channels, encode_channel, encode_channels
from tests.reference.planes import StreamCoding

Frequencies = NDArray[np.uint16]
HALVES = [2048, 2048]
STRADDLING = [2047, 2, 2047]
RAREST = [1, 4095]


def single_symbol(rng: np.random.Generator) -> Frequencies:
    frequencies = np.zeros(TABLE_SIZE, dtype=np.uint16)
    frequencies[rng.integers(TABLE_SIZE)] = 4096
    return frequencies


def skewed(rng: np.random.Generator) -> Frequencies:
    frequencies = np.zeros(TABLE_SIZE, dtype=np.uint16)
    rare, common = rng.choice(TABLE_SIZE, 2, replace=False)
    frequencies[rare], frequencies[common] = 1, 4095
    return frequencies


def with_gaps(rng: np.random.Generator) -> Frequencies:
    """Some of the symbols, wherever they are; the first of them takes what is left over."""
    frequencies = np.zeros(TABLE_SIZE, dtype=np.uint16)
    present = np.sort(rng.choice(TABLE_SIZE, rng.integers(2, TABLE_SIZE + 1), replace=False))
    shares = rng.dirichlet(np.full(len(present), 0.3)) * (4096 - len(present))
    frequencies[present] = 1 + shares.astype(np.uint16)
    frequencies[present[0]] += 4096 - frequencies.sum()
    return frequencies


def draw_typical(rng: np.random.Generator, frequencies: Frequencies, num_tokens: int) -> NDArray[np.int64]:
    return rng.choice(TABLE_SIZE, num_tokens, p=frequencies / 4096)


def draw_uniform(rng: np.random.Generator, frequencies: Frequencies, num_tokens: int) -> NDArray[np.int64]:
    return rng.choice(np.flatnonzero(frequencies), num_tokens)


def draw_rarest(rng: np.random.Generator, frequencies: Frequencies, num_tokens: int) -> NDArray[np.int64]:
    present = np.flatnonzero(frequencies)
    return np.full(num_tokens, present[frequencies[present].argmin()])


def native_encode(
    symbols: Sequence[Sequence[int]], frequencies: Sequence[Sequence[int]], low_bits: int = 0
) -> tuple[bytes, str]:
    tables = _native.TableSet.from_frequencies(pad(frequencies))
    content, num_words, status = _native.encode_symbols(
        np.array(symbols, dtype=np.uint16), tables, low_bits, is_arithmetic=True
    )
    assert num_words == 0
    return content, _native.Status(status).name


def native_decode(
    content: bytes, num_tokens: int, frequencies: Sequence[Sequence[int]], low_bits: int = 0, num_words: int = 0
) -> tuple[list[list[int]], str]:
    tables = _native.TableSet.from_frequencies(pad(frequencies))
    symbols, status = _native.decode_symbols(
        np.frombuffer(content, np.uint8),
        num_words,
        num_tokens,
        len(frequencies),
        tables,
        low_bits,
        is_arithmetic=True,
    )
    return symbols.tolist(), _native.Status(status).name


def pad(frequencies: Sequence[Sequence[int]]) -> NDArray[np.uint16]:
    return np.array([[*row, *[0] * (TABLE_SIZE - len(row))] for row in frequencies], dtype=np.uint16)


@pytest.mark.parametrize(
    "symbols, frequencies, code",
    [
        # Symbols of probability one half are bits; the two last ones, 01 or 10, name the quarter.
        ([1, 0, 1, 1, 0, 0, 1, 0], HALVES, "b240"),
        ([1, 0, 1, 1, 0, 0], HALVES, "b1"),
        # A certain symbol costs nothing.
        ([0] * 1000, [4096], "40"),
        ([7] * 1000, [0] * 7 + [4096], "40"),
        # [2047, 2049] of 4096 lies astride the middle: eleven pending bits, then the two last ones after one more.
        ([1], STRADDLING, "7ff8"),
        ([0], RAREST, "0004"),
        ([1], RAREST, "40"),
    ],
)
def test_known_codes(symbols: list[int], frequencies: list[int], code: str) -> None:
    assert encode_channel(symbols, frequencies).hex() == code
    assert decode_channel(bytes.fromhex(code), len(symbols), frequencies) == symbols
    content, status = native_encode([symbols], [frequencies])
    assert (content[4:].hex(), status) == (code, "OK")
    assert native_decode(content, len(symbols), [frequencies]) == ([symbols], "OK")


@pytest.mark.parametrize("last", [0, 2])
def test_thousands_of_pending_bits_resolve(last: int) -> None:
    symbols = [1] * 500 + [last]
    code = encode_channel(symbols, STRADDLING)
    assert code[:600] == (b"\x7f" + b"\xff" * 599 if last == 0 else b"\x80" + bytes(599))
    assert decode_channel(code, len(symbols), STRADDLING) == symbols
    content, _ = native_encode([symbols], [STRADDLING])
    assert content[4:] == code
    assert native_decode(content, len(symbols), [STRADDLING]) == ([symbols], "OK")


@pytest.mark.parametrize("draw", [draw_typical, draw_uniform, draw_rarest])
@pytest.mark.parametrize("make_table", [single_symbol, skewed, with_gaps])
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 256, 700])
def test_native_equals_reference_byte_for_byte(make_table, draw, num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    for num_channels, low_bits in [(1, 0), (3, 1), (4, 8), (9, 3), (40, 0)]:
        frequencies = [make_table(rng) for _ in range(num_channels)]
        high = np.stack([draw(rng, of_channel, num_tokens) for of_channel in frequencies])
        symbols = (high << low_bits | rng.integers(0, 1 << low_bits, high.shape)).tolist()
        tables = [of_channel.tolist() for of_channel in frequencies]
        coding = StreamCoding(tables, low_bits)
        expected = reference.encode_arithmetic_stream(symbols, coding)
        assert native_encode(symbols, tables, low_bits) == (expected, "OK")
        assert native_decode(expected, num_tokens, tables, low_bits) == (symbols, "OK")
        assert reference.decode_arithmetic_stream(expected, 0, num_tokens, coding) == symbols


def test_longest_code_fits_its_length_field() -> None:
    symbols = [0] * MAX_CODE_TOKENS
    code = encode_channel(symbols, RAREST)
    # The bound that sizes the native encoder's buffer.
    assert 12 * MAX_CODE_TOKENS < 8 * len(code) <= 8 * ((3 * MAX_CODE_TOKENS + 1) // 2 + 2)
    content, status = native_encode([symbols], [RAREST])
    assert (content[4:], status) == (code, "OK")
    assert native_decode(content, MAX_CODE_TOKENS, [RAREST]) == ([symbols], "OK")


def test_longer_streams_are_refused() -> None:
    symbols = [[0] * (MAX_CODE_TOKENS + 1)]
    with pytest.raises(ValueError, match="16384"):
        encode_channels(symbols, [[4096]])
    with pytest.raises(ValueError, match="16384"):
        native_encode(symbols, [[4096]])


@pytest.mark.parametrize("symbol", [1, 31, 32, 40])
def test_symbol_without_frequency_is_refused(symbol: int) -> None:
    with pytest.raises(ValueError, match="no frequency"):
        encode_channel([0, symbol], [4096])
    assert native_encode([[0, symbol]], [[4096]])[1] == "NO_FREQUENCY"


def test_missing_tables_are_refused() -> None:
    symbols = np.zeros((1, 32), dtype=np.uint16)
    with pytest.raises(ValueError, match="tables"):
        _native.encode_symbols(symbols, None, 0, is_arithmetic=True)


def damaged_streams() -> list[tuple[str, bytes]]:
    """Every stream that differs in a bit or in its length from a valid one of 3 channels and 7 tokens."""
    content = encode_channels(DAMAGED_SYMBOLS, DAMAGED_TABLES)
    flipped = [
        bytes([*content[:i], content[i] ^ 1 << bit, *content[i + 1 :]]) for i in range(len(content)) for bit in range(8)
    ]
    cut = [content[:size] for size in range(len(content))]
    return [*(("flipped", c) for c in flipped), *(("cut", c) for c in [*cut, content + b"\0"])]


DAMAGED_TABLES = [[100, 3996], [1365, 1365, 1366], [4096]]
DAMAGED_SYMBOLS = [[1, 1, 0, 1, 1, 1, 1], [2, 0, 1, 1, 2, 0, 0], [0] * 7]


def test_native_and_reference_agree_on_damaged_streams() -> None:
    num_accepted = 0
    for kind, content in damaged_streams():
        symbols, status = native_decode(content, 7, DAMAGED_TABLES)
        try:
            expected = decode_channels(content, 7, DAMAGED_TABLES)
        except BitstreamError:
            assert status in ("TRUNCATED", "CORRUPT")
            continue
        # What is not noticed is some other symbols' code: the bytes that encoding them gives.
        assert kind == "flipped"
        assert (symbols, status) == (expected, "OK")
        codes = encode_channels(expected, DAMAGED_TABLES)
        assert codes[8:] == content[8:]
        num_accepted += 1
    assert num_accepted < len(damaged_streams()) // 4


def test_words_are_refused() -> None:
    content = encode_channels([[0]], [[4096]])
    assert native_decode(content, 1, [[4096]], num_words=1)[1] == "CORRUPT"
    with pytest.raises(BitstreamError):
        reference.decode_arithmetic_stream(content, 1, 1, StreamCoding([[4096]]))
