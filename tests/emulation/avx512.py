"""The CPU module with its AVX-512 kernels compiled against plain loops, so that any x86-64 processor runs them.

`avx512_emulation.h` has the intrinsics; the kernels are the sources of src/csrc/cpu, as they are, and so is the rest of
the module. The kernels are compiled with AddressSanitizer and UndefinedBehaviorSanitizer. Objects are kept in
build/emulation, one per content of their sources.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from tests.emulation import EMULATION, NATIVE, ROOT, hash_files

_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-DCACHEGEN_EMULATION"]
_KERNEL_FLAGS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
_FOLDER = ROOT / "build" / "emulation" / "avx512"


def build(native: Path = NATIVE, kernel_optimization: str = "-O1") -> Path:
    """Compile the CPU module of the sources below `native`, unless it is there.

    Args:
        kernel_optimization: The compiler's option for the AVX-512 kernels; -O0 compiles fastest and runs slowest.

    Returns:
        The module's path.
    """
    sources = sorted(native.glob("cpu/*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        objects = list(compilers.map(lambda source: _object_of(source, native, kernel_optimization), sources))
    module = _FOLDER / hash_files(objects) / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    module.parent.mkdir(parents=True, exist_ok=True)
    unfinished = module.with_suffix(f".{os.getpid()}")
    shared = ["g++", "-shared", "-pthread", "-fsanitize=address,undefined"]
    subprocess.run([*shared, "-o", str(unfinished), *map(str, objects)], check=True)
    unfinished.replace(module)
    return module


def _object_of(source: Path, native: Path, kernel_optimization: str) -> Path:
    """Return the compiled object of a source, compiling what no earlier build has left."""
    headers = [*native.glob("*.h"), *native.glob("cpu/*.h")]
    flags = [*_FLAGS, "-O1"]
    if source.stem.endswith("avx512"):
        headers += EMULATION.glob("avx512_*.h")
        flags = [*_FLAGS, *_KERNEL_FLAGS, kernel_optimization]
        if native == NATIVE:  # what a mutation leaves may be unused
            flags += ["-Wall", "-Wextra", "-Werror"]
    else:  # so that a change of an AVX-512 header compiles little
        headers = [header for header in headers if "avx512" not in header.name]
    target = _FOLDER / f"{source.stem}-{hash_files([source, *headers], ' '.join(flags))}.o"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (native, EMULATION, sysconfig.get_path("include"), pybind11.get_include())]
    unfinished = target.with_suffix(f".{os.getpid()}.o")
    subprocess.run(["g++", *flags, *includes, "-c", str(source), "-o", str(unfinished)], check=True)
    unfinished.replace(target)
    return target


def run_tests(module: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest, in a process of its own, on the module in place of `cachegen._native`."""
    # The sanitizer's runtime must be there before Python.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's and torch's are not ours
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }
    command = [sys.executable, str(EMULATION / "run_tests.py"), str(module), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
