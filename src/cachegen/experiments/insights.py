"""What the paper's codec rests on: neighbouring tokens are alike, and channels and layers have entropies of their own.

Its second insight, that layers differ in what a loss costs, is `layer_sensitivity`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.comparison.schemes import SavedCache
from cachegen.comparison.schemes.rotary import rotate_keys
from cachegen.experiments.bench import Bench
from cachegen.experiments.outcome import Column, Figure, Outcome, Published, Table, Value
from cachegen.methods.absmax.quantization import quantize

NAME = "insights"
NUM_BINS = 32
ANCHOR_TOKENS = 10
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

Symbols = NDArray[np.int64]


def run(bench: Bench) -> Outcome:
    """Compare values with differences, and entropies by grouping, over all contexts."""
    caches = [saved for data_set in bench.data_sets for saved in bench.load_caches(data_set)]
    variances, quantiles = _compare_deltas(caches)
    bench.say("variances of values and of differences: done")
    entropies = _compare_groupings(caches)
    bench.say("entropies by grouping: done")
    ratios = [row["ratio"] for row in variances if row["planes"] in ("keys", "values") and row["layers"] == "all"]
    return Outcome(
        name=NAME,
        title="What the codec rests on",
        paper="Figures 3 and 5, insights 1 and 3",
        question="Are neighbouring tokens alike, and by what must values be grouped to have low entropy?",
        tables=(
            Table(
                "deltas",
                f"Variance of values over that of differences to the first token of {ANCHOR_TOKENS}",
                (
                    Column("planes", "of"),
                    Column("layers", "layers"),
                    Column("variance", "variance of values", 3),
                    Column("delta_variance", "of differences", 3),
                    Column("ratio", "ratio", 3),
                ),
                tuple(variances),
            ),
            Table(
                "quantiles",
                "Magnitudes below which a share of all lies",
                (
                    Column("what", "of"),
                    Column("share", "share", 2),
                    Column("magnitude", "magnitude", 3),
                ),
                tuple(quantiles),
            ),
            Table(
                "entropies",
                f"Entropy of values in {NUM_BINS} bins, grouped",
                (Column("grouping", "grouped by"), Column("groups", "groups"), Column("bits", "bits per value", 4)),
                tuple(entropies),
            ),
        ),
        figures=(
            Figure("Magnitudes of values and of differences", "quantiles", "magnitude", "share", "what", log_x=True),
            Figure("Entropy by grouping", "entropies", "grouping", "bits", kind="bar"),
        ),
        published=(
            Published(
                "variance of values over that of differences",
                "2.4 to 2.9",
                "section 5.1, Figure 3: Llama-7B and 13B, LongChat",
                " and ".join(f"{ratio:.2f}" for ratio in ratios if isinstance(ratio, float)) + " (keys and values)",
            ),
            Published(
                "what lowers entropy most",
                "channels and layers, not tokens",
                "Figure 5",
                _name_lowest(entropies),
            ),
        ),
        notes=(
            "Keys are as the model keeps them, turned by their positions, and in rows of their own before that turn.",
            "The entropy of many small groups is too low: a group of n values can know log2(n) bits at most. Groups of "
            "a token have all channels of one layer's keys or values.",
        ),
    )


def _compare_deltas(caches: list[SavedCache]) -> tuple[list[dict[str, Value]], list[dict[str, Value]]]:
    num_layers = caches[0].cache.num_layers
    rows: list[dict[str, Value]] = []
    sums = {name: np.zeros((num_layers, 2)) for name in ("keys", "values", "keys, turned back")}
    magnitudes: dict[str, list[NDArray[np.float32]]] = {"values": [], "differences": []}
    for saved in caches:
        rotations = saved.metadata.rotations_of(saved.cache)
        for layer in range(num_layers):
            keys, values = saved.cache.keys[layer], saved.cache.values[layer]
            turned_back = rotate_keys(keys, rotations[2 * layer], undo=True)
            for name, plane in (("keys", keys), ("values", values), ("keys, turned back", turned_back)):
                rowwise = plane.flatten(1).float()
                delta = _differences(rowwise)
                sums[name][layer] += [float(rowwise.double().var()), float(delta.double().var())]
                if name != "keys, turned back":
                    magnitudes["values"].append(rowwise.abs().flatten().numpy()[::97])
                    magnitudes["differences"].append(delta.abs().flatten().numpy()[::97])
    for name, variances in sums.items():
        for layers, chosen in _group_layers(num_layers).items():
            value, delta = (variances[chosen].sum(0) / len(caches) / len(chosen)).tolist()
            ratios = variances[chosen, 0] / np.maximum(variances[chosen, 1], 1e-30)
            rows.append(
                {
                    "planes": name,
                    "layers": layers,
                    "variance": value,
                    "delta_variance": delta,
                    "ratio": float(ratios.mean()),
                }
            )
    quantiles: list[dict[str, Value]] = [
        {"what": what, "share": share, "magnitude": float(np.quantile(np.concatenate(found), share))}
        for what, found in magnitudes.items()
        for share in _QUANTILES
    ]
    return rows, quantiles


def _group_layers(num_layers: int) -> dict[str, list[int]]:
    thirds = {
        name: [layer for layer in range(num_layers) if layer * 3 // num_layers == number]
        for number, name in enumerate(("first third", "second third", "last third"))
    }
    return {"all": list(range(num_layers)), **{name: layers for name, layers in thirds.items() if layers}}


def _differences(rows: torch.Tensor) -> torch.Tensor:
    """Return the other tokens' differences to the first of their ten, `[num_tokens, num_channels]` less those."""
    anchors = rows[::ANCHOR_TOKENS].repeat_interleave(ANCHOR_TOKENS, dim=0)[: len(rows)]
    is_delta = torch.arange(len(rows)) % ANCHOR_TOKENS != 0
    return (rows - anchors)[is_delta]


def _compare_groupings(caches: list[SavedCache]) -> list[dict[str, Value]]:
    """Return the mean entropy of symbols `[num_planes, num_tokens, num_channels]` given their group."""
    groupings: dict[str, Callable[[Symbols], Symbols]] = {
        "nothing": lambda symbols: symbols.reshape(1, -1),
        "keys or values": lambda symbols: symbols.reshape(-1, 2, *symbols.shape[1:]).swapaxes(0, 1).reshape(2, -1),
        "layer": lambda symbols: symbols.reshape(len(symbols), -1),
        "channel": lambda symbols: symbols.transpose(2, 0, 1).reshape(symbols.shape[2], -1),
        "token": lambda symbols: symbols.reshape(-1, symbols.shape[2]),
        "layer and channel": lambda symbols: symbols.swapaxes(1, 2).reshape(-1, symbols.shape[1]),
    }
    totals = dict.fromkeys(groupings, 0.0)
    counts = dict.fromkeys(groupings, 0)
    num_values = 0
    for saved in caches:
        # Planes of other shapes than the first's, as some models have, are left out: groups need one shape.
        like = saved.cache.planes[0].shape
        planes = [plane for plane in saved.cache.planes if plane.shape == like]
        symbols = np.stack([quantize(plane, NUM_BINS)[0].numpy().astype(np.int64) for plane in planes])
        num_values += symbols.size
        for name, group in groupings.items():
            grouped = group(symbols)
            totals[name] += _code_length(grouped)
            counts[name] = len(grouped)
    return [{"grouping": name, "groups": counts[name], "bits": total / num_values} for name, total in totals.items()]


def _code_length(groups: Symbols) -> float:
    """Return the ideal bits of all symbols `[num_groups, num_symbols]`, given the counts of their own group."""
    offsets = np.arange(len(groups))[:, None] * NUM_BINS
    counts = np.bincount((groups + offsets).ravel(), minlength=len(groups) * NUM_BINS).reshape(-1, NUM_BINS)
    shares = counts / counts.sum(1, keepdims=True)
    return float(-(counts * np.log2(np.where(counts > 0, shares, 1))).sum())


def _name_lowest(rows: list[dict[str, Value]]) -> str:
    ordered = sorted(rows, key=lambda row: float(row["bits"] or 0))
    return ", ".join(f"{row['grouping']} {row['bits']:.2f} bits" for row in ordered[:3])
