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
from tests.cuda_synthesis_checks import DigitShape, PlaceShape, check_digits, check_place, turns
from tests.emulation import kernels_of, reverse_threads

SHAPE = Shape(70, (2, 1), (16, 72), (32, 64), (32, 96))  # a tile, and a tile and a part
COMPONENT_SHAPE = ComponentShape(70, (33, 5), (32, 96))
DIGIT_SHAPES = [DigitShape(2, 17, 48, 8), DigitShape(2, 3, 48, 4), DigitShape(1, 3, 32, 16, shifts=(0, 1))]
PLACE_SHAPES = [
    PlaceShape(2, 2, 17, (2, 32), (2, 32), (turns(8, offset=4, attention_scaling=1.25), None), "head_major"),
    PlaceShape(1, 1, 5, (2, 16), (3, 20), (turns(4, pairing="interleaved", offset=4), turns(3, offset=1)), "odd"),
    PlaceShape(1, 1, 4, (2, 16), (2, 16), (turns(7), turns(8)), "shifted"),
    PlaceShape(1, 1, 5, (8, 128), (1, 128), (turns(64), None)),
]


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
            for shape in DIGIT_SHAPES:
                check_digits(kernels, shape)
            for shape in PLACE_SHAPES:
                check_place(kernels, shape, torch.float16)
        except (AssertionError, CacheGenError, RuntimeError, ValueError) as error:
            print(f"differs: {type(error).__name__} {error}".splitlines()[0])
            return 1
    print("agrees")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
