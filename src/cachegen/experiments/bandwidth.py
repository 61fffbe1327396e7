"""Time to first token over the link's speed: the cache by each method, and the text."""

from __future__ import annotations

from cachegen.experiments.bench import Bench
from cachegen.experiments.outcome import Column, Figure, Outcome, Published, Table, Value
from cachegen.experiments.timings import CHUNK_TOKENS, Times, measure_times
from cachegen.pipeline.break_even import beats_fp16_below, beats_text_above

NAME = "bandwidth"
TEXT = "text, computed"
EIGHT_BIT = "uniform, 8 bits"
GBPS = tuple(10 ** (exponent / 8) for exponent in range(-24, 17))  # 0.001 to 100
_GIGA = 1e9
_SHOWN = "cachegen, 32/16 bins"


def run(bench: Bench) -> Outcome:
    """Measure bytes and times here, and compute what links of every speed would make of them."""
    times = measure_times(bench)
    seconds = _seconds_by_method(times)
    rows: list[dict[str, Value]] = [
        {"method": name, "gbps": gbps, "seconds": found}
        for name, by_link in seconds.items()
        for gbps, found in zip(GBPS, by_link, strict=True)
    ]
    columns = (
        Column("method", "method"),
        Column("gbps", "link, Gbit/s", 3),
        Column("seconds", "time to first token, s", 3),
    )
    breaks: list[dict[str, Value]] = [
        {
            "method": times_of.name,
            "bits_per_value": 8 * times_of.num_bytes / times.num_values,
            "decode_gbs": times.raw_bytes / times_of.decode_seconds / _GIGA,
            "encode_gbs": times.raw_bytes / times_of.encode_seconds / _GIGA,
            "below": beats_fp16_below(times.raw_bytes, times_of.num_bytes, times_of.decode_seconds) / _GIGA,
            "above": _giga(
                beats_text_above(
                    times_of.num_bytes,
                    times_of.decode_seconds + times.first_token_seconds,
                    times.prefill_seconds + times.first_token_seconds,
                )
            ),
        }
        for times_of in times.encodings
    ]
    return Outcome(
        name=NAME,
        title="Time to first token over bandwidth",
        paper="Figure 11",
        question="Over which links is a method faster than the text, and than 8-bit quantization?",
        tables=(
            Table(
                "break-even",
                "Speeds of one context, and the links between which a method wins",
                (
                    Column("method", "method"),
                    Column("bits_per_value", "bits per value", 4),
                    Column("decode_gbs", "decode, GB/s of the cache", 3),
                    Column("encode_gbs", "encode", 3),
                    Column("below", "faster than sending the cache below, Gbit/s", 3),
                    Column("above", "than the text above, Gbit/s", 3),
                ),
                tuple(breaks),
            ),
            Table("times", "Time to first token", columns, tuple(rows)),
        ),
        figures=(Figure("Time to first token", "times", "gbps", "seconds", "method", log_x=True, log_y=True),),
        published=(
            Published(
                "time of loading, the baselines' over CacheGen's",
                "3.2 to 3.7",
                "abstract: four models and datasets, 3 Gbit/s, A40 GPUs",
                _best_ratio(seconds),
            ),
        ),
        notes=(
            f"Bytes and times are measured here, on {times.num_tokens:,} tokens. The link is arithmetic. "
            f"A chunk of {CHUNK_TOKENS:,} tokens is decoded while those behind it arrive. The text itself is "
            f"{times.text_bytes:,} bytes.",
            "How fast a link must be depends on the model and the machine: where the paper's are larger, compare the "
            "curves' shapes, not their Gbit/s.",
        ),
        setting={
            "num_tokens": times.num_tokens,
            "prefill_seconds": times.prefill_seconds,
            "first_token_seconds": times.first_token_seconds,
        },
    )


def _seconds_by_method(times: Times) -> dict[str, list[float]]:
    first = times.first_token_seconds
    found = {
        "cache, as it is": [8 * times.raw_bytes / gbps / _GIGA + first for gbps in GBPS],
        TEXT: [8 * times.text_bytes / gbps / _GIGA + times.prefill_seconds + first for gbps in GBPS],
    }
    for times_of in times.encodings:
        found[times_of.name] = [times_of.seconds_over(gbps * _GIGA) + first for gbps in GBPS]
    return found


def _best_ratio(seconds: dict[str, list[float]]) -> str:
    """Return over which link the best baseline takes longest, over the method's time."""
    texts = []
    for name, found in seconds.items():
        if name not in (_SHOWN,) and not name.startswith("transform"):
            continue
        ratios = [
            min(text, eight_bit) / own
            for text, eight_bit, own in zip(seconds[TEXT], seconds[EIGHT_BIT], found, strict=True)
        ]
        best = max(range(len(ratios)), key=ratios.__getitem__)
        texts.append(f"{name}: at most {ratios[best]:.2g}, at {GBPS[best]:.2g} Gbit/s")
    return "; ".join(texts)


def _giga(bits_per_second: float | None) -> float | None:
    return None if bits_per_second is None else bits_per_second / _GIGA
