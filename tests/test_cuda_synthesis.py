"""The CUDA kernels of the inverse transform, emulated on the CPU: torch's digits and values, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import emulation
from tests.cuda_synthesis_checks import (
    DIGIT_SHAPES,
    PLACE_SHAPES,
    DigitShape,
    PlaceShape,
    check_components_beyond,
    check_digits,
    check_documents,
    check_place,
    turns,
)
from tests.fixtures.caches import DTYPES

# --- equal to torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", DIGIT_SHAPES, ids=str)
def test_digits_and_their_flag_are_torchs(kernels, shape: DigitShape) -> None:
    check_digits(kernels, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PLACE_SHAPES, ids=str)
def test_vectors_are_placed_as_by_torch(kernels, shape: PlaceShape, dtype: torch.dtype) -> None:
    check_place(kernels, shape, dtype)


def test_transform_documents_decode_as_by_torch(emulated) -> None:
    check_documents(emulated)


def test_chunks_with_components_beyond_bf16_are_multiplied_once_more(emulated) -> None:
    check_components_beyond(emulated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairing", ["halves", "interleaved"])
def test_placing_writes_whole_sectors(emulated, module_path: Path, pairing, dtype: torch.dtype) -> None:
    shape = PlaceShape(1, 2, 17, (2, 128), (2, 128), (turns(64, pairing=pairing), None), "head_major")
    emulation.take_store_counts(module_path)
    check_place(emulated, shape, dtype)
    counts = emulation.take_store_counts(module_path)
    assert counts.num_whole_sectors == counts.num_sectors == 4 * 17 * 256 * dtype.itemsize // 32


def test_splitting_writes_whole_sectors(emulated, module_path: Path) -> None:
    components, digits = torch.ones(2, 17, 64, dtype=torch.int32), torch.empty(2, 17, 80, dtype=torch.bfloat16)
    emulation.take_store_counts(module_path)
    emulated.synthesis.split_digits(components, 16, digits, torch.zeros(1, dtype=torch.int32))
    counts = emulation.take_store_counts(module_path)
    assert counts.num_whole_sectors == counts.num_sectors == 2 * digits.numel() // 32


# --- refusals ---------------------------------------------------------------------------------------------------------


def digit_arguments() -> dict[str, Any]:
    return {
        "components": torch.zeros(2, 5, 16, dtype=torch.int32),
        "num_large": 8,
        "digits": torch.zeros(2, 5, 24, dtype=torch.bfloat16),
        "beyond": torch.zeros(1, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("components", torch.Tensor.long, "`components` must be torch.int32 of three dims, got torch.int64 [2, 5, 16]"),
        ("components", lambda t: t[0], "`components` must be torch.int32 of three dims, got torch.int32 [5, 16]"),
        ("components", lambda t: t.mT.contiguous().mT, "`components` must have the components of a token contiguous"),
        ("components", lambda t: t.to("meta"), "tensors must be on a cpu device, got meta"),
        ("num_large", lambda n: 17, "`num_large` must be 0 to 16, and sizes must fit 31 bits, got 17"),
        ("num_large", lambda n: -1, "`num_large` must be 0 to 16, and sizes must fit 31 bits, got -1"),
        ("digits", lambda t: t[..., :-1], "`digits` must be torch.bfloat16 [2, 5, 24] on cpu"),
        ("digits", torch.Tensor.half, "`digits` must be torch.bfloat16 [2, 5, 24] on cpu, got torch.float16"),
        ("digits", lambda t: t.mT.contiguous().mT, "`digits` must be contiguous"),
        ("beyond", lambda t: t[:0], "`beyond` must be torch.int32 [1] on cpu, got torch.int32 [0]"),
    ],
)
def test_digits_that_do_not_fit_are_refused(emulated, name: str, change: Callable, message: str) -> None:
    arguments = digit_arguments()
    emulated.synthesis.split_digits(**arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        emulated.synthesis.split_digits(**arguments | {name: change(arguments[name])})


def place_arguments() -> dict[str, Any]:
    return {
        "product": torch.zeros(2, 5, 48),
        "means": torch.zeros(2, 48),
        "step": 1.0,
        "planes": [torch.zeros(5, 2 - index % 2, 16) for index in range(4)],
        "rotations": (turns(4), None),
        "angles": ((torch.zeros(5, 1, 4), torch.zeros(5, 1, 4)), None),
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("product", torch.Tensor.double, "`product` must be torch.float32 of three dims, got torch.float64 [2, 5, 48]"),
        ("product", lambda t: t.mT.contiguous().mT, "`product` must be contiguous"),
        ("product", lambda t: t[:, :4].contiguous(), "plane 0 must be torch.float32 [4, 2, 16] on cpu"),
        ("means", lambda t: t[:1], "`means` must be torch.float32 [2, 48] on cpu, got torch.float32 [1, 48] on cpu"),
        ("planes", lambda p: p[:3], "`planes` must be keys and values of layers of 2 groups, got 3"),
        ("planes", lambda p: [], "`planes` must be keys and values of layers of 2 groups, got 0"),
        ("planes", lambda p: [*p, *p], "`planes` must have 48 channels in each group"),
        ("planes", lambda p: [*p[:3], p[3].half()], "plane 3 must be torch.float32 [5, 1, 16] on cpu"),
        ("planes", lambda p: [*p[:2], p[2][:, :1], p[3]], "plane 2 must be torch.float32 [5, 2, 16] on cpu"),
        ("planes", lambda p: [*p[:2], p[2].mT.contiguous().mT, p[3]], "plane 2 must have contiguous head dims"),
        ("planes", lambda p: [plane.double() for plane in p], "`planes` must be of torch.float16, torch.bfloat16"),
        ("rotations", lambda r: (turns(9), None), "`rotations` must fit heads of 16 dims, and have angles"),
        ("rotations", lambda r: (turns(4), turns(4)), "`rotations` must fit heads of 16 dims, and have angles"),
        ("rotations", lambda r: (None, None), "`rotations` must fit heads of 16 dims, and have angles"),
        ("rotations", lambda r: r[:1], "`rotations` and `angles` must be of keys and values"),
        ("rotations", lambda r: (turns(3), None), "`angles` must be torch.float32 [5, 1, 3] on cpu"),
        ("angles", lambda a: ((a[0][0], a[0][1][:4]), None), "`angles` must be torch.float32 [5, 1, 4] on cpu"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(emulated, name: str, change: Callable, message: str) -> None:
    arguments = place_arguments()
    emulated.synthesis.place_vectors(**arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        emulated.synthesis.place_vectors(**arguments | {name: change(arguments[name])})


def test_no_tokens_and_no_components_are_nothing(emulated) -> None:
    beyond = torch.zeros(1, dtype=torch.int32)
    for shape in ((2, 0, 8), (2, 5, 0), (0, 5, 8)):
        digits = torch.empty(shape, dtype=torch.bfloat16)
        emulated.synthesis.split_digits(torch.empty(shape, dtype=torch.int32), 0, digits, beyond)
    planes = [torch.zeros(0, 2, 16)] * 2
    emulated.synthesis.place_vectors(torch.zeros(1, 0, 64), torch.zeros(1, 64), 1.0, planes, (None,) * 2, (None,) * 2)
    assert not emulated.synthesis.start_reading(beyond)()
