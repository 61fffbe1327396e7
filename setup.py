"""Build the native modules; everything else about the package stands in pyproject.toml.

`python setup.py build_ext --inplace` compiles into src/, for work on the C++ sources; it needs setuptools and pybind11
beside the compiler. `pip install .` brings those two itself. Torch is not needed to build.

`cachegen._native` is always built, `torchac_cuda` where an nvcc is found: below CUDA_HOME, on PATH or in
/usr/local/cuda. No GPU is needed to build it.
"""

import os
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

try:
    from pybind11 import get_include
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:
    raise SystemExit(
        "setup.py: pybind11 is missing: run `pip install 'pybind11>=2.13' 'setuptools>=77'`, or `pip install .`"
    ) from None

# Portable and exact: no -march=native, and no flag that lets the compiler contract or reorder floating point,
# because the bytes of a chunk must not depend on the machine that wrote it.
COMPILE_FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
LINK_FLAGS = ["-pthread"]

CUDA_MODULE = "torchac_cuda"
MIN_NVCC = (12, 0)
# A100, H100, B200; PTX of the newest that an nvcc knows serves the GPUs after it.
CUDA_ARCHITECTURES = (80, 90, 100)
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-allow-unsupported-compiler", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def cpu_extension() -> Pybind11Extension:
    """Describe `cachegen._native`, the coder on the CPU; it is always built."""
    sources = sorted(glob("src/csrc/cpu/*.cpp"))
    if not sources:
        raise SystemExit("setup.py: no src/csrc/cpu/*.cpp here: run it in the root of a whole checkout")
    return Pybind11Extension(
        "cachegen._native",
        sources,
        include_dirs=["src/csrc"],
        depends=sorted(glob("src/csrc/**/*.h", recursive=True)),
        extra_compile_args=[*COMPILE_FLAGS],
        extra_link_args=[*LINK_FLAGS],
        cxx_std=17,
    )


def cuda_extension() -> Extension:
    """Describe `torchac_cuda`: kernels by nvcc, bindings by the C++ compiler, linked by nvcc, which has its runtime."""
    return Extension(
        CUDA_MODULE,
        sorted(glob("src/csrc/cuda/*.cu") + glob("src/csrc/cuda/*.cpp")),
        depends=sorted(glob("src/csrc/*.h") + glob("src/csrc/cuda/*")),
        optional=True,
    )


def find_nvcc() -> str | None:
    """Return the path of an nvcc."""
    folders = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"),) if home]
    on_path = shutil.which("nvcc")
    candidates = [folder / "nvcc" for folder in folders] + ([Path(on_path)] if on_path else [])
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(path) for path in candidates if os.access(path, os.X_OK) and path.is_file()), None)


def architecture_flags(nvcc: str) -> list[str]:
    """Return the -gencode flags for what this nvcc knows of CUDA_ARCHITECTURES."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in listed.split()]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


class BuildNative(build_ext):
    """Compile the native modules, say which were built, and why one was not."""

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
        """Compile one module. The CUDA one may fail: it leaves no file, so that nothing older is taken for it."""
        if ext.name != CUDA_MODULE:
            super().build_extension(ext)
            return
        problem = self.build_cuda(ext)
        if problem is not None:
            Path(self.file_of(ext)).unlink(missing_ok=True)
            print(f"setup.py: {CUDA_MODULE} is NOT built, --device cuda will not work: {problem}")

    def copy_extensions_to_source(self) -> None:
        """Copy what --inplace has built, and remove an older copy of what it has not."""
        super().copy_extensions_to_source()
        folder = Path(self.get_finalized_command("build_py").get_package_dir(""))
        for extension in self.extensions:
            if not Path(self.file_of(extension)).exists():
                (folder / self.get_ext_filename(extension.name)).unlink(missing_ok=True)

    def build_cuda(self, ext: Extension) -> str | None:
        """Compile and link `torchac_cuda`; returns why that was not possible."""
        nvcc = find_nvcc()
        if nvcc is None:
            return "no nvcc below CUDA_HOME, on PATH or in /usr/local/cuda"
        target, folder = Path(self.file_of(ext)), Path(self.build_temp, "cuda")
        newest = max(os.path.getmtime(path) for path in [*ext.sources, *ext.depends, "setup.py"])
        if not self.force and target.exists() and target.stat().st_mtime > newest:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            release = re.search(r"release (\d+)\.(\d+)", version)
            if release is None or (int(release[1]), int(release[2])) < MIN_NVCC:
                found = f"{release[1]}.{release[2]}" if release else "unknown"
                return f"{nvcc} is of release {found}, {MIN_NVCC[0]}.{MIN_NVCC[1]} or newer is needed"
            # CXX may be more than a name: "ccache g++", "g++ -m64".
            compiler = self.compiler.compiler_cxx
            as_host = ["-ccbin", [word for word in compiler if not word.startswith("-")][-1]]
            nvcc_flags = [*as_host, "-Isrc/csrc", *NVCC_FLAGS, *architecture_flags(nvcc), "--threads", "0"]
            includes = [f"-I{path}" for path in ("src/csrc", get_include(), *self.compiler.include_dirs)]
            objects = []
            for source in ext.sources:
                objects.append(str(folder / (Path(source).stem + ".o")))
                if source.endswith(".cu"):
                    command = [nvcc, *nvcc_flags]
                else:
                    command = [*compiler, "-std=c++17", "-fPIC", "-g0", *COMPILE_FLAGS, *includes]
                self.run_command_line([*command, "-c", source, "-o", objects[-1]])
            link = [nvcc, *as_host, "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
            self.run_command_line([*link, *objects, "-o", str(target)])
        except OSError as error:
            return str(error)
        except subprocess.CalledProcessError as error:
            return f"{error.cmd[0]} failed, its messages stand above"
        return None

    def run_command_line(self, command: list[str]) -> None:
        """Run a compiler, after showing how."""
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)

    def file_of(self, ext: Extension) -> str:
        """Return where a module is built, before --inplace copies it."""
        return str(Path(self.build_lib, self.get_ext_filename(ext.name)))


setup(ext_modules=[cpu_extension(), cuda_extension()], cmdclass={"build_ext": BuildNative})
