"""How much a decoded cache changes what the model predicts, against a reference cache that was never compressed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import get_capacity, preserve_tokens, set_length
from cachegen.pipeline.prefill import DEFAULT_BLOCK_SIZE, extend_cache, run_model

MAX_VERIFIED_TOKENS = 256
_TOKENS_PER_PIECE = 64  # bounds the fp32 logits: 64 x 256,000 x 4 bytes = 66 MB


@dataclass(frozen=True)
class Fidelity:
    """How close predictions on the decoded cache are to those on the reference, over the last tokens of a context.

    Attributes:
        kl: mean over positions of KL(reference || decoded) of the next-token distributions, in nats.
        next_token_agreement: share of positions where both predict the same token, 0 to 1.
        nll_delta: mean negative log-likelihood of the tokens that really follow, decoded minus reference, in nats;
            the last position has none; 0 where there is no other.
        verified_tokens: the number of positions.
    """

    kl: float
    next_token_agreement: float
    nll_delta: float
    verified_tokens: int


def count_verified_tokens(num_tokens: int) -> int:
    """Return how many of a context's last tokens are verified: 256, or half of a context shorter than 512."""
    return min(MAX_VERIFIED_TOKENS, num_tokens // 2)


@torch.inference_mode()
def compare_caches(
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    reference_cache: Cache,
    decoded_cache: Cache,
    *,
    num_reference_tokens: int,
    num_decoded_tokens: int,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Fidelity:
    """Force the last tokens of a context through the model on both caches, cropped before them, and compare.

    Where a cache ends even earlier, the tokens between are recomputed on it first. Both caches hold the same tokens
    afterwards as before, bit for bit, and are set to those lengths.

    Args:
        loaded: the model.
        token_ids: the whole context, integers `[num_tokens]`, at least two.
        reference_cache: from `prefill`, with a capacity of `num_tokens` at least.
        decoded_cache: the same for the decoded one; another object.
        num_reference_tokens: tokens the reference holds.
        num_decoded_tokens: tokens the decoded cache holds.
        block_size: tokens per step of what is recomputed first.

    Source: the metrics of this project's --verify; log-softmax in fp32, sums in fp64.
    """
    num_tokens = len(token_ids)
    if num_tokens < 2:
        raise ValueError(f"`token_ids` must have at least two tokens, got {num_tokens}")
    if reference_cache is decoded_cache:
        raise ValueError("`reference_cache` and `decoded_cache` must be two caches: each is written to")
    for cache in (reference_cache, decoded_cache):
        if get_capacity(cache) < num_tokens:
            raise ValueError(f"both caches must have room for {num_tokens} tokens, got {get_capacity(cache)}")
    num_verified = count_verified_tokens(num_tokens)
    start = num_tokens - num_verified
    with (
        preserve_tokens(reference_cache, start, num_reference_tokens),
        preserve_tokens(decoded_cache, start, num_decoded_tokens),
    ):
        for cache, num_held in ((reference_cache, num_reference_tokens), (decoded_cache, num_decoded_tokens)):
            set_length(cache, min(num_held, start))
            extend_cache(loaded, cache, token_ids[min(num_held, start) : start], block_size)
        return _compare_predictions(loaded, token_ids[start:], reference_cache, decoded_cache)


def _compare_predictions(loaded: LoadedModel, token_ids: torch.Tensor, reference: Cache, decoded: Cache) -> Fidelity:
    """Feed `token_ids` to both caches in pieces and compare the log-probabilities after each token."""
    kl = agreement = nll_delta = 0.0
    for start in range(0, len(token_ids), _TOKENS_PER_PIECE):
        piece = token_ids[start : start + _TOKENS_PER_PIECE]
        reference_logs = run_model(loaded, reference, piece, len(piece)).float().log_softmax(-1)
        decoded_logs = run_model(loaded, decoded, piece, len(piece)).float().log_softmax(-1)
        differences = reference_logs - decoded_logs
        # A token of probability zero adds nothing, also where the other cache agrees and the difference is NaN.
        terms = (reference_logs.exp() * differences).masked_fill_(reference_logs == -torch.inf, 0.0)
        kl += terms.sum(dtype=torch.float64).item()
        agreement += (reference_logs.argmax(-1) == decoded_logs.argmax(-1)).sum().item()
        followers = token_ids[start + 1 : start + 1 + len(piece)].to(device=differences.device, dtype=torch.int64)
        rows = torch.arange(len(followers), device=differences.device)
        nll_delta += differences[rows, followers].sum(dtype=torch.float64).item()
    num_positions = len(token_ids)
    return Fidelity(
        kl=kl / num_positions,
        next_token_agreement=agreement / num_positions,
        nll_delta=nll_delta / max(num_positions - 1, 1),
        verified_tokens=num_positions,
    )
