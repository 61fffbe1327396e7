"""Find how a model turns each plane of its cache, by looking at what it caches of one token repeated.

The hidden states of a token that is repeated do not depend on its position, whatever the weights: attention averages
values that are all the same. What it caches then differs by the rotation alone, and is constant over positions once the
right one is undone. Learned positions and attention sinks would defeat that; so each layer is given the hidden state of
the first position everywhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from cachegen.kv_cache import KVCache, rotations_by_rule
from cachegen.methods.rotary import Turns
from cachegen.pipeline.images import on_text_alone
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import empty_cache, preallocated_layers, view_kv_cache
from cachegen.rotation import PAIRINGS, PlaneRotations, Rotation

NUM_TOKENS = 128
"""That the model is run over."""
CONSTANT = 0.02
"""Planes that differ by less over positions, as a share of their root mean square, are constant but for rounding."""
MIN_GAIN = 4.0
"""A rotation must leave so much less than undoing nothing does."""

_DEFAULT_BASE = 10000.0  # of models that keep angles in a table, not in a rotary module (GPT-J)
# By model, and by the rotary embeddings in force: a search costs a forward pass.
_found: weakref.WeakKeyDictionary[Any, dict[Any, FoundRotations]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class FoundRotations:
    """What a search found.

    Attributes:
        planes: how each plane is turned; None: as `rotations_by_rule` says.
        unknown_layers: layers with a plane that nothing made constant; it is taken as it is.
        is_by_rule: nothing was found in any layer, or could be tried: the rule is a guess.
    """

    planes: PlaneRotations | None
    unknown_layers: tuple[int, ...] = ()
    is_by_rule: bool = False

    def describe_doubt(self) -> str | None:
        """Say in one line what could not be found; None where everything was."""
        if self.is_by_rule:
            return "how its keys are turned could not be found; they are coded as turned by its first rotary embedding"
        if not self.unknown_layers:
            return None
        layers = ", ".join(map(str, self.unknown_layers))
        return f"how the keys of layers {layers} are turned could not be found; they are coded as they are"


def find_rotations(loaded: LoadedModel) -> FoundRotations:
    """Find how the planes of a model's cache are turned; once per model, by one pass over 128 tokens.

    Nothing is computed for a model without rotary embeddings.
    """
    by_embeddings = _found.setdefault(loaded.model, {})
    if loaded.rotary_embeddings not in by_embeddings:
        by_embeddings[loaded.rotary_embeddings] = _find(loaded)
    return by_embeddings[loaded.rotary_embeddings]


def _find(loaded: LoadedModel) -> FoundRotations:
    frequencies = _frequencies(loaded)
    if not frequencies:
        return FoundRotations(None)
    cache = _cache_one_token(loaded)
    if cache is None:
        return FoundRotations(None, is_by_rule=True)
    turns = Turns(cache.num_tokens, 0, torch.device("cpu"))
    planes: list[Rotation | None] = []
    unknown: set[int] = set()
    for index, plane in enumerate(cache.planes):
        vectors = plane.to(device="cpu", dtype=torch.float32)
        rotation, is_constant = choose_rotation(vectors, frequencies, turns)
        planes.append(rotation)
        if not is_constant:
            unknown.add(index // 2)
    if len(unknown) == cache.num_layers and not any(planes):
        return FoundRotations(None, is_by_rule=True)
    found = tuple(planes)
    by_rule = rotations_by_rule(loaded.rotary_embeddings, [plane.shape[2] for plane in cache.planes])
    return FoundRotations(None if found == by_rule else found, tuple(sorted(unknown)))


def choose_rotation(
    vectors: torch.Tensor, frequencies: dict[tuple[float, ...], float], turns: Turns
) -> tuple[Rotation | None, bool]:
    """Choose what makes a plane constant over positions.

    Args:
        vectors: of one token at all positions, fp32 `[num_tokens, num_heads, head_dim]`.
        frequencies: inverse frequencies that may be its, and the scaling that goes with them.
        turns: of the positions.

    Returns:
        The rotation, None for none; and whether it leaves the plane constant.
    """
    untouched = _variation(vectors)
    best, least = None, untouched
    if untouched > 0:
        for candidate in _candidates(frequencies, vectors.shape[2]):
            left = _variation(turns.undo(vectors, candidate))
            if left < least and left * MIN_GAIN < untouched:
                best, least = candidate, left
    return best, least <= CONSTANT


def _candidates(frequencies: dict[tuple[float, ...], float], head_dim: int) -> Iterator[Rotation]:
    """Yield what is tried, the most usual first: of equally good ones the first is kept."""
    for inv_freq, scaling in frequencies.items():
        for offset in dict.fromkeys((0, head_dim - 2 * len(inv_freq))):
            if not 0 <= offset <= head_dim - 2 * len(inv_freq):
                continue
            for sign in (1.0, -1.0):
                for pairing in PAIRINGS:
                    yield Rotation(tuple(sign * number for number in inv_freq), pairing, offset, scaling)


def _frequencies(loaded: LoadedModel) -> dict[tuple[float, ...], float]:
    """Return the inverse frequencies of the model's rotary modules, each with its scaling."""
    found: dict[tuple[float, ...], float] = {}
    for rotary in loaded.rotary_embeddings:
        if rotary.inv_freq and rotary.attention_scaling != 0:
            found.setdefault(rotary.inv_freq, rotary.attention_scaling)
    num_dims = getattr(loaded.text_config, "rotary_dim", None)
    if not found and isinstance(num_dims, int) and num_dims > 1:
        found[tuple(_DEFAULT_BASE ** (-2 * i / num_dims) for i in range(num_dims // 2))] = 1.0
    return found


@torch.inference_mode()
def _cache_one_token(loaded: LoadedModel) -> KVCache | None:
    """Return what the model caches of one token repeated; None where a layer keeps nothing of it, or no numbers."""
    limits = (NUM_TOKENS, loaded.max_tokens, loaded.length_limit.num_tokens if loaded.length_limit else None)
    num_tokens = min(limit for limit in limits if limit is not None)
    # Not one of the first ids: a padding token's embedding is zero.
    token_id = loaded.model.get_input_embeddings().num_embeddings // 2
    ids = torch.full((1, num_tokens), token_id, dtype=torch.int64, device=loaded.device)
    cache = empty_cache(loaded.cache_layout, num_tokens)
    hooks = [layer.register_forward_pre_hook(_repeat_first_state, with_kwargs=True) for layer in loaded.layers]
    logits_limit = {"logits_to_keep": 1} if loaded.can_limit_logits else {}
    try:
        with on_text_alone(loaded.model), loaded.fixed_frequencies():
            loaded.model(input_ids=ids, **loaded.name_cache(cache), use_cache=True, **logits_limit)
    finally:
        for hook in hooks:
            hook.remove()
    layers = preallocated_layers(cache)
    if any(layer.buffers is None or layer.get_seq_length() != num_tokens for layer in layers):
        return None
    found = view_kv_cache(cache, num_tokens)
    return found if all(torch.isfinite(plane).all() for plane in found.planes) else None


def _repeat_first_state(
    module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a layer, in place of its hidden states `[..., num_tokens, size]`, those of the first token everywhere."""
    states = arguments[0] if arguments else named.get("hidden_states")
    if not isinstance(states, torch.Tensor) or states.ndim < 3:
        return arguments, named
    repeated = cast("torch.Tensor", states[..., :1, :].expand_as(states).contiguous())
    if arguments:
        return (repeated, *arguments[1:]), named
    return arguments, {**named, "hidden_states": repeated}


def _variation(vectors: torch.Tensor) -> float:
    """Return how much vectors differ over the positions, as a share of their root mean square."""
    power = vectors.square().mean().item()
    return (vectors.var(0, correction=0).mean().item() / power) ** 0.5 if power > 0 else 0.0
