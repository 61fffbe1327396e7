"""--verify: the numbers against a plain computation of them, and caches left as they were."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from cachegen.pipeline import verify
from cachegen.pipeline.model_cache import PreallocatedLayer, allocate_cache, set_length, view_kv_cache
from cachegen.pipeline.prefill import prefill
from cachegen.pipeline.session import Session
from cachegen.pipeline.verify import (
    Fidelity,
    compare_caches,
    compare_with_predictions,
    compare_with_text,
    count_verified_tokens,
    predict_from,
)
from tests.fixtures.models import make_named, make_token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

LOADED = make_named("llama")


def make_pair(token_ids: torch.Tensor, num_decoded: int, noise: float) -> tuple[Cache, Cache]:
    """A reference of all tokens but the last, and a noisy copy of its first `num_decoded` tokens."""
    reference = prefill(LOADED, token_ids[:-1], 64, capacity=len(token_ids))
    planes = view_kv_cache(reference, num_decoded).planes
    shapes = [(plane.shape[1], plane.shape[2]) for plane in planes]
    decoded = allocate_cache(LOADED.cache_layout, shapes, len(token_ids), torch.float32)
    generator = torch.Generator().manual_seed(1)
    for target, source in zip(view_kv_cache(decoded, num_decoded).planes, planes, strict=True):
        target.copy_(source + noise * torch.randn(source.shape, generator=generator))
    set_length(decoded, num_decoded)
    return reference, decoded


def compare(token_ids: torch.Tensor, pair: tuple[Cache, Cache], num_decoded: int) -> Fidelity:
    return compare_caches(
        LOADED, token_ids, *pair, num_reference_tokens=len(token_ids) - 1, num_decoded_tokens=num_decoded
    )


def predict_plainly(token_ids: torch.Tensor, cache: Cache, num_held: int) -> torch.Tensor:
    """Log-probabilities after each verified token, from one step over a concatenating cache."""
    start = len(token_ids) - count_verified_tokens(len(token_ids))
    num_kept = min(start, num_held)
    plain = DynamicCache()
    kept = view_kv_cache(cache, num_kept)
    for i in range(kept.num_layers):
        plain.update(kept.keys[i].permute(1, 0, 2)[None], kept.values[i].permute(1, 0, 2)[None], i)
    with torch.inference_mode():
        logits = LOADED.model(token_ids[num_kept:].long()[None], past_key_values=plain).logits[0]
    return logits[start - num_kept :].log_softmax(-1)


@pytest.mark.parametrize(
    ("num_tokens", "num_decoded"), [(600, 599), (600, 344), (600, 300), (600, 500), (31, 30), (31, 10)]
)
def test_the_numbers_are_those_of_a_plain_computation(num_tokens, num_decoded):
    token_ids = make_token_ids(num_tokens)
    pair = make_pair(token_ids, num_decoded, noise=0.3)
    expected_reference = predict_plainly(token_ids, pair[0], num_tokens - 1)
    expected_decoded = predict_plainly(token_ids, pair[1], num_decoded)
    fidelity = compare(token_ids, pair, num_decoded)
    kl = torch.nn.functional.kl_div(expected_decoded, expected_reference, log_target=True, reduction="batchmean")
    followers = token_ids[-len(expected_decoded) + 1 :].long()
    rows = torch.arange(len(followers))
    nll_delta = (expected_reference[rows, followers] - expected_decoded[rows, followers]).mean()
    agreement = (expected_reference.argmax(-1) == expected_decoded.argmax(-1)).float().mean()
    assert fidelity.kl == pytest.approx(kl.item(), rel=1e-3)
    assert fidelity.kl > 1e-4
    assert fidelity.nll_delta == pytest.approx(nll_delta.item(), rel=1e-3, abs=1e-5)
    assert fidelity.next_token_agreement == pytest.approx(agreement.item(), abs=1e-6)
    assert fidelity.verified_tokens == len(expected_decoded)


@pytest.mark.parametrize(("num_tokens", "num_decoded"), [(600, 344), (600, 500), (31, 10)])
def test_kept_predictions_give_the_same_numbers_to_the_bit(num_tokens, num_decoded):
    token_ids = make_token_ids(num_tokens)
    pair = make_pair(token_ids, num_decoded, noise=0.3)
    start = num_tokens - count_verified_tokens(num_tokens)
    before = [plane.clone() for plane in view_kv_cache(pair[0], num_tokens - 1).planes]
    kept = predict_from(LOADED, token_ids, pair[0], start=start, num_held_tokens=num_tokens - 1)
    assert all(map(torch.equal, before, view_kv_cache(pair[0], num_tokens - 1).planes))
    found = compare_with_predictions(LOADED, token_ids, kept, pair[1], num_decoded_tokens=num_decoded)
    assert found.fidelity == compare(token_ids, pair, num_decoded)


def test_a_comparison_has_each_token_and_both_likelihoods():
    token_ids = make_token_ids(600)
    pair = make_pair(token_ids, 300, noise=0.3)
    kept = predict_from(LOADED, token_ids, pair[0], start=300, num_held_tokens=599)
    found = compare_with_predictions(LOADED, token_ids, kept, pair[1], num_decoded_tokens=300)
    with torch.inference_mode():
        plain = DynamicCache()
        held = view_kv_cache(pair[1], 300)
        for i in range(held.num_layers):
            plain.update(held.keys[i].permute(1, 0, 2)[None], held.values[i].permute(1, 0, 2)[None], i)
        decoded = LOADED.model(token_ids[300:].long()[None], past_key_values=plain).logits[0].log_softmax(-1)
    kl = torch.nn.functional.kl_div(decoded, kept, log_target=True, reduction="none").sum(-1)
    assert found.kl_of_tokens == pytest.approx(kl.tolist(), rel=1e-2, abs=1e-6)
    rows, followers = torch.arange(299), token_ids[301:].long()
    assert found.nll_reference == pytest.approx(-kept[rows, followers].sum().item(), rel=1e-5)
    assert found.nll_decoded == pytest.approx(-decoded[rows, followers].sum().item(), rel=1e-5)
    assert found.num_followers == 299


@pytest.mark.parametrize(("num_tokens", "num_decoded"), [(600, 599), (600, 300), (31, 30)])
def test_the_numbers_against_the_text_are_those_of_a_plain_computation(num_tokens, num_decoded):
    token_ids = make_token_ids(num_tokens)
    _, decoded = make_pair(token_ids, num_decoded, noise=0.3)
    with torch.inference_mode():
        reference = LOADED.model(token_ids.long()[None]).logits[0].log_softmax(-1)
    found = compare_with_text(LOADED, token_ids, decoded, num_decoded_tokens=num_decoded)
    expected = predict_plainly(token_ids, decoded, num_decoded)
    kl = torch.nn.functional.kl_div(expected, reference[-len(expected) :], log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(kl.item(), rel=1e-3)
    assert decoded.get_seq_length() == num_decoded


def test_an_uncompressed_cache_differs_from_the_text_by_rounding_only():
    token_ids = make_token_ids(600)
    fidelity = compare_with_text(LOADED, token_ids, make_pair(token_ids, 599, noise=0)[1], num_decoded_tokens=599)
    assert fidelity.kl < 1e-6 and fidelity.next_token_agreement == 1


def test_a_mistake_in_our_own_prefilling_shows_against_the_text(monkeypatch):
    update = PreallocatedLayer.update
    monkeypatch.setattr(
        PreallocatedLayer, "update", lambda self, keys, *rest, **more: update(self, keys * 3, *rest, **more)
    )
    token_ids = make_token_ids(60)
    wrong = prefill(LOADED, token_ids[:-1], 16, capacity=70)
    assert compare_with_text(LOADED, token_ids, wrong, num_decoded_tokens=59).kl > 0.01
    session = Session(LOADED, token_ids, (None,), (token_ids,), max_new_tokens=8)
    record = session.verify(session.answer(wrong, 59, 16), wrong, 59, 16)
    assert record["greedy_match"] is False and record["kl"] > 0.01


@pytest.mark.parametrize("num_tokens", [2, 3, 40, 600])
def test_a_cache_compared_with_its_equal_is_exactly_faithful(num_tokens):
    token_ids = make_token_ids(num_tokens)
    fidelity = compare(token_ids, make_pair(token_ids, num_tokens - 1, noise=0), num_tokens - 1)
    assert fidelity == Fidelity(0.0, 1.0, 0.0, count_verified_tokens(num_tokens))


@pytest.mark.parametrize(
    ("num_tokens", "num_verified"), [(2, 1), (3, 1), (511, 255), (512, 256), (513, 256), (9000, 256)]
)
def test_the_last_256_tokens_are_verified_or_half_of_a_shorter_context(num_tokens, num_verified):
    assert count_verified_tokens(num_tokens) == num_verified


@pytest.mark.parametrize("num_decoded", [59, 45, 20])
def test_both_caches_are_afterwards_as_they_were(num_decoded):
    token_ids = make_token_ids(60)
    pair = make_pair(token_ids, num_decoded, noise=0.3)
    lengths = (59, num_decoded)
    before = [[p.clone() for p in view_kv_cache(c, n).planes] for c, n in zip(pair, lengths, strict=True)]
    compare(token_ids, pair, num_decoded)
    for cache, length, planes in zip(pair, lengths, before, strict=True):
        assert cache.get_seq_length() == length
        assert all(torch.equal(a, b) for a, b in zip(view_kv_cache(cache, length).planes, planes, strict=True))


def test_logits_are_made_in_pieces(monkeypatch):
    token_ids = make_token_ids(600)
    pair = make_pair(token_ids, 599, noise=0.3)
    whole = compare(token_ids, pair, 599)
    sizes = []
    run_model = verify.run_model

    def record(loaded, cache, ids, num_logits):
        sizes.append(num_logits)
        return run_model(loaded, cache, ids, num_logits)

    monkeypatch.setattr(verify, "_TOKENS_PER_PIECE", 100)
    monkeypatch.setattr(verify, "run_model", record)
    assert compare(token_ids, pair, 599).kl == pytest.approx(whole.kl, rel=1e-4)
    assert sizes == [100, 100, 100, 100, 56, 56]


def test_tokens_the_model_rules_out_do_not_make_the_kl_undefined():
    token_ids = make_token_ids(40)
    pair = make_pair(token_ids, 39, noise=0.3)

    def rule_out(module, inputs, output):
        output[..., 5] = -torch.inf
        return output

    hook = LOADED.model.lm_head.register_forward_hook(rule_out)
    kl = compare(token_ids, pair, 39).kl
    hook.remove()
    assert 0 < kl < 100


def test_bad_arguments_are_refused():
    token_ids = make_token_ids(40)
    reference, decoded = make_pair(token_ids, 39, noise=0)
    with pytest.raises(ValueError, match="two caches"):
        compare(token_ids, (reference, reference), 39)
    with pytest.raises(ValueError, match="must have room for 41 tokens, got 40"):
        compare(make_token_ids(41), (reference, decoded), 39)
    with pytest.raises(ValueError, match="at least two tokens"):
        compare(token_ids[:1], (reference, decoded), 0)
