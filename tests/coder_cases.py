"""Streams that every coder must code alike: the reference is tested on them, and others against the reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.reference.planes import StreamCoding


@dataclass(frozen=True)
class Case:
    """One stream.

    Attributes:
        symbols: `[num_channels][num_tokens]`.
    """

    name: str
    symbols: list[list[int]]
    coding: StreamCoding

    @property
    def is_small(self) -> bool:
        return len(self.symbols) * len(self.symbols[0]) <= 400


def flat_frequencies(alphabet_size: int) -> list[int]:
    """Frequencies that differ by at most one."""
    share, rest = divmod(4096, alphabet_size)
    return [share + (symbol < rest) for symbol in range(alphabet_size)] + [0] * (32 - alphabet_size)


def make_frequencies(generator: random.Random, alphabet_size: int) -> list[int]:
    """Random frequencies, some of them 1, whose sum is 4096."""
    weights = [generator.choice([1, 1, 5, 40, 300]) for _ in range(alphabet_size)]
    frequencies = [max(1, weight * 4096 // sum(weights)) for weight in weights]
    frequencies[weights.index(max(weights))] += 4096 - sum(frequencies)
    return frequencies + [0] * (32 - alphabet_size)


def draw_symbols(generator: random.Random, table: list[int], low_bits: int, num_tokens: int) -> list[int]:
    """Symbols as frequent as the table says, their low bits even."""
    high = generator.choices(range(32), weights=table, k=num_tokens)
    return [symbol << low_bits | generator.randrange(1 << low_bits) for symbol in high]


def list_cases() -> Iterator[Case]:
    generator = random.Random(1)
    for num_channels in (1, 5, 31, 33, 80, 128):
        for num_tokens in (1, 31, 32, 33, 100):
            tables = [make_frequencies(generator, generator.choice([1, 2, 15, 31, 32])) for _ in range(num_channels)]
            low_bits = generator.choice([0, 0, 1, 3])
            symbols = [draw_symbols(generator, table, low_bits, num_tokens) for table in tables]
            yield Case(f"{num_channels} channels, {num_tokens} tokens", symbols, StreamCoding(tables, low_bits))
    for low_bits in range(9):
        tables = [make_frequencies(generator, 32) for _ in range(6)]
        symbols = [draw_symbols(generator, table, low_bits, 45) for table in tables]
        yield Case(f"{low_bits} low bits", symbols, StreamCoding(tables, low_bits))
        symbols = [[generator.randrange(1 << low_bits) for _ in range(45)] for _ in range(6)]
        yield Case(f"packed, {low_bits} low bits", symbols, StreamCoding(None, low_bits))
    single = [0] * 31 + [4096]
    yield Case("single symbol", [[31] * 70] * 3, StreamCoding([single] * 3))
    rare = [4095] + [0] * 30 + [1]
    yield Case("rarest symbols only", [[31] * 70] * 3, StreamCoding([rare] * 3))
    yield Case("rarest symbol once", [[0] * 69 + [31]] * 3, StreamCoding([rare] * 3))
    yield Case("largest symbols", [[(31 << 8) + 255] * 40] * 2, StreamCoding([rare] * 2, 8))
    yield Case("minimal", [[0]], StreamCoding([[4096] + [0] * 31]))
    yield Case("minimal packed", [[0]], StreamCoding(None, 0))
    tables = [make_frequencies(generator, 16) for _ in range(5)]
    indices = [generator.randrange(5) for _ in range(40)]
    symbols = [draw_symbols(generator, tables[index], 1, 45) for index in indices]
    yield Case("table indices", symbols, StreamCoding(tables, 1, indices))


CASES = list(list_cases())
