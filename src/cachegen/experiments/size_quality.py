"""Size against quality, by every method: what the paper's evaluation begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachegen.comparison.rate_distortion import measure
from cachegen.comparison.report import summarize
from cachegen.comparison.schemes import Scheme, choose_schemes, make_schemes
from cachegen.experiments.bench import Bench
from cachegen.experiments.outcome import Column, Figure, Outcome, Published, Table, Value

NAME = "size-quality"
_EIGHT_BIT = ("uniform", "8-bit")
_USUAL_BINS = ("cachegen", "32/16 bins")
_SETTINGS = (
    "uniform=4-bit,8-bit",
    "cachegen=16/8 bins,32/16 bins,64/32 bins",
    "cachegen-delta=bins x1,bins x1/2,bins x1/4,bins x1/8",
    "llama.cpp=q4_0,q8_0",
    "kivi=2-bit",
    "pca=1 bit,2 bit",
    "transform-sinks=step +28,step +20,step +12,step +4,step -8,step -24",
    "lossless",
)
_TITLES = {
    "uniform": "uniform",
    "uniform-rans": "uniform, entropy coded",
    "cachegen": "cachegen, without deltas",
    "cachegen-original": "cachegen, the original's code",
    "cachegen-delta": "cachegen, deltas to anchors",
    "llama.cpp": "llama.cpp",
    "kivi": "KIVI-like",
    "pca": "KVTC-like",
    "transform-sinks": "transform",
    "lossless": "lossless",
}
"""The methods that are shown; the other coders of the same values are left out."""


def run(bench: Bench) -> Outcome:
    """Measure all methods on all data sets."""
    rows: list[dict[str, Value]] = []
    for data_set, contexts in bench.data_sets.items():
        asks = all(context.questions for context in contexts)
        study = bench.study(data_set, _choose(bench), with_retrieval=asks)
        rows += _describe(data_set, summarize(measure(study, bench.say)), len(contexts))
    first = [row for row in rows if row["data_set"] == next(iter(bench.data_sets))]
    return Outcome(
        name=NAME,
        title="Size and quality",
        paper="Table 1, Figures 8 and 9",
        question="How small does each method make the cache, and what does the model then predict and answer?",
        tables=(Table("methods", "Every method and setting", _COLUMNS, tuple(rows)),),
        figures=(
            Figure(
                "Loss over size",
                "methods",
                "bits_per_value",
                "kl",
                "method",
                "setting",
                "data_set",
                log_x=True,
                log_y=True,
            ),
            Figure(
                "Size over that of 8-bit quantization, and agreement",
                "methods",
                "over_8_bit",
                "agreement",
                "method",
                "setting",
                kind="points",
                log_x=True,
            ),
        ),
        published=(
            Published(
                "cache of 8-bit quantization over CacheGen's",
                "3.5 to 4.3 (622 MB against 176 MB: 3.5)",
                "abstract; Table 1: Mistral-7B, LongChat",
                _ratio_to_8_bit(first),
            ),
        ),
        notes=(
            "Every byte of a document is counted, tables included; a model's profile is not. KL and agreement are over "
            "the last 256 tokens of each context, which are read on the decoded cache.",
            "Deltas to anchors are the paper's text (section 5.1); without deltas, method cachegen is as its released "
            "code. KIVI-like, KVTC-like and llama.cpp are readings of papers and formats, not their authors' code.",
        ),
    )


_COLUMNS = (
    Column("data_set", "data set"),
    Column("method", "method"),
    Column("setting", "setting"),
    Column("bits_per_value", "bits per value", 4),
    Column("megabytes", "MB per context", 3),
    Column("over_8_bit", "size over 8-bit's", 3),
    Column("kl", "KL, nats per token", 3),
    Column("agreement", "same next token", 4),
    Column("perplexity", "perplexity", 4),
    Column("right", "right answers", 4),
)


def _choose(bench: Bench) -> list[Scheme]:
    schemes = [scheme for scheme in make_schemes(bench.profile) if scheme.name not in bench.left_out]
    known = {scheme.name for scheme in schemes}
    return choose_schemes(schemes, [setting for setting in _SETTINGS if setting.partition("=")[0] in known])


def _describe(data_set: str, summaries: list[dict[str, Any]], num_contexts: int) -> list[dict[str, Value]]:
    eight_bit = _bytes_of(summaries, *_EIGHT_BIT)
    return [
        {
            "data_set": data_set,
            "method": _TITLES[row["method"]],
            "setting": row["setting"],
            "bits_per_value": row["bits_per_value"],
            "megabytes": row["encoded_bytes"] / num_contexts / 1e6,
            "over_8_bit": None if eight_bit is None else row["encoded_bytes"] / eight_bit,
            "kl": row["kl"],
            "agreement": row["next_token_agreement"],
            "perplexity": row["perplexity"],
            "right": row["retrieval_accuracy"],
        }
        for row in summaries
        if row["method"] in _TITLES
    ]


def _bytes_of(summaries: list[dict[str, Any]], method: str, setting: str) -> int | None:
    found = [row["encoded_bytes"] for row in summaries if (row["method"], row["setting"]) == (method, setting)]
    return found[0] if found else None


def _ratio_to_8_bit(rows: list[dict[str, Value]]) -> str:
    method, setting = _USUAL_BINS
    found: list[Mapping[str, Value]] = [
        row for row in rows if (row["method"], row["setting"]) == (_TITLES[method], setting)
    ]
    if not found or not isinstance(share := found[0]["over_8_bit"], float):
        return ""
    return f"{1 / share:.2f} at {setting}, without deltas"
