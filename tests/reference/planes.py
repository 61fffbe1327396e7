"""The coders in plain Python: slow, and laid out like docs/format.md. The oracle of the tests.

Here is rANS; `arithmetic` has coder `ac`. A stream holds the symbols of some tokens of one plane, all
channels. 32 lanes, one per token of a row, each with its own 32-bit state, share one sequence of 16-bit words; the
decoder reads the words in the order in which its lanes run low. A symbol is a high part, coded with its channel's
frequency table, and `low_bits` raw bits.

Source: J. Duda, "Asymmetric numeral systems" (2013); F. Giesen, "Interleaved entropy coders" (2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.coder import symbol_model
from cachegen.coder.symbol_model import choose_weight_classes, normalize, unpack_tables
from cachegen.errors import BitstreamError, NotFiniteError
from cachegen.format import ALIGNMENT, LANES, TABLE_SIZE, Coder, PlaneLayout, StreamEntry, round_up
from cachegen.kv_cache import KVCache
from cachegen.methods.absmax.quantization import dequantize, quantize
from tests.reference import arithmetic

FREQUENCY_BITS = 12
WORD_BITS = 16
STATE_LOW = 1 << WORD_BITS


@dataclass(frozen=True)
class StreamCoding:
    """How the symbols of a stream are coded.

    Attributes:
        frequencies: per channel (or, with `table_indices`, per table) 32 integers that sum to 4096; None for coder
            `packed`, whose symbols are all low bits.
        low_bits: raw bits of every symbol.
        table_indices: per channel the index of its table; None: its own.
    """

    frequencies: Sequence[Sequence[int]] | None
    low_bits: int = 0
    table_indices: Sequence[int] | None = None

    def frequencies_of(self, channel: int) -> Sequence[int]:
        """Return the frequencies that a channel is coded with."""
        assert self.frequencies is not None
        return self.frequencies[self.table_indices[channel] if self.table_indices is not None else channel]


def _rows(num_tokens: int) -> list[range]:
    """The tokens of each row of lanes; only the last row may have fewer than 32."""
    return [range(start, min(start + LANES, num_tokens)) for start in range(0, num_tokens, LANES)]


def _starts(frequencies: Sequence[int]) -> list[int]:
    """Exclusive cumulative sums of a table's frequencies."""
    starts = [0]
    for frequency in frequencies:
        starts.append(starts[-1] + frequency)
    return starts


def encode_stream(symbols: Sequence[Sequence[int]], coding: StreamCoding) -> tuple[bytes, int]:
    """Encode one stream.

    Args:
        symbols: `[num_channels][num_tokens]`.

    Returns:
        The stream without its padding, and its number of words.

    Raises:
        ValueError: a symbol has no frequency.
    """
    num_channels, num_tokens = len(symbols), len(symbols[0])
    rows = _rows(num_tokens)
    # The decoder's order is channel by channel and in a channel row by row; the encoder walks it backwards.
    states = [STATE_LOW] * min(num_tokens, LANES)
    words: list[int] = []
    if coding.frequencies is not None:
        for channel in reversed(range(num_channels)):
            frequencies = coding.frequencies_of(channel)
            starts = _starts(frequencies)
            for tokens in reversed(rows):
                for token in reversed(tokens):
                    high, lane = symbols[channel][token] >> coding.low_bits, token % LANES
                    state = states[lane]
                    frequency = frequencies[high] if high < TABLE_SIZE else 0
                    if frequency == 0:
                        raise ValueError(f"symbol {symbols[channel][token]} of channel {channel} has no frequency")
                    if state >> (32 - FREQUENCY_BITS) >= frequency:
                        words.append(state & 0xFFFF)
                        state >>= WORD_BITS
                    states[lane] = ((state // frequency) << FREQUENCY_BITS) + state % frequency + starts[high]
        words.reverse()

    content = b"".join(state.to_bytes(4, "little") for state in states) if coding.frequencies is not None else b""
    # Low bits: row by row, channel by channel, bit by bit, one bit per live lane, the first in the least significant
    # place.
    packed, num_bits = 0, 0
    for tokens in rows:
        for channel in range(num_channels):
            for bit in range(coding.low_bits):
                for token in tokens:
                    packed |= (symbols[channel][token] >> bit & 1) << num_bits
                    num_bits += 1
    content += packed.to_bytes(round_up(-(-num_bits // 8), 4), "little")
    return content + b"".join(word.to_bytes(2, "little") for word in words), len(words)


def decode_stream(
    content: bytes, num_words: int, num_tokens: int, num_channels: int, coding: StreamCoding
) -> list[list[int]]:
    """Decode one stream.

    Args:
        content: the stream without its padding.
        num_words: its number of words, from the index.

    Returns:
        Symbols, `[num_channels][num_tokens]`.

    Raises:
        BitstreamError: the stream is not whole, or its lanes do not end in the start state.
    """
    rows = _rows(num_tokens)
    states_end = 4 * min(num_tokens, LANES) if coding.frequencies is not None else 0
    low_bits_at = states_end
    words_at = len(content) - 2 * num_words
    if words_at < low_bits_at:
        raise BitstreamError("the stream ends too early", field="stream")
    states = [int.from_bytes(content[at : at + 4], "little") for at in range(0, states_end, 4)]
    packed = int.from_bytes(content[low_bits_at:words_at], "little")
    words = [int.from_bytes(content[at : at + 2], "little") for at in range(words_at, len(content), 2)]
    words.reverse()  # pop() takes the next one

    symbols = [[0] * num_tokens for _ in range(num_channels)]
    num_bits = 0
    for tokens in rows:
        for channel in range(num_channels):
            for bit in range(coding.low_bits):
                for token in tokens:
                    symbols[channel][token] |= (packed >> num_bits & 1) << bit
                    num_bits += 1
    if round_up(-(-num_bits // 8), 4) != words_at - low_bits_at:
        raise BitstreamError("the parts of the stream do not add up", field="stream")
    if coding.frequencies is None:
        if words:
            raise BitstreamError("a stream without tables has no words", field="stream")
        return symbols

    for channel in range(num_channels):
        frequencies = coding.frequencies_of(channel)
        starts = _starts(frequencies)
        for tokens in rows:
            for token in tokens:
                state = states[token % LANES]
                slot = state & ((1 << FREQUENCY_BITS) - 1)
                high = max(symbol for symbol in range(TABLE_SIZE) if starts[symbol] <= slot)
                symbols[channel][token] |= high << coding.low_bits
                state = frequencies[high] * (state >> FREQUENCY_BITS) + slot - starts[high]
                if state < STATE_LOW:
                    if not words:
                        raise BitstreamError("the words run out before the symbols", field="stream")
                    state = state << WORD_BITS | words.pop()
                states[token % LANES] = state
    if words or any(state != STATE_LOW for state in states):
        raise BitstreamError("the lanes do not end in the start state", field="stream")
    return symbols


def encode_arithmetic_stream(symbols: Sequence[Sequence[int]], coding: StreamCoding) -> bytes:
    """Encode one stream with coder `ac`: the low bits as coder `packed` writes them, then a code per channel.

    Raises:
        ValueError: a symbol has no frequency.
    """
    low_bits, _ = encode_stream(symbols, StreamCoding(None, coding.low_bits))
    high_parts = [[symbol >> coding.low_bits for symbol in channel] for channel in symbols]
    return low_bits + arithmetic.encode_channels(high_parts, coding.frequencies or ())


def decode_arithmetic_stream(content: bytes, num_words: int, num_tokens: int, coding: StreamCoding) -> list[list[int]]:
    """Decode one stream of coder `ac`.

    Raises:
        BitstreamError: the stream is not whole, or a code does not end as it must.
    """
    frequencies = coding.frequencies or ()
    low_bits_bytes = round_up(-(-num_tokens * len(frequencies) * coding.low_bits // 8), 4)
    if num_words or len(content) < low_bits_bytes:
        raise BitstreamError("the stream ends too early, or has words", field="stream")
    packed = StreamCoding(None, coding.low_bits)
    low_parts = decode_stream(content[:low_bits_bytes], 0, num_tokens, len(frequencies), packed)
    high_parts = arithmetic.decode_channels(content[low_bits_bytes:], num_tokens, frequencies)
    return [
        [high << coding.low_bits | low for high, low in zip(*channel, strict=True)]
        for channel in zip(high_parts, low_parts, strict=True)
    ]


def crc32c(content: bytes | bytearray | memoryview) -> int:
    """CRC-32C, bit by bit: reflected polynomial 0x82F63B78, inverted at both ends. Source: RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in bytes(content):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@dataclass(frozen=True)
class Tables:
    """The frequency tables of a document: per plane and channel 32 integers that sum to 4096."""

    of_plane: list[list[list[int]]]


def load_tables(
    content: bytes, planes: Sequence[PlaneLayout], plane_table_bytes: Sequence[int], num_threads: int = 1
) -> Tables:
    """Read the tables section of a tables file; see `cpu.load_tables`."""
    del num_threads
    of_plane, offset = [], 0
    for plane, num_bytes in zip(planes, plane_table_bytes, strict=True):
        classes = unpack_tables(content[offset : offset + num_bytes], plane.num_channels, plane.alphabet_size)
        of_plane.append(normalize(classes).tolist())
        offset += num_bytes
    return Tables(of_plane)


def pack_tables(counts: NDArray[np.uint32], planes: Sequence[PlaneLayout], num_threads: int = 1) -> list[bytes]:
    """Make the tables of all planes from symbol counts; see `cpu.pack_tables`."""
    del num_threads
    classes, first, packed = choose_weight_classes(counts), 0, []
    for plane in planes:
        packed.append(symbol_model.pack_tables(classes[first : first + plane.num_channels]))
        first += plane.num_channels
    return packed


def measure(
    cache: KVCache, planes: Sequence[PlaneLayout], num_threads: int = 1
) -> tuple[torch.Tensor, NDArray[np.uint32]]:
    """Find the scales of all tokens and count the high parts of all symbols; see `cpu.measure`."""
    del num_threads
    scales, counts = [], []
    for index, (values, plane) in enumerate(zip(cache.planes, planes, strict=True)):
        finite = torch.isfinite(values).reshape(cache.num_tokens, -1).all(dim=1)
        if not finite.all():
            raise NotFiniteError(index, int(finite.int().argmin()))
        symbols, plane_scales = quantize(values, plane.num_bins)
        high = (symbols >> plane.low_bits).numpy()
        counts.append(np.stack([(high == symbol).sum(axis=0) for symbol in range(TABLE_SIZE)], axis=1))
        scales.append(plane_scales)
    return torch.stack(scales), np.concatenate(counts).astype(np.uint32)


def encode(
    cache: KVCache,
    scales: torch.Tensor,
    planes: Sequence[PlaneLayout],
    tables: Tables | None,
    num_threads: int = 1,
    *,
    coder: Coder | None = None,
) -> tuple[bytes, list[StreamEntry]]:
    """Quantize and encode the tokens of a chunk; see `cpu.encode`."""
    del num_threads, scales  # the quantizer finds the same scales again
    payload, entries = bytearray(), []
    for index, (values, plane) in enumerate(zip(cache.planes, planes, strict=True)):
        symbols = quantize(values, plane.num_bins)[0].T.tolist()
        coding = StreamCoding(tables.of_plane[index] if tables else None, plane.low_bits)
        for start in range(0, cache.num_tokens, plane.tokens_per_stream):
            stop = start + plane.tokens_per_stream
            stream_symbols = [channel[start:stop] for channel in symbols]
            if coder is Coder.AC:
                content, num_words = encode_arithmetic_stream(stream_symbols, coding), 0
            else:
                content, num_words = encode_stream(stream_symbols, coding)
            padded = content.ljust(round_up(len(content), ALIGNMENT), b"\0")
            entries.append(StreamEntry(len(content), num_words, crc32c(padded)))
            payload += padded
    return bytes(payload), entries


def decode(
    payload: bytes,
    streams: Sequence[StreamEntry],
    scales: torch.Tensor,
    planes: Sequence[PlaneLayout],
    tables: Tables | None,
    output: KVCache,
    num_threads: int = 1,
    *,
    coder: Coder | None = None,
) -> None:
    """Decode and dequantize the tokens of a chunk into `output`; see `cpu.decode`."""
    del num_threads
    offset, entries = 0, iter(streams)
    for index, (values, plane) in enumerate(zip(output.planes, planes, strict=True)):
        coding = StreamCoding(tables.of_plane[index] if tables else None, plane.low_bits)
        for start in range(0, output.num_tokens, plane.tokens_per_stream):
            stop = min(start + plane.tokens_per_stream, output.num_tokens)
            entry = next(entries)
            content = payload[offset : offset + entry.num_bytes]
            offset += round_up(entry.num_bytes, ALIGNMENT)
            if coder is Coder.AC:
                symbols = decode_arithmetic_stream(content, entry.num_words, stop - start, coding)
            else:
                symbols = decode_stream(content, entry.num_words, stop - start, plane.num_channels, coding)
            decoded = dequantize(torch.tensor(symbols).T, scales[index, start:stop], plane.num_bins)
            values[start:stop] = decoded.reshape(values[start:stop].shape)
