"""Run pytest on another build of the CPU module, in place of `cachegen._native`.

usage: python tests/emulation/run_tests.py MODULE [PYTEST ARGUMENT...]

A script of its own, outside the package: what that imports has loaded the usual module already.
"""

import importlib.util
import sys

import pytest

import cachegen

NAME = "cachegen._native"


def main(path: str, *arguments: str) -> int:
    assert NAME not in sys.modules
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = cachegen._native = native  # pyright: ignore[reportAttributeAccessIssue]
    spec.loader.exec_module(native)
    assert native.best_path() == native.CpuPath.AVX512
    return pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
