"""Whether a model with recurrent states goes on from them with several tokens at once: its code may forget them.

transformers' code of some families starts from states of zero whenever it is given more than one token. It is found,
not looked up: a few tokens behind others are given at once and one by one, and compared with all in one pass.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache

from cachegen.errors import InputError
from cachegen.pipeline.images import on_text_alone
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import empty_cache

_NUM_BEFORE = 12
_NUM_BEHIND = 4
_MAX_RATIO = 3.0
"""Of the differences that blocks make to those that single tokens make, where both are rounding."""
_LEAST_DIFFERENCE = 1e-6  # of logits, relative to their spread
_found: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def continues_in_blocks(loaded: LoadedModel) -> bool:
    """Tell whether several tokens may follow at once what is cached; of a model without recurrent states they may.

    Costs seven passes over a few tokens, once per model.
    """
    if not loaded.has_states:
        return True
    if loaded.model not in _found:
        _found[loaded.model] = _try_blocks(loaded)
    return _found[loaded.model]


def name_positions(loaded: LoadedModel, cache: Cache, num_new: int) -> dict[str, torch.Tensor]:
    """Return the positions of the tokens behind a cache, as an argument of a model with recurrent states.

    The code of some (Bamba) counts from zero in every call that does not say them.

    Args:
        num_new: tokens that follow.
    """
    if not (loaded.has_states and loaded.can_be_told_positions):
        return {}
    start = cache.get_seq_length()
    return {"position_ids": torch.arange(start, start + num_new, device=loaded.device)[None]}


def refuse_forgetful(loaded: LoadedModel) -> None:
    """Refuse a model whose own `generate` would forget the recurrent states of a cache that it is given.

    Raises:
        InputError: in one line.
    """
    if not continues_in_blocks(loaded):
        raise InputError(
            f"{loaded.model_id}: transformers forgets its recurrent states where several tokens follow a cache, so "
            "generate() would give a wrong answer: use run_decoding_disk.py, which gives it one at a time"
        )


def refuse_states(loaded: LoadedModel, task: str) -> None:
    """Refuse a model with recurrent states for a task that needs those in the middle of a context.

    Raises:
        InputError: in one line.
    """
    if loaded.has_states:
        raise InputError(
            f"{loaded.model_id} has recurrent states, which are known at the end of a context alone: {task} is not "
            "supported for such models"
        )


def _try_blocks(loaded: LoadedModel) -> bool:
    vocabulary_size = loaded.model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary_size // 2, (1, _NUM_BEFORE + _NUM_BEHIND), generator=generator)
    behind = range(_NUM_BEFORE, ids.shape[1])
    expected = _predict(loaded, ids, [0, ids.shape[1]])
    at_once = _predict(loaded, ids, [0, _NUM_BEFORE, ids.shape[1]])
    one_by_one = _predict(loaded, ids, [0, *behind, ids.shape[1]])
    spread = expected.std().item()
    rounding = (one_by_one - expected).square().mean().sqrt().item() + _LEAST_DIFFERENCE * spread
    return (at_once - expected).square().mean().sqrt().item() <= _MAX_RATIO * rounding


@torch.inference_mode()
def _predict(loaded: LoadedModel, ids: torch.Tensor, stops: list[int]) -> torch.Tensor:
    """Return logits `[tokens behind, vocabulary]` in fp64 of tokens that are given in pieces between `stops`."""
    cache = empty_cache(loaded.cache_layout, ids.shape[1])
    logits = []
    for start, stop in itertools.pairwise(stops):
        inputs = ids[:, start:stop].to(loaded.device)
        with on_text_alone(loaded.model), loaded.fixed_frequencies():
            arguments = loaded.name_cache(cache) | name_positions(loaded, cache, stop - start)
            logits.append(loaded.model(input_ids=inputs, **arguments, use_cache=True).logits[0])
    return torch.cat(logits)[_NUM_BEFORE:].double()
