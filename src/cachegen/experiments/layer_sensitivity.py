"""How much the loss of one layer's precision costs: the paper's second insight."""

from __future__ import annotations

import torch

from cachegen.comparison.context_loss import ContextLoss
from cachegen.comparison.schemes import SavedCache
from cachegen.experiments.bench import Bench
from cachegen.experiments.outcome import Column, Figure, Outcome, Published, Table, Value
from cachegen.kv_cache import KVCache
from cachegen.methods.absmax.quantization import dequantize, quantize

NAME = "layer-sensitivity"
NUM_BINS = 8
_PARTS = ("keys", "values")


def run(bench: Bench) -> Outcome:
    """Quantize one layer at a time, coarsely, and compare predictions."""
    losses: dict[tuple[int, str], list[float]] = {}
    for saved in bench.load_first_caches():
        _measure(bench, saved, losses)
    rows: list[dict[str, Value]] = [
        {"layer": layer, "part": part, "kl": sum(found) / len(found)} for (layer, part), found in losses.items()
    ]
    num_layers = 1 + max(layer for layer, _ in losses)
    thirds: list[dict[str, Value]] = []
    for part in _PARTS:
        for number, name in enumerate(("first", "second", "last")):
            layers = [layer for layer in range(num_layers) if layer * 3 // num_layers == number]
            kls = [kl for layer in layers for kl in losses[layer, part]]
            thirds.append({"layers": f"{name} third", "part": part, "kl": sum(kls) / len(kls) if kls else None})
    return Outcome(
        name=NAME,
        title="Sensitivity of layers",
        paper="Figure 4, insight 2",
        question="Does the same loss cost more in some layers than in others?",
        tables=(
            Table(
                "layers",
                f"KL where one layer's keys or values alone have {NUM_BINS} bins",
                (Column("layer", "layer"), Column("part", "of"), Column("kl", "KL, nats per token", 3)),
                tuple(rows),
            ),
            Table(
                "thirds",
                "Mean over each third of the layers, still one layer at a time",
                (Column("layers", "layers"), Column("part", "of"), Column("kl", "KL, nats per token", 3)),
                tuple(thirds),
            ),
        ),
        figures=(Figure("KL of one layer's loss", "layers", "layer", "kl", "part", log_y=True),),
        published=(
            Published(
                "layers that lose most",
                "the shallow ones",
                "Figure 4: Llama-7B and 13B, accuracy on LongChat",
                _compare_thirds(thirds),
            ),
        ),
        notes=(
            f"A token's values of a layer are rounded to {NUM_BINS} bins of its largest magnitude, the quantizer of "
            "method cachegen. All other layers keep every bit. The mean over the first context of each "
            "data set.",
        ),
    )


def _measure(bench: Bench, saved: SavedCache, losses: dict[tuple[int, str], list[float]]) -> None:
    loss = ContextLoss(bench.loaded, saved.cache, saved.metadata.token_ids)
    for layer in range(saved.cache.num_layers):
        for part in _PARTS:
            planes = KVCache(list(saved.cache.keys), list(saved.cache.values))
            chosen = planes.keys if part == "keys" else planes.values
            chosen[layer] = _round(chosen[layer])
            kl = loss.measure(planes)
            losses.setdefault((layer, part), []).append(kl)
            bench.say(f"layer {layer}, {part} in {NUM_BINS} bins: KL {kl:.5f}")


def _round(plane: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(plane, NUM_BINS), NUM_BINS).reshape(plane.shape)


def _compare_thirds(rows: list[dict[str, Value]]) -> str:
    texts = []
    for part in _PARTS:
        found = [row["kl"] for row in rows if row["part"] == part]
        first, last = found[0], found[-1]
        if isinstance(first, float) and isinstance(last, float) and last > 0:
            texts.append(f"{part}: the first third {first / last:.2g} times the last")
    return "; ".join(texts)
