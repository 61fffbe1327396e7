"""The CUDA kernels, compiled by g++ and run thread by thread on the CPU: torchac_cuda's functions without a GPU.

`simt_emulation.h` is the GPU; the kernels, their launches and their bindings are the sources of src/csrc/cuda, as they
are. Builds are kept in build/emulation, one per content of the sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch

from cachegen.coder.cuda import CudaKernels

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "src" / "csrc"
EMULATION = Path(__file__).resolve().parent
_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
_NUM_COMPILERS = 2  # the kernels and the bindings


def build(folder: Path = ROOT / "build" / "emulation", native: Path = NATIVE) -> Path:
    """Compile the sources below `native` into a module in `folder`, unless it is there.

    Returns:
        The module's path; `load` imports it.
    """
    kernel_sources = [*native.glob("*.h"), *native.glob("cuda/*"), EMULATION / "simt_emulation.h"]
    key = hash_files([*kernel_sources, Path(__file__)])
    module = folder / key / f"torchac_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    module.parent.mkdir(parents=True, exist_ok=True)
    # The bindings are the slower half, and no mutation touches them.
    headers = [native / "cuda" / "bindings.cpp", native / "cuda" / "launch.h", *native.glob("*.h")]
    bindings = ROOT / "build" / "emulation" / f"bindings-{hash_files([*headers, Path(__file__)])}.o"
    kernels = module.parent / "kernels.o"
    includes = [f"-I{path}" for path in (native, EMULATION, sysconfig.get_path("include"), pybind11.get_include())]
    commands = [["-DCACHEGEN_EMULATION", "-O1", "-x", "c++", str(native / "cuda" / "kernels.cu"), "-o", str(kernels)]]
    bindings_temporary = bindings.with_suffix(f".{os.getpid()}.o")
    if not bindings.exists():
        bindings.parent.mkdir(parents=True, exist_ok=True)
        commands.append(["-O0", str(native / "cuda" / "bindings.cpp"), "-o", str(bindings_temporary)])
    compilers = [subprocess.Popen(["g++", *_FLAGS, *includes, "-c", *command]) for command in commands]
    if any([compiler.wait() for compiler in compilers]):
        raise RuntimeError("the emulated kernels do not compile")
    if len(compilers) == _NUM_COMPILERS:
        bindings_temporary.replace(bindings)
    unfinished = module.with_suffix(f".{os.getpid()}")
    subprocess.run(["g++", "-shared", "-o", str(unfinished), str(kernels), str(bindings)], check=True)
    unfinished.replace(module)
    return module


def load(path: Path) -> ModuleType:
    """Import a module that `build` made; one per process."""
    loader = importlib.machinery.ExtensionFileLoader("torchac_cuda", str(path))
    spec = importlib.util.spec_from_file_location("torchac_cuda", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def reverse_threads(path: Path, is_reversed: bool) -> None:
    """Run the threads of each block from the last to the first; a kernel without a race does not notice."""
    ctypes.CDLL(str(path)).cachegen_emulation_reverse(int(is_reversed))


@dataclass(frozen=True)
class StoreCounts:
    """What decoding stored: a store of a warp touches some sectors of 32 bytes, and fills some of them whole."""

    num_stores: int
    num_sectors: int
    num_whole_sectors: int


def take_store_counts(path: Path) -> StoreCounts:
    """Return what was counted since the last call."""
    counts = (ctypes.c_uint64 * 3)()
    ctypes.CDLL(str(path)).cachegen_emulation_stores(counts)
    return StoreCounts(*counts)


def kernels_of(path: Path) -> CudaKernels:
    """Return the coder's CUDA half over an emulated module; its device's memory is the CPU's."""
    return CudaKernels(load(path), torch.device("cpu"))


def choose_mutations(names: Iterable[str], in_every_run: Collection[str]) -> list[Any]:
    """Return parameters for a test of mutations: those that `make test` leaves out are marked `mutation`."""
    chosen = list(names)
    assert set(in_every_run) <= set(chosen)
    return [name if name in in_every_run else pytest.param(name, marks=pytest.mark.mutation) for name in chosen]


def hash_files(paths: list[Path], options: str = "") -> str:
    """Return what tells builds apart: a hash of the files' names and content, and of the compiler's options."""
    digest = hashlib.sha256(options.encode())
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
