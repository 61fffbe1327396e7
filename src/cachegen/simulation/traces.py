"""Bandwidth over time as a piecewise constant function, its JSON-lines file, and generators of the usual kinds.

A file is one trace. Its first line may be an object with "name", "indexed_by" ("time", the default, or "chunk") and the
request model's "first_byte_seconds" (a list, taken in turn) and "connection_gbps". Each further line is one piece,
{"seconds": 0.1, "gbps": 2.5}; the last piece holds for ever. Indexed by chunk, a piece is {"gbps": 2.5}, the
rate at which all files of the chunk of that number travel, the pieces in turn. 1 Gbps is 10^9 bits per second.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachegen.errors import InputError
from cachegen.fields import Fields, parse_fields, refuse_input
from cachegen.files import read_file, write_file

BYTES_PER_GIGABIT = 1e9 / 8
_MAX_PIECES = 1_000_000
_MAX_NUMBER = 1e12
MAX_TRACE_BYTES = 128 << 20  # a million pieces, and more than a hundred bytes for each


@dataclass(frozen=True)
class BandwidthTrace:
    """What a link gives, and what a request on it costs.

    Attributes:
        name: for reports.
        rates: bytes per second of each piece, at least 0.
        starts: seconds at which each piece begins, ascending from 0; empty where `rates` are indexed by chunk.
        first_byte_seconds: from a request to its first byte; the k-th request takes the k-th value, in turn.
        connection_rate: bytes per second that a single connection cannot exceed.
    """

    name: str
    rates: tuple[float, ...]
    starts: tuple[float, ...] = ()
    first_byte_seconds: tuple[float, ...] = (0.0,)
    connection_rate: float = math.inf

    def __post_init__(self) -> None:
        if not self.rates or any(not 0 <= rate < math.inf for rate in self.rates):
            raise ValueError("`rates` must be at least one finite number of at least 0")
        if self.starts and (len(self.starts) != len(self.rates) or self.starts[0] != 0):
            raise ValueError("`starts` must begin at 0 and have one value per rate")
        if any(not before < after for before, after in zip(self.starts, self.starts[1:], strict=False)):
            raise ValueError("`starts` must ascend")
        if not self.first_byte_seconds or any(not 0 <= s < math.inf for s in self.first_byte_seconds):
            raise ValueError("`first_byte_seconds` must be at least one finite number of at least 0")
        if not self.connection_rate > 0:
            raise ValueError("`connection_rate` must be positive")

    @property
    def is_per_chunk(self) -> bool:
        """Whether the rate depends on the chunk that travels rather than on the time."""
        return not self.starts

    def rate_at(self, seconds: float) -> float:
        """Return the bytes per second at that time; not for a trace indexed by chunk."""
        return self.rates[bisect_right(self.starts, seconds) - 1]

    def rate_of_chunk(self, chunk: int) -> float:
        """Return the bytes per second at which the files of that chunk travel; for a trace indexed by chunk."""
        return self.rates[chunk % len(self.rates)]

    def next_change(self, seconds: float) -> float:
        """Return when the rate changes next, after that time; infinity for never."""
        piece = bisect_right(self.starts, seconds)
        return self.starts[piece] if piece < len(self.starts) else math.inf

    def bytes_until(self, seconds: float) -> float:
        """Return the integral of the rate from 0 to that time; not for a trace indexed by chunk."""
        ends = (*self.starts[1:], math.inf)
        return sum(
            rate * (min(end, seconds) - start)
            for rate, start, end in zip(self.rates, self.starts, ends, strict=True)
            if start < seconds
        )


# --- files ------------------------------------------------------------------------------------------------------------


def load_trace(path: str | os.PathLike[str]) -> BandwidthTrace:
    """Read a trace file; the format is at the top of this module.

    Raises:
        InputError: it is missing, or not a trace, naming the line.
    """
    path = Path(path)
    text = read_file(path, MAX_TRACE_BYTES, kind="trace file")
    try:
        lines = text.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a trace of JSON lines: byte {error.start} is not UTF-8") from error
    header = _Header(path.stem)
    rates: list[float] = []
    durations: list[float] = []
    is_first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        if len(rates) == _MAX_PIECES:
            raise InputError(f"{where}: a trace has at most {_MAX_PIECES:,} pieces")
        fields = parse_fields(line, refuse_input(where))
        if is_first and "gbps" not in fields:
            header = _read_header(fields, header)
        else:
            fields.require(("gbps",) if header.is_per_chunk else ("gbps", "seconds"))
            rates.append(fields.number("gbps", 0, _MAX_NUMBER) * BYTES_PER_GIGABIT)
            if not header.is_per_chunk:
                durations.append(fields.number("seconds", 0, _MAX_NUMBER, above=True))
        is_first = False
    if not rates:
        raise InputError(f'{path}: holds no piece such as {{"seconds": 1, "gbps": 2.5}}')
    starts = () if not durations else (0.0, *np.cumsum(durations[:-1]).tolist())
    try:
        return BandwidthTrace(
            name=header.name,
            rates=tuple(rates),
            starts=starts,
            first_byte_seconds=header.first_byte_seconds,
            connection_rate=header.connection_rate,
        )
    except ValueError as error:  # durations too small to add up
        raise InputError(f"{path}: {error}") from error


def save_trace(path: str | os.PathLike[str], trace: BandwidthTrace) -> None:
    """Write a trace file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    header: dict = {"name": trace.name, "indexed_by": "chunk" if trace.is_per_chunk else "time"}
    if trace.first_byte_seconds != (0.0,):
        header["first_byte_seconds"] = list(trace.first_byte_seconds)
    if trace.connection_rate < math.inf:
        header["connection_gbps"] = trace.connection_rate / BYTES_PER_GIGABIT
    lines = [header]
    for piece, rate in enumerate(trace.rates):
        line = {"gbps": rate / BYTES_PER_GIGABIT}
        if not trace.is_per_chunk:
            end = trace.starts[piece + 1] if piece + 1 < len(trace.starts) else trace.starts[piece] + 1
            line = {"seconds": end - trace.starts[piece], **line}
        lines.append(line)
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


@dataclass(frozen=True)
class _Header:
    """What the first line of a trace file may say."""

    name: str
    is_per_chunk: bool = False
    first_byte_seconds: tuple[float, ...] = (0.0,)
    connection_rate: float = math.inf


def _read_header(fields: Fields, default: _Header) -> _Header:
    fields.refuse_unknown({"name", "indexed_by", "first_byte_seconds", "connection_gbps", "gbps"})
    return _Header(
        name=fields.text("name") if "name" in fields else default.name,
        is_per_chunk="indexed_by" in fields and fields.choice("indexed_by", ("time", "chunk")) == "chunk",
        first_byte_seconds=fields.numbers("first_byte_seconds", 1, _MAX_PIECES, 0, _MAX_NUMBER)
        if "first_byte_seconds" in fields
        else default.first_byte_seconds,
        connection_rate=fields.number("connection_gbps", 0, _MAX_NUMBER, above=True) * BYTES_PER_GIGABIT
        if "connection_gbps" in fields
        else default.connection_rate,
    )


# --- generators -------------------------------------------------------------------------------------------------------


def held(name: str, gbps: Iterable[float], seconds: float) -> BandwidthTrace:
    """Return a trace that holds each rate for so long."""
    rates = tuple(float(rate) * BYTES_PER_GIGABIT for rate in gbps)
    return BandwidthTrace(name, rates, tuple(seconds * i for i in range(len(rates))))


def constant(gbps: float) -> BandwidthTrace:
    """Return a link that never changes."""
    return held(f"constant {gbps:g} Gbps", [gbps], 1.0)


def uniform_per_chunk(seed: int, low: float = 0.1, high: float = 10.0, num_chunks: int = 256) -> BandwidthTrace:
    """Return U(low, high) Gbps, white, drawn once per chunk index: what the CacheGen paper's evaluation replays.

    Source: streaming.md, "Bandwidth"; the paper's section 7 says "between 0.1 and 10 Gbps at each context chunk".
    """
    rates = np.random.default_rng(seed).uniform(low, high, num_chunks) * BYTES_PER_GIGABIT
    return BandwidthTrace(f"U({low:g}, {high:g}) Gbps per chunk", tuple(rates.tolist()))


def uniform_held(seed: int, low: float = 0.1, high: float = 10.0, seconds: float = 0.2) -> BandwidthTrace:
    """Return U(low, high) Gbps, white, each rate held for `seconds`."""
    rates = np.random.default_rng(seed).uniform(low, high, 512)
    return held(f"U({low:g}, {high:g}) Gbps held {seconds:g} s", rates, seconds)


def autoregressive(seed: int, median: float = 2.5, sigma: float = 0.4, rho: float = 0.85) -> BandwidthTrace:
    """Return a log-normal AR(1) per 100 ms: the logarithm has standard deviation `sigma`, correlation `rho` a step."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal(512) * sigma
    logs = [noise[0]]
    for value in noise[1:]:
        logs.append(rho * logs[-1] + math.sqrt(1 - rho * rho) * value)
    return held(f"log-normal AR(1), median {median:g} Gbps", median * np.exp(logs), 0.1)


def markov(seed: int, good: float = 0.606, drop: float = 4.0, fall: float = 0.047, rise: float = 0.2) -> BandwidthTrace:
    """Return two states per second, `good` and `good / drop` Gbps; the defaults have mmWave 5G's mean, 0.52 Gbps.

    Args:
        seed: of the draws, the first state included.
        good: Gbps of the better state.
        drop: how many times less the other gives.
        fall: probability per second to leave the better state.
        rise: probability per second to leave the worse one: assumed, unlike the others.
    """
    generator = np.random.default_rng(seed)
    is_good = generator.random() < rise / (rise + fall)
    rates = []
    for draw in generator.random(120):
        rates.append(good if is_good else good / drop)
        is_good = draw >= fall if is_good else draw < rise
    return held(f"Markov, {good:g} and {good / drop:.3g} Gbps", rates, 1.0)


def step_drop(seed: int, before: float = 5.0, after: float = 0.15, latest: float = 0.5) -> BandwidthTrace:
    """Return one drop, for ever, at a random time up to `latest` seconds."""
    time = float(np.random.default_rng(seed).uniform(0.001, latest))
    rates = (before * BYTES_PER_GIGABIT, after * BYTES_PER_GIGABIT)
    return BandwidthTrace(f"drop from {before:g} to {after:g} Gbps", rates, (0.0, time))


def outage(seed: int, gbps: float = 3.0) -> BandwidthTrace:
    """Return a link that gives nothing for 0.5 to 2 seconds, beginning within the first half second."""
    start, length = np.random.default_rng(seed).uniform((0.001, 0.5), (0.5, 2.0)).tolist()
    rate = gbps * BYTES_PER_GIGABIT
    return BandwidthTrace(f"{gbps:g} Gbps with an outage", (rate, 0.0, rate), (0.0, start, start + length))


def no_bandwidth() -> BandwidthTrace:
    """Return a link that gives nothing, ever."""
    return held("no bandwidth", [0.0], 1.0)


def object_store(seed: int, gbps: float = 25.0) -> BandwidthTrace:
    """Return S3's request model: 0.7 Gbps (87.5 MB/s) per connection, first byte log-normal, median 27 ms, p99 114 ms.

    Args:
        seed: of the first-byte times.
        gbps: of the machine's network card, which all connections share.

    Source: streaming.md, "Bandwidth". 2.326 is the normal distribution's 99th percentile.
    """
    sigma = math.log(114 / 27) / 2.326
    times = 0.027 * np.exp(sigma * np.random.default_rng(seed).standard_normal(512))
    rate = gbps * BYTES_PER_GIGABIT
    return BandwidthTrace("object store requests", (rate,), (0.0,), tuple(times.tolist()), 0.7 * BYTES_PER_GIGABIT)


SEEDED_TRACES: dict[str, Callable[[int], BandwidthTrace]] = {
    "uniform-per-chunk": uniform_per_chunk,
    "uniform-held": uniform_held,
    "autoregressive": autoregressive,
    "markov": markov,
    "step-drop": step_drop,
    "outage": outage,
    "object-store": object_store,
}
"""The random kinds by the name that scripts/simulate_adaptation.py gives them."""
