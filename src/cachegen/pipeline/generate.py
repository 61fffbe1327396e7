"""KV cache and prompt to answer: greedy generation that recomputes only the tokens the cache lacks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from cachegen.pipeline.chunking import DEFAULT_BLOCK_SIZE
from cachegen.pipeline.hybrids import continues_in_blocks
from cachegen.pipeline.images import on_text_alone
from cachegen.pipeline.limits import check_length, decoder_of, find_rotary_switches
from cachegen.pipeline.model import LoadedModel, quiet_transformers
from cachegen.pipeline.model_cache import get_capacity, set_length
from cachegen.pipeline.prefill import extend_cache


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and what it took.

    Attributes:
        token_ids: the new tokens, with the end-of-text token if it came.
        text: the same as text, without special tokens; empty for a model without tokenizer.
        num_forward_tokens: tokens that passed through the model: those the cache lacked, and all new ones but the last.
        prefill_seconds: from the call to the first new token.
        total_seconds: from the call to the last one.
        first_token_at: time.perf_counter() when the first new token was there.
    """

    token_ids: tuple[int, ...]
    text: str
    num_forward_tokens: int
    prefill_seconds: float
    total_seconds: float
    first_token_at: float


@torch.inference_mode()
def generate_answer(
    loaded: LoadedModel,
    cache: Cache,
    num_cached_tokens: int,
    token_ids: torch.Tensor,
    max_new_tokens: int,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Answer:
    """Continue a prompt greedily from a cache of its first tokens.

    The first `num_cached_tokens` tokens in the cache are left as they are, whatever length it has before and after, so
    that the same cache serves the next question.

    Args:
        loaded: the model.
        cache: from `allocate_cache`, `prefill` or `empty_cache`, with room for the prompt and `max_new_tokens` more.
        num_cached_tokens: tokens of the prompt it holds, at least one fewer than the prompt has.
        token_ids: the whole prompt, integers `[num_tokens]`: context and question.
        max_new_tokens: where to stop if the model does not.
        block_size: tokens per step where many are to be recomputed.

    Raises:
        InputError: prompt and answer are too long for the model.
        ValueError: the cache holds the whole prompt or more (generation needs its last token), or has too little room.
    """
    num_tokens = len(token_ids)
    if not 0 <= num_cached_tokens < num_tokens:
        raise ValueError(f"`num_cached_tokens` must be below the prompt's {num_tokens} tokens, got {num_cached_tokens}")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}")
    # The last new token is never fed back, so it needs no room.
    if get_capacity(cache) < num_tokens + max_new_tokens - 1:
        raise ValueError(
            f"`cache` must have room for {num_tokens + max_new_tokens - 1} tokens, it was allocated for "
            f"{get_capacity(cache)}"
        )
    check_length(loaded, num_tokens + max_new_tokens - 1, "the prompt and its answer")
    start_seconds = time.perf_counter()
    set_length(cache, num_cached_tokens)
    # generate() would take all missing tokens in one step, quadratic in their number.
    if not continues_in_blocks(loaded):
        block_size = 1  # generate() would take several tokens in one step, too
    num_in_blocks = (num_tokens - 1 - num_cached_tokens) // block_size * block_size
    extend_cache(loaded, cache, token_ids[num_cached_tokens : num_cached_tokens + num_in_blocks], block_size)
    with loaded.fixed_frequencies():
        return _generate(
            loaded, token_ids, max_new_tokens, start_seconds, num_cached_tokens, **loaded.name_cache(cache)
        )


@torch.inference_mode()
def generate_from_text(loaded: LoadedModel, token_ids: torch.Tensor, max_new_tokens: int) -> Answer:
    """Continue a prompt greedily as transformers does of itself: one pass over all of it, into its own kind of cache.

    What --verify compares with: nothing of this project is in it, neither blocks nor preallocated layers. Only where
    the model by itself would give the prompt other frequencies than were chosen before the prefill, it keeps those.

    Args:
        loaded: the model.
        token_ids: the whole prompt, integers `[num_tokens]`.
        max_new_tokens: where to stop if the model does not.

    Raises:
        InputError: prompt and answer are too long for the model.
    """
    check_length(loaded, len(token_ids) + max_new_tokens - 1, "the prompt and its answer")
    if _chooses_the_same(loaded, len(token_ids)):
        return _generate(loaded, token_ids, max_new_tokens, time.perf_counter(), 0)
    with loaded.fixed_frequencies():
        return _generate(loaded, token_ids, max_new_tokens, time.perf_counter(), 0)


def _chooses_the_same(loaded: LoadedModel, num_tokens: int) -> bool:
    """Tell whether the model, left alone, gives a prompt and what follows the frequencies that were chosen."""
    switches = list(find_rotary_switches(decoder_of(loaded.model)))
    return all(switch.rope_type == "longrope" and num_tokens > switch.num_tokens for switch in switches)


def _generate(
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    max_new_tokens: int,
    start_seconds: float,
    num_cached_tokens: int,
    **arguments: Any,
) -> Answer:
    """Call generate() and time it; `arguments` are for it."""
    clock = _FirstTokenClock()
    inputs = token_ids.to(device=loaded.device, dtype=torch.int64)[None]
    with quiet_transformers(), on_text_alone(loaded.model):
        output = loaded.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=_choose_pad_token(loaded),
            streamer=clock,
            **arguments,
        )
    new_ids = tuple(output[0, len(token_ids) :].tolist())
    end_seconds = time.perf_counter()
    return Answer(
        token_ids=new_ids,
        text=loaded.tokenizer.decode(new_ids, skip_special_tokens=True) if loaded.tokenizer is not None else "",
        num_forward_tokens=len(token_ids) - num_cached_tokens + len(new_ids) - 1,
        prefill_seconds=clock.first_token_at - start_seconds,
        total_seconds=end_seconds - start_seconds,
        first_token_at=clock.first_token_at,
    )


class _FirstTokenClock(BaseStreamer):
    """Note when generate() hands over its first new token; the prompt, which it hands over before, does not count."""

    def __init__(self) -> None:
        self._num_puts = 0
        self.first_token_at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._num_puts += 1
        if self._num_puts == 2:
            self.first_token_at = time.perf_counter()

    def end(self) -> None:
        pass


def _choose_pad_token(loaded: LoadedModel) -> int:
    """Return a token for generate() to pad with; one sequence has no padding, but without one it warns."""
    defaults = loaded.model.generation_config
    end_token = defaults.eos_token_id[0] if isinstance(defaults.eos_token_id, list) else defaults.eos_token_id
    candidates = (defaults.pad_token_id, getattr(loaded.tokenizer, "pad_token_id", None), end_token)
    return next((token for token in candidates if token is not None), 0)
