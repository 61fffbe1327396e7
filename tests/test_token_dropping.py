"""Dropping tokens: scores against plain attention of transformers, and what is kept against a second way."""

from __future__ import annotations

import pytest
import torch

from cachegen.comparison import token_dropping
from cachegen.comparison.schemes import SavedCache
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.prefill import prefill_context
from tests.fixtures.models import CONFIGS, make_loaded, make_token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS = 300


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make_loaded(CONFIGS["llama"])


@pytest.fixture(scope="module")
def saved(loaded: LoadedModel) -> SavedCache:
    return SavedCache(*prefill_context(loaded, make_token_ids(NUM_TOKENS + 1), 64))


def attention_of(loaded: LoadedModel, saved: SavedCache) -> list[torch.Tensor]:
    """Return weights `[num_kv_heads, queries, tokens]` per layer, of one pass of transformers over the text."""
    loaded.model.set_attn_implementation("eager")
    with torch.inference_mode():
        found = loaded.model(saved.metadata.token_ids.long()[None], output_attentions=True).attentions
    loaded.model.set_attn_implementation("sdpa")
    heads = [plane.shape[1] for plane in saved.cache.keys]
    return [w[0].reshape(n, -1, NUM_TOKENS, NUM_TOKENS).mean(1) for w, n in zip(found, heads, strict=True)]


def test_h2o_sums_the_attention_of_all_tokens(loaded, saved):
    before = loaded.model.config._attn_implementation
    scores = token_dropping.score_by_all(loaded, saved)
    assert loaded.model.config._attn_implementation == before
    for score, weights in zip(scores, attention_of(loaded, saved), strict=True):
        torch.testing.assert_close(score, weights.sum(1), rtol=1e-4, atol=1e-4)


def test_snapkv_takes_the_last_tokens_and_smooths(loaded, saved):
    scores = token_dropping.score_by_last(loaded, saved)
    for score, weights in zip(scores, attention_of(loaded, saved), strict=True):
        plain = weights[:, -token_dropping.SNAPKV_WINDOW :].sum(1)
        for token in (0, 1, 100, NUM_TOKENS - 1):
            around = plain[:, max(0, token - 3) : token + 4].mean(1)
            torch.testing.assert_close(score[:, token], around, rtol=1e-4, atol=1e-4)


def test_keeping_all_changes_nothing_but_roundings(saved):
    scores = [torch.rand(plane.shape[1], NUM_TOKENS) for plane in saved.cache.keys]
    kept = token_dropping.drop_tokens(saved, scores, NUM_TOKENS, 10)
    for plane, before in zip(kept.planes, saved.cache.planes, strict=True):
        torch.testing.assert_close(plane, before, rtol=1e-4, atol=1e-4)


def test_heads_keep_the_first_the_last_and_their_own_best(saved):
    scores = [torch.rand(plane.shape[1], NUM_TOKENS) for plane in saved.cache.keys]
    kept = token_dropping.drop_tokens(saved, scores, 50, 20)
    assert kept.num_tokens == 50
    for layer, score in enumerate(scores):
        for head in range(score.shape[0]):
            middle = score[head, 4 : NUM_TOKENS - 20]
            best = sorted(range(len(middle)), key=lambda token: -float(middle[token]))[: 50 - 24]
            tokens = [0, 1, 2, 3, *sorted(4 + token for token in best), *range(NUM_TOKENS - 20, NUM_TOKENS)]
            assert torch.equal(kept.values[layer][:, head], saved.cache.values[layer][tokens, head])


def test_what_is_kept_moves_together(loaded, saved):
    """Keys depend on the token and its position alone in the first layer: the same text without the dropped tokens."""
    scores = [torch.rand(1, NUM_TOKENS).expand(plane.shape[1], -1) for plane in saved.cache.keys]
    kept = token_dropping.drop_tokens(saved, scores, 50, 20)
    middle = scores[0][0, 4 : NUM_TOKENS - 20].topk(26).indices.sort().values + 4
    tokens = [0, 1, 2, 3, *middle.tolist(), *range(NUM_TOKENS - 20, NUM_TOKENS)]
    ids = saved.metadata.token_ids[tokens]
    expected, _ = prefill_context(loaded, torch.cat([ids, ids[:1]]), 64)
    torch.testing.assert_close(kept.keys[0], expected.keys[0], rtol=1e-3, atol=1e-3)


def test_fewer_than_what_is_always_kept_is_refused(saved):
    scores = [torch.rand(plane.shape[1], NUM_TOKENS) for plane in saved.cache.keys]
    with pytest.raises(ValueError, match="`num_kept` must be 24 to 300, got 23"):
        token_dropping.drop_tokens(saved, scores, 23, 20)
