"""The coder of method `transform`: quantized components of one group of layers to streams and back, on the CPU.

Checks first, then arrays to `cachegen._native`; coder/component_reference.py is the same in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cachegen import _native
from cachegen.coder.cpu import Tables, decode_error, encode_error
from cachegen.component_tables import LevelCoding, component_frequencies
from cachegen.format import StreamEntry


@cache
def component_tables() -> Tables:
    """Return the kernels' form of `component_frequencies`."""
    return Tables.from_frequencies(component_frequencies())


def encode_components(
    fine: NDArray[np.int32],
    coarse: NDArray[np.int32] | None,
    coding: LevelCoding,
    tokens_per_stream: int,
    num_threads: int = 1,
) -> tuple[memoryview, list[StreamEntry]]:
    """Encode the components of one group at one level.

    Args:
        fine: int32 `[num_tokens, num_components]`, this level's.
        coarse: int32 `[num_tokens, at least num_refined]`, the level before's; None at level 1.
        tokens_per_stream: a multiple of 32.

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
    )
    if failed >= 0:
        raise encode_error(failed, status)
    return payload.data, [StreamEntry(*row) for row in index.tolist()]


def decode_components(
    payload: bytes | memoryview,
    streams: Sequence[StreamEntry],
    components: NDArray[np.int32],
    coding: LevelCoding,
    tokens_per_stream: int,
    num_threads: int = 1,
) -> None:
    """Decode the components of one group at one level, in place.

    Args:
        payload: the group's streams, each padded to a multiple of 16 bytes.
        components: int32 `[num_tokens, at least num_components]`, C-contiguous: in, the level before's in the first
            num_refined columns; out, this level's in the first num_components.

    Raises:
        BitstreamError: a stream is corrupt; `components` then holds nothing usable.
    """
    failed, status = _native.decode_components(
        np.frombuffer(payload, np.uint8),
        np.array(streams, dtype=np.uint32).reshape(len(streams), 3),
        components,
        component_tables(),
        coding.table_indices,
        coding.low_bits,
        coding.num_refined,
        tokens_per_stream,
        num_threads,
    )
    if failed >= 0:
        raise decode_error(failed, status)
