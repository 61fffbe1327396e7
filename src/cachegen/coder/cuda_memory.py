"""What the callers of the CUDA kernels share: tables and bytes in a device's memory, and what became of streams."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.coder import cpu
from cachegen.format import ALIGNMENT, StreamEntry

_STREAM_FIELDS = 3  # of a StreamRecord in src/csrc/cuda/launch.h


class Tables:
    """The frequency tables of a document, packed as the kernels read them, on every device that has asked for them."""

    def __init__(self, tables: cpu.Tables) -> None:
        frequencies = torch.from_numpy(tables.frequencies().astype(np.int32))
        starts = frequencies.cumsum(dim=1, dtype=torch.int32) - frequencies
        self._packed = {torch.device("cpu"): starts << 16 | frequencies}

    @property
    def num_tables(self) -> int:
        return len(self._packed[torch.device("cpu")])

    def on(self, device: torch.device) -> torch.Tensor:
        """Return int32 `[num_tables, 32]`: a symbol's start in the upper half, its frequency in the lower."""
        if device not in self._packed:
            self._packed[device] = self._packed[torch.device("cpu")].to(device)
        return self._packed[device]


def pack_records(records: list[list[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(records, dtype=torch.int64).to(device)


def describe_streams(streams: Sequence[StreamEntry], num_streams: int, payload_bytes: int) -> NDArray[np.int64]:
    """Return the streams of a payload as StreamRecords: offset, length and words.

    Raises:
        ValueError: there are not `num_streams`, or the payload is not as long as they are.
    """
    if len(streams) != num_streams:
        raise ValueError(f"`streams` must have {num_streams} entries, got {len(streams)}")
    records = np.zeros((num_streams, _STREAM_FIELDS), dtype=np.int64)
    records[:, 1:] = np.array(streams, dtype=np.int64).reshape(-1, 3)[:, :2]
    ends = ((records[:, 1] + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT).cumsum()
    records[1:, 0] = ends[:-1]
    if (ends[-1] if num_streams else 0) != payload_bytes:
        raise ValueError("the payload is not as long as its streams")
    return records


def place_streams(records: torch.Tensor) -> int:
    """Give the StreamRecords that an encoder has filled their offsets; returns the payload's length."""
    padded = (records[:, 1] + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    ends = padded.cumsum(0)
    records[:, 0] = ends - padded
    return int(ends[-1].item())


def list_streams(records: torch.Tensor, content: memoryview, num_threads: int) -> list[StreamEntry]:
    """Return the index of an encoded payload, its checksums found on the CPU."""
    unchecked = [StreamEntry(num_bytes, num_words, 0) for num_bytes, num_words in records[:, 1:].tolist()]
    checksums = cpu.checksum_streams(content, unchecked, num_threads).tolist()
    return [entry._replace(crc=crc) for entry, crc in zip(unchecked, checksums, strict=True)]


def first_failure(statuses: NDArray[np.int32]) -> tuple[int, int]:
    """Return the index and status of the first stream that failed, or -1 and 0."""
    failed = np.flatnonzero(statuses)
    return (int(failed[0]), int(statuses[failed[0]])) if len(failed) else (-1, 0)


def stream_of(device: torch.device) -> int:
    """Return torch's current stream of a GPU as CUDA knows it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU torch's current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
