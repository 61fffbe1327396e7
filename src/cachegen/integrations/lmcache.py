"""The serde `cachegen` of LMCache's multiprocess mode, registered when this module is imported; see docs/lmcache.md.

Source: lmcache 0.5.6, `lmcache.v1.distributed.serde` and `lmcache.v1.distributed.l2_adapters`.
"""

# The package is in no environment but its own: see `make test-doors`.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig
from lmcache.v1.distributed.serde import (
    AsyncSerdeProcessor,
    Deserializer,
    SerdeProcessor,
    Serializer,
    register_serde_factory,
)
from lmcache.v1.memory_management import MemoryObj

from cachegen.errors import BackendUnavailableError, CacheGenError, ConfigError
from cachegen.integrations.block_codec import SOURCE, BlockCodec, read_settings
from cachegen.integrations.counters import Counters
from cachegen.integrations.memory_objects import deserialize_object, estimate_bytes, serialize_object
from cachegen.integrations.metrics import register

SERDE_NAME = "cachegen"
COUNTERS = Counters()
"""Of all serdes of this process; see `BlockCodec.counters` and `deserialize_object`."""


class CacheGenSerializer(Serializer):
    """Keys and values of one object to a blob."""

    def __init__(self, codec: BlockCodec) -> None:
        self._codec = codec

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Write the blob of `src` to the beginning of `dst`; returns its length."""
        return serialize_object(self._codec, src, dst, key)

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Return a bound of the length, a little more than that of the values as they are."""
        return estimate_bytes(self._codec, layout_desc.shapes, layout_desc.dtypes)


class CacheGenDeserializer(Deserializer):
    """A blob to keys and values."""

    def __init__(self, codec: BlockCodec) -> None:
        self._codec = codec

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Fill `dst` from the blob in `src`.

        Raises:
            BitstreamError, MismatchError: LMCache takes it for a miss.
        """
        deserialize_object(self._codec, src, dst, key)


class FileAdapter(FSL2Adapter):
    """LMCache's adapter of files, which also loads what is shorter than its buffer.

    The original refuses a file of fewer bytes than were reserved for it: nothing that a serde has made smaller is ever
    loaded. Naming this class in a `plugin` adapter imports this module before the serde is asked for.
    """

    def __init__(self, config: FSL2AdapterConfig, l1_memory_desc: object = None) -> None:
        """Take a config with the fields of LMCache's own; `plugin` adapters are told of the memory, too."""
        super().__init__(config)

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Narrow each buffer to its file, then load."""
        for key, memory in zip(keys, objects, strict=True):
            with contextlib.suppress(OSError):  # no file: a miss
                num_bytes = os.stat(self._key_to_path(key)).st_size
                if num_bytes < memory.get_size():
                    memory.set_used_size(num_bytes)
        return super().submit_load_task(keys, objects)

    def report_status(self) -> dict[str, Any]:
        """Return what the server's `/status` says of the adapter, with the counters of all serdes of this process."""
        return {**super().report_status(), "cachegen": COUNTERS.snapshot()}


FileAdapterConfig = FSL2AdapterConfig
"""LMCache takes the fields of `adapter_params` by this."""


class _OnOneLine(logging.Filter):
    """Leaves out tracebacks of errors of ours, which say on one line what there is to say."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, CacheGenError):
            record.exc_info = None
        return True


def create_serde(options: Mapping[str, Any]) -> SerdeProcessor:
    """Make the serde of a config's object `serde`, without its `type`.

    Args:
        options: as `read_settings`, and `max_workers`, how many tasks are worked on at a time.

    Raises:
        ConfigError: naming the field that is wrong.
        InputError, BitstreamError: a file is missing or corrupt.
    """
    own = dict(options)
    num_workers = own.pop("max_workers", 1)
    if type(num_workers) is not int or not 1 <= num_workers <= 1024:
        raise ConfigError(f"{SOURCE}: max_workers must be 1 to 1024, got {num_workers!r}")
    codec = BlockCodec(read_settings(own), COUNTERS)
    return AsyncSerdeProcessor(CacheGenSerializer(codec), CacheGenDeserializer(codec), max_workers=num_workers)


register_serde_factory(SERDE_NAME, create_serde)
with contextlib.suppress(BackendUnavailableError):  # without Prometheus there is still the server's `/status`
    register(COUNTERS, "lmcache")
logging.getLogger(AsyncSerdeProcessor.__module__).addFilter(_OnOneLine())
