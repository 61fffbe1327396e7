"""The symbols and tables that interop.py exchanges: random, skewed, degenerate, and those of a real cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cachegen.coder import cpu
from cachegen.format import Coder
from cachegen.methods import load_config
from cachegen.methods.absmax.codec import AbsmaxEncoder
from cachegen.methods.absmax.config import AbsmaxConfig
from cachegen.methods.absmax.quantization import quantize

ROOT = Path(__file__).resolve().parent.parent
TABLE_SIZE = 32
TOKEN_COUNTS = [1, 2, 31, 32, 33, 255, 256, 257, 1000]
LMCACHE_TOKENS = 256


@dataclass
class Case:
    """Streams to be exchanged.

    Attributes:
        streams: pairs of symbols `[num_channels, num_tokens]` and frequencies `[num_channels, 32]` that sum to 4096.
    """

    name: str
    streams: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def list_cases(model_id: str | Path | None, context: Path, num_tokens: int) -> list[Case]:
    """Make all cases; without a model, no real cache."""
    rng = np.random.default_rng(1987)
    cases = [
        Case("random symbols and tables", list(_draw(rng, _random_table, _draw_uniform))),
        Case("as their skewed tables say", list(_draw(rng, _skewed_table, _draw_typical))),
        Case("always the rarest", list(_draw(rng, _skewed_table, _draw_rarest))),
        Case("astride the middle", list(_draw(rng, _straddling_table, _draw_rarest))),
        Case("a single symbol", list(_draw(rng, _single_symbol_table, _draw_typical))),
    ]
    if model_id is not None:
        cases += _list_real_cases(model_id, context, num_tokens)
    return cases


def make_tables_like(name: str, ask_for_cdf: Callable[[np.ndarray, int], np.ndarray]) -> list[Case]:
    """Make cases whose tables are LMCache's own for the symbols, brought to 12 bits.

    Its rule is (0xFFFF - num_bins) * cumulative // total + k, and 0x10000 at the end: every symbol has a frequency. Its
    tables as such are not ours, which are multiples of 16: each frequency is divided by 16 and floored, but at least 1,
    and the largest takes what is left over.
    """
    rng = np.random.default_rng(7)
    streams = []
    for num_symbols, num_tokens in [(32, LMCACHE_TOKENS), (16, LMCACHE_TOKENS), (32, 101), (2, LMCACHE_TOKENS)]:
        spread = rng.normal(num_symbols / 2, num_symbols / 8, (64, num_tokens))
        symbols = np.clip(spread.astype(np.int64), 0, num_symbols - 1).astype(np.uint8)
        frequencies = np.maximum(np.diff(ask_for_cdf(symbols, num_symbols), axis=1) >> 4, 1)
        rows = np.arange(len(frequencies))
        frequencies[rows, frequencies.argmax(axis=1)] += 4096 - frequencies.sum(axis=1)
        streams.append((symbols, np.pad(frequencies, ((0, 0), (0, TABLE_SIZE - num_symbols)))))
    return [Case(name, streams)]


# --- random ones ------------------------------------------------------------------------------------------------------


def _draw(rng: np.random.Generator, make_table, draw_symbols) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for num_tokens in TOKEN_COUNTS:
        frequencies = np.stack([make_table(rng) for _ in range(64)])
        yield np.stack([draw_symbols(rng, table, num_tokens) for table in frequencies]), frequencies


def _table_of(rng: np.random.Generator, num_present: int, concentration: float) -> np.ndarray:
    frequencies = np.zeros(TABLE_SIZE, dtype=np.int64)
    present = np.sort(rng.choice(TABLE_SIZE, num_present, replace=False))
    shares = rng.dirichlet(np.full(num_present, concentration)) * (4096 - num_present)
    frequencies[present] = 1 + shares.astype(np.int64)
    frequencies[rng.choice(present)] += 4096 - frequencies.sum()
    return frequencies


def _random_table(rng: np.random.Generator) -> np.ndarray:
    return _table_of(rng, int(rng.integers(2, TABLE_SIZE + 1)), 1.0)


def _skewed_table(rng: np.random.Generator) -> np.ndarray:
    return _table_of(rng, int(rng.integers(2, TABLE_SIZE + 1)), 0.05)


def _single_symbol_table(rng: np.random.Generator) -> np.ndarray:
    return _table_of(rng, 1, 1.0)


def _straddling_table(rng: np.random.Generator) -> np.ndarray:
    """A rare symbol astride the middle: bit after bit stays pending."""
    frequencies = np.zeros(TABLE_SIZE, dtype=np.int64)
    first = int(rng.integers(0, TABLE_SIZE - 2))
    below = 2047 - int(rng.integers(0, 2))
    frequencies[first : first + 3] = below, 2, 4094 - below
    return frequencies


def _draw_uniform(rng: np.random.Generator, table: np.ndarray, num_tokens: int) -> np.ndarray:
    return rng.choice(np.flatnonzero(table), num_tokens)


def _draw_typical(rng: np.random.Generator, table: np.ndarray, num_tokens: int) -> np.ndarray:
    return rng.choice(TABLE_SIZE, num_tokens, p=table / 4096)


def _draw_rarest(rng: np.random.Generator, table: np.ndarray, num_tokens: int) -> np.ndarray:
    present = np.flatnonzero(table)
    return np.full(num_tokens, present[table[present].argmin()])


# --- a real cache -----------------------------------------------------------------------------------------------------


def _list_real_cases(model_id: str | Path, context: Path, num_tokens: int) -> list[Case]:
    from cachegen.pipeline.model import load_model
    from cachegen.pipeline.prefill import prefill_context, tokenize

    text = (context if context.exists() else ROOT / "LICENSE").read_text(encoding="utf-8")
    loaded = load_model(str(model_id), device=torch.device("cpu"), dtype=torch.bfloat16)
    cache, metadata = prefill_context(loaded, tokenize(loaded, text)[: num_tokens + 1])
    cases = []
    for config_name in ("quantization_tiny", "quantization_tiny_fine"):
        config = load_config(ROOT / "config" / f"{config_name}.json")
        assert isinstance(config, AbsmaxConfig)
        encoder = AbsmaxEncoder(cache, metadata, config, [cache.num_tokens], Coder.AC)
        tables = encoder.document.classes[0][1]
        if not isinstance(tables, cpu.Tables):
            raise TypeError("the document has no tables")
        planes = encoder.document.header.planes
        frequencies = tables.frequencies().astype(np.int64)
        first_tables = np.cumsum([0] + [plane.num_channels for plane in planes])
        for size in (LMCACHE_TOKENS, cache.num_tokens):
            case = Case(f"{config_name}, {size} tokens")
            for index, (values, plane) in enumerate(zip(cache.planes, planes, strict=True)):
                symbols = (quantize(values, plane.num_bins)[0] >> plane.low_bits).to(torch.int64).numpy().T
                of_plane = frequencies[first_tables[index] : first_tables[index + 1]]
                case.streams += [(symbols[:, at : at + size], of_plane) for at in range(0, cache.num_tokens, size)]
            cases.append(case)
    return cases
