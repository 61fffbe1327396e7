"""The inverse transform in integers: every path gives the values that integers say, and rounding stays in bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cachegen.coder import cpu
from cachegen.methods.rotary import Turns
from cachegen.methods.transform import integers
from cachegen.methods.transform.integer_rows import IntegerRows
from cachegen.methods.transform.integers import IntegerMatrix, make_integer_matrix, measure_synthesis, synthesize
from cachegen.rotation import Rotation

CPU = torch.device("cpu")
HALVES = Rotation((1.0, 0.3, 0.02), "halves", 1, 1.25)
INTERLEAVED = Rotation((1.0, 0.3, 0.02), "interleaved", 1)
WHOLE = Rotation(tuple(10000.0 ** (-i / 32) for i in range(32)))
WIDE = Rotation(tuple(10000.0 ** (-i / 50) for i in range(50)), "interleaved", 4)

pytestmark = pytest.mark.skipif(cpu.supported_paths() == ("portable",), reason="portable code has no such kernels")


@pytest.fixture(params=[path for path in cpu.supported_paths() if path != "portable"])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


class Group:
    """A random matrix of planes, and components about as large as its deviations say."""

    def __init__(self, planes: list[tuple[int, int]], num_components: int, num_tokens: int, largest: float = 8.0):
        generator = torch.Generator().manual_seed(num_components + num_tokens)
        self.planes = planes
        self.channels = [heads * dim for heads, dim in planes]
        width = sum(self.channels)
        self.synthesis = torch.randn(num_components + 5, width, generator=generator) / width**0.5
        self.mean = torch.randn(width, generator=generator)
        self.deviations = largest * torch.arange(1, num_components + 6).float() ** -0.5
        drawn = torch.randn(num_tokens, num_components, generator=generator) * self.deviations[:num_components]
        self.components = drawn.round().to(torch.int32)

    def describe(self, num_components: int) -> tuple[Any, ...]:
        rows, deviations = self.synthesis[:num_components], self.deviations[:num_components]
        variances = self.deviations.square() @ self.synthesis.square()
        return IntegerRows.of(rows), self.mean, deviations, variances, self.channels

    def matrix(self, step: float = 1.0) -> IntegerMatrix:
        made = make_integer_matrix(*self.describe(self.components.shape[1]), step)
        assert made is not None
        return made

    def allocate(self, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
        # As a cache has them: head after head.
        tokens = len(self.components)
        return [torch.full((heads, tokens, dim), 7.0, dtype=dtype).transpose(0, 1) for heads, dim in self.planes]

    def run(self, path: str, rotations, dtype=torch.float16, matrix=None, num_threads=1):
        planes = self.allocate(dtype)
        turns = Turns(len(self.components), 11, CPU)
        angles = [turns.angles(rotation) for rotation in rotations]
        matrix = matrix or self.matrix()
        misfits = synthesize(matrix, self.components, planes, rotations, angles, num_threads, path)
        return planes, misfits


def rows_of(matrix: IntegerMatrix) -> np.ndarray:
    """The integers of all components, int64 `[num_components, blocks * 64]`, in units of a 256th."""
    count, num_dense, num_fine, dense, fine, sparse, factors, _ = matrix.parts
    num_blocks = len(factors) // 64
    rows = np.zeros((max(count, num_dense), num_blocks * 64), np.int64)
    for part, number, scale in ((dense, num_dense, 256), (fine, num_fine, 1)):
        quads = part.astype(np.int64).reshape(num_blocks, number // 4, 64, 4) - 128
        rows[:number] += scale * quads.transpose(1, 3, 0, 2).reshape(number, num_blocks * 64)
    num_sections = sparse.size // (num_blocks * 512 * 64)
    sections = sparse.reshape(num_blocks, num_sections, 512, 64).astype(np.int64)
    assert not sections[:, :, 511].any()
    ordered = sections.reshape(num_blocks, num_sections, 512, 16, 4)[..., [0, 2, 1, 3]].transpose(1, 2, 0, 4, 3)
    flat = ordered[:, :511].reshape(num_sections * 511, num_blocks * 64)
    rows[num_dense:count] = 512 * (flat[: max(count - num_dense, 0)] - 64)
    return rows[:count]


def turned(values: np.ndarray, rotation: Rotation | None, angles) -> np.ndarray:
    """Rotate fp32 `[num_tokens, heads, dim]`, each operation rounded once."""
    if rotation is None:
        return values
    cosines, sines = (part.numpy() for part in angles)
    first, second = values[..., rotation.firsts], values[..., rotation.seconds]
    made = values.copy()
    made[..., rotation.firsts] = first * cosines - second * sines
    made[..., rotation.seconds] = second * cosines + first * sines
    return made


def expect(group: Group, matrix: IntegerMatrix, rotations, dtype: torch.dtype) -> list[torch.Tensor]:
    *_, factors, means = matrix.parts
    sums = (group.components.numpy().astype(np.int64) @ rows_of(matrix)).astype(np.float32)
    values = sums * factors + means
    turns, planes, first = Turns(len(sums), 11, CPU), [], 0
    for (heads, dim), rotation in zip(group.planes, rotations, strict=True):
        part = values[:, first : first + heads * dim].reshape(-1, heads, dim)
        planes.append(torch.from_numpy(turned(part, rotation, turns.angles(rotation))).to(dtype))
        first += -(-heads * dim // 64) * 64
    return planes


CASES = {
    "heads of 64, two tiles": ([(2, 64), (3, 64)], [WHOLE, None], 200, 130),
    "heads of 128 and more than a section": ([(1, 128), (1, 128)], [WIDE, HALVES], 1100, 9),
    "heads that fill no block": ([(3, 40), (5, 24)], [HALVES, INTERLEAVED], 77, 33),
    "heads of a few dims": ([(3, 8), (8, 8)], [INTERLEAVED, None], 30, 7),
    "heads of 192": ([(2, 192), (1, 17)], [WIDE, None], 61, 13),
    "one component": ([(2, 64)], [WHOLE], 1, 5),
    "no component": ([(2, 64)], [WHOLE], 0, 5),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_integers(name: str, dtype: torch.dtype, path: str) -> None:
    planes, rotations, num_components, num_tokens = CASES[name]
    group = Group(planes, num_components, num_tokens)
    matrix = group.matrix()
    found, misfits = group.run(path, rotations, dtype, matrix)
    assert not misfits.any()
    for plane, expected in zip(found, expect(group, matrix, rotations, dtype), strict=True):
        assert torch.equal(plane, expected)


def test_digits_signs_and_repeated_units_count(path: str) -> None:
    group = Group([(2, 64)], 90, 140, 5.6)
    matrix = group.matrix()
    group.components[3, :8] = torch.tensor([63, 64, -64, -65, 1000, -8128, 8128, 127])
    group.components[4, matrix.num_dense + 7] = 40
    # Around as many as 16 bits hold, around twice as many, and as many as the kernels take.
    for token, units in enumerate((253, 254, 255, -254, -255, 256, 508, 509, -509, 1023, -1023), 8):
        group.components[token, matrix.num_dense :] = 0
        group.components[token, matrix.num_dense] = units
    found, misfits = group.run(path, [None], matrix=matrix)
    assert not misfits.any()
    for plane, expected in zip(found, expect(group, matrix, [None], torch.float16), strict=True):
        assert torch.equal(plane, expected)


@pytest.mark.parametrize("place", ["dense", "sparse", "units"])
@pytest.mark.parametrize("sign", [1, -1])
def test_tokens_beyond_the_kernels_are_named_and_others_stay(place: str, sign: int, path: str) -> None:
    group = Group([(2, 64)], 90, 20, 5.6)
    matrix = group.matrix()
    expected = expect(group, matrix, [None], torch.float16)[0]
    changed = group.components[7]
    if place == "dense":
        changed[0] = sign * 8129
    elif place == "sparse":
        changed[-1] = sign * 1024
    else:
        changed[:8] = sign * 8000
    (plane,), misfits = group.run(path, [None], matrix=matrix)
    assert np.flatnonzero(misfits).tolist() == [7]
    others = torch.arange(20) != 7
    assert torch.equal(plane[others], expected[others])


def test_threads_change_nothing(path: str) -> None:
    group = Group([(8, 64), (8, 64)], 300, 300)
    one, two = (group.run(path, [WHOLE, None], num_threads=number)[0] for number in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("step", [0.5, 1.0, 4.0])
def test_rounding_adds_little_to_the_error_of_quantizing_and_stays_within_the_formats_tolerance(step, path) -> None:
    group = Group([(4, 64), (4, 64)], 250, 100)
    group.components = (group.components / step).round().to(torch.int32)
    matrix = group.matrix(step)
    assert matrix.share <= integers.MAX_INTEGER_SHARE
    found, _ = group.run(path, [None, None], matrix=matrix)
    found = torch.cat([plane.flatten(1) for plane in found], 1).double()
    rows = group.synthesis[:250].double()
    exact = group.mean.double() + step * group.components.double() @ rows
    largest = rows.abs().amax(0)
    allowed = step * group.components.abs().sum(1)[:, None] * largest / 64
    assert ((found - exact).abs() <= allowed + exact.abs() / 1024).all()
    quantizing = (rows.square() * group.deviations[:250, None].square().clamp(max=step**2 / 12)).sum(0)
    rounding = (found - exact.half().double()).square().mean(0)
    assert (rounding / quantizing).mean() < 4 * integers.MAX_INTEGER_SHARE


def test_a_matrix_that_bytes_lose_too_much_of_is_not_made() -> None:
    group = Group([(2, 64)], 400, 4)
    # A channel that one component alone reaches far into: its unit is too coarse for all others.
    group.synthesis[300] *= 2000
    group.deviations[:] = 30.0
    assert make_integer_matrix(*group.describe(400), 1.0) is None


def test_components_of_few_units_have_coarser_rows_than_large_ones() -> None:
    matrix = Group([(2, 64)], 200, 4, largest=300.0).matrix()
    assert matrix.num_fine > 0
    assert (np.abs(rows_of(matrix)[matrix.num_dense :]) % 512 == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_errors_are_measured_as_of_what_is_written(name: str, dtype: torch.dtype, path: str) -> None:
    planes, rotations, num_components, num_tokens = CASES[name]
    group = Group(planes, num_components, num_tokens)
    matrix = group.matrix()
    decoded, _ = group.run(path, rotations, dtype, matrix)
    noise = torch.Generator().manual_seed(3)
    originals = [plane + torch.randn(plane.shape, generator=noise).to(dtype) for plane in decoded]
    angles = [Turns(num_tokens, 11, CPU).angles(rotation) for rotation in rotations]
    found = measure_synthesis(matrix, group.components, originals, rotations, angles, 2, path)
    assert found is not None
    values = torch.cat([plane.float().flatten(1) for plane in decoded], 1)
    errors = (torch.cat([plane.float().flatten(1) for plane in originals], 1) - values).abs()
    assert np.array_equal(found.errors.largest, errors.amax(0))
    assert np.allclose(found.errors.sums, errors.sum(0), rtol=1e-5)
    assert (found.least, found.greatest) == (min(values.min().item(), 0), max(values.max().item(), 0))


def test_no_errors_are_measured_where_a_token_is_beyond_the_kernels(path: str) -> None:
    group = Group([(2, 64)], 90, 20, 5.6)
    group.components[7, 0] = 8129
    assert measure_synthesis(group.matrix(), group.components, group.allocate(), [None], [None], 1, path) is None
