"""Compare an emulated module with the CPU's kernels in a process of its own: 0 where the bytes agree, 1 where not.

usage: python -m tests.emulation.compare MODULE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from cachegen.errors import CacheGenError
from cachegen.format import Coder
from tests.cuda_checks import Shape, check_corrupt_streams, check_shape, check_word_counts, encode_on_cpu
from tests.cuda_component_checks import ComponentShape, check_component_shape, check_corrupt_escapes
from tests.emulation import kernels_of, reverse_threads

SHAPE = Shape(70, (2, 1), (16, 72), (32, 64), (32, 96))  # a tile, and a tile and a part
COMPONENT_SHAPE = ComponentShape(70, (33, 5), (32, 96))


def main(path: Path) -> int:
    kernels = kernels_of(path)
    for is_reversed in (False, True):
        reverse_threads(path, is_reversed)
        try:
            for coder in Coder:
                check_shape(kernels, SHAPE, torch.float16, coder)
            check_corrupt_streams(kernels, encode_on_cpu(SHAPE, torch.float16, Coder.RANS), 20)
            check_word_counts(kernels)
            check_component_shape(kernels, COMPONENT_SHAPE)
            check_corrupt_escapes(kernels)
        except (AssertionError, CacheGenError, RuntimeError, ValueError) as error:
            print(f"differs: {type(error).__name__} {error}".splitlines()[0])
            return 1
    print("agrees")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
