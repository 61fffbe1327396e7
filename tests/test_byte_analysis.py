"""The forward transform in bytes: every path finds what integers say, and leaves to others what is beyond it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cachegen.coder import cpu
from cachegen.kv_cache import KVCache
from cachegen.methods.rotary import Turns
from cachegen.methods.transform import byte_analysis, transform
from cachegen.methods.transform.byte_analysis import ByteRows, gather_bytes, make_byte_analysis, multiply_bytes
from cachegen.methods.transform.transform import GroupTransform, join_planes, quantize_components
from cachegen.rotation import Rotation
from tests.fixtures.transform import make_profile, make_transformed_cache

CPU = torch.device("cpu")
HALVES = Rotation((1.0, 0.3, 0.02), "halves", 1, 1.25)
INTERLEAVED = Rotation((1.0, 0.3, 0.02), "interleaved", 1)
WHOLE = Rotation(tuple(10000.0 ** (-i / 32) for i in range(32)))
WIDE = Rotation(tuple(10000.0 ** (-i / 64) for i in range(64)), attention_scaling=1.5)

pytestmark = pytest.mark.skipif(cpu.supported_paths() == ("portable",), reason="portable code has no such kernels")


@pytest.fixture(params=[path for path in cpu.supported_paths() if path != "portable"])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


SHAPES = {
    "whole heads of 64": ([(2, 64), (3, 64)], [WHOLE, None], 130),
    "whole heads of 128": ([(2, 128)], [WIDE], 65),
    "heads that are no whole vectors": ([(3, 12), (2, 7), (1, 96)], [HALVES, INTERLEAVED, None], 70),
    "one token": ([(1, 64)], [WHOLE], 1),
}


def make_planes(shapes: list[tuple[int, int]], num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    # As a cache has them: head after head.
    generator = torch.Generator().manual_seed(num_tokens)
    drawn = [torch.randn(heads, num_tokens, dim, generator=generator) for heads, dim in shapes]
    return [plane.to(dtype).transpose(0, 1) for plane in drawn]


class Group:
    """Random planes and a matrix for them.

    Args:
        largest: of the first component's entries and of a channel's, over the others': large ones have a second digit,
            and copies.
    """

    def __init__(
        self, name: str, dtype: torch.dtype = torch.float16, num_components: int = 77, largest: float = 1.0
    ) -> None:
        shapes, self.rotations, num_tokens = SHAPES[name]
        self.planes = make_planes(shapes, num_tokens, dtype)
        width = sum(heads * dim for heads, dim in shapes)
        generator = torch.Generator().manual_seed(1)
        self.analysis = torch.randn(width, num_components, generator=generator) / width**0.5
        self.analysis[:, 0] *= largest
        self.analysis[0] *= max(largest / 3, 1.0)
        self.mean = torch.linspace(-1, 1, width)
        self.matrix = make_byte_analysis(self.analysis, torch.full((width,), 1.3), [6.0, 2.0])

    def gather(self, path: str, num_threads: int = 1) -> ByteRows:
        assert self.matrix is not None
        turns = Turns(len(self.planes[0]), 5, CPU)
        angles = [turns.undoing_angles(rotation) for rotation in self.rotations]
        return gather_bytes(self.matrix, self.planes, self.rotations, angles, self.mean, num_threads, path)

    def differences(self) -> torch.Tensor:
        return join_planes(self.planes, self.rotations, 5, CPU) - self.mean

    def values(self, rows: ByteRows) -> tuple[np.ndarray, np.ndarray]:
        """The integers of rows, int64 `[num_tokens, places]`, excesses added: of bytes and copies, and of low bytes."""
        integers = rows.rows.astype(np.int64) - 64
        assert self.matrix is not None
        num_low = -(-len(self.mean) // 4) * 4 if self.matrix.num_fine else 0
        for token, place, units in rows.excess:
            assert place < integers.shape[1] - num_low
            integers[token, place] += units
        return integers[:, : integers.shape[1] - num_low], integers[:, integers.shape[1] - num_low :]

    def entries(self, part: int) -> np.ndarray:
        """The integers of a part of the matrix, int64 `[places, components]`."""
        assert self.matrix is not None
        num_blocks = (len(self.matrix.parts[2]), self.matrix.num_fine)[part] // 64
        content = self.matrix.parts[part].view(np.int8).astype(np.int64)
        if not num_blocks:
            return content.reshape(0, 0)
        return content.reshape(num_blocks, -1, 64, 4).transpose(1, 3, 0, 2).reshape(-1, num_blocks * 64)

    def multiply(self, rows: ByteRows) -> np.ndarray:
        """The components that rows come to, fp32, in steps of the first level."""
        assert self.matrix is not None
        high, low = self.values(rows)
        sums = (high @ self.entries(0)).astype(np.float32)
        if self.matrix.num_fine:
            low_sums = (np.concatenate([high, low], 1) @ self.entries(1)).astype(np.float32)
            sums[:, : self.matrix.num_fine] += low_sums * np.float32(1 / 128)
        return (sums * self.matrix.parts[2])[:, : self.analysis.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_rows_and_excess_are_the_values_in_units_of_their_channels(name: str, dtype, path: str) -> None:
    group = Group(name, dtype)
    group.planes[0][0, 0, 3], group.planes[-1][-1, -1, -1] = 40.0, -55.0
    found, expected = group.gather(path, 2), group.differences()
    width = expected.shape[1]
    for token, channel, units in found.excess:
        assert found.rows[token, channel] == (127 if units > 0 else 0)
    assert len(found.excess) >= 2 and (found.rows[:, width:] == 64).all()
    integers, _ = group.values(found)
    assert np.abs(integers[:, :width] - (expected.numpy() * group.matrix.inverses)).max() <= 0.501
    assert np.allclose(found.sizes.largest, expected.abs().amax(0), atol=1e-5)
    assert np.allclose(found.sizes.sums, expected.abs().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("largest", [1.0, 20.0, 80.0])
@pytest.mark.parametrize("name", SHAPES)
def test_all_paths_gather_the_same(name: str, largest: float, path: str) -> None:
    group = Group(name, largest=largest)
    group.planes[0][0, 0, 3] = 40.0
    first, found = group.gather("avx2"), group.gather(path, 3)
    assert (first.rows == found.rows).all() and (first.excess == found.excess).all()
    assert np.array_equal(first.sizes.largest, found.sizes.largest) and np.array_equal(
        first.sizes.sums, found.sizes.sums
    )


@pytest.mark.parametrize("name", SHAPES)
def test_large_entries_have_copies_and_a_second_digit(name: str, path: str) -> None:
    group = Group(name, num_components=200, largest=80.0)
    assert group.matrix is not None and group.matrix.num_fine >= 64 and 0 in group.matrix.copies
    group.planes[0][0, 0, 0] = 40.0
    found = group.gather(path)
    high, low = group.values(found)
    width, copies = len(group.mean), group.matrix.copies
    start = -(-width // 4) * 4
    for place, channel in enumerate(copies, start):
        assert (high[:, place] == (0 if channel < 0 else high[:, channel])).all()
    exact = group.differences().numpy() * group.matrix.inverses
    assert np.abs(high[:, :width] + low[:, :width] / 128 - exact).max() <= 0.01


@pytest.mark.parametrize("largest", [1.0, 20.0, 80.0])
@pytest.mark.parametrize("num_coded", [[200, 200], [16, 33], [0, 5], [64, 65], [1, 1], [70, 130]])
def test_components_are_those_of_the_integers(num_coded: list[int], largest: float, path: str) -> None:
    group = Group("heads that are no whole vectors", num_components=200, largest=largest)
    group.planes[0][2, 1, 3] = 30.0
    values, matrix = group.gather(path), group.matrix
    levels, misfits = multiply_bytes(matrix, values, num_coded, 3, 2, path)
    assert len(values.excess) and not misfits.any()
    scaled = group.multiply(values)
    expected = quantize_components(torch.from_numpy(scaled), 1.0, num_coded)
    for level, components in zip(levels, expected, strict=True):
        assert torch.equal(level, components)


@pytest.mark.parametrize("largest", [1.0, 20.0, 80.0])
def test_components_are_near_those_of_floats(largest: float, path: str) -> None:
    group = Group("whole heads of 128", largest=largest)
    levels, _ = multiply_bytes(group.matrix, group.gather(path), [77], 3, 1, path)
    exact = (group.differences() @ group.analysis) / 6.0
    assert (levels[0] - exact).abs().max() < 0.6


def test_tokens_beyond_the_bound_are_named(path: str) -> None:
    group = Group("whole heads of 64")
    group.planes[1][7] = 9.0
    group.planes[1][9, 0, 0] = 60000.0
    values = group.gather(path)
    integers = values.rows.astype(np.int64) - 64
    squares = (integers * integers).sum(1)
    matrix = byte_analysis.ByteAnalysis(**(vars(group.matrix) | {"max_square": int(squares[7]) - 1}))
    _, misfits = multiply_bytes(matrix, values, [5], 3, 2, path)
    assert misfits.tolist() == (squares >= squares[7]).tolist() and misfits[7]
    endless = ByteRows(values.rows, np.array([[3, 0, 1 << 23]], np.int32), values.sizes)
    matrix = byte_analysis.ByteAnalysis(**(vars(group.matrix) | {"max_square": 1 << 40}))
    assert multiply_bytes(matrix, endless, [5], 3, 1, path)[1].nonzero()[0].tolist() == [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_shows_in_the_sums(value: float, path: str) -> None:
    group = Group("whole heads of 64")
    group.planes[0][3, 1, 5] = value
    assert not np.isfinite(group.gather(path).sizes.sums).all()


def test_no_matrix_where_rounding_would_be_noticed() -> None:
    analysis, deviations = torch.eye(64), torch.ones(64)
    assert make_byte_analysis(analysis, deviations, [6.0]) is not None
    assert make_byte_analysis(analysis, deviations, [6.0, 1e-4]) is None
    assert make_byte_analysis(analysis[:, :0], deviations, [6.0]) is None
    assert make_byte_analysis(analysis, torch.zeros(64), [6.0]) is None


def test_a_matrix_that_is_zero_finds_zeros(path: str) -> None:
    group = Group("whole heads of 64")
    group.matrix = make_byte_analysis(torch.zeros_like(group.analysis), torch.ones(320), [1.0])
    levels, misfits = multiply_bytes(group.matrix, group.gather(path), [77], 3, 1, path)
    assert not levels[0].any() and not misfits.any()


class TestGroupTransform:
    def make(self, num_tokens: int = 90) -> tuple[GroupTransform, KVCache]:
        profile = make_profile([(2, 16)] * 2, (1,))
        cache = make_transformed_cache(profile, num_tokens, torch.float16)
        return GroupTransform(profile, profile.groups[0], CPU, may_round=True), cache

    def test_components_are_hardly_others_than_those_of_floats(self) -> None:
        group, cache = self.make()
        count = group.group.num_components
        found = group.quantize_in_integers(group.planes(cache), 0, [1.0], [count])
        assert found is not None
        exact = group.analyze(group.join(cache, 0))
        assert (found[0] - exact).abs().max() < 0.6

    def test_a_token_that_does_not_fit_is_found_by_floats(self, monkeypatch: pytest.MonkeyPatch) -> None:
        group, cache = self.make()
        count = group.group.num_components
        monkeypatch.setattr(
            transform,
            "multiply_bytes",
            lambda *rest: ([torch.full((90, count), 77, dtype=torch.int32)], np.arange(90) == 5),
        )
        found = group.quantize_in_integers(group.planes(cache), 0, [1.0], [count])
        expected = quantize_components(group.analyze(group.join(cache, 0)), 1.0, [count])
        assert found is not None and torch.equal(found[0][5], expected[0][5]) and (found[0][4] == 77).all()

    @pytest.mark.parametrize("outlier", [3e4, float("nan")])
    def test_outliers_and_what_is_no_number_are_left_to_floats(self, outlier: float) -> None:
        group, cache = self.make()
        cache.keys[0][17, 1, 3] = outlier
        assert group.quantize_in_integers(group.planes(cache), 0, [1.0], [group.group.num_components]) is None
