"""The coder on a GPU: bytes first, then its kernels' time between CUDA events, and whole documents by the clock.

A part of coder_throughput.py. Nothing here runs without a GPU but `measure_kernels`, which tests run on the emulated
module with a clock of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from documents import Document, run_pipeline

from cachegen.coder import cuda
from cachegen.coder.cuda import CudaKernels
from cachegen.errors import BackendUnavailableError
from cachegen.kv_cache import KVCache, from_planes

PATH = "cuda"
CHUNK_TOKENS = 256
_TIMED = {"decode": "decode", "encode": "encode", "compact": "encode"}  # functions of torchac_cuda


class Timer(Protocol):
    """Two marks around a launch."""

    def mark(self) -> Any: ...

    def seconds_between(self, first: Any, last: Any) -> float:
        """Wait for the second mark."""
        ...


class EventTimer:
    """Marks of a GPU."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return first.elapsed_time(last) / 1000


class TimedModule:
    """A torchac_cuda that marks the launches of its coder."""

    def __init__(self, module: Any, timer: Timer) -> None:
        self._module, self._timer = module, timer
        self._marks: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in _TIMED:
            return found

        def timed(*arguments: Any) -> None:
            first = self._timer.mark()
            found(*arguments)
            self._marks.append((_TIMED[name], first, self._timer.mark()))

        return timed

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds of all launches since the last call, per operation."""
        seconds: dict[str, float] = {}
        for operation, first, last in self._marks:
            seconds[operation] = seconds.get(operation, 0.0) + self._timer.seconds_between(first, last)
        self._marks.clear()
        return seconds


@dataclass(frozen=True)
class KernelTimes:
    """Of the fastest round.

    Attributes:
        num_bytes: of the cache, which decoding writes and encoding reads.
        file_bytes: of the encoded streams and their index.
    """

    encode_seconds: float
    decode_seconds: float
    num_bytes: int
    file_bytes: int


def measure_kernels(
    document: Document, module: Any, device: torch.device, timer: Timer, rounds: int, repeats: int = 1
) -> KernelTimes:
    """Check a GPU's bytes and values against the CPU's, then time its kernels, warm, on one long chunk.

    Args:
        repeats: how often the document's tokens follow each other in that chunk.

    Raises:
        SystemExit: the GPU gives other bytes or values.
    """
    timed = TimedModule(module, timer)
    kernels = CudaKernels(timed, device)  # type: ignore[arg-type]
    tables = cuda.Tables(document.tables)
    arguments = (document.planes, tables)
    cache, output = _on(device, document.cache, 1), _on(device, document.output, 1)
    expected_payload, expected_streams = document.encode("portable", 1)
    document.decode(expected_payload, expected_streams, "portable", 1)
    payload, streams = kernels.encode(cache, document.scales.to(device), *arguments)
    if bytes(payload) != bytes(expected_payload) or streams != expected_streams:
        raise SystemExit(f"{document.name}: the GPU gives other bytes than the CPU")
    kernels.decode(payload, streams, document.scales, *arguments, output)
    _compare(document, output, 1)
    cache, output = _on(device, document.cache, repeats), _on(device, document.output, repeats)
    for plane in output.planes:
        plane.zero_()
    scales = document.scales.repeat(1, repeats)
    device_scales = scales.to(device)
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(rounds + 1):
        timed.take_seconds()
        payload, streams = kernels.encode(cache, device_scales, *arguments)
        kernels.decode(payload, streams, scales, *arguments, output)
        for operation, found in timed.take_seconds().items():
            seconds[operation].append(found)
    _compare(document, output, repeats)
    num_bytes = sum(plane.numel() * plane.element_size() for plane in output.planes)
    fastest = {operation: min(found[1:]) for operation, found in seconds.items()}  # the first round warms up
    return KernelTimes(fastest["encode"], fastest["decode"], num_bytes, len(payload) + 12 * len(streams))


def run_on_gpu(document: Document, rounds: int, threads: int) -> list[tuple]:
    """Return the rows of a large document on the GPU, less its name; none where there is no GPU or no torchac_cuda."""
    if not torch.cuda.is_available():
        return []
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        kernels = cuda.load_kernels(device)
    except BackendUnavailableError as error:
        print(f"no rows for the GPU: {error}")
        return []
    times = measure_kernels(document, cuda.load_module(), device, EventTimer(), rounds, document.repeats)
    rates = [document.num_values / seconds / 1e6 for seconds in (times.encode_seconds, times.decode_seconds)]
    overhead = 8 * times.file_bytes / (document.ideal_bits * document.repeats) - 1
    rows: list[tuple] = [("rans", PATH, 0, *rates, overhead)]
    rows += run_pipeline(
        document,
        threads,
        rounds,
        kernels=kernels,
        output=_on(device, document.output, 1),
        chunk_tokens=CHUNK_TOKENS,
        path=PATH,
        wait=torch.cuda.synchronize,
    )
    return rows


def describe_gpu() -> str:
    """Return the GPU's name and what drives it; empty where there is none."""
    if not torch.cuda.is_available():
        return ""
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _on(device: torch.device, cache: KVCache, repeats: int) -> KVCache:
    return from_planes([plane.to(device).repeat(repeats, 1, 1) for plane in cache.planes])


def _compare(document: Document, output: KVCache, repeats: int) -> None:
    for plane, expected in zip(output.planes, document.output.planes, strict=True):
        if not torch.equal(plane, expected.to(plane.device).repeat(repeats, 1, 1)):
            raise SystemExit(f"{document.name}: the GPU gives other values than the CPU")
