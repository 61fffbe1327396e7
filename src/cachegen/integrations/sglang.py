"""The storage backend of SGLang's HiCache: pages of prompts from a store of blocks, and into it; see docs/sglang.md.

Source: sglang 0.5.23, `sglang.srt.mem_cache.hicache_storage`, `sglang.srt.managers.cache_controller`.
"""

# The package is in no environment but its own: see `make test-doors`.
# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from cachegen.errors import CacheGenError, ConfigError, InputError
from cachegen.fields import Fields, refuse_config
from cachegen.integrations.block_codec import BlockCodec, miss_reason, read_settings
from cachegen.integrations.block_store import BlockStore, Namespace, count_prefix
from cachegen.integrations.counters import Counters
from cachegen.pipeline.fingerprint import compute_fingerprint

logger = logging.getLogger(__name__)

NAME = "backend cachegen"
"""Names the configuration in messages."""
DEFAULT_METHOD = "lossless"
"""The default for `method`: the same keys and values as without the store."""
_FIELD = "cachegen"
_OWN_FIELDS = ("store", "model_fingerprint")


@dataclass(frozen=True)
class PageLayout:
    """How the host's pool lays a flat page out.

    Attributes:
        shape: of the page, the dims in their order.
        order: of these dims, to have keys and values, layers, tokens, heads, dims.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    def to_planes(self, page: torch.Tensor) -> torch.Tensor:
        """Return a flat page as contiguous `[2, num_layers, num_tokens, num_channels]`."""
        return page.reshape(self.shape).permute(self.order).flatten(3).contiguous()

    def copy_back(self, planes: torch.Tensor, page: torch.Tensor) -> None:
        """Write such planes into a flat page."""
        view = page.view(self.shape).permute(self.order)
        view.copy_(planes.view(view.shape))


def read_page_layout(pool: Any) -> PageLayout:
    """Return how a pool of keys and values of plain attention lays its pages out.

    Raises:
        ConfigError: it is another kind of pool, or another layout.
    """
    try:
        layers, tokens, heads, dim = pool.layer_num, pool.page_size, pool.head_num, pool.head_dim
    except AttributeError:
        raise ConfigError(f"{NAME}: {type(pool).__name__} is no pool of plain attention's keys and values") from None
    if getattr(pool, "v_head_dim", dim) != dim:
        raise ConfigError(f"{NAME}: keys of {dim} and values of {pool.v_head_dim} dims are not supported")
    layouts = {
        "layer_first": PageLayout((2, layers, tokens, heads, dim), (0, 1, 2, 3, 4)),
        "page_first": PageLayout((2, tokens, layers, heads, dim), (0, 2, 1, 3, 4)),
        "page_first_direct": PageLayout((2, layers, tokens, heads, dim), (0, 1, 2, 3, 4)),
        "page_head": PageLayout((2, heads, tokens, layers, dim), (0, 3, 2, 1, 4)),
    }
    if pool.layout not in layouts:
        raise ConfigError(f"{NAME}: hicache_mem_layout must be one of {', '.join(layouts)}, got {pool.layout}")
    return layouts[pool.layout]


class CacheGenStorage(HiCacheStorage):
    """Pages by the hashes that SGLang gives them, each coded by itself.

    Attributes:
        counters: those of the codec; `found` pages; `missed:reason` with the reasons of `miss_reason`, and
            `unsaved:reason`: `there`, `outage`, `failed`; `seconds:fetch`, `seconds:store`; `read_bytes`.
    """

    def __init__(self, storage_config: Any, options: Any = None) -> None:
        """Read the configuration and open the store.

        Args:
            storage_config: a `HiCacheStorageConfig`; `cachegen` in its `extra_config` has our fields.
            options: what SGLang gives beside it.

        Raises:
            ConfigError: a field is wrong, or the model's attention is not supported.
            InputError: the model has no fingerprint, or a file of the codec is missing.
            StoreError, OutputError: the store cannot be opened.
        """
        if storage_config.is_mla_model:
            raise ConfigError(f"{NAME}: latents (MLA) are not supported")
        extra = storage_config.extra_config or {}
        if not isinstance(extra.get(_FIELD), dict):
            raise ConfigError(f"{NAME}: the extra config must have an object {_FIELD}, with store in it")
        if extra.get("interface_v1"):
            raise ConfigError(f"{NAME}: interface_v1 must not be set: pages are coded, not copied")
        self._given: dict[str, Any] = dict(extra[_FIELD])
        fields = Fields(dict(self._given), refuse_config(NAME), reads_digits=True)
        location = fields.text("store")
        self._config = storage_config
        self._model = fields.text("model_fingerprint") if "model_fingerprint" in fields else None
        if self._model is None:
            self._model = _fingerprint_of(str(storage_config.model_name))
        self.counters = Counters()
        self._store = BlockStore(location, create="://" not in location)
        self._layout: PageLayout | None = None
        self._codec: BlockCodec | None = None
        self._namespace: Namespace | None = None
        self._max_blob_bytes = 0
        self._damaged: set[str] = set()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Learn how pages are laid out.

        Raises:
            ConfigError: a field is wrong, or the pool is not supported.
            InputError, BitstreamError: as `read_settings`.
        """
        super().register_mem_pool_host(mem_pool_host)
        self._layout = read_page_layout(mem_pool_host)
        self._dtype: torch.dtype = mem_pool_host.dtype
        layers, tokens = mem_pool_host.layer_num, mem_pool_host.page_size
        heads, dim = mem_pool_host.head_num, mem_pool_host.head_dim
        codec = {name: value for name, value in self._given.items() if name not in _OWN_FIELDS}
        if "config" not in codec:
            codec.setdefault("method", DEFAULT_METHOD)
        if "profile" not in codec:
            codec.setdefault("head_dim", dim)
        settings = read_settings({"threads": 1, **codec}, NAME)
        self._codec = BlockCodec(settings, self.counters)
        self._shape = (2, layers, tokens, heads * dim)
        self._max_blob_bytes = self._codec.max_blob_bytes([self._shape], [self._dtype])
        config = self._config
        self._namespace = Namespace(
            engine="sglang",
            model=self._model,
            dtype=str(self._dtype),
            num_layers=layers,
            num_heads=heads,
            head_dim=dim,
            page_tokens=tokens,
            tensor_parallel=[config.tp_rank, config.tp_size],
            pipeline_parallel=[config.pp_rank, config.pp_size],
            context_parallel=[config.attn_cp_rank, config.attn_cp_size],
            codec=settings.codec_hash.hex(),
            method=settings.method,
        )
        logger.info("%s: %s, %s", NAME, self._store.url, self._namespace.description)

    # --- pages --------------------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Tell whether a page is there; False where the store does not say, which is counted."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """Return how many of the first pages are there, with about 2 log2 of them looked for."""
        names = [self._of_pool().block_name(_hash_of(key)) for key in keys]
        found = self._tried(
            "missed", keys, lambda: count_prefix(lambda index: self._store.has(names[index]), len(names))
        )
        self.counters.add(found=found or 0)
        return found or 0

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        """Decode a page into a flat tensor, which is returned; None where that fails."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Decode pages into flat tensors; None from the first on that is not there or not whole."""
        pages: list[torch.Tensor | None] = [None] * len(keys)
        for index, (key, page) in enumerate(zip(keys, target_locations, strict=True)):
            if self._tried("missed", keys[index:], lambda key=key, page=page: self._load(key, page)) is None:
                break
            pages[index] = page
        return pages

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Encode and store a page, unless it is there."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Encode and store pages; returns whether all are there now."""
        for index, (key, page) in enumerate(zip(keys, values, strict=True)):
            if self._tried("unsaved", keys[index:], lambda key=key, page=page: self._save(key, page)) is None:
                return False
        return True

    def clear(self) -> None:
        """Do nothing: others have pages there, too."""
        logger.warning("%s: blocks are deleted by age, not by an engine: docs/vllm.md", NAME)

    def close(self) -> None:
        """Nothing is open."""

    def _load(self, key: str, page: torch.Tensor) -> bool:
        layout, codec = self._layout, self._codec
        assert layout is not None and codec is not None
        start = time.perf_counter()
        try:
            blob = self._store.get(self._of_pool().block_name(_hash_of(key)), self._max_blob_bytes)
        finally:
            self.counters.add_for("seconds", "fetch", time.perf_counter() - start)
        self.counters.add(read_bytes=len(blob))
        planes = torch.empty(self._shape, dtype=self._dtype)
        try:
            codec.decode(_hash_of(key), blob, [planes])
        except Exception:
            self._damaged.add(key)
            raise
        layout.copy_back(planes, page)
        return True

    def _save(self, key: str, page: torch.Tensor) -> bool:
        layout, codec, namespace = self._layout, self._codec, self._of_pool()
        assert layout is not None and codec is not None
        is_damaged = key in self._damaged
        if not is_damaged and self._store.has(namespace.block_name(_hash_of(key))):
            self.counters.add_for("unsaved", "there")
            return True
        blob = codec.encode(_hash_of(key), [layout.to_planes(page)])
        start = time.perf_counter()
        self._store.put(namespace, _hash_of(key), blob, replace=is_damaged)
        self._damaged.discard(key)
        self.counters.add_for("seconds", "store", time.perf_counter() - start)
        return True

    def _of_pool(self) -> Namespace:
        if self._namespace is None:
            raise ConfigError(f"{NAME}: SGLang has not registered its host pool")
        return self._namespace

    def _tried(self, kind: str, keys: Sequence[str], action: Callable[[], Any]) -> Any:
        """Return what comes of an action; None, counted and logged on one line, where it fails."""
        try:
            return action()
        except ConfigError:
            raise
        except Exception as error:
            if kind == "missed":
                reason = miss_reason(error)
            else:
                reason = "outage" if isinstance(error, CacheGenError) else "failed"
            self.counters.add_for(kind, reason, len(keys))
            problem = " ".join(str(error).split()) or type(error).__name__
            level = logging.DEBUG if reason == "absent" or "left alone" in problem else logging.WARNING
            verb = "loaded" if kind == "missed" else "stored"
            logger.log(level, "%s: %d pages were not %s (%s): %s", NAME, len(keys), verb, reason, problem)
            return None


def _hash_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _fingerprint_of(model: str) -> str:
    try:
        return compute_fingerprint(model, local_files_only=not os.path.isdir(model))
    except InputError as error:
        raise InputError(f"{NAME}: give model_fingerprint, any text that names the weights: {error}") from None
