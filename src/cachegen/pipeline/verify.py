"""How much a decoded cache changes what the model predicts: against the text itself, or against another cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from cachegen.format.headers import DocumentHeader
from cachegen.kv_cache import KVCache, hash_planes
from cachegen.pipeline.chunking import DEFAULT_BLOCK_SIZE
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import get_capacity, preserve_tokens, set_length
from cachegen.pipeline.prefill import extend_cache, run_model

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


@dataclass(frozen=True)
class Comparison:
    """Two sets of predictions of the same tokens, in full.

    Attributes:
        fidelity: their summary.
        kl_of_tokens: KL(reference || decoded) of each position, in nats.
        nll_reference: summed negative log-likelihood, in nats, of the tokens that really follow.
        nll_decoded: the same of the decoded cache.
        num_followers: how many tokens follow: one less than there are positions.
    """

    fidelity: Fidelity
    kl_of_tokens: tuple[float, ...]
    nll_reference: float
    nll_decoded: float
    num_followers: int


def count_verified_tokens(num_tokens: int) -> int:
    """Return how many of a context's last tokens are verified: 256, or half of a context shorter than 512."""
    return min(MAX_VERIFIED_TOKENS, num_tokens // 2)


def is_saved_cache(cache: KVCache, header: DocumentHeader) -> bool:
    """Tell whether a decoded cache is, bit for bit, the one that a document was encoded from, as far as it is stored.

    Args:
        cache: all that was decoded; of fewer tokens than the saved one nothing is known, and the answer is no.
    """
    if cache.num_tokens != header.num_cache_tokens:
        return False
    on_cpu = KVCache([plane.cpu() for plane in cache.keys], [plane.cpu() for plane in cache.values])
    return hash_planes(on_cpu, first_stored=header.first_stored) == header.cache_hash.hex()


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
    start = _first_verified(token_ids, reference_cache, decoded_cache)
    if reference_cache is decoded_cache:
        raise ValueError("`reference_cache` and `decoded_cache` must be two caches: each is written to")
    with (
        preserve_tokens(reference_cache, start, num_reference_tokens),
        preserve_tokens(decoded_cache, start, num_decoded_tokens),
    ):
        return _compare_predictions(
            token_ids[start:],
            _predict_on(loaded, reference_cache, num_reference_tokens, token_ids, start, block_size),
            _predict_on(loaded, decoded_cache, num_decoded_tokens, token_ids, start, block_size),
        ).fidelity


@torch.inference_mode()
def predict_from(
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    cache: Cache,
    *,
    start: int,
    num_held_tokens: int,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> torch.Tensor:
    """Force the tokens of a context from `start` on through the model, once for many comparisons.

    Args:
        loaded: the model.
        token_ids: the whole context, integers `[num_tokens]`.
        cache: as in `compare_caches`; it holds the same tokens afterwards as before.
        start: the first token that is fed.
        num_held_tokens: tokens the cache holds.
        block_size: as in `compare_caches`.

    Returns:
        Log-probabilities after each of these tokens, fp32 `[num_tokens - start, vocabulary]`, where the model is.
    """
    with preserve_tokens(cache, start, num_held_tokens):
        predict = _predict_on(loaded, cache, num_held_tokens, token_ids, start, block_size)
        logs = torch.empty(0)
        for begin in range(0, len(token_ids) - start, _TOKENS_PER_PIECE):
            piece = predict(begin, min(begin + _TOKENS_PER_PIECE, len(token_ids) - start))
            if not begin:
                logs = torch.empty(len(token_ids) - start, piece.shape[-1], device=piece.device)
            logs[begin : begin + len(piece)] = piece
        return logs


@torch.inference_mode()
def compare_with_predictions(
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    reference: torch.Tensor,
    decoded_cache: Cache,
    *,
    num_decoded_tokens: int,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Comparison:
    """Compare predictions on a decoded cache with those that `predict_from` has returned, as `compare_caches` does.

    Args:
        loaded: the model on the decoded cache; the reference may be of one in another dtype.
        token_ids: the whole context, integers `[num_tokens]`.
        reference: after the last `len(reference)` tokens, at least one.
        decoded_cache: with a capacity of `num_tokens` at least; it holds the same tokens afterwards as before.
        num_decoded_tokens: tokens the decoded cache holds.
        block_size: as in `compare_caches`.
    """
    start = len(token_ids) - len(reference)
    with preserve_tokens(decoded_cache, start, num_decoded_tokens):
        return _compare_predictions(
            token_ids[start:],
            lambda begin, end: reference[begin:end],
            _predict_on(loaded, decoded_cache, num_decoded_tokens, token_ids, start, block_size),
        )


@torch.inference_mode()
def compare_with_text(
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    decoded_cache: Cache,
    *,
    num_decoded_tokens: int,
    block_size: int = DEFAULT_BLOCK_SIZE,
    start: int | None = None,
) -> Fidelity:
    """Compare predictions on a decoded cache with those of one plain pass of the model over the whole context.

    The reference is transformers' own: `model(token_ids)`, in one piece, into whatever cache it makes. Nothing of this
    project is in it, so that a mistake in prefilling shows, too. A pass in one piece rounds otherwise than one in
    blocks, so an uncompressed cache has a KL of its own: on the bundled model 0.00006 in bf16, below 1e-7 in fp32.

    Args:
        loaded: the model.
        token_ids: the whole context, integers `[num_tokens]`, at least two.
        decoded_cache: with a capacity of `num_tokens` at least; it holds the same tokens afterwards as before.
        num_decoded_tokens: tokens the decoded cache holds.
        block_size: tokens per step of what is recomputed on the decoded cache before the verified tokens.
        start: the first token that is verified; None: as `count_verified_tokens` says. A cache that can only be used
            whole is verified behind all of it.

    Source: as `compare_caches`.
    """
    last = _first_verified(token_ids, decoded_cache)
    start = last if start is None else start
    num_verified = len(token_ids) - start
    limit = {"logits_to_keep": num_verified} if loaded.can_limit_logits else {}
    inputs = token_ids.to(device=loaded.device, dtype=torch.int64)[None]
    # A context alone may be so short that the model would take the frequencies of short texts.
    with loaded.fixed_frequencies():
        logits = loaded.model(input_ids=inputs, **limit).logits[0, -num_verified:]
    with preserve_tokens(decoded_cache, start, num_decoded_tokens):
        return _compare_predictions(
            token_ids[start:],
            lambda begin, end: logits[begin:end].float().log_softmax(-1),
            _predict_on(loaded, decoded_cache, num_decoded_tokens, token_ids, start, block_size),
        ).fidelity


def _first_verified(token_ids: torch.Tensor, *caches: Cache) -> int:
    """Return the first position that is verified; refuse caches without room for all tokens."""
    num_tokens = len(token_ids)
    if num_tokens < 2:
        raise ValueError(f"`token_ids` must have at least two tokens, got {num_tokens}")
    for cache in caches:
        if get_capacity(cache) < num_tokens:
            raise ValueError(f"a cache must have room for {num_tokens} tokens, got {get_capacity(cache)}")
    return num_tokens - count_verified_tokens(num_tokens)


def _predict_on(
    loaded: LoadedModel, cache: Cache, num_held: int, token_ids: torch.Tensor, start: int, block_size: int
) -> Callable[[int, int], torch.Tensor]:
    """Crop or extend a cache to end before token `start`, and return what feeds it the tokens from there on."""
    set_length(cache, min(num_held, start))
    extend_cache(loaded, cache, token_ids[min(num_held, start) : start], block_size)

    def predict(begin: int, end: int) -> torch.Tensor:
        return run_model(loaded, cache, token_ids[start + begin : start + end], end - begin).float().log_softmax(-1)

    return predict


def _compare_predictions(
    token_ids: torch.Tensor,
    predict_reference: Callable[[int, int], torch.Tensor],
    predict_decoded: Callable[[int, int], torch.Tensor],
) -> Comparison:
    """Compare the log-probabilities after each token.

    Args:
        token_ids: the verified ones.
        predict_reference, predict_decoded: give the log-probabilities, fp32 `[num_tokens, vocabulary]`, after tokens
            `begin` to `end` of these, for consecutive pieces.
    """
    kl = agreement = nll_delta = nll_reference = nll_decoded = 0.0
    kl_of_tokens: list[float] = []
    for start in range(0, len(token_ids), _TOKENS_PER_PIECE):
        piece = token_ids[start : start + _TOKENS_PER_PIECE]
        reference_logs = predict_reference(start, start + len(piece))
        decoded_logs = predict_decoded(start, start + len(piece))
        if decoded_logs.device != reference_logs.device:
            decoded_logs = decoded_logs.to(reference_logs.device)
        differences = reference_logs - decoded_logs
        # A token of probability zero adds nothing, also where the other cache agrees and the difference is NaN.
        terms = (reference_logs.exp() * differences).masked_fill_(reference_logs == -torch.inf, 0.0)
        kl += terms.sum(dtype=torch.float64).item()
        kl_of_tokens += terms.sum(-1, dtype=torch.float64).tolist()
        agreement += (reference_logs.argmax(-1) == decoded_logs.argmax(-1)).sum().item()
        followers = token_ids[start + 1 : start + 1 + len(piece)].to(device=differences.device, dtype=torch.int64)
        rows = torch.arange(len(followers), device=differences.device)
        nll_delta += differences[rows, followers].sum(dtype=torch.float64).item()
        nll_reference -= reference_logs[rows, followers].sum(dtype=torch.float64).item()
        nll_decoded -= decoded_logs[rows, followers].sum(dtype=torch.float64).item()
    num_positions = len(token_ids)
    fidelity = Fidelity(
        kl=kl / num_positions,
        next_token_agreement=agreement / num_positions,
        nll_delta=nll_delta / max(num_positions - 1, 1),
        verified_tokens=num_positions,
    )
    return Comparison(fidelity, tuple(kl_of_tokens), nll_reference, nll_decoded, num_positions - 1)
