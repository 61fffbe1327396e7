"""The static arithmetic coder in plain Python: slow, bit by bit, and as its source derives it. The oracle of the tests.

A code holds the symbols of one channel: a number between 0 and 1, written in binary, that lies in the interval which
the symbols narrow down to. `low` and `high` are the interval's first and last number in 32 bits; bits that both begin
with are written at once, and where the interval straddles the middle ever more closely, the bit to come is kept
pending. With cumulative frequencies of 16 bits (ours, of 12 bits, times 16) the codes are those of torchac and of
LMCache's CacheGen.

Source: I. Witten, R. Neal, J. Cleary, "Arithmetic coding for data compression" (1987), with 32 bits for 16.
"""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.errors import BitstreamError
from cachegen.format import MAX_CODE_TOKENS, round_up

FREQUENCY_BITS = 12
CODE_BITS = 32
TOP = (1 << CODE_BITS) - 1
QUARTER = 1 << (CODE_BITS - 2)
HALF = 2 * QUARTER
THREE_QUARTERS = 3 * QUARTER
LENGTH_BYTES = 2


def _narrow(low: int, high: int, start: int, frequency: int) -> tuple[int, int]:
    """Return the part of an interval that belongs to a symbol."""
    span = high - low + 1
    return low + (span * start >> FREQUENCY_BITS), low + (span * (start + frequency) >> FREQUENCY_BITS) - 1


def encode_channel(symbols: Sequence[int], frequencies: Sequence[int]) -> bytes:
    """Encode the symbols of one channel.

    Args:
        frequencies: of each symbol; their sum is 4096.

    Returns:
        The code: bits from the most significant of each byte on, filled up with zeros.

    Raises:
        ValueError: a symbol has no frequency.
    """
    bits: list[int] = []
    low, high, pending = 0, TOP, 0

    def write(bit: int) -> None:
        nonlocal pending
        bits.extend([bit] + [1 - bit] * pending)
        pending = 0

    for symbol in symbols:
        if symbol >= len(frequencies) or frequencies[symbol] == 0:
            raise ValueError(f"symbol {symbol} has no frequency")
        low, high = _narrow(low, high, sum(frequencies[:symbol]), frequencies[symbol])
        while True:
            if high < HALF:
                write(0)
            elif low >= HALF:
                write(1)
                low, high = low - HALF, high - HALF
            elif low >= QUARTER and high < THREE_QUARTERS:
                pending += 1
                low, high = low - QUARTER, high - QUARTER
            else:
                break
            low, high = 2 * low, 2 * high + 1
    # Two bits name a quarter that lies within the interval, whatever follows.
    pending += 1
    write(0 if low < QUARTER else 1)
    bits += [0] * (-len(bits) % 8)
    return bytes(int("".join(map(str, bits[at : at + 8])), 2) for at in range(0, len(bits), 8))


def decode_channel(code: bytes, num_symbols: int, frequencies: Sequence[int]) -> list[int]:
    """Decode the symbols of one channel; bits beyond the code's end count as zeros.

    Raises:
        BitstreamError: the code is not what encoding the decoded symbols gives.
    """
    num_bits, position = 8 * len(code), 0
    content = int.from_bytes(code, "big")

    def read() -> int:
        nonlocal position
        position += 1
        return content >> (num_bits - position) & 1 if position <= num_bits else 0

    value = 0
    for _ in range(CODE_BITS):
        value = 2 * value + read()
    low, high = 0, TOP
    symbols = []
    for _ in range(num_symbols):
        slot = (((value - low + 1) << FREQUENCY_BITS) - 1) // (high - low + 1)
        symbol, start = 0, 0
        while start + frequencies[symbol] <= slot:
            start += frequencies[symbol]
            symbol += 1
        symbols.append(symbol)
        low, high = _narrow(low, high, start, frequencies[symbol])
        while True:
            if high < HALF:
                pass
            elif low >= HALF:
                value, low, high = value - HALF, low - HALF, high - HALF
            elif low >= QUARTER and high < THREE_QUARTERS:
                value, low, high = value - QUARTER, low - QUARTER, high - QUARTER
            else:
                break
            value, low, high = 2 * value + read(), 2 * low, 2 * high + 1
    # All that is left of the code are the encoder's last two bits, and zeros.
    num_code_bits = position - CODE_BITS + 2
    if value != (QUARTER if low < QUARTER else HALF) or len(code) != -(-num_code_bits // 8):
        raise BitstreamError("a channel's code does not end as the encoder leaves it", field="stream")
    return symbols


def encode_channels(symbols: Sequence[Sequence[int]], frequencies: Sequence[Sequence[int]]) -> bytes:
    """Encode the channels of one stream.

    Args:
        symbols: `[num_channels][num_tokens]`, at most MAX_CODE_TOKENS tokens, so that a length fits in 16 bits.
        frequencies: per channel.

    Returns:
        The length of every code in bytes, as 16-bit numbers filled up with zeros to a multiple of 4 bytes, then the
        codes.
    """
    if len(symbols[0]) > MAX_CODE_TOKENS:
        raise ValueError(f"a stream must have at most {MAX_CODE_TOKENS} tokens, got {len(symbols[0])}")
    codes = list(map(encode_channel, symbols, frequencies))
    lengths = b"".join(len(code).to_bytes(LENGTH_BYTES, "little") for code in codes)
    return lengths.ljust(round_up(len(lengths), 4), b"\0") + b"".join(codes)


def decode_channels(content: bytes, num_tokens: int, frequencies: Sequence[Sequence[int]]) -> list[list[int]]:
    """Decode what `encode_channels` wrote.

    Raises:
        BitstreamError: the lengths do not add up, or a code is corrupt.
    """
    num_channels = len(frequencies)
    codes_at = round_up(LENGTH_BYTES * num_channels, 4)
    lengths = [
        int.from_bytes(content[at : at + LENGTH_BYTES], "little")
        for at in range(0, LENGTH_BYTES * num_channels, LENGTH_BYTES)
    ]
    if codes_at + sum(lengths) != len(content):
        raise BitstreamError("the parts of the stream do not add up", field="stream")
    symbols, at = [], codes_at
    for length, of_channel in zip(lengths, frequencies, strict=True):
        symbols.append(decode_channel(content[at : at + length], num_tokens, of_channel))
        at += length
    return symbols
