"""What the door's functions are given: checked, and turned into what the pipeline takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cachegen.errors import InputError
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods import default_config, load_config, read_config
from cachegen.methods.base import MethodConfig
from cachegen.pipeline.model_cache import planes_of_cache

CLONE = Path(__file__).resolve().parents[3]
"""Of an installed package this is no clone: then there are neither its configs nor its models."""

_MAX_TOKEN_ID = (1 << 31) - 1


def read_cache(cache: Any) -> KVCache:
    """Return a cache's planes on the CPU, as views where they are there already."""
    if not isinstance(cache, KVCache):
        if hasattr(cache, "past_key_values"):
            cache = cache.past_key_values
            if cache is None:
                raise InputError("the model's output has no cache: call the model with use_cache=True")
        cache = planes_of_cache(cache)
    return from_planes([plane.detach().cpu() for plane in cache.planes])


def read_token_ids(token_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Return token ids as int32 `[num_tokens]` on the CPU."""
    ids = torch.as_tensor(token_ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"`token_ids` must be integers, got {ids.dtype}")
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"`token_ids` must be [num_tokens] or [1, num_tokens], got {list(ids.shape)}")
    if ids.min() < 0 or ids.max() > _MAX_TOKEN_ID:
        raise ValueError(f"`token_ids` must be 0 to {_MAX_TOKEN_ID}, got {int(ids.min())} to {int(ids.max())}")
    return ids.detach().to(device="cpu", dtype=torch.int32)


def choose_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | MethodConfig | None, num_layers: int
) -> MethodConfig:
    """Return the config that `compress` was asked for."""
    if config is None:
        return default_config(num_layers)
    if isinstance(config, MethodConfig):
        return config
    if isinstance(config, Mapping):
        return read_config(config, "config")
    path = Path(config)
    is_name = path.parent == Path() and not path.suffix and not path.exists()
    return load_config(CLONE / "config" / f"{path}.json" if is_name else path)
