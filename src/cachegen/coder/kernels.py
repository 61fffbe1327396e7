"""What a set of kernels can do: the interface that the methods are written against.

`cachegen.coder.cpu_kernels.CPU` and `cachegen.coder.cuda.CudaKernels` satisfy it, and so does the plain-Python
reference of the tests. All give the same bytes and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.coder.component_tables import LevelCoding
from cachegen.coder.components import ComponentGroup, Components
from cachegen.format import Coder, PlaneLayout, StreamEntry
from cachegen.kv_cache import KVCache


class Kernels(Protocol):
    """Kernels that quantize and code planes, and code components; see `cachegen.coder.cpu` and `.components`.

    Attributes:
        device: where the tensors are that they take.
        chunks_in_flight: how many chunks they can have begun and not ended.
        multiplies_batches: whether matrix products of many groups of layers are best one product.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def chunks_in_flight(self) -> int: ...
    @property
    def multiplies_batches(self) -> bool: ...

    def components_at_a_time(self, num_threads: int) -> int:
        """Return how many integers they should be given to decode at a time; 0: one group, however large."""
        ...

    def load_tables(
        self, content: bytes, planes: Sequence[PlaneLayout], plane_table_bytes: Sequence[int], num_threads: int = 1
    ) -> Any:
        """Read the tables section of a tables file; see `cpu.load_tables`."""
        ...

    def pack_tables(
        self, counts: NDArray[np.uint32], planes: Sequence[PlaneLayout], num_threads: int = 1
    ) -> list[bytes]:
        """Make the tables of all planes from symbol counts; see `cpu.pack_tables`."""
        ...

    def measure(
        self, cache: KVCache, planes: Sequence[PlaneLayout], num_threads: int = 1
    ) -> tuple[torch.Tensor, NDArray[np.uint32]]:
        """Find the scales of all tokens and count the high parts of all symbols; see `cpu.measure`."""
        ...

    def encode(
        self,
        cache: KVCache,
        scales: torch.Tensor,
        planes: Sequence[PlaneLayout],
        tables: Any,
        num_threads: int = 1,
        *,
        coder: Coder | None = None,
    ) -> tuple[memoryview, list[StreamEntry]]:
        """Quantize and encode the tokens of a chunk; see `cpu.encode`."""
        ...

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
        """Begin to decode and dequantize the tokens of a chunk; see `cpu.decode`.

        Returns:
            A function that waits for the end and raises what is left to raise. Until it has returned, `output` holds
            no usable values; the payload may change before.
        """
        ...

    def encode_components(
        self,
        fine: Components,
        coarse: Components | None,
        coding: LevelCoding,
        tokens_per_stream: int,
        num_threads: int = 1,
    ) -> tuple[memoryview, list[StreamEntry]]:
        """Encode the components of one group at one level; see `components.encode_components`."""
        ...

    def start_decode_component_groups(
        self,
        payload: bytes | memoryview,
        streams: Sequence[StreamEntry],
        groups: Sequence[ComponentGroup],
        num_threads: int = 1,
    ) -> Callable[[], None]:
        """Begin to decode the components of some groups at one level, in place.

        See `components.decode_component_groups`; returns as `start_decode` does.
        """
        ...
