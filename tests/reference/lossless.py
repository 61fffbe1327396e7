"""Method `lossless` decoded in plain Python, from docs/lossless.md: fractions and big integers, no shared code."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction

BLOCK = 256
LANES = 16
ESCAPE = 63


@dataclass
class Channel:
    mean: int
    multiplier: int
    step: int
    shift: int
    exponent: int
    history: int


class Model:
    """The inflated model."""

    def __init__(self, compressed: bytes, planes: list[tuple[int, int]]) -> None:
        """Parse it; `planes` are (heads, dims) of the keys and values of each layer."""
        content = zlib.decompress(compressed)
        at = 0

        def take(form: str, count: int) -> list[int]:
            nonlocal at
            numbers = struct.unpack_from(f"<{count}{form}", content, at)
            at += struct.calcsize(f"<{count}{form}")
            return list(numbers)

        rotations: list[list[tuple[int, int, int]] | None] = [None]  # of each: first dim, second dim, turn
        for _ in range(*take("H", 1)):
            (interleaved,), (offset, num_pairs) = take("B", 1), take("H", 2)
            turns = take("Q", num_pairs)
            gap = 1 if interleaved else num_pairs
            firsts = [offset + (2 * i if interleaved else i) for i in range(num_pairs)]
            rotations.append([(first, first + gap, turn) for first, turn in zip(firsts, turns, strict=True)])
        self.rotations = [rotations[number] for number in take("H", len(planes))]
        self.before = take("B", len(planes) // 2)
        count = sum(heads * dims for heads, dims in planes)
        columns = [take(form, count) for form in "iiHBbB"]
        self.channels = [Channel(*row) for row in zip(*columns, strict=True)]
        self.frequencies = [take("H", 64) for _ in planes]
        self.weights: list[list[list[int]] | None] = []
        widths = [planes[i][0] * planes[i][1] + planes[i + 1][0] * planes[i + 1][1] for i in range(0, len(planes), 2)]
        for layer, before in enumerate(self.before):
            if before == 255:
                self.weights.append(None)
                continue
            width = sum(widths[layer - before : layer + 1])
            self.weights.append([take("b", width) for _ in range(widths[layer])])
        assert at == len(content)
        self.planes, self.widths = planes, widths


class Stream:
    """The states and words of one stream."""

    def __init__(self, content: bytes) -> None:
        self.states = list(struct.unpack_from(f"<{LANES}I", content))
        self.words = list(struct.unpack(f"<{(len(content) - 4 * LANES) // 2}H", content[4 * LANES :]))[::-1]

    def slot(self, token: int, total: int) -> int:
        return self.states[token % LANES] % total

    def take(self, token: int, start: int, frequency: int, total: int) -> None:
        state = self.states[token % LANES]
        state = frequency * (state // total) + state % total - start
        self.states[token % LANES] = state * 65536 + self.words.pop() if state < 65536 else state

    def take_raw(self, token: int, num_bits: int) -> int:
        number = self.slot(token, 1 << num_bits)
        self.take(token, number, 1, 1 << num_bits)
        return number


def value_of(bits: int, mantissa_bits: int) -> Fraction | None:
    """The value of 16 bits; None where it is not finite."""
    exponent_bits = 16 - mantissa_bits
    exponent, mantissa = (bits & 0x7FFF) >> (mantissa_bits - 1), bits & ((1 << (mantissa_bits - 1)) - 1)
    if exponent == (1 << exponent_bits) - 1:
        return None
    lowest = 2 - (1 << (exponent_bits - 1)) - (mantissa_bits - 1)
    if exponent:
        mantissa += 1 << (mantissa_bits - 1)
    return (-1) ** (bits >> 15) * mantissa * Fraction(2) ** (lowest + max(exponent - 1, 0))


def units_of(bits: int, exponent: int, mantissa_bits: int) -> int:
    """A value in whole units, towards zero."""
    value = value_of(bits, mantissa_bits)
    if value is None:
        return 0
    scaled = value * Fraction(2) ** exponent
    return math.trunc(scaled) if abs(scaled) < 1 << 30 else (1 << 30) * (1 if scaled > 0 else -1)


def places_between(begin: int, end: int, mantissa_bits: int) -> list[int]:
    """The whole numbers in [begin, end) that have at most so many significant bits, or are below 2^mantissa_bits."""

    def is_place(number: int) -> bool:
        return abs(number) >> max(0, abs(number).bit_length() - mantissa_bits) << max(
            0, abs(number).bit_length() - mantissa_bits
        ) == abs(number)

    return [number for number in range(begin, end) if is_place(number)]


def sine(phase: int) -> int:
    """Of a phase in 2^-64 turns, times 2^15: between two entries of a table of 4096, linearly."""
    index, part = phase >> 52, (phase >> 36) & 0xFFFF
    low, high = (round(32768 * math.sin(2 * math.pi * (index + i) / 4096)) for i in (0, 1))
    return low + ((high - low) * part >> 16)


def turn(a: int, cosine: int, b: int, sine: int) -> int:
    return (a * cosine + b * sine + 16384) >> 15


def decode(
    model: Model, streams: list[bytes], num_tokens: int, first_token: int, mantissa_bits: int
) -> list[list[int]]:
    """Decode one chunk to the bits of its values, `[num_tokens][num_channels]`."""
    rows: list[list[int]] = []
    remaining = list(streams)
    for start in range(0, num_tokens, BLOCK):
        count = min(BLOCK, num_tokens - start)
        block = [[0] * len(model.channels) for _ in range(count)]
        history = [[0] * len(model.channels) for _ in range(count)]
        for layer in range(len(model.widths)):
            _decode_layer(model, layer, Stream(remaining.pop(0)), block, history, first_token + start, mantissa_bits)
        rows += block
    assert not remaining
    return rows


def _decode_layer(
    model: Model,
    layer: int,
    stream: Stream,
    block: list[list[int]],
    history: list[list[int]],
    first_token: int,
    mantissa_bits: int,
) -> None:
    base = sum(model.widths[:layer])
    num_keys = model.planes[2 * layer][0] * model.planes[2 * layer][1]
    seconds: dict[int, tuple[int, int]] = {}  # by the first channel of a pair: the second one and the turn
    plane_base = 0
    for plane in (2 * layer, 2 * layer + 1):
        heads, dims = model.planes[plane]
        for head in range(heads):
            for first, second, turn_of_pair in model.rotations[plane] or []:
                seconds[plane_base + head * dims + first] = plane_base + head * dims + second, turn_of_pair
        plane_base += heads * dims
    coded_before = {second for second, _ in seconds.values()}
    weights = model.weights[layer]
    begin = base - sum(model.widths[layer - model.before[layer] : layer]) if weights is not None else base

    def predict(token: int, offset: int) -> int:
        channel = model.channels[base + offset]
        total = 0
        if weights is not None:
            context = history[token][begin : base + model.widths[layer]]
            total = sum(weight * number for weight, number in zip(weights[offset], context, strict=True))
        prediction = channel.mean + (total * channel.multiplier >> channel.shift)
        return max(-(1 << 30), min(1 << 30, prediction))

    def read(token: int, offset: int, prediction: int) -> int:
        channel = model.channels[base + offset]
        frequencies = model.frequencies[2 * layer + (offset >= num_keys)]
        slot, symbol = stream.slot(token, 4096), 0
        while slot >= sum(frequencies[: symbol + 1]):
            symbol += 1
        stream.take(token, sum(frequencies[:symbol]), frequencies[symbol], 4096)
        if symbol == ESCAPE:
            bits = stream.take_raw(token, 16)
            block[token][base + offset] = bits
            return units_of(bits, channel.exponent, mantissa_bits)
        low = prediction + (symbol - 31) * channel.step - channel.step // 2
        places = places_between(low, low + channel.step, mantissa_bits)
        place = 0
        if len(places) > 1:
            slot = stream.slot(token, 4096)
            place = next(p for p in range(len(places)) if (p + 1) * 4096 // len(places) > slot)
            start = place * 4096 // len(places)
            stream.take(token, start, (place + 1) * 4096 // len(places) - start, 4096)
        units = places[place]
        if units == 0:
            bits = stream.take_raw(token, 16)
        else:
            num_below = max(0, mantissa_bits - abs(units).bit_length())
            below = stream.take_raw(token, num_below) if num_below else 0
            magnitude = (abs(units) + Fraction(below, 1 << num_below)) / Fraction(2) ** channel.exponent
            bits = bits_of(magnitude, mantissa_bits) | (0x8000 if units < 0 else 0)
        block[token][base + offset] = bits
        return units

    def note(token: int, offset: int, units: int) -> None:
        channel = model.channels[base + offset]
        distance = (units - channel.mean) >> channel.history
        history[token][base + offset] = max(-4096, min(4096, distance))

    for offset in range(model.widths[layer]):
        if offset in coded_before:
            continue
        for token in range(len(block)):
            if offset not in seconds:
                note(token, offset, read(token, offset, predict(token, offset)))
                continue
            other, turn_of_pair = seconds[offset]
            phase = (first_token + token) * turn_of_pair % (1 << 64)
            cosine, sin = sine((phase + (1 << 62)) % (1 << 64)), sine(phase)
            p, q = predict(token, offset), predict(token, other)
            a = read(token, offset, turn(p, cosine, q, -sin))
            b = read(token, other, turn(q, cosine, p, sin))
            note(token, offset, turn(a, cosine, b, sin))
            note(token, other, turn(b, cosine, a, -sin))
    assert stream.states == [65536] * LANES
    assert not stream.words


def bits_of(magnitude: Fraction, mantissa_bits: int) -> int:
    """The bits of a positive value that the dtype has."""
    exponent_bits = 16 - mantissa_bits
    lowest = 2 - (1 << (exponent_bits - 1)) - (mantissa_bits - 1)
    power = max(lowest, math.floor(math.log2(magnitude)) - (mantissa_bits - 1))
    mantissa = magnitude / Fraction(2) ** power
    assert mantissa.denominator == 1
    if mantissa < 1 << (mantissa_bits - 1):
        return int(mantissa)
    return ((power - lowest + 1) << (mantissa_bits - 1)) | (int(mantissa) & ((1 << (mantissa_bits - 1)) - 1))
