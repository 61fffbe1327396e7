"""The files of a model, in a folder or the Hugging Face cache: where they are, and which hold its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, cached_files

from cachegen.errors import InputError

CONFIG_NAME = "config.json"
# In the order in which transformers looks for them; the first that is there is loaded.
_WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX_SUFFIX = ".index.json"


def find_model_file(model_id: str, name: str, local_files_only: bool) -> Path | None:
    """Return the local path of a model's file, downloaded if need be; None if the model has no such file.

    Raises:
        InputError: the hub has it and does not give it.
    """
    try:
        found = cached_file(model_id, name, local_files_only=local_files_only)
    except OSError as error:
        if error.__cause__ is None or local_files_only:
            return None
        raise InputError(f"{model_id}: {name} cannot be fetched: {first_line(error)}") from error
    return None if found is None else Path(found)


def read_config(model_id: str, local_files_only: bool) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        InputError: there is none, or it is not a JSON object.
    """
    path = find_model_file(model_id, CONFIG_NAME, local_files_only)
    if path is None:
        raise InputError(f"{model_id}: has no {CONFIG_NAME}: not a Hugging Face model")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        InputError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object")
    return content


def find_weight_files(model_id: str, local_files_only: bool, named_by_config: object = None) -> list[Path]:
    """Return the files whose tensors transformers loads: a single one, or the shards that an index names.

    Args:
        named_by_config: the field `transformers_weights` of config.json, which overrides the usual names.

    Raises:
        InputError: there are none, the index is damaged, or a shard is missing.
    """
    names = (named_by_config,) if isinstance(named_by_config, str) else _WEIGHT_NAMES
    found = (find_model_file(model_id, name, local_files_only) for name in names)
    path = next((path for path in found if path is not None), None)
    if path is None:
        raise InputError(f"{model_id}: cannot be loaded: has no weights (none of {', '.join(names)})")
    if not path.name.endswith(_INDEX_SUFFIX):
        return [path]
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{path}: field weight_map must name a file for every tensor")
    shard_names = sorted(set(weight_map.values()))
    if os.path.isdir(model_id):
        shards = [path.parent / name for name in shard_names]
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise InputError(f"{missing[0]}: no such file, which {path.name} names as holding weights")
        return shards
    try:
        return [Path(shard) for shard in cached_files(model_id, shard_names, local_files_only=local_files_only) or []]
    except OSError as error:
        raise InputError(f"{model_id}: its weights cannot be fetched: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
