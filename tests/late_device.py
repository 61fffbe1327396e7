"""A GPU for tests of transfers: two streams that do what they are asked as late, or as early, as events allow.

It is the `operations` of `cachegen.coder.cuda_transfers.Transfers`, and stands before an emulated torchac_cuda whose
decoding it delays. Work that lacks an event to wait for then runs before what it needs, or after that is gone.

usage: python -m tests.late_device MODULE TRANSFERS: decode with the transfers in that file; 0 where the values agree on
every schedule, 1 where they do not.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from cachegen.coder import cpu, cuda_transfers
from cachegen.coder.cuda import CudaKernels
from cachegen.errors import BitstreamError, CacheGenError
from cachegen.format import Coder
from cachegen.kv_cache import KVCache
from tests import emulation
from tests.cuda_checks import Encoded, Shape, encode_on_cpu
from tests.fixtures.caches import allocate_like, are_equal

CPU = torch.device("cpu")
NUM_CHUNKS = 5

COPY, COMPUTE = "copy", "compute"
SCHEDULES = ("late copies", "late kernels", "all late")


@dataclass(frozen=True)
class Event:
    """The end of the first `position` tasks of a stream."""

    stream: str
    position: int


@dataclass
class _Stream:
    tasks: list[Callable[[], object] | Event] = field(default_factory=list)
    num_done: int = 0


class LateDevice:
    """Stands for `DeviceOperations`.

    Attributes:
        log: "upload" and "synchronize compute" as they were asked for.
    """

    def __init__(self, schedule: str) -> None:
        assert schedule in SCHEDULES
        self._schedule = schedule
        self._streams = {COPY: _Stream(), COMPUTE: _Stream()}
        self.log: list[str] = []

    def allocate_pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    allocate = allocate_pinned

    def start_upload(self, source: torch.Tensor, target: torch.Tensor, after: Event) -> Event:
        self.log.append("upload")
        self._enqueue(COPY, after)
        self._enqueue(COPY, lambda: target.copy_(source))
        return self._end_of(COPY)

    def start_download(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._enqueue(COMPUTE, lambda: target.copy_(source))

    def record(self) -> Event:
        return self._end_of(COMPUTE)

    def wait(self, event: Event) -> None:
        self._enqueue(COMPUTE, event)

    def synchronize(self, event: Event) -> None:
        self.log.append(f"synchronize {event.stream}")
        self._finish(event)

    def run_kernel(self, kernel: Callable[[], object]) -> None:
        self._enqueue(COMPUTE, kernel)

    def _end_of(self, stream: str) -> Event:
        return Event(stream, len(self._streams[stream].tasks))

    def _enqueue(self, stream: str, task: Callable[[], object] | Event) -> None:
        self._streams[stream].tasks.append(task)
        if self._schedule == "late copies" and stream == COMPUTE:
            self._finish(self._end_of(COMPUTE))
        if self._schedule == "late kernels" and stream == COPY:
            self._run_what_can(COPY)

    def _run_what_can(self, name: str) -> None:
        """Run a stream's tasks up to an event that has not come."""
        stream = self._streams[name]
        while stream.num_done < len(stream.tasks):
            task = stream.tasks[stream.num_done]
            if isinstance(task, Event):
                if self._streams[task.stream].num_done < task.position:
                    return
            else:
                task()
            stream.num_done += 1

    def _finish(self, event: Event) -> None:
        """Run a stream up to an event, and what it waits for, but nothing else."""
        stream = self._streams[event.stream]
        while stream.num_done < event.position:
            task = stream.tasks[stream.num_done]
            if isinstance(task, Event):
                self._finish(task)
            else:
                task()
            stream.num_done += 1


class LateModule:
    """An emulated torchac_cuda whose decoding kernels wait for their turn on a device."""

    def __init__(self, module: ModuleType, device: LateDevice) -> None:
        self._module, self._device = module, device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in ("decode", "decode_codes", "decode_components"):
            return found
        return lambda *arguments: self._device.run_kernel(lambda: found(*arguments))


def late_kernels(module: ModuleType, device: LateDevice, transfers: ModuleType = cuda_transfers) -> CudaKernels:
    kernels = CudaKernels(cast(ModuleType, LateModule(module, device)), CPU)
    kernels._transfers_of[CPU] = transfers.Transfers(device)
    return kernels


def make_chunks() -> list[Encoded]:
    """Chunks that grow, all of them different."""
    shapes = [Shape(40 + 32 * index, (2, 1), (8, 9), (32, 64), (32, 96)) for index in range(NUM_CHUNKS)]
    return [encode_on_cpu(shape, torch.float16, Coder.RANS) for shape in shapes]


def check_chunks(kernels: CudaKernels, chunks: list[Encoded]) -> None:
    """Chunks that are all started before any is finished come out right, and a corrupt one among them is found."""
    corrupt = chunks[2].payload[:-64] + bytes(64)
    expected = _outcome(lambda: chunks[2].decode(cpu, corrupt))
    assert isinstance(expected, str)
    cases = [(chunk, chunk.payload) for chunk in chunks]
    cases.insert(3, (chunks[2], corrupt))
    # A GPU's allocator gives memory to others behind what is queued, the CPU's at once: the tables stay.
    tables = [chunk.load_tables(kernels) for chunk, _ in cases]
    started = [_start(kernels, *case, loaded) for case, loaded in zip(cases, tables, strict=True)]
    for (output, finish), (chunk, payload) in zip(started, cases, strict=True):
        error = _outcome(finish)
        assert error == (expected if payload is corrupt else None)
        assert error is not None or are_equal(output, chunk.decode(cpu))


def _outcome(call: Callable[[], object]) -> str | None:
    try:
        call()
    except BitstreamError as error:
        return str(error)
    return None


def _start(kernels: CudaKernels, chunk: Encoded, payload: bytes, tables: Any) -> tuple[KVCache, Callable[[], None]]:
    output, content = allocate_like(chunk.cache, chunk.cache.num_tokens), bytearray(payload)
    finish = kernels.start_decode(memoryview(content), chunk.streams, chunk.scales, chunk.layouts, tables, output)
    content[:] = bytes(len(content))  # they are the caller's again

    return output, finish


def main(module_path: Path, transfers_path: Path) -> int:
    spec = importlib.util.spec_from_file_location("transfers", transfers_path)
    assert spec is not None and spec.loader is not None
    transfers = importlib.util.module_from_spec(spec)
    sys.modules["transfers"] = transfers  # where dataclasses look their module up
    spec.loader.exec_module(transfers)
    module, chunks = emulation.load(module_path), make_chunks()
    for schedule in SCHEDULES:
        try:
            check_chunks(late_kernels(module, LateDevice(schedule), transfers), chunks)
        except (AssertionError, CacheGenError, RuntimeError, ValueError) as error:
            print(f"differs: {schedule}: {type(error).__name__} {error}".splitlines()[0])
            return 1
    print("agrees")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
