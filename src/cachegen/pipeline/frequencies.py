"""Rotary frequencies that depend on a sequence's length, chosen once for all of it.

`dynamic` NTK computes them anew for each length beyond the pretraining's, `longrope` has a second set for all of them.
Keys that were cached before a sequence grew beyond that length would have other ones. So a length is chosen before the
prefill, for context, question and answer together; the model then keeps the frequencies of that length, whatever it is
given. Which they are, a KV file records with its rotary embeddings, and every file by `rope_hash`.

Source: the rules are transformers' own (`ROPE_INIT_FUNCTIONS`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cachegen.errors import InputError
from cachegen.kv_cache import hash_rotary_embeddings
from cachegen.pipeline.limits import RotarySwitch, decoder_of, find_rotary_switches
from cachegen.pipeline.model import LoadedModel

DEFAULT_ROOM = 256
"""Tokens that are left for question and answer where no length is given."""
_MAX_TOTAL_TOKENS = 1 << 24


def round_total(num_tokens: int) -> int:
    """Return the length that frequencies are chosen for: `num_tokens` rounded up to eight lengths per octave.

    Their frequencies differ enough for their hashes to tell them apart.
    """
    unit = 1 << max((num_tokens - 1).bit_length() - 4, 0)
    return -(-num_tokens // unit) * unit


def choose_frequencies(loaded: LoadedModel, num_tokens: int) -> LoadedModel:
    """Return a model with the frequencies for sequences of up to `num_tokens` tokens.

    The model itself is not changed: `LoadedModel.fixed_frequencies` sets them where they are needed.

    Raises:
        InputError: `num_tokens` is more than any model takes.
    """
    if num_tokens > _MAX_TOTAL_TOKENS:
        raise InputError(f"`max_total_tokens` must be at most {_MAX_TOTAL_TOKENS}, got {num_tokens}")
    switches = [switch for switch in find_rotary_switches(decoder_of(loaded.model)) if num_tokens > switch.num_tokens]
    if not switches:
        return loaded
    total = round_total(num_tokens)
    fixed = {switch.buffer_name: _compute(switch, total) for switch in switches}
    rotary_embeddings = tuple(
        dataclasses.replace(
            rotary,
            inv_freq=tuple(fixed[rotary.name][0].detach().float().cpu().tolist()),
            attention_scaling=float(fixed[rotary.name][1]),
        )
        if rotary.name in fixed
        else rotary
        for rotary in loaded.rotary_embeddings
    )
    return dataclasses.replace(loaded, rotary_embeddings=rotary_embeddings, total_tokens=total)


def match_frequencies(loaded: LoadedModel, rope_hash: str) -> LoadedModel:
    """Return a model with the frequencies that a file was made with.

    Args:
        loaded: with the frequencies it was loaded with.
        rope_hash: the file's; see `hash_rotary_embeddings`.

    Returns:
        `loaded` itself where no length gives that hash: the file is another model's, and its gates say so.
    """
    switches = list(find_rotary_switches(decoder_of(loaded.model)))
    if not switches or hash_rotary_embeddings(loaded.rotary_embeddings) == rope_hash:
        return loaded
    total = min(switch.num_tokens for switch in switches) + 1
    while total <= _MAX_TOTAL_TOKENS:
        chosen = choose_frequencies(loaded, total)
        if hash_rotary_embeddings(chosen.rotary_embeddings) == rope_hash:
            return chosen
        total = (chosen.total_tokens or total) + 1
    return loaded


@contextmanager
def keep_frequencies(model: Any, total_tokens: int | None) -> Iterator[None]:
    """Let a model's rotary embeddings have the frequencies for `total_tokens`, whatever passes through it meanwhile.

    Args:
        total_tokens: None leaves the model as it is.
    """
    if total_tokens is None:
        yield
        return
    switches = [s for s in find_rotary_switches(decoder_of(model)) if total_tokens > s.num_tokens]
    saved = [(switch.module, dict(switch.module.__dict__), dict(switch.module._buffers)) for switch in switches]
    # Phi-3 throws the cache of a sequence away where it crosses this length.
    crossing = getattr(model.config, "original_max_position_embeddings", None)
    try:
        for switch in switches:
            inv_freq, scaling = _compute(switch, total_tokens)
            switch.module._buffers[f"{switch.prefix}inv_freq"] = inv_freq
            setattr(switch.module, f"{switch.prefix}attention_scaling", scaling)
            _stop_switching(switch)
        if crossing is not None:
            model.config.original_max_position_embeddings = -1
        yield
    finally:
        if crossing is not None:
            model.config.original_max_position_embeddings = crossing
        for module, attributes, buffers in reversed(saved):
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _stop_switching(switch: RotarySwitch) -> None:
    """Give a rotary module the name of a rule without any length."""
    if switch.layer_type is None:
        switch.module.rope_type = "default"
    else:
        switch.module.rope_type = {**switch.module.rope_type, switch.layer_type: "default"}


def _compute(switch: RotarySwitch, num_tokens: int) -> tuple[torch.Tensor, float]:
    """Return the frequencies of a length, where the module's are, and their scaling."""
    device = getattr(switch.module, f"{switch.prefix}inv_freq").device
    named = {} if switch.layer_type is None else {"layer_type": switch.layer_type}
    return ROPE_INIT_FUNCTIONS[switch.rope_type](switch.module.config, device, seq_len=num_tokens, **named)
