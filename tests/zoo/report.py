"""What is found out about a family, as a row of docs/models.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.pipeline.prefill import prefill_context
from cachegen.states import split_name
from tests.zoo.checkpoints import Specimen, make_ids

COLUMNS = ("family", "config", "works", "how keys are turned", "what is stored per token", "most tokens", "notes")


def describe(specimen: Specimen) -> str:
    """Return a family's row: only what is the same on every machine."""
    family = specimen.family
    if specimen.error is not None:
        reason = str(specimen.error).removeprefix(f"{specimen.folder}: ")
        cells = ["refused", "", "", "", "; ".join(filter(None, [reason, family.note]))]
    else:
        loaded = specimen.half
        cache, metadata = prefill_context(loaded, make_ids(4))
        limit = loaded.length_limit
        cells = [
            "yes",
            describe_rotation(cache, metadata),
            describe_planes(cache, metadata, loaded.text_config.num_hidden_layers),
            str(limit.num_tokens) if limit is not None else "",
            family.note,
        ]
    return format_row([family.name, family.class_name.removesuffix("Config"), *cells])


def describe_rotation(cache: KVCache, metadata: ContextMetadata) -> str:
    """Say how the planes of a cache are turned, as its metadata has it: plane by plane, or by rotary embedding."""
    rotations_of: Any = getattr(metadata, "rotations_of", None)
    if rotations_of is None:
        kinds = [f"{2 * len(rotary.inv_freq)} dims, {rotary.rope_type}" for rotary in metadata.rotary_embeddings]
        return "; ".join(dict.fromkeys(kinds)) or "not"
    rotations = rotations_of(cache)
    frequencies = list(dict.fromkeys(rotation.inv_freq for rotation in rotations if rotation is not None))
    parts = []
    for kind, of_kind in (("keys", rotations[0::2]), ("values", rotations[1::2])):
        described = [_describe_one(rotation, frequencies) for rotation in of_kind]
        if kind == "values" and set(described) == {"not"}:
            continue
        runs = [(text, len(list(run))) for text, run in itertools.groupby(described)]
        parts.append(f"{kind}: " + (runs[0][0] if len(runs) == 1 else ", ".join(f"{n} × {text}" for text, n in runs)))
    return "; ".join(parts).removeprefix("keys: ") if len(parts) == 1 else "; ".join(parts)


def _describe_one(rotation: Any, frequencies: Sequence[tuple[float, ...]]) -> str:
    """Say how one plane is turned; which frequencies only where there are several."""
    if rotation is None:
        return "not"
    words = [f"{rotation.num_dims} dims in {'pairs' if rotation.pairing == 'interleaved' else 'halves'}"]
    if rotation.offset:
        words.append(f"from dim {rotation.offset} on")
    if rotation.inv_freq[0] < 0:
        words.append("backwards")
    if len(frequencies) > 1:
        words.append("ABCDEFGH"[frequencies.index(rotation.inv_freq)])
    return " ".join(words)


def describe_planes(cache: KVCache, metadata: ContextMetadata, num_layers: int) -> str:
    """Say which layers keep how many heads and dims of keys and values, and how many have states."""
    shapes = [(*keys.shape[1:], *values.shape[1:]) for keys, values in zip(cache.keys, cache.values, strict=True)]
    runs = [(len(list(run)), shape) for shape, run in itertools.groupby(shapes)]
    parts = [f"{count} × ({k} × {dk} + {v} × {dv})" for count, (k, dk, v, dv) in runs]
    if metadata.states:
        num_with_states = len({split_name(name)[0] for name in metadata.states})
        count = "1 layer" if num_with_states == 1 else f"{num_with_states} layers"
        return f"{' + '.join(parts)}; states of {count}"
    left_out = num_layers - len(shapes)
    return " + ".join(parts) + (f", {left_out} of {num_layers} layers share them" if left_out else "")


def format_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
