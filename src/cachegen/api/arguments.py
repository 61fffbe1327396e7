"""What the door's functions are given: checked, and turned into what the pipeline takes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cachegen.errors import CacheGenError, InputError, MismatchError
from cachegen.kv_cache import KVCache, describe_difference, from_planes
from cachegen.methods import default_config, load_config, read_config
from cachegen.methods.base import MethodConfig
from cachegen.methods.profile_files import AnyProfile
from cachegen.pipeline.limits import check_length
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import keep_distinct_heads, planes_and_missing, planes_of_cache
from cachegen.pipeline.prefill import measure_cache, measure_plane_shapes
from cachegen.pipeline.state_layers import states_of_cache
from cachegen.states import find_different_state

CLONE = Path(__file__).resolve().parents[3]
"""Of an installed package this is no clone: then there are neither its configs nor its models."""

_MAX_TOKEN_ID = (1 << 31) - 1


def read_cache(cache: Any) -> KVCache:
    """Return a cache's planes on the CPU, as views where they are there already.

    Raises:
        InputError: as `planes_of_cache`.
    """
    cache = _unwrap(cache)
    return _on_cpu(cache if isinstance(cache, KVCache) else planes_of_cache(cache))


def read_visible_cache(cache: Any) -> tuple[KVCache, tuple[int, ...]]:
    """Return a cache's planes as `read_cache` does, zeros for what sliding windows have dropped.

    Returns:
        And per layer, how many of its first tokens it lacks; nothing where it lacks none.
    """
    cache = _unwrap(cache)
    planes, num_missing = (cache, ()) if isinstance(cache, KVCache) else planes_and_missing(cache)
    return _on_cpu(planes), num_missing if any(num_missing) else ()


def read_model_states(cache: Any, loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Return the recurrent states that a cache holds, on the CPU; nothing for a model without.

    Raises:
        InputError: the model has some, and the cache none.
        MismatchError: they are not of the model.
    """
    states = states_of_cache(_unwrap(cache))
    if not states and not loaded.has_states:
        return {}  # there is nothing to measure
    difference = find_different_state(states, states_of_cache(measure_cache(loaded)))
    if difference is None:
        return states
    if not states:
        raise InputError(f"{loaded.model_id} has recurrent states, the cache has none: give the model's own cache")
    raise MismatchError(f"the cache is not of {loaded.model_id}: {difference}")


def _on_cpu(cache: KVCache) -> KVCache:
    return from_planes([plane.detach().cpu() for plane in cache.planes])


def _unwrap(cache: Any) -> Any:
    """Return the cache that a model's output has, or what is one already."""
    if not isinstance(cache, KVCache):
        name = next((name for name in ("cache", "past_key_values") if hasattr(cache, name)), None)
        if name is not None:
            cache = getattr(cache, name)
            if cache is None:
                raise InputError("the model's output has no cache: call the model with use_cache=True")
    return cache


def read_token_ids(token_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Return token ids as int32 `[num_tokens]` on the CPU."""
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(token_ids).__name__
        raise TypeError(f"`token_ids` must be a tensor or a sequence of integers, got {kind}") from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"`token_ids` must be integers, got {ids.dtype}")
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"`token_ids` must be [num_tokens] or [1, num_tokens], got {list(ids.shape)}")
    if ids.min() < 0 or ids.max() > _MAX_TOKEN_ID:
        raise ValueError(f"`token_ids` must be 0 to {_MAX_TOKEN_ID}, got {int(ids.min())} to {int(ids.max())}")
    return ids.detach().to(device="cpu", dtype=torch.int32)


def check_cache(cache: KVCache, loaded: LoadedModel) -> KVCache:
    """Refuse a cache that the model cannot have computed, or could not go on from.

    Returns:
        The cache, with one of each head that the model repeats.

    Raises:
        MismatchError: it has another dtype or other shapes.
        InputError: it has more tokens than may pass through the model.
    """
    if cache.dtype != loaded.dtype:
        raise MismatchError(f"the cache is {cache.dtype}, but {loaded.model_id} computes in {loaded.dtype}")
    expected, num_repeats = measure_plane_shapes(loaded), loaded.num_head_repeats
    if num_repeats > 1 and cache.keys[0].shape[1] == num_repeats * expected[0][0]:
        try:
            cache = keep_distinct_heads(cache, num_repeats)
        except ValueError as error:
            raise MismatchError(f"the cache is not of {loaded.model_id}: {error}") from error
    shapes = [(plane.shape[1], plane.shape[2]) for plane in cache.planes]
    difference = describe_difference(expected, shapes)
    if difference is not None:
        raise MismatchError(f"the cache is not of {loaded.model_id}: {difference}")
    check_length(loaded, cache.num_tokens, "the cache")
    return cache


def choose_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | MethodConfig | None,
    num_layers: int,
    profile: str | os.PathLike[str] | AnyProfile | None = None,
) -> MethodConfig:
    """Return the config that `compress` was asked for, with the profile that it was given."""
    if config is None:
        chosen = default_config(num_layers)
    elif isinstance(config, MethodConfig):
        chosen = config
    elif isinstance(config, Mapping):
        chosen = read_config(config, "config")
    else:
        chosen = load_config(_find_config(config))
    if profile is None:
        return chosen
    return chosen.with_flags({"profile": os.fspath(profile) if isinstance(profile, (str, os.PathLike)) else profile})


def _find_config(config: str | os.PathLike[str]) -> Path:
    """Return the path of a config that is given by its path, or by its name in a clone.

    Raises:
        InputError: there is none of that name.
    """
    path = Path(config)
    if path.parent != Path() or path.suffix or path.exists():
        return path
    folder = CLONE / "config"
    found = folder / f"{path}.json"
    if found.is_file():
        return found
    if not folder.is_dir():
        known = "names stand for the configs of a clone of this project, and this package is installed without them"
    else:
        known = f"names are those of the files in {folder} ({', '.join(_list_names(folder))})"
    raise InputError(f"{path}: no such config: {known}; give a path, or the content as a dictionary")


def _list_names(folder: Path) -> list[str]:
    """Return the names of a folder's quantization configs."""
    names: list[str] = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(CacheGenError):  # a model's config
            load_config(path)
            names.append(path.stem)
    return names
