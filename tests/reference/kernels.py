"""The reference as one object: `cachegen.coder.kernels.Kernels` of planes, in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cachegen.coder.cpu_kernels import CpuKernels
from cachegen.format import Coder, PlaneLayout, StreamEntry
from cachegen.kv_cache import KVCache
from tests.reference import planes


class ReferenceKernels(CpuKernels):
    """The reference for planes; components are the CPU's, whose reference is `tests.reference.components`."""

    load_tables = staticmethod(planes.load_tables)
    pack_tables = staticmethod(planes.pack_tables)
    measure = staticmethod(planes.measure)
    encode = staticmethod(planes.encode)

    def start_decode(
        self,
        payload: bytes | memoryview,
        streams: Sequence[StreamEntry],
        scales: Any,
        layouts: Sequence[PlaneLayout],
        tables: Any,
        output: KVCache,
        num_threads: int = 1,
        *,
        coder: Coder | None = None,
    ) -> Callable[[], None]:
        planes.decode(payload, streams, scales, layouts, tables, output, num_threads, coder=coder)
        return lambda: None


REFERENCE = ReferenceKernels()
