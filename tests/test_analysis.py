"""The forward transform's native passes find what torch finds: rows, products, errors, and what they leave to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cachegen.kv_cache import KVCache, RotaryEmbedding
from cachegen.methods.transform import analysis, loss, transform
from cachegen.methods.transform.analysis import RoundedAnalysis, gather_rows, measure_errors
from cachegen.methods.transform.loss import LossMeter
from cachegen.methods.transform.transform import GroupTransform, join_planes
from cachegen.rotation import Rotation
from tests.fixtures.transform import make_profile, make_transformed_cache

CPU = torch.device("cpu")
SHAPES = [(2, 12), (3, 7)]
ROTATIONS = [
    (Rotation((1.0, 0.3, 0.02), "halves", 2, 1.25), None),
    (Rotation((1.0, 0.3, 0.02), "interleaved", 1), Rotation((0.5,), "halves")),
]
DTYPES = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(not analysis.CAN_GATHER, reason="this processor has no such kernels")


def make_planes(num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    drawn = [torch.randn(heads, num_tokens, dim, generator=generator) for heads, dim in SHAPES]
    return [plane.to(dtype).transpose(0, 1) for plane in drawn]


def undoing_angles(rotations, num_tokens: int):
    turns = transform.Turns(num_tokens, 5, CPU)
    return [turns.undoing_angles(rotation) for rotation in rotations]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotations", ROTATIONS, ids=["scaled halves", "both pairings"])
@pytest.mark.parametrize("num_tokens", [1, 63, 130])
def test_rows_are_the_values_with_rotations_undone_less_their_means(num_tokens, rotations, dtype) -> None:
    planes = make_planes(num_tokens, dtype)
    mean = torch.linspace(-1, 1, 45)
    expected = join_planes(planes, rotations, 5, CPU) - mean
    angles = undoing_angles(rotations, num_tokens)
    rows, sizes = gather_rows(planes, rotations, angles, mean, is_bf16=False, num_threads=2)
    found = torch.from_numpy(rows)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert np.array_equal(sizes.largest, found.abs().amax(0))
    assert np.allclose(sizes.sums, found.abs().sum(0), rtol=1e-5)
    rounded, _ = gather_rows(planes, rotations, angles, mean, is_bf16=True, num_threads=1)
    bits = torch.from_numpy(rounded).view(torch.bfloat16)
    assert torch.equal(bits[:, :45], found.bfloat16()) and not bits[:, 45:].any()


@pytest.mark.skipif(not analysis.CAN_MULTIPLY_BF16, reason="this processor has no products in bf16")
@pytest.mark.parametrize("num_components", [1, 64, 65, 200])
def test_products_in_bf16_sum_in_fp32(num_components: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(17, 46, generator=generator).bfloat16()
    matrix = torch.randn(45, 200, generator=generator)
    bits = rows.view(torch.int16).numpy().view("uint16")
    found = RoundedAnalysis(matrix).multiply(bits, num_components, 1e3, 2)
    assert found is not None
    expected = rows[:, :45].double() @ matrix.bfloat16().double()[:, :num_components]
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not analysis.CAN_MULTIPLY_BF16, reason="this processor has no products in bf16")
def test_products_in_bf16_are_not_taken_where_quantizing_is_finer() -> None:
    rows = torch.full((3, 46), 100.0).bfloat16().view(torch.int16).numpy().view("uint16")
    rounded = RoundedAnalysis(torch.eye(45))
    assert rounded.multiply(rows, 45, 1.0, 1) is None
    assert rounded.multiply(rows, 45, 100.0, 1) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 130])
def test_errors_are_those_of_each_channel(num_tokens: int, dtype: torch.dtype) -> None:
    planes = make_planes(num_tokens, dtype)
    values = torch.cat([plane.float().flatten(1) for plane in planes], 1)
    decoded = (values + torch.linspace(-1, 1, 45)).to(dtype)
    found = measure_errors(planes, decoded, 2)
    errors = (decoded.float() - values).abs()
    assert np.array_equal(found.errors.largest, errors.amax(0))
    assert np.allclose(found.errors.sums, errors.sum(0), rtol=1e-5)
    assert (found.least, found.greatest) == (min(decoded.min().item(), 0), max(decoded.max().item(), 0))


def test_a_decoded_value_that_is_no_number_travels_exactly() -> None:
    planes = make_planes(70, torch.float16)
    decoded = torch.cat([plane.flatten(1) for plane in planes], 1).contiguous()
    decoded[3, 7], decoded[4, 8] = float("nan"), float("inf")
    meter = LossMeter()
    meter.add(planes, decoded, torch.full((45,), 0.1), 0, 0)
    found = meter.gather(KVCache([planes[0]], [planes[1]]))
    assert list(zip(found.tokens.tolist(), found.channels.tolist(), strict=True)) == [(3, 7), (4, 8)]


@pytest.mark.parametrize("outlier", [None, 3e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_components_are_those_of_torch_and_outliers_are_left_to_it(dtype, outlier, monkeypatch) -> None:
    profile = make_profile([(2, 16)] * 2, (1,), rotary=RotaryEmbedding("r", "default", (1.0, 0.01), 1.3))
    cache = make_transformed_cache(profile, 90, dtype)
    if outlier is not None:
        cache.keys[0][17, 1, 3] = outlier
    block = GroupTransform(profile, profile.groups[0], CPU, may_round=True)
    count = profile.groups[0].num_components
    found = block.analyze_block(cache, 0, count, 1.0)
    monkeypatch.setattr(transform, "CAN_GATHER", False)
    expected = block.analyze_block(cache, 0, count, 1.0)
    assert (found - expected).abs().max() <= (0.05 if outlier is None else 0)


def test_what_is_measured_is_the_same_without_native_passes(monkeypatch) -> None:
    planes = make_planes(100, torch.float16)
    decoded = torch.cat([plane.flatten(1) for plane in planes], 1) + 0.125
    measured = []
    for can_gather in (True, False):
        monkeypatch.setattr(loss, "CAN_GATHER", can_gather)
        meter = LossMeter()
        meter.add(planes, decoded.contiguous(), torch.full((45,), 0.1), 0, 0)
        measured.append(meter.measure())
    assert measured[0].largest == measured[1].largest
    assert measured[0].mean == pytest.approx(measured[1].mean, rel=1e-6)
