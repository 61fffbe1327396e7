"""Build the native modules; everything else about the package stands in pyproject.toml.

`python setup.py build_ext --inplace` compiles into src/cachegen/, for work on the C++ sources; it needs setuptools and
pybind11 beside the compiler. `pip install .` brings those two itself. Torch is not needed to build.
"""

import shutil
from glob import glob

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:
    raise SystemExit(
        "setup.py: pybind11 is missing: run `pip install 'pybind11>=2.13' 'setuptools>=77'`, or `pip install .`"
    ) from None

# Portable and exact: no -march=native, and no flag that lets the compiler contract or reorder floating point,
# because the bytes of a chunk must not depend on the machine that wrote it.
COMPILE_FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
LINK_FLAGS = ["-pthread"]


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
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=LINK_FLAGS,
        cxx_std=17,
    )


def native_extensions() -> list[Pybind11Extension]:
    """List the native modules that this machine can build."""
    return [cpu_extension()]


class BuildNative(build_ext):
    """Compile the native modules and say which were built."""

    def build_extensions(self) -> None:
        """Compile, after one clear line where there is no compiler to do it."""
        command = getattr(self.compiler, "compiler_cxx", None)
        if command and shutil.which(command[0]) is None:
            raise SystemExit(
                f"setup.py: the C++ compiler {command[0]!r} is missing: install one (Debian: apt-get install g++) "
                "or name yours in CXX"
            )
        super().build_extensions()
        print("setup.py: built native modules:", ", ".join(extension.name for extension in self.extensions))


setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildNative})
