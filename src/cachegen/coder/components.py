"""The coder of method `transform`: quantized components of one group of layers to streams and back, on the CPU.

Checks first, then arrays to `cachegen._native`; tests/reference/components.py is the same in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.coder.component_tables import LevelCoding, component_frequencies
from cachegen.coder.cpu import Tables, decode_error, encode_error, native_path
from cachegen.errors import BitstreamError
from cachegen.format import StreamEntry

Components: TypeAlias = NDArray[np.int32] | torch.Tensor
"""int32 `[num_tokens, num_components]`; tensors on the kernels' device."""


@dataclass(frozen=True)
class ComponentGroup:
    """The components of one group of layers at one level: where they go, and how they are coded.

    Attributes:
        number: of the group, for errors.
        components: as `decode_components` takes them.
        tokens_per_stream: a multiple of 32.
    """

    number: int
    components: Components
    coding: LevelCoding
    tokens_per_stream: int

    @property
    def num_streams(self) -> int:
        return -(-len(self.components) // self.tokens_per_stream)

    def name_in(self, error: BitstreamError) -> BitstreamError:
        """Return an error of one of the group's streams as one that names the group, too."""
        return BitstreamError(error.problem, field=f"group {self.number}, {error.field}")


@cache
def component_tables() -> Tables:
    """Return the kernels' form of `component_frequencies`."""
    return Tables.from_frequencies(component_frequencies())


def encode_components(
    fine: Components,
    coarse: Components | None,
    coding: LevelCoding,
    tokens_per_stream: int,
    num_threads: int = 1,
    *,
    path: str | None = None,
) -> tuple[memoryview, list[StreamEntry]]:
    """Encode the components of one group at one level.

    Args:
        fine: int32 `[num_tokens, num_components]`, this level's.
        coarse: int32 `[num_tokens, at least num_refined]`, the level before's; None at level 1.
        tokens_per_stream: a multiple of 32.
        path: as for `cpu.decode`.

    Returns:
        The payload (streams, each padded to a multiple of 16 bytes) and its index.

    Raises:
        ValueError: `fine` does not refine `coarse`, or a component is beyond 2^24.
    """
    if coarse is None:
        coarse = np.zeros((len(fine), 0), dtype=np.int32)
    payload, index, failed, status = _native.encode_components(
        np.ascontiguousarray(fine, dtype=np.int32),
        np.ascontiguousarray(coarse, dtype=np.int32),
        component_tables(),
        coding.table_indices,
        coding.low_bits,
        coding.num_refined,
        tokens_per_stream,
        num_threads,
        native_path(path),
    )
    if failed >= 0:
        raise encode_error(failed, status)
    return payload.data, [StreamEntry(*row) for row in index.tolist()]


def decode_components(
    payload: bytes | memoryview,
    streams: Sequence[StreamEntry],
    components: Components,
    coding: LevelCoding,
    tokens_per_stream: int,
    num_threads: int = 1,
    *,
    path: str | None = None,
) -> None:
    """Decode the components of one group at one level, in place.

    Args:
        payload: the group's streams, each padded to a multiple of 16 bytes.
        components: int32 `[num_tokens, at least num_components]`, C-contiguous: in, the level before's in the first
            num_refined columns; out, this level's in the first num_components.
        path: as for `cpu.decode`.

    Raises:
        BitstreamError: a stream is corrupt; `components` then holds nothing usable.
    """
    failed, error = _decode(
        payload, streams, [ComponentGroup(0, components, coding, tokens_per_stream)], num_threads, path
    )
    if error is not None:
        raise decode_error(failed, error)


def decode_component_groups(
    payload: bytes | memoryview,
    streams: Sequence[StreamEntry],
    groups: Sequence[ComponentGroup],
    num_threads: int = 1,
    *,
    path: str | None = None,
) -> None:
    """Decode the components of some groups at one level, in place, as `decode_components` does one group's.

    Args:
        payload: the streams of the first group, of the second, ...
        groups: of equally many tokens.

    Raises:
        BitstreamError: a stream is corrupt, naming group and stream.
    """
    failed, error = _decode(payload, streams, groups, num_threads, path)
    if error is None:
        return
    for group in groups:
        if failed < group.num_streams:
            raise group.name_in(decode_error(failed, error))
        failed -= group.num_streams


def _decode(
    payload: bytes | memoryview,
    streams: Sequence[StreamEntry],
    groups: Sequence[ComponentGroup],
    num_threads: int,
    path: str | None,
) -> tuple[int, int | None]:
    """Decode groups; returns the first stream that is corrupt and its status, None where none is."""
    failed, status = _native.decode_components(
        np.frombuffer(payload, np.uint8),
        np.array(streams, dtype=np.uint32).reshape(len(streams), 3),
        [
            (
                np.asarray(group.components),
                group.coding.table_indices,
                group.coding.low_bits,
                group.coding.num_refined,
                group.tokens_per_stream,
            )
            for group in groups
        ],
        component_tables(),
        num_threads,
        native_path(path),
    )
    return failed, status if failed >= 0 else None
