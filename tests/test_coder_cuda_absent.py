"""Without a GPU, or without torchac_cuda: one clear line, and never a silent fallback."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import run_decoding_disk
import run_encoding
from cachegen import device
from cachegen.coder import cuda
from cachegen.coder.cpu_kernels import CPU
from cachegen.errors import BackendUnavailableError, ConfigError
from cachegen.format import PlaneLayout
from tests import emulation

GPU = torch.device("cuda", 0)


@pytest.fixture
def with_gpu(monkeypatch) -> None:
    """Let torch seem to have a GPU."""
    monkeypatch.setattr(device, "resolve_device", lambda name: torch.device("cpu") if name == "cpu" else GPU)


@pytest.fixture
def without_module(monkeypatch) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cuda.importlib, "import_module", refuse)


@pytest.mark.parametrize("script", [run_encoding, run_decoding_disk], ids=lambda script: script.__name__)
def test_cuda_without_a_gpu_is_exit_code_6_and_one_line(script, refuse, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: " in refuse(script.main, ["--device", "cuda"], 6)


@pytest.mark.parametrize("script", [run_encoding, run_decoding_disk], ids=lambda script: script.__name__)
def test_cuda_without_the_module_names_the_build_command(script, refuse, with_gpu, without_module, monkeypatch) -> None:
    monkeypatch.setattr(script, "resolve_device", device.resolve_device, raising=False)
    error = refuse(script.main, ["--device", "cuda"], 6)
    assert "python setup.py build_ext --inplace" in error and "nvcc 12" in error and "--device cpu" in error


def test_auto_says_why_it_is_the_cpu(with_gpu, without_module) -> None:
    chosen = device.choose_kernels("auto")
    assert chosen.kernels is CPU and chosen.device == torch.device("cpu")
    assert str(chosen).startswith("cpu (the CUDA module torchac_cuda cannot be imported")


def test_auto_without_a_gpu_is_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = device.choose_kernels("auto")
    assert chosen.kernels is CPU and str(chosen) == "cpu (torch sees no GPU)"
    assert str(device.choose_kernels("cpu")) == "cpu"


def test_auto_is_cuda_where_all_is_there(with_gpu, monkeypatch) -> None:
    module = SimpleNamespace(find_problem=lambda index: None)
    monkeypatch.setattr(cuda, "load_module", lambda: module)
    for name in ("auto", "cuda"):
        chosen = device.choose_kernels(name)
        assert isinstance(chosen.kernels, cuda.CudaKernels) and chosen.kernels.device == GPU
        assert str(chosen) == "cuda:0"


def test_a_module_that_cannot_run_says_why(with_gpu, monkeypatch) -> None:
    module = SimpleNamespace(find_problem=lambda index: "no kernel image is available for execution on the device")
    monkeypatch.setattr(cuda, "load_module", lambda: module)
    with pytest.raises(BackendUnavailableError, match="torchac_cuda cannot use cuda:0: no kernel image"):
        device.choose_kernels("cuda")
    assert device.choose_kernels("auto").kernels is CPU


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="`device`"):
        device.choose_kernels("tpu")


def test_the_module_imports_without_a_driver_wherever_it_is_built() -> None:
    if importlib.util.find_spec("torchac_cuda") is None:
        with pytest.raises(BackendUnavailableError, match=r"python setup\.py build_ext --inplace"):
            cuda.load_module()
        return
    # In a process without torch, whose libraries would otherwise be there already.
    program = "import torchac_cuda; print(torchac_cuda.PLANE_FIELDS, repr(torchac_cuda.find_problem(0)))"
    search_path = os.pathsep.join(["src", *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=emulation.ROOT,
        env={"PYTHONPATH": search_path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    fields, problem = result.stdout.strip().split(" ", 1)
    assert int(fields) == len(cuda._record(torch.zeros(1, 1, 1), torch.zeros(1), PlaneLayout(1, 1, 32, 0), 0, 0, 0))
    assert problem == "None" or not torch.cuda.is_available()
