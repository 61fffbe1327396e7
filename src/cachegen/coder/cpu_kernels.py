"""The CPU's kernels as one object: the functions of `cachegen.coder.cpu` and `cachegen.coder.components`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cachegen.coder import components, cpu
from cachegen.coder.components import ComponentGroup
from cachegen.format import Coder, PlaneLayout, StreamEntry
from cachegen.kv_cache import KVCache


class CpuKernels:
    """See `cachegen.coder.kernels.Kernels`; all is done when a `start_` function returns."""

    device = torch.device("cpu")
    chunks_in_flight = 0
    synthesis = None  # each group's matrix stays in the caches

    load_tables = staticmethod(cpu.load_tables)
    pack_tables = staticmethod(cpu.pack_tables)
    measure = staticmethod(cpu.measure)
    encode = staticmethod(cpu.encode)
    encode_components = staticmethod(components.encode_components)

    def components_at_a_time(self, num_threads: int) -> int:
        """See `Kernels`: a stream or two for each thread."""
        return max(1 << 20, num_threads << 19)

    def start_decode(
        self,
        payload: bytes | memoryview,
        streams: Sequence[StreamEntry],
        scales: torch.Tensor,
        planes: Sequence[PlaneLayout],
        tables: Any,
        output: KVCache,
        num_threads: int = 1,
        *,
        coder: Coder | None = None,
    ) -> Callable[[], None]:
        """See `cpu.decode`."""
        cpu.decode(payload, streams, scales, planes, tables, output, num_threads, coder=coder)
        return _is_done

    def start_decode_component_groups(
        self,
        payload: bytes | memoryview,
        streams: Sequence[StreamEntry],
        groups: Sequence[ComponentGroup],
        num_threads: int = 1,
    ) -> Callable[[], None]:
        """See `components.decode_component_groups`."""
        components.decode_component_groups(payload, streams, groups, num_threads)
        return _is_done


def _is_done() -> None:
    pass


CPU = CpuKernels()
