"""What is found out about a family, as a row of docs/models.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.pipeline.prefill import prefill_context
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
            describe_rotation(metadata),
            describe_planes(cache, loaded.text_config.num_hidden_layers),
            str(limit.num_tokens) if limit is not None else "",
            family.note,
        ]
    return format_row([family.name, family.class_name.removesuffix("Config"), *cells])


def describe_rotation(metadata: ContextMetadata) -> str:
    """Say how the keys of a cache are turned, as its metadata has it."""
    kinds = [f"{2 * len(rotary.inv_freq)} dims, {rotary.rope_type}" for rotary in metadata.rotary_embeddings]
    return "; ".join(dict.fromkeys(kinds)) or "not"


def describe_planes(cache: KVCache, num_layers: int) -> str:
    """Say which layers keep how many heads and dims of keys and values."""
    shapes = [(*keys.shape[1:], *values.shape[1:]) for keys, values in zip(cache.keys, cache.values, strict=True)]
    runs = [(len(list(run)), shape) for shape, run in itertools.groupby(shapes)]
    parts = [f"{count} × ({k} × {dk} + {v} × {dv})" for count, (k, dk, v, dv) in runs]
    left_out = num_layers - len(shapes)
    return " + ".join(parts) + (f", {left_out} of {num_layers} layers share them" if left_out else "")


def format_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
