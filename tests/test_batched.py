"""The inverse transform of several groups at once: the values of one after the other, within what rounding costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from cachegen.kv_cache import KVCache, RotaryEmbedding
from cachegen.methods.transform import batched
from cachegen.methods.transform.batched import BatchedSynthesis, can_join
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.transform import GroupTransform
from tests.fixtures.transform import make_profile

CPU = torch.device("cpu")
ROTARY = RotaryEmbedding("r", "default", (1.0, 0.3, 0.01), 1.3)
NUM_TOKENS = 70


def make_groups(profile: Profile) -> list[GroupTransform]:
    return [GroupTransform(profile, group, CPU) for group in profile.groups]


def empty_cache(profile: Profile, dtype: torch.dtype) -> KVCache:
    planes = [torch.full((NUM_TOKENS, *shape), torch.nan, dtype=dtype) for shape in profile.plane_shapes]
    return KVCache(planes[0::2], planes[1::2])


class Case:
    def __init__(self, largest: float = 3.0, dtype: torch.dtype = torch.float16) -> None:
        self.profile = make_profile([(2, 16)] * 8, (2, 2), rotary=ROTARY)
        self.groups = make_groups(self.profile)
        self.num_coded = [group.group.num_components - 3 * i for i, group in enumerate(self.groups)]
        self.dtype = dtype
        drawn = torch.randn(2, NUM_TOKENS, max(self.num_coded), generator=torch.Generator().manual_seed(1))
        self.components = (largest * drawn).round().to(torch.int32)
        for components, count in zip(self.components, self.num_coded, strict=True):
            components[:, count:] = 0

    def decode_apart(self, step: float) -> KVCache:
        output = empty_cache(self.profile, self.dtype)
        for group, components, count in zip(self.groups, self.components, self.num_coded, strict=True):
            group.synthesize(components[:, :count], step, output, 5)
        return output

    def decode_at_once(self, step: float, *, may_round: bool) -> tuple[KVCache, Callable[[], bool] | None]:
        output = empty_cache(self.profile, self.dtype)
        synthesis = BatchedSynthesis(self.groups, may_round=may_round)
        return output, synthesis.synthesize(self.components, self.num_coded, step, output, 5)


def largest_error(a: KVCache, b: KVCache) -> float:
    return max((x.float() - y.float()).abs().max().item() for x, y in zip(a.planes, b.planes, strict=True))


@pytest.mark.parametrize(("block", "run"), [(16, 1), (16, 40), (2048, 1), (2048, 16384)])
def test_values_in_fp32_are_those_of_each_group(block: int, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "BATCH_TOKENS", block)
    monkeypatch.setattr(batched, "ANGLE_TOKENS", run)
    case = Case(dtype=torch.float32)
    found, is_beyond = case.decode_at_once(0.7, may_round=False)
    assert is_beyond is None and largest_error(found, case.decode_apart(0.7)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_in_bf16_are_near_those_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupTransform, "is_rounding_cheap", lambda *rest: True)
    case = Case(dtype=dtype)
    found, is_beyond = case.decode_at_once(0.7, may_round=True)
    expected = case.decode_apart(0.7)
    size = max(plane.float().abs().max().item() for plane in expected.planes)
    assert is_beyond is not None and not is_beyond()
    assert 0 < largest_error(found, expected) < size / 64


def test_positions_before_those_of_the_call_before_have_their_own_angles() -> None:
    case, outputs = Case(dtype=torch.float32), []
    synthesis = BatchedSynthesis(case.groups, may_round=False)
    for position in (5, 9, 5):
        outputs.append(empty_cache(case.profile, case.dtype))
        synthesis.synthesize(case.components, case.num_coded, 0.7, outputs[-1], position)
    expected = case.decode_apart(0.7)
    assert largest_error(outputs[0], expected) < 1e-5 < largest_error(outputs[1], expected)
    assert largest_error(outputs[2], expected) < 1e-5


def test_where_rounding_would_be_noticed_all_is_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupTransform, "is_rounding_cheap", lambda *rest: False)
    case = Case(dtype=torch.float32)
    found, is_beyond = case.decode_at_once(0.7, may_round=True)
    assert is_beyond is None and largest_error(found, case.decode_apart(0.7)) < 1e-5


@pytest.mark.parametrize(("place", "size", "is_exact"), [(0, 65535, True), (0, 65536, False), (-1, 257, False)])
def test_large_components_have_two_digits_or_are_told(place, size, is_exact, monkeypatch) -> None:
    monkeypatch.setattr(GroupTransform, "is_rounding_cheap", lambda *rest: True)
    monkeypatch.setattr(GroupTransform, "count_large", lambda *rest: 2)
    case = Case(largest=0.0, dtype=torch.float32)
    case.components[0, 3, place] = -size
    found, is_beyond = case.decode_at_once(0.5, may_round=True)
    assert is_beyond is not None and is_beyond() != is_exact
    if is_exact:
        expected = case.decode_apart(0.5)
        assert largest_error(found, expected) < max(p.abs().max().item() for p in expected.planes) / 64


def test_only_groups_that_are_alike_are_joined() -> None:
    profile = make_profile([(2, 16)] * 8, (2, 2), rotary=ROTARY)
    assert can_join(make_groups(profile))
    assert not can_join(make_groups(make_profile([(2, 16)] * 6, (2, 1), rotary=ROTARY)))
    shapes = tuple((1, 32) if i == 1 else shape for i, shape in enumerate(profile.plane_shapes))
    assert not can_join(make_groups(dataclasses.replace(profile, plane_shapes=shapes)))
