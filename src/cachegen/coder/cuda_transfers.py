"""Bytes on their way to a GPU: two pinned buffers in turn, copied on a stream of their own while kernels run.

An upload waits for nothing but the buffers it takes: its pinned one until the copy from there has ended, its device one
until the kernels that read it have. What is queued after `Transfers.start` on torch's current stream sees the bytes.

Everything that a GPU does is asked of `DeviceOperations`, so that tests can put a device in its place that does it as
late, or as early, as events allow.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

NUM_BUFFERS = 2
_PART_ALIGNMENT = 256  # of a part in device memory; the last one ends where its buffer does
_LAST_ALIGNMENT = 16
_GROWTH_BYTES = 1 << 20  # buffers are multiples of it


class DeviceOperations:
    """What transfers ask of one GPU. Events are torch's, or any object that the operations agree on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_stream = torch.cuda.Stream(device)

    def allocate_pinned(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 `[num_bytes]` that the GPU can copy from and to by itself."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 `[num_bytes]` on the device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def start_upload(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Any:
        """Copy on the copy stream, after an event; returns the event of the copy's end."""
        # Should nobody wait for the copy, both allocators do before they give the memory to others.
        target.record_stream(self._copy_stream)
        self._copy_stream.wait_event(after)
        with torch.cuda.stream(self._copy_stream):
            target.copy_(source, non_blocking=True)
            return self._copy_stream.record_event()

    def start_download(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy on the current stream."""
        target.copy_(source, non_blocking=True)

    def record(self) -> Any:
        """Return the event of the end of all that is queued on the current stream."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, event: Any) -> None:
        """Let what is queued on the current stream from now on wait for an event."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Wait here for an event."""
        event.synchronize()


class HostOperations:
    """The same where the device is the CPU, as for emulated kernels: all is done at once."""

    def allocate_pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    allocate = allocate_pinned

    def start_upload(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Any:
        target.copy_(source)

    def start_download(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def record(self) -> Any:
        return None

    def wait(self, event: Any) -> None:
        pass

    def synchronize(self, event: Any) -> None:
        pass


@dataclass
class _Buffers:
    """A pinned buffer and its counterpart on the device, of one length.

    Attributes:
        copied: the end of the last copy from `host`.
        used: the end of what reads `device`.
    """

    host: torch.Tensor
    device: torch.Tensor
    copied: Any
    used: Any


class Upload:
    """Bytes to be copied to a device together.

    Attributes:
        host: what to fill before `Transfers.start`, uint8, one array per part.
        device: uint8, the same parts on the device; 256-byte aligned but for the last one, which has 16.
    """

    def __init__(self, buffers: _Buffers, sizes: Sequence[int]) -> None:
        self.buffers = buffers
        self.first = len(buffers.host)
        starts = []
        for index, size in reversed(list(enumerate(sizes))):
            alignment = _LAST_ALIGNMENT if index == len(sizes) - 1 else _PART_ALIGNMENT
            self.first = (self.first - size) // alignment * alignment
            starts.insert(0, self.first)
        spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        self.host: list[NDArray[np.uint8]] = [buffers.host[span].numpy() for span in spans]
        self.device = [buffers.device[span] for span in spans]


class Transfers:
    """The buffers of one device, for any thread."""

    def __init__(self, operations: DeviceOperations | HostOperations) -> None:
        self.operations = operations
        self._free: list[_Buffers] = []
        self._lock = threading.Lock()

    def reserve(self, sizes: Sequence[int]) -> Upload:
        """Return room for parts of so many bytes; waits until the copy before the last one has ended.

        Until `release` the buffers are the upload's: one that is given up takes them with it, and others take their
        place.
        """
        needed = sum(-(-size // _PART_ALIGNMENT) * _PART_ALIGNMENT for size in sizes) + _PART_ALIGNMENT
        with self._lock:
            buffers = self._free.pop(0) if len(self._free) >= NUM_BUFFERS else None
        if buffers is not None:
            self.operations.synchronize(buffers.copied)
        if buffers is None or len(buffers.host) < needed:
            num_bytes = -(-needed // _GROWTH_BYTES) * _GROWTH_BYTES
            device = self.operations.allocate(num_bytes)
            # The allocator may give memory that kernels queued before still read.
            event = self.operations.record()
            buffers = _Buffers(self.operations.allocate_pinned(num_bytes), device, event, event)
        return Upload(buffers, sizes)

    def start(self, upload: Upload) -> None:
        """Copy an upload, once filled, and let the current stream wait for it."""
        buffers = upload.buffers
        source, target = buffers.host[upload.first :], buffers.device[upload.first :]
        buffers.copied = self.operations.start_upload(source, target, buffers.used)
        self.operations.wait(buffers.copied)

    def release(self, upload: Upload) -> None:
        """Take the buffers back, once all that reads the upload is queued on the current stream."""
        upload.buffers.used = self.operations.record()
        self._free.append(upload.buffers)

    def start_download(self, values: torch.Tensor) -> Download:
        """Copy a tensor to the host after what is queued on the current stream."""
        host = self.operations.allocate_pinned(values.numel() * values.element_size()).view(values.dtype)
        self.operations.start_download(values, host)
        return Download(self.operations, host, self.operations.record(), values)


@dataclass(frozen=True)
class Download:
    """A copy to the host that may be under way; it keeps its source."""

    _operations: DeviceOperations | HostOperations
    _host: torch.Tensor
    _copied: Any
    _source: torch.Tensor

    def finish(self) -> NDArray[Any]:
        """Wait for the copy, and all that was queued before it; returns the values."""
        self._operations.synchronize(self._copied)
        return self._host.numpy()


def operations_of(device: torch.device) -> DeviceOperations | HostOperations:
    """Return the operations of a device."""
    return DeviceOperations(device) if device.type == "cuda" else HostOperations()
