"""Text to KV cache: run the model over the tokens in blocks, with memory linear in their number.

Source: block-wise ("chunked") prefill; each block attends to all tokens before it through the cache. The sums are
those of one pass over the whole text, in another order of rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from cachegen.errors import InputError
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.pipeline.chunking import DEFAULT_BLOCK_SIZE
from cachegen.pipeline.hybrids import continues_in_blocks, name_positions
from cachegen.pipeline.images import on_text_alone, refuse_images
from cachegen.pipeline.limits import check_context, check_length
from cachegen.pipeline.model import LoadedModel, read_rotary_embeddings
from cachegen.pipeline.model_cache import empty_cache, preallocated_layers, set_length, view_kv_cache
from cachegen.pipeline.rotation import find_rotations
from cachegen.pipeline.state_layers import keep_states, state_layers, states_of_cache
from cachegen.pipeline.windows import find_windows


def tokenize(loaded: LoadedModel, text: str, *, add_special_tokens: bool = True) -> torch.Tensor:
    """Return the token ids of `text`, int32 `[num_tokens]` on the CPU.

    Args:
        loaded: the model whose tokenizer is used.
        text: any text.
        add_special_tokens: with those the tokenizer puts around a text (True for a context, False for what follows).

    Raises:
        InputError: the text has a token that stands for an image.
    """
    ids = loaded.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    token_ids = torch.tensor(ids, dtype=torch.int32)
    refuse_images(loaded, token_ids, "the text")
    return token_ids


def prefill_context(
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    block_size: int = DEFAULT_BLOCK_SIZE,
    progress: Callable[[int], None] | None = None,
) -> tuple[KVCache, ContextMetadata]:
    """Compute the cache of a context, as it is saved: all tokens but the last, which generation begins with.

    Args:
        loaded: the model.
        token_ids: integers `[num_tokens]`.
        block_size: tokens per step; part of the metadata.
        progress: called with the number of tokens of each block done.

    Returns:
        The cache of `num_tokens - 1` tokens, on the model's devices, and what it was computed from.

    Raises:
        InputError: the context has fewer than two tokens, or as `prefill`.
    """
    if len(token_ids) < 2:
        raise InputError(f"a context needs at least two tokens, this one has {len(token_ids)}")
    check_context(loaded, len(token_ids), "the context")
    cached_ids = token_ids[:-1]
    cache = prefill(loaded, cached_ids, block_size, progress)
    metadata = ContextMetadata(
        model_id=loaded.model_id,
        model_fingerprint=loaded.fingerprint,
        token_ids=cached_ids.to(dtype=torch.int32, device="cpu"),
        rotary_embeddings=loaded.rotary_embeddings,
        block_size=choose_block_size(loaded, block_size, len(cached_ids)),
        plane_rotations=find_rotations(loaded).planes,
        windows=find_windows(loaded.text_config),
        states=states_of_cache(cache),
    )
    return view_kv_cache(cache, len(cached_ids)), metadata


@torch.inference_mode()
def prefill(
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    block_size: int = DEFAULT_BLOCK_SIZE,
    progress: Callable[[int], None] | None = None,
    *,
    capacity: int | None = None,
) -> Cache:
    """Compute the keys and values of all tokens.

    Args:
        loaded: the model.
        token_ids: integers `[num_tokens]`, at least one.
        block_size: tokens per step.
        progress: called with the number of tokens of each block done.
        capacity: tokens the cache has room for, if more will follow; None for just these.

    Returns:
        A cache of preallocated layers that holds `num_tokens` tokens, one sequence.

    Raises:
        InputError: the text is too long for the model (see `limits`) or not only text (see `images`), a layer does not
            hold keys and values of all tokens, or the model's rotary frequencies changed on the way, so that the keys
            are not all of one kind.
    """
    num_tokens = len(token_ids)
    if num_tokens < 1:
        raise ValueError("`token_ids` must have at least one token")
    check_length(loaded, num_tokens, "the text to prefill")
    refuse_images(loaded, token_ids, "the text to prefill")
    block_size = choose_block_size(loaded, block_size, num_tokens)
    cache = empty_cache(loaded.cache_layout, max(num_tokens, capacity or 0))
    # What a model keeps shows after the first block, long before the last.
    extend_cache(loaded, cache, token_ids[:block_size], block_size, progress)
    _check_whole(loaded.model_id, cache, min(block_size, num_tokens))
    extend_cache(loaded, cache, token_ids[block_size:], block_size, progress)
    _check_whole(loaded.model_id, cache, num_tokens)
    if loaded.total_tokens is None and read_rotary_embeddings(loaded.model) != loaded.rotary_embeddings:
        rope_types = ", ".join(sorted({rotary.rope_type for rotary in loaded.rotary_embeddings}))
        raise InputError(
            f"{loaded.model_id}: its rotary embedding ({rope_types}) changes its frequencies within {num_tokens} "
            "tokens; use a shorter context"
        )
    keep_states(cache, states_of_cache(cache), num_tokens)
    return cache


def choose_block_size(loaded: LoadedModel, block_size: int, num_tokens: int) -> int:
    """Return the tokens per step of a prefill: all in one of a model whose code forgets its states between blocks."""
    return block_size if continues_in_blocks(loaded) else max(block_size, num_tokens)


def measure_cache(loaded: LoadedModel) -> Cache:
    """Return what the model keeps of one token.

    Raises:
        InputError: as `prefill`.
    """
    return prefill(loaded, torch.zeros(1, dtype=torch.int64))


def measure_plane_shapes(loaded: LoadedModel) -> list[tuple[int, int]]:
    """Return (num_kv_heads, head_dim) of the model's keys and values of layer 0, of layer 1, ..., from one token.

    Raises:
        InputError: as `prefill`.
    """
    return [(plane.shape[1], plane.shape[2]) for plane in view_kv_cache(measure_cache(loaded), 1).planes]


@torch.inference_mode()
def extend_cache(
    loaded: LoadedModel,
    cache: Cache,
    token_ids: torch.Tensor,
    block_size: int = DEFAULT_BLOCK_SIZE,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Append the keys and values of `token_ids`, integers `[num_new]`, to what `cache` holds, in blocks."""
    if block_size < 1:
        raise ValueError(f"`block_size` must be at least 1, got {block_size}")
    for start in range(0, len(token_ids), block_size):
        block = token_ids[start : start + block_size]
        run_model(loaded, cache, block, num_logits=1)
        if progress is not None:
            progress(len(block))


def recompute_first_tokens(
    loaded: LoadedModel, cache: Cache, token_ids: torch.Tensor, num_first: int, num_held: int
) -> None:
    """Replace the first tokens of a decoded cache by those computed from text.

    Almost every query attends to them, so what a coarse code has lost there costs most; computing a few tokens costs
    next to nothing, since they depend on nothing else.

    Args:
        cache: from `allocate_cache`, with room for them.
        token_ids: of the context, integers `[num_tokens]`.
        num_first: tokens to compute; may be more than there are.
        num_held: tokens that the cache holds, before and after.

    Source: attention sinks (Xiao et al., ICLR 2024).
    """
    if num_first == 0:
        return
    set_length(cache, 0)
    extend_cache(loaded, cache, token_ids[: min(num_first, num_held)])
    set_length(cache, num_held)


@torch.inference_mode()
def run_model(loaded: LoadedModel, cache: Cache, token_ids: torch.Tensor, num_logits: int) -> torch.Tensor:
    """Run the model once over the tokens that follow those in `cache`, which grows by them.

    Positions are those after the cache's: the models derive them from its length.

    Returns:
        Logits `[num_logits, vocabulary]` of the last tokens, in the model's dtype.
    """
    if state_layers(cache) and len(token_ids) > 1 and cache.get_seq_length() and not continues_in_blocks(loaded):
        logits = [run_model(loaded, cache, token_id, 1) for token_id in token_ids.split(1)]
        return torch.cat(logits[-num_logits:])
    logits_limit = {"logits_to_keep": num_logits} if loaded.can_limit_logits else {}
    inputs = token_ids.to(device=loaded.device, dtype=torch.int64)[None]
    arguments = loaded.name_cache(cache) | name_positions(loaded, cache, len(token_ids)) | logits_limit
    with on_text_alone(loaded.model), loaded.fixed_frequencies():
        output = loaded.model(input_ids=inputs, **arguments, use_cache=True)
    return output.logits[0, -num_logits:]


def _check_whole(model_id: str, cache: Cache, num_tokens: int) -> None:
    """Refuse a cache that is not keys and values of every token in every layer that has any, in one dtype."""
    layers = preallocated_layers(cache)
    dtypes = set()
    for i, layer in enumerate(layers):
        if layer.buffers is None:
            raise InputError(
                f"{model_id}: layer {i} keeps no keys and values of its own; such models are not supported"
            )
        if layer.get_seq_length() != num_tokens:
            raise InputError(
                f"{model_id}: layer {i} holds {layer.get_seq_length()} of {num_tokens} tokens (a sliding window "
                "already truncated, or states that are not per token); such models are not supported"
            )
        dtypes.update(buffer.dtype for buffer in layer.buffers)
    if len(dtypes) != 1:
        raise InputError(f"{model_id}: keys and values of several dtypes ({', '.join(sorted(map(str, dtypes)))})")
