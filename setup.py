"""Build the native modules; everything else about the package stands in pyproject.toml.

`python setup.py build_ext --inplace` compiles into src/, for work on the C++ sources; it needs setuptools beside the
compiler, and pybind11 for the CUDA module. `pip install .` brings those two itself. Torch is not needed to build.

`cachegen._native` is always built, by as many compilers side by side as there are processors (`--parallel N` or
MAX_JOBS: fewer). `torchac_cuda` is built, by the nvcc below CUDA_HOME, on PATH or in /usr/local/cuda, as `--cuda` or
CACHEGEN_CUDA says:

    auto  for this machine's GPUs, where it has any; the default
    all   for all GPUs that are supported; without nvcc this fails
    off   not at all
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

# Portable and exact: no -march=native, and no flag that lets the compiler contract or reorder floating point,
# because the bytes of a chunk must not depend on the machine that wrote it.
COMPILE_FLAGS = ["-std=c++17", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
LINK_FLAGS = ["-pthread"]
# What calls the kernels, once per chunk, need not be fast; and in kernels of intrinsics there is nothing to vectorize.
OPTIMIZATION = {"bindings": ("-O1",), "vectors": ("-O3", "-fno-tree-vectorize")}
DEFAULT_OPTIMIZATION = ("-O3",)
# Sources share headers, intrinsics above all, that take as long as a kernel: they are compiled as two units, the vector
# paths' and the rest, and the bindings apart from them.
VECTOR_PATHS = ("avx2", "avx512")

# The bindings stay within what every Python from 3.11 on has; one without a lock has another interface.
LIMITED_API = "0x030B0000" if not sysconfig.get_config_var("Py_GIL_DISABLED") else None
LIMITED_API_TAG = "cp311"

CPU_MODULE = "cachegen._native"
CUDA_MODULE = "torchac_cuda"
CUDA_CHOICES = ("auto", "all", "off")
MIN_NVCC = (12, 0)
# A100, H100, B200; PTX of the newest that an nvcc knows serves the GPUs after it.
CUDA_ARCHITECTURES = (80, 90, 100)
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-allow-unsupported-compiler", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class CannotBuild(Exception):
    """Why the CUDA module is not built."""


# --- what is built ----------------------------------------------------------------------------------------------------


def cpu_extension() -> Extension:
    """Describe `cachegen._native`, the coder on the CPU; it is always built."""
    sources = sorted(glob("src/csrc/cpu/*.cpp"))
    if not sources:
        raise SystemExit("setup.py: no src/csrc/cpu/*.cpp here: run it in the root of a whole checkout")
    return Extension(
        CPU_MODULE,
        sources,
        include_dirs=["src/csrc"],
        define_macros=[("Py_LIMITED_API", LIMITED_API)] if LIMITED_API else [],
        depends=["setup.py", *sorted(glob("src/csrc/**/*.h", recursive=True))],
        language="c++",
        py_limited_api=LIMITED_API is not None,
    )


def cuda_extension() -> Extension:
    """Describe `torchac_cuda`: kernels by nvcc, bindings by the C++ compiler, linked by nvcc, which has its runtime."""
    return Extension(
        CUDA_MODULE,
        sorted(glob("src/csrc/cuda/*.cu") + glob("src/csrc/cuda/*.cpp")),
        depends=sorted(glob("src/csrc/*.h") + glob("src/csrc/cuda/*")),
        optional=True,
    )


def num_jobs(asked: int | None, environment: str | None) -> int:
    """Return how many compilers may run side by side: what --parallel or MAX_JOBS says, or one per processor."""
    if asked:
        return asked
    if environment is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not environment.isdecimal() or int(environment) < 1:
        raise SystemExit(f"setup.py: MAX_JOBS must be a number of compilers, at least 1, got {environment!r}")
    return int(environment)


@dataclass(frozen=True)
class Unit:
    """What one run of the compiler compiles.

    Attributes:
        name: of the object file.
        sources: more than one are compiled as one.
    """

    name: str
    sources: tuple[str, ...]

    @property
    def optimization(self) -> tuple[str, ...]:
        return OPTIMIZATION.get(self.name, DEFAULT_OPTIMIZATION)


def units_of(sources: Sequence[str]) -> list[Unit]:
    """Return what is compiled, what takes longest first."""
    joined: dict[str, list[str]] = {}
    for source in sources:
        stem = Path(source).stem
        is_vectors = stem.rpartition("_")[2] in VECTOR_PATHS
        unit = stem if stem in OPTIMIZATION else "vectors" if is_vectors else "portable"
        joined.setdefault(unit, []).append(source)
    units = [Unit(name, tuple(members)) for name, members in joined.items()]
    return sorted(units, key=lambda unit: -sum(os.path.getsize(source) for source in unit.sources))


# --- CUDA -------------------------------------------------------------------------------------------------------------


def find_gpus() -> list[int]:
    """Return the compute capabilities of this machine's GPUs, 90 for 9.0, as its driver tells them."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for device in range(count.value):
        # 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
        problems = [driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)]
        problems.append(driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device))
        if not any(problems):
            found.append(10 * major.value + minor.value)
    return sorted(set(found))


def choose_architectures(choice: str, gpus: Callable[[], Sequence[int]] = find_gpus) -> list[int]:
    """Return the compute capabilities to compile for.

    Raises:
        CannotBuild: there are none, with the reason.
    """
    if choice == "all":
        return list(CUDA_ARCHITECTURES)
    if choice == "off":
        raise CannotBuild("switched off")
    found = gpus()
    if not found:
        raise CannotBuild("no GPU here; CACHEGEN_CUDA=all builds it all the same")
    supported = [gpu for gpu in found if gpu >= CUDA_ARCHITECTURES[0]]
    if not supported:
        old = ", ".join(f"{gpu // 10}.{gpu % 10}" for gpu in found)
        raise CannotBuild(f"the GPU's compute capability is {old}, 8.0 or more is needed")
    return supported


def architecture_flags(architectures: Sequence[int], listed: Sequence[str]) -> list[str]:
    """Return the -gencode flags of architectures, for an nvcc that lists such codes ("sm_90").

    An architecture that nvcc does not know gets PTX of the newest supported one before it that nvcc knows, and so do
    the GPUs after the last one.
    """
    known = [arch for arch in architectures if f"sm_{arch}" in listed]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    candidates = [arch for arch in (*CUDA_ARCHITECTURES, *known) if f"sm_{arch}" in listed]
    before = [arch for arch in candidates if arch <= max(architectures)]
    if not before:
        raise CannotBuild(f"nvcc knows none of the architectures {', '.join(map(str, CUDA_ARCHITECTURES))}")
    return [*flags, f"-gencode=arch=compute_{max(before)},code=compute_{max(before)}"]


def find_nvcc() -> str:
    """Return the path of an nvcc that is new enough.

    Raises:
        CannotBuild: there is none.
    """
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    candidates = [Path(home, "bin", "nvcc")] if home else []
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    nvcc = next((str(path) for path in candidates if os.access(path, os.X_OK) and path.is_file()), None)
    if nvcc is None:
        raise CannotBuild("no nvcc below CUDA_HOME, on PATH or in /usr/local/cuda")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) < MIN_NVCC:
        found = f"{release[1]}.{release[2]}" if release else "unknown"
        raise CannotBuild(f"{nvcc} is of release {found}, {MIN_NVCC[0]}.{MIN_NVCC[1]} or newer is needed")
    return nvcc


# --- the command ------------------------------------------------------------------------------------------------------


class BuildNative(build_ext):
    """Compile the native modules, say which were built, and why one was not."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("cuda=", None, f"build {CUDA_MODULE}: {', '.join(CUDA_CHOICES)}"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cuda: str | None = None

    def finalize_options(self) -> None:
        super().finalize_options()
        self.cuda = self.cuda or os.environ.get("CACHEGEN_CUDA") or "auto"
        if self.cuda not in CUDA_CHOICES:
            raise SystemExit(f"setup.py: --cuda, CACHEGEN_CUDA must be {', '.join(CUDA_CHOICES)}, got {self.cuda!r}")
        self.num_jobs = num_jobs(int(self.parallel) if self.parallel else None, os.environ.get("MAX_JOBS"))
        # The compilers of one module run side by side, not the modules.
        self.parallel = None

    def build_extensions(self) -> None:
        """Compile, after one clear line where there is no compiler to do it."""
        command = getattr(self.compiler, "compiler_cxx", None)
        if command and shutil.which(command[0]) is None:
            raise SystemExit(
                f"setup.py: the C++ compiler {command[0]!r} is missing: install one (Debian: apt-get install g++) "
                "or name yours in CXX"
            )
        super().build_extensions()
        built = [extension.name for extension in self.extensions if Path(self.file_of(extension)).exists()]
        print("setup.py: built native modules:", ", ".join(built))

    def build_extension(self, ext: Extension) -> None:
        """Compile one module. Where the CUDA one cannot be built it leaves no file, so that none is taken for it."""
        if ext.name != CUDA_MODULE:
            self.build_cpu(ext)
            return
        try:
            self.build_cuda(ext)
        except (CannotBuild, OSError) as error:
            problem = str(error)
        except subprocess.CalledProcessError as error:
            problem = f"{error.cmd[0]} failed, its messages stand above"
        else:
            return
        Path(self.file_of(ext)).unlink(missing_ok=True)
        if self.cuda == "all":
            raise SystemExit(f"setup.py: {CUDA_MODULE} cannot be built: {problem}")
        print(f"setup.py: {CUDA_MODULE} is NOT built, --device cuda will not work: {problem}")

    def copy_extensions_to_source(self) -> None:
        """Copy what --inplace has built, and remove older builds of what it has not, or has under another name."""
        super().copy_extensions_to_source()
        build_py = self.get_finalized_command("build_py")
        for extension in self.extensions:
            package, _, name = extension.name.rpartition(".")
            folder = Path(build_py.get_package_dir(package))
            built = Path(self.file_of(extension))
            for older in folder.glob(f"{name}.*.so"):
                if older.name != built.name or not built.exists():
                    older.unlink()

    # --- the CPU's module ---

    def build_cpu(self, ext: Extension) -> None:
        """Compile units side by side and link them."""
        target = Path(self.file_of(ext))
        if not self.force and self.is_newer(target, ext):
            return
        folder = Path(self.build_temp, "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        macros = [f"-D{name}={value}" for name, value in ext.define_macros]
        includes = [f"-I{path}" for path in (*ext.include_dirs, *self.compiler.include_dirs)]
        command = [*self.cxx(), "-fPIC", "-DNDEBUG", *COMPILE_FLAGS, *macros, *includes]
        units = units_of(ext.sources)
        with ThreadPoolExecutor(self.num_jobs) as compilers:
            runs = [compilers.submit(self.compile_unit, unit, command, folder) for unit in units]
        try:
            objects = [run.result() for run in runs]
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"setup.py: {error.cmd[0]} failed, its messages stand above") from None
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=LINK_FLAGS, build_temp=str(folder), target_lang="c++"
        )

    def compile_unit(self, unit: Unit, command: Sequence[str], folder: Path) -> str:
        """Compile, and return the object's path."""
        target, source = folder / f"{unit.name}.o", unit.sources[0]
        if len(unit.sources) > 1:
            source = str(folder / f"{unit.name}.cpp")
            Path(source).write_text("".join(f'#include "{Path(part).resolve()}"\n' for part in unit.sources), "utf-8")
        self.run_command_line([*command, *unit.optimization, "-c", source, "-o", str(target)])
        return str(target)

    # --- the GPU's ---

    def build_cuda(self, ext: Extension) -> None:
        """Compile and link `torchac_cuda`.

        Raises:
            CannotBuild, OSError, CalledProcessError: it is not possible.
        """
        architectures = choose_architectures(self.cuda)
        nvcc = find_nvcc()
        try:
            from pybind11 import get_include
        except ImportError:
            raise CannotBuild("pybind11 is missing: run `pip install 'pybind11>=2.13'`, or `pip install .`") from None
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        flags = architecture_flags(architectures, listed)
        target, folder = Path(self.file_of(ext)), Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A module for other GPUs is no module.
        built_for = folder / "architectures"
        is_same = built_for.exists() and built_for.read_text("utf-8") == " ".join(flags)
        if not self.force and is_same and self.is_newer(target, ext):
            return
        compiler = self.cxx()
        # CXX may be more than a name: "ccache g++", "g++ -m64".
        as_host = ["-ccbin", [word for word in compiler if not word.startswith("-")][-1]]
        nvcc_flags = [*as_host, "-Isrc/csrc", *NVCC_FLAGS, *flags, "--threads", str(self.num_jobs)]
        includes = [f"-I{path}" for path in ("src/csrc", get_include(), *self.compiler.include_dirs)]
        commands, objects = [], []
        for source in ext.sources:
            objects.append(str(folder / (Path(source).stem + ".o")))
            command = [nvcc, *nvcc_flags]
            if not source.endswith(".cu"):
                command = [*compiler, "-fPIC", *COMPILE_FLAGS, "-O1", *includes]
            commands.append([*command, "-c", source, "-o", objects[-1]])
        with ThreadPoolExecutor(self.num_jobs) as compilers:
            list(compilers.map(self.run_command_line, commands))
        link = [nvcc, *as_host, "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
        self.run_command_line([*link, *objects, "-o", str(target)])
        built_for.write_text(" ".join(flags), "utf-8")

    # --- both ---

    def is_newer(self, target: Path, ext: Extension) -> bool:
        """Return whether a module is newer than all that it is built from."""
        newest = max(os.path.getmtime(path) for path in [*ext.sources, *ext.depends, "setup.py"])
        return target.exists() and target.stat().st_mtime > newest

    def cxx(self) -> list[str]:
        """Return the words that begin a command of the C++ compiler."""
        return list(self.compiler.compiler_cxx)

    def run_command_line(self, command: Sequence[str]) -> None:
        """Run a compiler, after showing how."""
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)

    def file_of(self, ext: Extension) -> str:
        """Return where a module is built, before --inplace copies it."""
        return str(Path(self.build_lib, self.get_ext_filename(ext.name)))


def wheel_options() -> dict[str, dict[str, str]]:
    """Return what tags a wheel for every Python from 3.11 on, unless it may hold the CUDA module, which is for one."""
    if LIMITED_API is None:
        return {}
    try:
        choose_architectures(os.environ.get("CACHEGEN_CUDA") or "auto")
    except CannotBuild:
        return {"bdist_wheel": {"py_limited_api": LIMITED_API_TAG}}
    return {}


class ShipSources(sdist):
    """Put into the sdist all that `pip install` and the scripts need; the model, the prompts and tests stay in git."""

    def make_distribution(self) -> None:
        for pattern in ("*.py", "NOTICE", "CHANGELOG.md", "env.yml", "tools/constraints.txt"):
            self.filelist.include(pattern)
        for folder in ("src/csrc", "config", "docs", "models/tiny-mistral/profile"):
            self.filelist.graft(folder)
        for pattern in ("*.pyi", "py.typed"):
            self.filelist.recursive_include("src/cachegen", pattern)
        self.filelist.prune("tests")
        for pattern in ("*.so", "*.o", "*.py[co]"):
            self.filelist.global_exclude(pattern)
        super().make_distribution()


if __name__ == "__main__":
    setup(
        ext_modules=[cpu_extension(), cuda_extension()],
        cmdclass={"build_ext": BuildNative, "sdist": ShipSources},
        options=wheel_options(),
    )
