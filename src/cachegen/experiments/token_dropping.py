"""Dropping tokens, and encoding what is left: whether a codec still gains where tokens are gone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from cachegen.comparison.context_loss import fill_new_cache
from cachegen.comparison.schemes import SavedCache
from cachegen.comparison.token_dropping import SNAPKV_WINDOW, drop_tokens, score_by_all, score_by_last
from cachegen.errors import InputError
from cachegen.experiments.bench import Bench
from cachegen.experiments.encodings import choose_encodings, encode, open_encoding
from cachegen.experiments.outcome import Column, Figure, Outcome, Published, Table, Value
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods.transform.transform import SINK_TOKENS
from cachegen.pipeline.verify import compare_with_predictions, count_verified_tokens, predict_from

NAME = "token-dropping"
SHARES = (0.5, 0.25)
_NO_DROPPING = "none"
_NO_CODEC = "as it is"


def run(bench: Bench) -> Outcome:
    """Drop tokens of each data set's first context, encode the rest, and compare predictions."""
    found: dict[tuple[str, float, str], list[tuple[float, float, float]]] = {}
    for saved in bench.load_first_caches():
        _measure(bench, saved, found)
    rows: list[dict[str, Value]] = []
    for (dropping, share, codec), measured in found.items():
        bits, kl, agreement = (sum(values) / len(measured) for values in zip(*measured, strict=True))
        rows.append(
            {
                "dropping": dropping,
                "kept": share,
                "codec": codec,
                "chain": f"{dropping}, {codec}",
                "bits": bits,
                "kl": kl,
                "agreement": agreement,
            }
        )
    return Outcome(
        name=NAME,
        title="Dropping tokens before encoding",
        paper="Table 1, Figure 10",
        question="Does encoding pay where tokens have been dropped, and dropping where there is a codec?",
        tables=(
            Table(
                "chains",
                "Bits over all values of the whole cache, dropped ones included",
                (
                    Column("dropping", "dropped by"),
                    Column("kept", "share kept", 2),
                    Column("codec", "then"),
                    Column("chain", "chain"),
                    Column("bits", "bits per value", 3),
                    Column("kl", "KL, nats per token", 3),
                    Column("agreement", "same next token", 3),
                ),
                tuple(rows),
            ),
        ),
        figures=(
            Figure("Loss over size", "chains", "bits", "kl", "codec", "chain", kind="points", log_x=True, log_y=True),
        ),
        published=(
            Published(
                "CacheGen on H2O over H2O alone",
                "282 MB to 71 MB, accuracy 0.97 for both; CacheGen alone: 176 MB, 0.98",
                "Table 1: Mistral-7B, LongChat",
                _compare(rows),
            ),
        ),
        notes=(
            "H2O-like and SnapKV-like are this project's reading of the papers. Each head keeps tokens of its own, the "
            f"first {SINK_TOKENS} always, and what is kept moves together, so that positions have no gaps.",
            "KL is over the last tokens of each data set's first context, against the whole uncompressed cache.",
        ),
    )


def _measure(
    bench: Bench, saved: SavedCache, found: dict[tuple[str, float, str], list[tuple[float, float, float]]]
) -> None:
    token_ids = saved.metadata.token_ids
    start = len(token_ids) - count_verified_tokens(len(token_ids))
    whole = saved.slice(start)
    if saved.metadata.first_visible(len(token_ids)):
        raise InputError(f"{NAME}: windows of the model hide tokens of {len(token_ids)}: give shorter contexts")
    reference = predict_from(
        bench.loaded,
        token_ids,
        fill_new_cache(bench.loaded, whole.cache, len(token_ids)),
        start=start,
        num_held_tokens=start,
    )
    scorers: Mapping[str, Callable[[], list[torch.Tensor]]] = {
        "H2O-like": lambda: score_by_all(bench.loaded, whole),
        "SnapKV-like": lambda: score_by_last(bench.loaded, whole),
    }
    kept: dict[tuple[str, float], KVCache] = {(_NO_DROPPING, 1.0): whole.cache}
    for name, score in scorers.items():
        scores = score()
        for share in SHARES:
            num_kept = max(int(share * start), SINK_TOKENS + SNAPKV_WINDOW)
            num_recent = num_kept // 2 if name == "H2O-like" else SNAPKV_WINDOW
            kept[name, share] = drop_tokens(whole, scores, num_kept, min(num_recent, num_kept - SINK_TOKENS))
    for (dropping, share), cache in kept.items():
        for codec, (decoded, bits) in _recode(bench, whole, cache).items():
            num_tokens = decoded.num_tokens
            ids = torch.cat([token_ids[:num_tokens], token_ids[start:]])
            fidelity = compare_with_predictions(
                bench.loaded,
                ids,
                reference,
                fill_new_cache(bench.loaded, decoded, len(ids)),
                num_decoded_tokens=num_tokens,
            ).fidelity
            found.setdefault((dropping, share, codec), []).append((bits, fidelity.kl, fidelity.next_token_agreement))
            bench.say(f"{dropping}, {share:.0%} kept, {codec}: {bits:.3f} bits per value, KL {fidelity.kl:.5f}")


def _recode(bench: Bench, whole: SavedCache, cache: KVCache) -> dict[str, tuple[KVCache, float]]:
    """Return what each codec makes of a cache, and its bits over the values of the whole one."""
    num_values = whole.cache.num_values
    recoded = {_NO_CODEC: (cache, 8.0 * sum(plane.nbytes for plane in cache.planes) / num_values)}
    shorter = SavedCache(cache, whole.slice(cache.num_tokens).metadata)
    for encoding in choose_encodings(bench):
        compressed = encode(bench, shorter, encoding, cache.num_tokens)
        output = from_planes([torch.empty_like(plane) for plane in cache.planes])
        with tempfile.TemporaryDirectory(dir=bench.work) as folder:
            compressed.save(Path(folder, "encoded"))
            opened = open_encoding(bench, Path(folder, "encoded"))
            opened.decode_into(output, None, opened.select_chunks(None))
        if encoding.profile is not None:  # which are computed from the text
            for target, source in zip(output.planes, cache.planes, strict=True):
                target[:SINK_TOKENS] = source[:SINK_TOKENS]
        recoded[encoding.name] = (output, 8 * compressed.num_bytes / num_values)
    return recoded


def _compare(rows: list[dict[str, Value]]) -> str:
    bits = {row["codec"]: row["bits"] for row in rows if (row["dropping"], row["kept"]) == ("H2O-like", 0.5)}
    losses = {row["codec"]: row["kl"] for row in rows if (row["dropping"], row["kept"]) == ("H2O-like", 0.5)}
    codec = "cachegen, 32/16 bins"
    return (
        f"half kept: {bits[_NO_CODEC]:.3g} to {bits[codec]:.3g} bits per value, KL {losses[_NO_CODEC]:.2g} and "
        f"{losses[codec]:.2g}"
    )
