"""Tokens that attention says can be left out of a cache, by head, in the manner of H2O and of SnapKV.

Both keep what queries have attended to most, and what is recent. H2O takes the attention of all tokens, SnapKV that of
the last ones, smoothed over neighbours. What is kept moves together: keys are turned to the positions they then have.

What is not the authors': the first four tokens are always kept, and attention is taken after the whole context rather
than while it flows.

Source: Zhang et al., "H2O" (NeurIPS 2023); Li et al., "SnapKV" (NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import avg_pool1d

from cachegen.comparison.context_loss import fill_new_cache
from cachegen.comparison.schemes.base import SavedCache
from cachegen.comparison.schemes.rotary import rotate_keys
from cachegen.kv_cache import KVCache
from cachegen.methods.transform.transform import SINK_TOKENS
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import set_length

SNAPKV_WINDOW = 64
SNAPKV_POOL = 7
_BLOCK_TOKENS = 128


def score_by_all(loaded: LoadedModel, saved: SavedCache) -> list[torch.Tensor]:
    """Return the attention that each token gets from all behind it, as H2O sums it.

    Returns:
        Per layer fp32 `[num_kv_heads, num_tokens]`, on the CPU.
    """
    return _score(loaded, saved, 0)


def score_by_last(loaded: LoadedModel, saved: SavedCache) -> list[torch.Tensor]:
    """Return the attention that each token gets from the last ones, smoothed over neighbours, as SnapKV does.

    Returns:
        As `score_by_all`.
    """
    scores = _score(loaded, saved, max(0, saved.cache.num_tokens - SNAPKV_WINDOW))
    return [avg_pool1d(score[None], SNAPKV_POOL, 1, SNAPKV_POOL // 2, count_include_pad=False)[0] for score in scores]


def drop_tokens(saved: SavedCache, scores: list[torch.Tensor], num_kept: int, num_recent: int) -> KVCache:
    """Keep the first tokens, the last ones, and those of the highest scores, in each head its own.

    Args:
        scores: per layer `[num_kv_heads, num_tokens]`.
        num_kept: tokens to keep in all.
        num_recent: of these the last ones of the context.

    Returns:
        A cache of `num_kept` tokens at the positions from 0 on.
    """
    num_tokens = saved.cache.num_tokens
    if not SINK_TOKENS + num_recent <= num_kept <= num_tokens:
        raise ValueError(f"`num_kept` must be {SINK_TOKENS + num_recent} to {num_tokens}, got {num_kept}")
    rotations = saved.metadata.rotations_of(saved.cache)
    keys, values = [], []
    for layer, score in enumerate(scores):
        ranked = score.clone()
        ranked[:, :SINK_TOKENS] = torch.inf
        ranked[:, num_tokens - num_recent :] = torch.inf
        kept = ranked.topk(num_kept, dim=1).indices.sort(dim=1).values.T[:, :, None]
        plane = saved.cache.keys[layer]
        turned_back = rotate_keys(plane, rotations[2 * layer], undo=True)
        gathered = turned_back.gather(0, kept.expand(-1, -1, plane.shape[2]))
        keys.append(rotate_keys(gathered, rotations[2 * layer], undo=False).to(plane.dtype))
        plane = saved.cache.values[layer]
        values.append(plane.gather(0, kept.expand(-1, -1, plane.shape[2])))
    return KVCache(keys, values)


@torch.inference_mode()
def _score(loaded: LoadedModel, saved: SavedCache, first_query: int) -> list[torch.Tensor]:
    """Return the attention that each token gets from those from `first_query` on."""
    num_tokens, cache = saved.cache.num_tokens, fill_new_cache(loaded, saved.cache)
    scores = [torch.zeros(plane.shape[1], num_tokens) for plane in saved.cache.keys]
    with _weights_returned(loaded):
        for start in range(first_query, num_tokens, _BLOCK_TOKENS):
            set_length(cache, start)
            block = saved.metadata.token_ids[start : start + _BLOCK_TOKENS]
            inputs = block.to(device=loaded.device, dtype=torch.int64)[None]
            output = loaded.model(input_ids=inputs, **loaded.name_cache(cache), use_cache=True, output_attentions=True)
            for score, weights in zip(scores, output.attentions, strict=True):
                by_head = weights[0].float().sum(1).cpu()  # [num_heads, tokens so far]
                by_kv_head = by_head.reshape(len(score), -1, by_head.shape[-1]).mean(1)
                score[:, : by_kv_head.shape[1]] += by_kv_head
    return scores


@contextmanager
def _weights_returned(loaded: LoadedModel) -> Iterator[None]:
    """Let the model compute attention so that its weights can be had."""
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        loaded.model.set_attn_implementation(before)
