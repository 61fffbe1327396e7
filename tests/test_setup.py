"""What setup.py builds: how many compilers run, what they compile together, and when the CUDA module is built."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cachegen_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cachegen_setup"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- compilers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "environment", "expected"), [(3, "7", 3), (None, "7", 7), (None, "1", 1)])
def test_parallel_comes_before_max_jobs(setup: ModuleType, asked, environment, expected: int) -> None:
    assert setup.num_jobs(asked, environment) == expected


def test_a_compiler_per_processor_is_the_default(setup: ModuleType) -> None:
    assert setup.num_jobs(None, None) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("text", ["0", "-1", "two", ""])
def test_max_jobs_must_be_a_positive_number(setup: ModuleType, text: str) -> None:
    with pytest.raises(SystemExit, match="MAX_JOBS must be"):
        setup.num_jobs(None, text)


def test_every_source_is_compiled_once(setup: ModuleType) -> None:
    sources = sorted(str(path) for path in (ROOT / "src" / "csrc" / "cpu").glob("*.cpp"))
    units = setup.units_of(sources)
    assert sorted(source for unit in units for source in unit.sources) == sources
    assert len({unit.name for unit in units}) == len(units)


def test_only_the_bindings_are_compiled_for_little_speed(setup: ModuleType) -> None:
    units = setup.units_of([str(path) for path in (ROOT / "src" / "csrc" / "cpu").glob("*.cpp")])
    assert [unit.name for unit in units if "-O3" not in unit.optimization] == ["bindings"]


# --- CUDA -------------------------------------------------------------------------------------------------------------


def refuse_to_look() -> list[int]:
    raise AssertionError("nobody asked for this machine's GPUs")


def test_all_is_every_supported_architecture_whatever_is_here(setup: ModuleType) -> None:
    assert setup.choose_architectures("all", refuse_to_look) == list(setup.CUDA_ARCHITECTURES)


def test_auto_is_this_machines_architectures(setup: ModuleType) -> None:
    assert setup.choose_architectures("auto", lambda: [75, 90]) == [90]


@pytest.mark.parametrize(
    ("choice", "gpus", "reason"),
    [
        ("off", [90], "switched off"),
        ("auto", [], "no GPU here; CACHEGEN_CUDA=all builds it"),
        ("auto", [61, 75], r"compute capability is 6\.1, 7\.5, 8\.0 or more is needed"),
    ],
)
def test_the_reason_is_given_where_it_is_not_built(setup: ModuleType, choice: str, gpus, reason: str) -> None:
    with pytest.raises(setup.CannotBuild, match=reason):
        setup.choose_architectures(choice, lambda: gpus)


@pytest.mark.parametrize(
    ("architectures", "listed", "codes", "ptx"),
    [
        ([90], ["sm_80", "sm_90", "sm_100"], ["sm_90"], 90),
        ([80, 90, 100], ["sm_80", "sm_90", "sm_100"], ["sm_80", "sm_90", "sm_100"], 100),
        ([80, 90, 100], ["sm_80", "sm_90"], ["sm_80", "sm_90"], 90),
        ([120], ["sm_80", "sm_90", "sm_100"], [], 100),
        ([86, 120], ["sm_80", "sm_86", "sm_90"], ["sm_86"], 90),
    ],
)
def test_an_unknown_gpu_gets_ptx_of_the_newest_before_it(setup: ModuleType, architectures, listed, codes, ptx) -> None:
    flags = setup.architecture_flags(architectures, listed)
    assert [flag.split("code=")[-1] for flag in flags] == [*codes, f"compute_{ptx}"]
    assert flags[-1] == f"-gencode=arch=compute_{ptx},code=compute_{ptx}"


def test_an_nvcc_that_knows_no_supported_architecture_cannot_build(setup: ModuleType) -> None:
    with pytest.raises(setup.CannotBuild, match="knows none of the architectures"):
        setup.architecture_flags([90], ["sm_60"])


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["build_ext", "--cuda=some"], ["build_ext"]], ids=["option", "environment"])
def test_an_unknown_choice_is_refused_before_anything_is_built(arguments: list[str]) -> None:
    result = run_setup(*arguments, CACHEGEN_CUDA="some")
    assert result.returncode == 1 and "must be auto, all, off, got 'some'" in result.stderr
    assert "g++" not in result.stdout


# --- the Makefile -----------------------------------------------------------------------------------------------------


def test_the_demo_installs_nothing_of_the_tests() -> None:
    rules = (ROOT / "Makefile").read_text("utf-8")
    assert "\ndemo: $(RUNNABLE) ##" in rules
    recipe = rules.split("$(RUNNABLE): ", 1)[1].split("\n\n", 1)[0]
    assert "-e ." in recipe and "dev" not in recipe
