"""The plain-Python coder, the oracle of all others: round trips, exact bytes, and refusal of bad streams."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.errors import BitstreamError
from tests.coder_cases import CASES, Case, flat_frequencies, make_frequencies
from tests.reference.planes import StreamCoding, crc32c, decode_stream, encode_stream

SINGLE = [0, 0, 4096] + [0] * 29


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_round_trip(case: Case) -> None:
    coding, symbols = case.coding, case.symbols
    content, num_words = encode_stream(symbols, coding)
    assert decode_stream(content, num_words, len(symbols[0]), len(symbols), coding) == symbols


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 70), st.integers(0, 8), st.integers(0, 2**32))
def test_any_symbols_round_trip(data, num_channels: int, num_tokens: int, low_bits: int, seed: int) -> None:
    generator = random.Random(seed)
    alphabet_size = data.draw(st.integers(1, 32))
    tables = [make_frequencies(generator, alphabet_size) for _ in range(num_channels)]
    coding = StreamCoding(tables, low_bits)
    symbols = [[generator.randrange(alphabet_size << low_bits) for _ in range(num_tokens)] for _ in range(num_channels)]
    content, num_words = encode_stream(symbols, coding)
    assert decode_stream(content, num_words, num_tokens, num_channels, coding) == symbols


# --- bytes by hand ----------------------------------------------------------------------------------------------------


def test_single_symbol_costs_nothing_but_the_start_states() -> None:
    content, num_words = encode_stream([[2] * 100] * 5, StreamCoding([SINGLE] * 5))
    assert (content, num_words) == (b"\0\0\1\0" * 32, 0)


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 100])
def test_a_stream_has_one_state_per_live_lane(num_tokens: int) -> None:
    content, _ = encode_stream([[2] * num_tokens], StreamCoding([SINGLE]))
    assert content == b"\0\0\1\0" * min(num_tokens, 32)


def test_low_bits_fill_bytes_from_the_least_significant_place() -> None:
    # Two channels of three tokens, k = 2: channel 0 bit 0, channel 0 bit 1, channel 1 bit 0, channel 1 bit 1.
    content, num_words = encode_stream([[1, 0, 3], [2, 2, 0]], StreamCoding(None, 2))
    assert (content, num_words) == (bytes([0b00100101, 0b00000110, 0, 0]), 0)
    assert content == pack_bits("101 001 000 110")


def pack_bits(bits: str) -> bytes:
    """Bits in stream order to bytes, padded to a multiple of 4."""
    bits = bits.replace(" ", "")
    value = sum(1 << position for position, bit in enumerate(bits) if bit == "1")
    return value.to_bytes(-(-len(bits) // 32) * 4, "little")


def test_low_bits_of_tail_rows_take_a_bit_per_live_lane() -> None:
    symbols = [[token & 1 for token in range(33)], [1] * 33]
    content, _ = encode_stream(symbols, StreamCoding(None, 1))
    assert content == pack_bits("01" * 16 + "1" * 32 + "0" + "1")


def test_parts_stand_in_order() -> None:
    symbols = [[2 * (token % 3 == 0) + token % 2 for token in range(33)]]
    content, num_words = encode_stream(symbols, StreamCoding([[4095, 1] + [0] * 30], 1))
    assert content[128:136] == pack_bits("01" * 16 + "0")
    assert len(content) == 136 + 2 * num_words


def test_words_stand_in_the_decoders_order() -> None:
    frequencies = [4094, 1, 1] + [0] * 29
    content, num_words = encode_stream([[2, 1], [1, 2]], StreamCoding([frequencies] * 2))
    assert content == bytes.fromhex("ff0f0001 fe0f0001 fe0f ff0f") and num_words == 2


def test_crc32c_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_symbol_without_a_frequency_is_refused() -> None:
    for symbol in (3, 31, 32, 100):
        with pytest.raises(ValueError, match=f"symbol {symbol} of channel 0 has no frequency"):
            encode_stream([[2, symbol]], StreamCoding([SINGLE]))


@pytest.mark.parametrize("case", [case for case in CASES if case.is_small], ids=lambda case: case.name)
def test_every_truncation_of_a_stream_is_refused(case: Case) -> None:
    content, num_words = encode_stream(case.symbols, case.coding)
    shape = len(case.symbols[0]), len(case.symbols)
    for length in range(len(content)):
        for words in {num_words, max(0, num_words - (len(content) - length) // 2)}:
            with pytest.raises(BitstreamError):
                decode_stream(content[:length], words, *shape, case.coding)


def test_words_left_over_are_refused() -> None:
    coding = StreamCoding([flat_frequencies(16)] * 3)
    content, num_words = encode_stream([[1, 5, 15]] * 3, coding)
    with pytest.raises(BitstreamError, match="do not end in the start state"):
        decode_stream(content + b"\0\0", num_words + 1, 3, 3, coding)


def test_changed_start_state_is_refused() -> None:
    coding = StreamCoding([flat_frequencies(16)] * 3)
    content, num_words = encode_stream([[1, 5, 15]] * 3, coding)
    for lane in range(3):
        # Too large, too small, and nothing at all. (A state of about the right size may decode: the CRC tells.)
        for state in (2**32 - 1, 65536, 0):
            changed = content[: 4 * lane] + state.to_bytes(4, "little") + content[4 * lane + 4 :]
            with pytest.raises(BitstreamError):
                decode_stream(changed, num_words, 3, 3, coding)


def test_words_in_a_stream_without_tables_are_refused() -> None:
    content, _ = encode_stream([[1, 2, 3]], StreamCoding(None, 8))
    with pytest.raises(BitstreamError, match="has no words"):
        decode_stream(content + b"\0\0", 1, 3, 1, StreamCoding(None, 8))
