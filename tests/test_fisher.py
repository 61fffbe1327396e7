"""The Fisher information predicts what a change of the cache costs, in the unit that the transform works in."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from cachegen.calibration.fisher import accumulate_fisher, plan_windows
from cachegen.kv_cache import KVCache, from_planes, rotations_by_rule
from cachegen.methods.rotary import Turns
from cachegen.methods.transform.transform import join_planes
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import allocate_cache, set_length, view_kv_cache
from cachegen.pipeline.prefill import prefill_context, run_model
from tests.fixtures.models import SMALL_SIZES, make_loaded, make_named, make_token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_BEFORE = 3
YARN = transformers.LlamaConfig(
    **SMALL_SIZES,
    max_position_embeddings=256,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)


def sum_fisher(loaded: LoadedModel, num_tokens: int, groups: list[tuple[int, int]], **options) -> list[torch.Tensor]:
    cache, metadata = prefill_context(loaded, make_token_ids(num_tokens + 1))
    widths = [sum(plane.shape[1] * plane.shape[2] for plane in cache.planes[2 * f : 2 * (f + n)]) for f, n in groups]
    totals = [torch.zeros(width, width, dtype=torch.float64) for width in widths]
    options = {"num_forced": 8, "num_samples": 1, "seed": 0, **options}
    accumulate_fisher(loaded, cache, metadata, groups, totals, **options)
    return totals


def predict(loaded: LoadedModel, before: KVCache, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after each token of the window, fp64."""
    shapes = [tuple(plane.shape[1:]) for plane in before.planes]
    cache = allocate_cache(loaded.cache_layout, shapes, NUM_BEFORE + len(window), torch.float32)
    for target, source in zip(view_kv_cache(cache, NUM_BEFORE).planes, before.planes, strict=True):
        target.copy_(source)
    set_length(cache, NUM_BEFORE)
    return run_model(loaded, cache, window, len(window)).double().log_softmax(-1)


def change(loaded: LoadedModel, before: KVCache, changes: torch.Tensor) -> KVCache:
    """Add vectors `[num_tokens, num_channels]` to a cache, in the keys before their rotary embedding is applied."""
    planes = []
    turns = Turns(NUM_BEFORE, 0, torch.device("cpu"))
    rotations = rotations_by_rule(loaded.rotary_embeddings, [plane.shape[2] for plane in before.planes])
    parts = changes.split([p.shape[1] * p.shape[2] for p in before.planes], dim=1)
    for plane, part, rotation in zip(before.planes, parts, rotations, strict=True):
        planes.append(plane + turns.apply(part.view(plane.shape), rotation))
    return from_planes(planes)


@pytest.mark.parametrize(
    "model", ["llama", "yarn", "gpt2 with learned positions", "gemma3 with local and global layers"]
)
def test_the_quadratic_form_is_the_divergence_that_a_change_causes(model):
    loaded = make_loaded(YARN) if model == "yarn" else make_named(model)
    if model == "yarn":
        assert loaded.rotary_embeddings[0].attention_scaling > 1.1  # what the test is for
    cache, metadata = prefill_context(loaded, make_token_ids(2 * NUM_BEFORE + 1))
    num_channels = sum(plane.shape[1] * plane.shape[2] for plane in cache.planes)
    total = torch.zeros(num_channels, num_channels, dtype=torch.float64)
    num_samples = 400
    groups = [(0, cache.num_layers)]
    count = accumulate_fisher(
        loaded, cache, metadata, groups, [total], num_forced=NUM_BEFORE, num_samples=num_samples, seed=0
    )
    assert count == NUM_BEFORE * num_samples
    before, window = cache.slice(0, NUM_BEFORE), metadata.token_ids[NUM_BEFORE:]
    reference = predict(loaded, before, window)
    generator = torch.Generator().manual_seed(1)
    spread = join_planes(before.planes, [None] * len(before.planes), 0, torch.device("cpu")).std().item()
    is_key = torch.cat([torch.full((p.shape[1] * p.shape[2],), i % 2 == 0) for i, p in enumerate(before.planes)])
    for mask in (is_key, ~is_key):
        direction = 0.01 * spread * torch.randn(num_channels, generator=generator) * mask
        divergences = []
        # Over all signs the tokens' cross terms cancel, which the sum of each token's own products does not have.
        for signs in itertools.product((-1.0, 1.0), repeat=NUM_BEFORE):
            changed = predict(loaded, change(loaded, before, torch.tensor(signs)[:, None] * direction), window)
            divergences.append((reference.exp() * (reference - changed)).sum().item())
        expected = (direction.double() @ total @ direction.double()).item() / (2 * num_samples)
        assert sum(divergences) / len(divergences) == pytest.approx(expected, rel=0.2)


def test_the_same_seed_gives_the_same_sums_and_another_one_others():
    first, again, other = (sum_fisher(make_named("llama"), 40, [(0, 3)], seed=seed)[0] for seed in (5, 5, 6))
    assert first.equal(again)
    assert not first.equal(other)


def test_groups_are_blocks_of_the_whole():
    loaded = make_named("deepseek with unlike keys and values")
    (whole,) = sum_fisher(loaded, 40, [(0, 3)])
    parts = sum_fisher(loaded, 40, [(0, 1), (1, 2)])
    torch.testing.assert_close(whole[: len(parts[0]), : len(parts[0])], parts[0])
    torch.testing.assert_close(whole[len(parts[0]) :, len(parts[0]) :], parts[1])


def test_the_model_and_the_cache_are_left_as_they_were():
    loaded = make_named("llama")
    cache, metadata = prefill_context(loaded, make_token_ids(41))
    copies = [plane.clone() for plane in cache.planes]
    total = torch.zeros(192, 192, dtype=torch.float64)
    accumulate_fisher(loaded, cache, metadata, [(0, 3)], [total], num_forced=8, num_samples=1, seed=0)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert all(a.equal(b) for a, b in zip(copies, cache.planes, strict=True))


@pytest.mark.parametrize(
    ("num_tokens", "num_forced", "windows"),
    [
        (9000, 1024, [(1994, 2250), (4244, 4500), (6494, 6750), (8744, 9000)]),
        (9000, 100, [(8900, 9000)]),
        (1024, 1024, [(256, 512), (768, 1024)]),
        (300, 1024, [(150, 300)]),
        (2, 1024, [(1, 2)]),
    ],
)
def test_windows_are_spread_evenly_and_leave_a_cache_before_them(num_tokens, num_forced, windows):
    assert plan_windows(num_tokens, num_forced) == windows
