"""Decode corrupt streams with an emulated module, the payload's end against memory that must not be touched; and place
vectors and split digits, whatever is read or written against such memory.

An access beyond ends the process with SIGSEGV; otherwise it exits with 0.

usage: python -m tests.emulation.guarded MODULE
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch

from cachegen.coder import cuda_components, cuda_transfers
from cachegen.format import Coder
from tests.cuda_checks import Shape, check_corrupt_streams, encode_on_cpu
from tests.cuda_component_checks import ComponentShape, check_corrupt_components, encode_components_on_cpu
from tests.cuda_synthesis_checks import DIGIT_SHAPES, PLACE_SHAPES, check_digits, check_place
from tests.emulation import kernels_of

SHAPES = [Shape(33, (1, 1), (9, 8), (32, 64), (32, 64)), Shape(64, (1, 1), (3, 16), (256, 32), (32, 32))]
COMPONENT_SHAPES = [ComponentShape(33, (9, 5), (64, 32)), ComponentShape(64, (20,), (32,), 14.0)]
_PROT_NONE = 0
_REGION = mmap.mmap(-1, 257 * mmap.PAGESIZE)  # room for a buffer
_ADDRESS = ctypes.addressof(ctypes.c_char.from_buffer(_REGION))
_USABLE_BYTES = 256 * mmap.PAGESIZE


class Guarded(cuda_transfers.HostOperations):
    """Transfers into the memory before the guard: the payload's last byte is the last that may be read."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        whole = torch.frombuffer(_REGION, dtype=torch.uint8, count=_USABLE_BYTES)
        return whole[_USABLE_BYTES - num_bytes :]


def move_before_guard(values: torch.Tensor) -> torch.Tensor:
    """Return a copy whose last element is the last before a guard of its own."""
    extent = values.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
    num_bytes = extent * values.element_size()
    num_pages = -(-num_bytes // mmap.PAGESIZE)
    region = mmap.mmap(-1, (num_pages + 1) * mmap.PAGESIZE)
    end = num_pages * mmap.PAGESIZE
    whole = torch.frombuffer(region, dtype=values.dtype, count=extent, offset=end - num_bytes)
    whole.copy_(torch.empty(0, dtype=values.dtype).set_(values.untyped_storage())[:extent])
    _protect(ctypes.addressof(ctypes.c_char.from_buffer(region)) + end)
    return whole.as_strided(values.shape, values.stride(), values.storage_offset())


def _protect(address: int) -> None:
    guard = ctypes.c_void_p(address)
    if ctypes.CDLL(None, use_errno=True).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")


def main(path: Path) -> int:
    _protect(_ADDRESS + _USABLE_BYTES)
    cuda_components.operations_of = lambda device: Guarded()
    kernels = kernels_of(path)
    for shape in SHAPES:
        for coder in (Coder.RANS, Coder.AC):
            check_corrupt_streams(kernels, encode_on_cpu(shape, torch.float16, coder), 150)
    for shape in COMPONENT_SHAPES:
        check_corrupt_components(kernels, encode_components_on_cpu(shape), 150)
    for digits in DIGIT_SHAPES:
        check_digits(kernels, digits, move_before_guard)
    for placed in PLACE_SHAPES:
        check_place(kernels, placed, torch.bfloat16, move_before_guard)
    print("stayed inside")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
