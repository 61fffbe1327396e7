"""The transform: its rotation and matrices are undone by their inverses, and levels nest."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cachegen.kv_cache import RotaryEmbedding, from_planes
from cachegen.methods.rotary import angles_of, apply_rotation, undo_rotation
from cachegen.methods.transform import transform
from cachegen.methods.transform.transform import (
    LEVEL_RATIO_LOG,
    MAX_COMPONENT,
    GroupTransform,
    quantize_components,
    step_of_level,
)
from cachegen.rotation import PAIRINGS, Pairing, Rotation
from tests.fixtures.transform import allocate_for, make_components, make_profile, make_transformed_cache

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPES = [(2, 8), (1, 12), (1, 6), (3, 5)]


# --- rotation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [1.0, 1.25])
@pytest.mark.parametrize("first_token", [0, 7, 100_000])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("offset", [0, 3, 4])
def test_undoing_a_rotation_gives_the_keys_back(
    first_token: int, scaling: float, pairing: Pairing, offset: int
) -> None:
    keys = torch.randn(20, 3, 10, generator=torch.Generator().manual_seed(0))
    rotation = Rotation((1.0, 0.3, -0.01), pairing, offset, scaling)
    angles = angles_of(rotation, 20, first_token, CPU)
    rotated = apply_rotation(keys, rotation, angles)
    torch.testing.assert_close(undo_rotation(rotated, rotation, angles), keys, rtol=1e-5, atol=1e-5)
    stop = offset + 6
    assert torch.equal(rotated[..., :offset], keys[..., :offset]) and torch.equal(rotated[..., stop:], keys[..., stop:])
    torch.testing.assert_close(rotated[..., offset:stop].norm(dim=-1), scaling * keys[..., offset:stop].norm(dim=-1))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_rotation_turns_the_pairs_of_a_head_by_position_times_frequency(pairing: Pairing) -> None:
    keys = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    if pairing == "interleaved":
        keys = keys[..., [0, 2, 1, 3]]
    rotation = Rotation((0.5, 0.125), pairing, attention_scaling=2.0)
    rotated = apply_rotation(keys, rotation, angles_of(rotation, 1, 3, CPU))
    expected = []
    for first, second, angle in ((1.0, 3.0, 1.5), (2.0, 4.0, 0.375)):
        expected.append(2 * (first * math.cos(angle) - second * math.sin(angle)))
        expected.append(2 * (second * math.cos(angle) + first * math.sin(angle)))
    found = rotated.ravel()[[0, 2, 1, 3] if pairing == "halves" else [0, 1, 2, 3]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_token_zero_is_not_turned() -> None:
    keys = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1))
    rotation = Rotation((1.0, 0.5))
    assert torch.equal(apply_rotation(keys, rotation, angles_of(rotation, 1, 0, CPU)), keys)


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", [None, RotaryEmbedding("r", "default", (1.0, 0.1, 0.01), 1.1)])
def test_synthesis_undoes_analysis(rotary: RotaryEmbedding | None) -> None:
    profile = make_profile(SHAPES, (1, 1), rotary=rotary)
    cache = make_transformed_cache(profile, 530)
    output = allocate_for(profile, 530, torch.float32)
    for group in profile.groups:
        transform = GroupTransform(profile, group, CPU)
        transform.synthesize(transform.analyze(transform.join(cache, 41)), 1.0, output, 41)
    for found, expected in zip(output.planes, cache.planes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_analysis_finds_the_components_of_a_cache() -> None:
    profile = make_profile(SHAPES, (2,))
    cache, (expected,) = make_transformed_cache(profile, 60), make_components(profile, 60)
    transform = GroupTransform(profile, profile.groups[0], CPU)
    vectors = transform.join(cache, 0)
    torch.testing.assert_close(transform.analyze(vectors), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transform.analyze(vectors, 5), expected[:, :5], rtol=1e-4, atol=1e-4)


def test_missing_components_are_zero_and_a_step_is_a_factor() -> None:
    profile = make_profile(SHAPES, (2,))
    transform = GroupTransform(profile, profile.groups[0], CPU)
    few = torch.randint(-9, 9, (10, 3), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([few, torch.zeros(10, 46, dtype=torch.int64)], dim=1)[:, : profile.groups[0].num_components]
    outputs = [allocate_for(profile, 10, torch.float32) for _ in range(3)]
    transform.synthesize(few, 0.5, outputs[0], 3)
    transform.synthesize(padded, 0.5, outputs[1], 3)
    transform.synthesize(padded * 0.5, 1.0, outputs[2], 3)
    for planes in zip(*(output.planes for output in outputs), strict=True):
        torch.testing.assert_close(planes[0], planes[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(planes[1], planes[2], rtol=1e-5, atol=1e-5)


def test_without_components_the_mean_is_left() -> None:
    profile = make_profile(SHAPES, (2,), rotary=None)
    output = allocate_for(profile, 4, torch.float32)
    GroupTransform(profile, profile.groups[0], CPU).synthesize(torch.zeros(4, 0, dtype=torch.int32), 1.0, output, 0)
    vectors = torch.cat([plane.flatten(1) for plane in output.planes], dim=1)
    assert torch.equal(vectors, profile.groups[0].mean.expand(4, -1))


def test_a_group_writes_its_own_layers_only() -> None:
    profile = make_profile(SHAPES, (1, 1))
    output = allocate_for(profile, 4, torch.float32)
    GroupTransform(profile, profile.groups[1], CPU).synthesize(torch.zeros(4, 1, dtype=torch.int32), 1.0, output, 0)
    assert [bool(plane.isnan().any()) for plane in output.planes] == [True, True, False, False]


def test_strides_do_not_matter() -> None:
    profile = make_profile(SHAPES, (2,))
    cache = make_transformed_cache(profile, 40)
    strided = from_planes([plane.permute(1, 0, 2).contiguous().permute(1, 0, 2) for plane in cache.planes])
    transform = GroupTransform(profile, profile.groups[0], CPU)
    components = transform.analyze(transform.join(cache, 9))
    assert torch.equal(transform.analyze(transform.join(strided, 9)), components)
    outputs = [allocate_for(profile, 40, torch.float16), allocate_for(profile, 40, torch.float16)]
    outputs[1] = from_planes([plane.permute(1, 0, 2).contiguous().permute(1, 0, 2) for plane in outputs[1].planes])
    for output in outputs:
        transform.synthesize(components, 1.0, output, 9)
    assert all(torch.equal(a, b) for a, b in zip(outputs[0].planes, outputs[1].planes, strict=True))


def test_a_profile_without_analysis_cannot_encode() -> None:
    profile = make_profile(SHAPES, (2,))
    cache = make_transformed_cache(profile, 4)
    object.__setattr__(profile.groups[0], "analysis", None)
    transform = GroupTransform(profile, profile.groups[0], CPU)
    with pytest.raises(ValueError, match="without its analysis matrices"):
        transform.analyze(transform.join(cache, 0))


# --- quantization -----------------------------------------------------------------------------------------------------


def test_steps_are_powers_of_two_over_powers_of_three() -> None:
    assert [step_of_level(16, level) for level in (1, 2, 3)] == [2.0, 2.0 / 3, 2.0 / 9]
    assert step_of_level(-8, 1) == 2**-0.5
    assert round(16 * math.log2(3)) == LEVEL_RATIO_LOG


def test_levels_nest_and_refine() -> None:
    components = 30 * torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
    step = 0.7
    levels = quantize_components(components, step, (6, 9, 12, 12))
    assert [level.shape[1] for level in levels] == [6, 9, 12, 12]
    for level, quantized in enumerate(levels):
        error = (quantized * (step / 3**level) - components[:, : quantized.shape[1]]).abs().max()
        assert error <= step / 3**level / 2 * 1.001
    for coarse, fine in itertools.pairwise(levels):
        assert ((fine[:, : coarse.shape[1]] - 3 * coarse).abs() <= 1).all()


def test_ties_go_to_the_even_component() -> None:
    components = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_components(components, 1.0, (6,))[0].tolist() == [[0, 2, 2, 0, -2, -2]]


def test_a_tie_of_the_level_before_stays_in_its_cell() -> None:
    # 0.5 is 0 at step 1, whose cell ends there; at step 1/3 it would be 1.5, so 2.
    coarse, fine = quantize_components(torch.tensor([[0.5, -0.5]]), 1.0, (2, 2))
    assert (coarse.tolist(), fine.tolist()) == ([[0, 0]], [[1, -1]])


def test_huge_components_are_clamped_and_still_refined() -> None:
    components = torch.tensor([[1e30, -1e30, 3.0e7]])
    levels = quantize_components(components, 1.0, (3, 3, 3, 3))
    assert levels[0].tolist() == [[MAX_COMPONENT, -MAX_COMPONENT, MAX_COMPONENT]]
    for coarse, fine in itertools.pairwise(levels):
        assert ((fine - 3 * coarse).abs() <= 1).all()
    (anew,) = quantize_components(components[:, :0], 1.0, (0,))
    assert anew.shape == (1, 0)


class TestRoundedProducts:
    """The inverse transform in bf16, on any processor: torch has the products even where they are slow."""

    @pytest.fixture
    def transforms(self, monkeypatch) -> tuple[GroupTransform, GroupTransform]:
        """One of a profile's groups, exact and rounded."""
        monkeypatch.setattr(transform, "has_bf16_products", lambda device: device.type == "cpu")
        profile = make_profile([(2, 16)] * 4, (2,), rotary=None)
        return tuple(GroupTransform(profile, profile.groups[0], CPU, may_round=flag) for flag in (False, True))

    @staticmethod
    def components(transforms: tuple[GroupTransform, GroupTransform], step: float) -> torch.Tensor:
        """As large as the profile says, in steps."""
        deviations = torch.exp2(transforms[0].group.scale_logs.float() / 16)
        random = torch.randn(64, len(deviations), generator=torch.Generator().manual_seed(0))
        return (random * deviations / step).round().to(torch.int32)

    @pytest.mark.parametrize("step_log", [16, 0])
    def test_they_differ_by_far_less_than_quantizing_does_and_within_the_formats_tolerance(self, transforms, step_log):
        step = 2.0 ** (step_log / 16)
        components = self.components(transforms, step)
        exact, rounded = (transform.reconstruct(components, step, 5) for transform in transforms)
        terms = components.abs().float() * step @ transforms[0].group.synthesis.float().abs()
        assert not all(torch.equal(a, b) for a, b in zip(exact, rounded, strict=True))
        differences = torch.cat([(a - b).flatten(1) for a, b in zip(exact, rounded, strict=True)], dim=1)
        expected = transforms[0].expected_errors(step, components.shape[1])
        assert differences.square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()
        assert (differences.abs() <= terms / 64 + 1e-6).all()

    def test_components_beyond_256_and_steps_too_fine_for_them_are_not_rounded(self, transforms):
        exact, rounded = transforms
        large = self.components(transforms, 1.0)
        large[7, 0] = 257
        fine = self.components(transforms, 1 / 64).clamp(-256, 256)
        for components, step in ((large, 1.0), (fine, 1 / 64)):
            pairs = zip(*(t.reconstruct(components, step, 0) for t in (exact, rounded)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)

    def test_no_components_at_all_give_the_mean(self, transforms):
        exact, rounded = (t.reconstruct(torch.zeros(4, 0, dtype=torch.int32), 1.0, 0) for t in transforms)
        assert all(torch.equal(a, b) for a, b in zip(exact, rounded, strict=True))


@pytest.mark.parametrize("num_misfits", [1, 30])
def test_tokens_that_integers_do_not_hold_are_decoded_in_fp32(num_misfits: int) -> None:
    profile = make_profile([(2, 16)] * 2, (1,), rotary=None)
    exact, rounded = (GroupTransform(profile, profile.groups[0], CPU, may_round=flag) for flag in (False, True))
    components = torch.ones(60, profile.groups[0].num_components, dtype=torch.int32)
    components[5 : 5 + num_misfits, -1] = 3000
    wanted, found = (t.decode_block(components, 1.0, torch.float16, 3) for t in (exact, rounded))
    misfits = slice(5, 5 + num_misfits)
    assert torch.allclose(found[misfits].float(), wanted[misfits].float(), rtol=2e-3, atol=1e-3)
    assert torch.allclose(found.float(), wanted.float(), rtol=0, atol=3000 / 64)
