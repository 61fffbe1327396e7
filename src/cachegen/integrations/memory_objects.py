"""LMCache's memory objects, read and filled by a `BlockCodec`; here it is only known what they look like.

Source: lmcache 0.5.6, `lmcache.v1.memory_management.MemoryObj` and `lmcache.v1.distributed.api.ObjectKey`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from cachegen.integrations.block_codec import SOURCE, BlockCodec, miss_reason

logger = logging.getLogger(__name__)


class ObjectKey(Protocol):
    """What names an object: content, model, rank, group of layers and user."""

    @property
    def chunk_hash(self) -> bytes: ...

    @property
    def model_name(self) -> str: ...

    @property
    def kv_rank(self) -> int: ...

    @property
    def object_group_id(self) -> int: ...

    @property
    def cache_salt(self) -> str: ...


class MemoryObject(Protocol):
    """A buffer on the CPU, of one tensor or several behind each other, or of plain bytes."""

    @property
    def byte_array(self) -> Any: ...

    def get_shapes(self) -> list[torch.Size]: ...

    def get_tensor(self, index: int) -> torch.Tensor | None: ...


def pack_key(key: ObjectKey) -> bytes:
    """Return bytes that differ wherever keys do."""
    name = f"{key.model_name}\0{key.kv_rank}\0{key.object_group_id}\0{key.cache_salt}\0"
    return name.encode() + key.chunk_hash


def serialize_object(codec: BlockCodec, source: MemoryObject, target: MemoryObject, key: ObjectKey) -> int:
    """Write an object's blob to the beginning of a buffer.

    Returns:
        The bytes of the blob.

    Raises:
        ValueError: the buffer is too small, or the object has no tensors.
    """
    blob = codec.encode(pack_key(key), tensors_of(source))
    output = memoryview(target.byte_array).cast("B")
    if len(output) < len(blob):
        raise ValueError(f"the buffer has {len(output)} bytes, the blob {len(blob)}")
    output[: len(blob)] = blob
    return len(blob)


def deserialize_object(codec: BlockCodec, source: MemoryObject, target: MemoryObject, key: ObjectKey) -> None:
    """Fill an object from the blob at the beginning of a buffer.

    What is refused is counted as `missed:reason`, with the reason `damaged`, `foreign` or `failed`, and logged on one
    line. The object then holds no usable values.

    Raises:
        BitstreamError, MismatchError: as `BlockCodec.decode`.
    """
    try:
        codec.decode(pack_key(key), memoryview(source.byte_array).cast("B"), tensors_of(target))
    except Exception as error:
        reason = miss_reason(error)
        codec.counters.add_for("missed", reason)
        logger.warning("%s: a miss (%s): %s %s: %s", SOURCE, reason, key.model_name, key.chunk_hash.hex()[:12], error)
        raise


def estimate_bytes(codec: BlockCodec, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> int:
    """Return how many bytes a buffer for an object's blob must have; no blob needs more."""
    return codec.max_blob_bytes(shapes, dtypes)


def tensors_of(source: MemoryObject) -> list[torch.Tensor]:
    """Return an object's tensors, as views of its memory.

    Raises:
        ValueError: one is not there or not on the CPU.
    """
    tensors: list[torch.Tensor] = []
    for index in range(len(source.get_shapes())):
        tensor = source.get_tensor(index)
        if tensor is None or tensor.device.type != "cpu":
            raise ValueError("a memory object has no tensor on the CPU")
        tensors.append(tensor)
    return tensors
