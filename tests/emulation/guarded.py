"""Decode corrupt streams with an emulated module, the payload's end against memory that must not be touched.

A read beyond the payload ends the process with SIGSEGV; otherwise it exits with 0.

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


def main(path: Path) -> int:
    guard = ctypes.c_void_p(_ADDRESS + _USABLE_BYTES)
    if ctypes.CDLL(None, use_errno=True).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    cuda_components.operations_of = lambda device: Guarded()
    kernels = kernels_of(path)
    for shape in SHAPES:
        for coder in (Coder.RANS, Coder.AC):
            check_corrupt_streams(kernels, encode_on_cpu(shape, torch.float16, coder), 150)
    for shape in COMPONENT_SHAPES:
        check_corrupt_components(kernels, encode_components_on_cpu(shape), 150)
    print("stayed inside")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
