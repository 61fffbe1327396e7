"""The benchmark's part for a GPU, on the emulated kernels: what it checks, and what it makes of times."""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

from cachegen.coder import cpu
from tests import emulation

CPU = torch.device("cpu")


class CountingTimer:
    """A second passes with every mark."""

    def __init__(self) -> None:
        self._num_marks = 0

    def mark(self) -> int:
        self._num_marks += 1
        return self._num_marks

    def seconds_between(self, first: int, last: int) -> float:
        return last - first


class Without:
    """A module one of whose functions does nothing, but for zeroing the buffer that it should fill, if it has one."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self._module, self._name = module, name

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._module, name)
        return zero_payload if name == "compact" else lambda *_: None


def zero_payload(launch: Any, slots: int, streams: int, payload: int, num_bytes: int) -> None:
    ctypes.memset(payload, 0, num_bytes)  # memory that is used again may hold the right bytes


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return emulation.load(emulation.build())


@pytest.fixture
def benchmark(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(emulation.ROOT / "benchmarks"))
    return importlib.import_module("cuda_throughput")


@pytest.fixture
def document(benchmark) -> Any:
    documents = importlib.import_module("documents")
    return documents.Document("small", documents.synthetic_cache(2, 40, 2, 8), 32, repeats=3)


def test_kernels_are_timed_by_their_launches(benchmark, module, document) -> None:
    times = benchmark.measure_kernels(document, module, CPU, CountingTimer(), 2, document.repeats)
    assert times.decode_seconds == 1 and times.encode_seconds == 2  # encoding, and compaction
    assert times.num_bytes == 2 * document.num_values == 2 * 2 * 120 * 16
    assert times.file_bytes > document.ideal_bits * 3 / 8


@pytest.mark.parametrize(("name", "found"), [("decode", "other values"), ("compact", "other bytes")])
def test_wrong_bytes_stop_the_benchmark(benchmark, module, document, name: str, found: str) -> None:
    with pytest.raises(SystemExit, match=f"small: the GPU gives {found} than the CPU"):
        benchmark.measure_kernels(document, Without(module, name), CPU, CountingTimer(), 1)


def test_documents_are_timed_with_kernels_of_a_gpu(benchmark, module, document) -> None:
    kernels = emulation.kernels_of(emulation.build())
    waits: list[bool] = []
    rows = benchmark.run_pipeline(
        document,
        1,
        1,
        kernels=kernels,
        output=document.output,
        chunk_tokens=32,
        path="cuda",
        wait=lambda: waits.append(True),
    )
    assert [row[:3] for row in rows] == [("documents", "cuda", 1)] and waits
    payload, streams = document.encode("portable", 1)
    decoded = [plane.clone() for plane in document.output.planes]
    cpu.decode(payload, streams, document.scales, document.planes, document.tables, document.output)
    assert all(map(torch.equal, decoded, document.output.planes))


def test_goals_of_a_gpu_are_in_terabytes_per_second(benchmark) -> None:
    goals = importlib.import_module("goals")
    row = {"case": goals.MISTRAL, "coder": "rans", "path": "cuda", "threads": 0}
    rows = [row | {"decode_msym_s": 350_000.0, "encode_msym_s": 100_000.0, "bits_over_table_ideal": 0.0}]
    found = {what: (value, floor, goal) for what, value, floor, goal, _ in goals.list_goals(rows) if "GPU" in what}
    assert found == {
        "GPU decode, TB/s of fp16 written (H100)": (0.7, 0.3, 0.7),
        "GPU encode, TB/s of fp16 read (H100)": (0.2, 0.2, 0.5),
    }
