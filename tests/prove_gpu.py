#!/usr/bin/env python3
"""Prove that a GPU's kernels give the CPU's bytes and values, without pytest: `python -m tests.prove_gpu`.

For machines that have only torch; tests/test_coder_cuda.py runs the same checks, and more, by pytest. --short is what a
sanitizer's tools run. --emulated runs the kernels' own lines on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from cachegen.coder.cuda import CudaKernels, load_kernels
from cachegen.errors import BackendUnavailableError
from cachegen.format import Coder
from tests.cuda_checks import (
    SHAPES,
    OnDevice,
    Shape,
    check_corrupt_streams,
    check_shape,
    check_word_counts,
    encode_on_cpu,
)
from tests.cuda_component_checks import (
    COMPONENT_SHAPES,
    ComponentShape,
    check_component_shape,
    check_corrupt_components,
    check_corrupt_escapes,
    check_transform_document,
    encode_components_on_cpu,
)
from tests.cuda_synthesis_checks import list_synthesis_checks
from tests.fixtures.caches import DTYPES
from tests.golden import make_golden
from tests.golden.make_golden import FOLDER, GOLDENS, Golden

CODERS = (Coder.RANS, Coder.PACKED)
MISTRAL = Shape(300, (8, 8), (128, 128), (32, 16), (128, 128))
LARGE = ComponentShape(600, (2048, 1024, 2048), (64, 96, 128))  # more blocks than one group of layers has

Check = Callable[[CudaKernels], object]
"""Fails by whatever it raises."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few checks of each kernel")
    parser.add_argument("--emulated", action="store_true", help="the kernels' lines on the CPU")
    args = parser.parse_args(argv)
    try:
        kernels = _load(args.emulated)
    except BackendUnavailableError as error:
        print(f"prove_gpu: {error}", file=sys.stderr)
        return 1
    num_failed, num_checks, start = 0, 0, time.perf_counter()
    for name, check in list_checks(is_short=args.short):
        num_checks += 1
        try:
            check(kernels)
        except Exception:  # whatever it is, the next check says something, too
            num_failed += 1
            print(f"failed: {name}\n{traceback.format_exc()}", file=sys.stderr)
    print(f"{num_checks - num_failed} of {num_checks} checks passed in {time.perf_counter() - start:.0f} s")
    return 1 if num_failed else 0


def _load(is_emulated: bool) -> CudaKernels:
    if is_emulated:
        from tests import emulation

        return CudaKernels(emulation.load(emulation.build()), torch.device("cpu"))  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        raise BackendUnavailableError("torch sees no CUDA GPU")
    return load_kernels(torch.device("cuda", torch.cuda.current_device()))


def list_checks(*, is_short: bool) -> Iterator[tuple[str, Check]]:
    """Yield names and checks, which take the kernels of a GPU."""
    for shape in SHAPES[:3] if is_short else [*SHAPES, MISTRAL]:
        for dtype in DTYPES[:1] if is_short else DTYPES:
            for coder in CODERS:
                yield (
                    f"{shape} {dtype} {coder.name}",
                    lambda gpu, s=shape, d=dtype, c=coder: check_shape(OnDevice(gpu), s, d, c),
                )
    for shape in COMPONENT_SHAPES[:2] if is_short else [*COMPONENT_SHAPES, LARGE]:
        yield f"components {shape}", lambda gpu, shape=shape: check_component_shape(OnDevice(gpu), shape)
    yield from list_synthesis_checks(is_short=is_short)
    yield "transform documents", check_transform_document
    for golden in GOLDENS:
        if golden.coder in CODERS:
            yield f"golden {golden.name}", lambda gpu, golden=golden: _check_golden(OnDevice(gpu), golden)
    if not is_short:
        yield "corrupt streams", _check_corrupt_streams
        yield "corrupt components", _check_corrupt_components


def _check_corrupt_streams(gpu: CudaKernels) -> None:
    check_corrupt_streams(OnDevice(gpu), encode_on_cpu(SHAPES[2], torch.float16, Coder.RANS), 300)
    check_word_counts(OnDevice(gpu))


def _check_corrupt_components(gpu: CudaKernels) -> None:
    check_corrupt_components(OnDevice(gpu), encode_components_on_cpu(ComponentShape(70, (33, 5), (32, 96))), 300)
    check_corrupt_escapes(OnDevice(gpu))


def _check_golden(kernels: OnDevice, golden: Golden) -> None:
    files = {path.name: path.read_bytes() for path in sorted((FOLDER / golden.name).iterdir())}
    if make_golden.encode(golden, kernels) != files:
        raise AssertionError("other bytes are encoded")
    expected = json.loads((FOLDER / "decoded_sha256.json").read_text("utf-8"))
    if make_golden.hash_cache(make_golden.decode(golden, files, kernels)) != expected[golden.name]:
        raise AssertionError("other values are decoded")


if __name__ == "__main__":
    sys.exit(main())
