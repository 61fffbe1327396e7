"""Which model a cache is of: one hash of its config, its tokenizer and its weights, from the files as they are.

A cache fits the very weights that computed it, and no others: a fine-tune, an adapter or an updated checkpoint has the
same config and tokenizer and other keys and values. Hashing all weights would mean reading them all, minutes for a
large model; here a few rows of each tensor stand for it. docs/format.md says what that covers, and what can escape.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from cachegen.errors import BackendUnavailableError, InputError
from cachegen.pipeline.gguf import find_gguf_file, hash_gguf_file, split_gguf_name
from cachegen.pipeline.model_files import (
    find_model_file,
    find_weight_files,
    first_line,
    read_config,
    read_json_object,
)

WHOLE_VALUES = 1 << 16
"""A tensor of at most so many values is hashed whole: all norms, biases and most adapters."""
NUM_ROWS = 8
"""Rows of a larger tensor that are hashed, evenly spaced, the first and the last among them."""
MIN_VALUES = 2048
"""Where rows are short, as many of them as make so many values."""

# The first group with a file present is the tokenizer; further ones would only repeat it in an older form.
_TOKENIZER_FILE_GROUPS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_CONFIG_FIELDS_OUTSIDE = ("transformers_version", "_name_or_path")
# Saving a model writes its class into its config; the tensors say in which dtype they are.
_CONFIG_FIELDS_OUTSIDE_MEMORY = (*_CONFIG_FIELDS_OUTSIDE, "architectures", "dtype", "torch_dtype")
_ADAPTER_CONFIG_NAME = "adapter_config.json"
_ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# What torch.load and safetensors raise for files that are damaged or not theirs.
_READING_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)


def compute_fingerprint(model_id: str, *, local_files_only: bool = False, weight_bits: int | None = None) -> str:
    """Hash what makes a cache this model's: config, tokenizer, and a sample of every tensor of the weights.

    Only files are looked at, so that neither the dtype in which the model computes, nor the device, the number of GPUs,
    the place of the files, the version of transformers or the number of shards matters. Of each tensor as many pages
    are read as its sample touches; a tensor whose other rows alone differ is not told apart. docs/format.md
    (Fingerprint of the model) specifies the bytes. A GGUF file counts with all its bytes, which hold config and
    tokenizer, too.

    Args:
        model_id: a Hugging Face id, a local folder or a GGUF file.
        weight_bits: that the weights are rounded to on loading, which gives other keys and values; None for none.

    Returns:
        SHA-256 in hex.

    Raises:
        InputError: a file is missing or damaged.
        BackendUnavailableError: the model has an adapter, and the package that applies it is not there.
    """
    if split_gguf_name(model_id) is not None:
        digest = hashlib.sha256()
        _add(digest, "gguf", hash_gguf_file(find_gguf_file(model_id, local_files_only)))
        return digest.hexdigest()
    config = read_config(model_id, local_files_only)
    canonical = {name: value for name, value in config.items() if name not in _CONFIG_FIELDS_OUTSIDE}
    digest = hashlib.sha256()
    _add(digest, "config.json", json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode())
    for group in _TOKENIZER_FILE_GROUPS:
        found = {name: path for name in group if (path := find_model_file(model_id, name, local_files_only))}
        for name, path in found.items():
            _add(digest, name, path.read_bytes())
        if found:
            break
    base_id, adapter_paths = model_id, []
    adapter_config_path = find_model_file(model_id, _ADAPTER_CONFIG_NAME, local_files_only)
    if adapter_config_path is not None:
        base_id, adapter_paths = _find_adapter(model_id, adapter_config_path, local_files_only)
        _add(digest, _ADAPTER_CONFIG_NAME, adapter_config_path.read_bytes())
    weight_paths = find_weight_files(base_id, local_files_only, config.get("transformers_weights"))
    for kind, paths in (("tensor", weight_paths), ("adapter tensor", adapter_paths)):
        for description, sample in sorted(_describe_sample(*entry) for path in paths for entry in _read_samples(path)):
            _add(digest, f"{kind} {description}", sample)
    if weight_bits is not None:
        _add(digest, f"load_in_{weight_bits}bit", b"")
    return digest.hexdigest()


def compute_memory_fingerprint(model: Any) -> str:
    """Hash a model as it is in memory: its class, its config, and a sample of every tensor of its state.

    Where adapters of peft are in it, also which are in force how strongly. For models that were built or changed where
    no checkpoint says what they are. It is another domain than `compute_fingerprint`: the two never agree, not even for
    a model that was just loaded from that checkpoint. The dtype of the tensors belongs to it; the device does not, nor
    does a tokenizer, which the model does not have.
    docs/format.md (Fingerprint of a model in memory) specifies the bytes.

    Args:
        model: a transformers model.

    Returns:
        SHA-256 in hex.

    Raises:
        InputError: a tensor is not in memory (accelerate keeps it elsewhere).
    """
    digest = hashlib.sha256()
    _add(digest, "model in memory", type(model).__name__.encode())
    _add(digest, "config", _pack_config(model.config))
    entries = []
    for name, tensor in _list_tensors(model):
        entries.append(_describe_sample(name, tuple(tensor.shape), _sample_rows(tuple(tensor.shape), tensor)))
    for description, sample in sorted(entries):
        _add(digest, f"tensor {description}", sample)
    for name, state in _list_adapters(model):
        _add(digest, f"adapters {name}", state.encode())
    return digest.hexdigest()


def find_checkpoint_fingerprint(model: Any) -> str | None:
    """Return the fingerprint of the checkpoint that a model in memory was loaded from, if it still is that checkpoint.

    Config and a sample of every tensor are compared with the checkpoint's files, in the dtype that the model has: what
    the fingerprint tells apart, this does. Only local files are looked at.

    Args:
        model: a transformers model.

    Returns:
        What `compute_fingerprint` says of the files; None where they are not there or not the model's: it was changed
        or quantized, has an adapter, or is of a kind whose tensors transformers names otherwise than its files do.
    """
    model_id = model.name_or_path
    try:
        if not model_id or not _is_checkpoint(model, model_id):
            return None
        return compute_fingerprint(model_id, local_files_only=True)
    except (InputError, OSError, ValueError):
        return None


def _is_checkpoint(model: Any, model_id: str) -> bool:
    """Tell whether a model in memory is what a checkpoint's files say.

    Raises:
        InputError, OSError, ValueError: a file is missing or damaged.
    """
    if find_model_file(model_id, _ADAPTER_CONFIG_NAME, True) is not None:
        return False
    config = AutoConfig.from_pretrained(model_id, local_files_only=True)
    if type(config) is not type(model.config) or _pack_config(config) != _pack_config(model.config):
        return False
    left = dict(_list_tensors(model))
    found: set[int] = set()
    for path in find_weight_files(model_id, True, read_config(model_id, True).get("transformers_weights")):
        for name, shape, rows in _read_samples(path):
            tensor = left.pop(name, None)
            if tensor is None:
                continue  # what the model does not have, it does not compute with
            if tuple(tensor.shape) != shape:
                return False
            in_memory = _sample_rows(shape, tensor)
            if not all(a.to(b.dtype).equal(b.cpu()) for a, b in zip(rows, in_memory, strict=True)):
                return False
            found.add(tensor.data_ptr())
    return all(tensor.data_ptr() in found for tensor in left.values())  # tied to one that was found


def choose_rows(num_rows: int, row_values: int) -> list[int]:
    """Return which rows of a tensor stand for it, in ascending order.

    Args:
        num_rows: the product of the leading dimensions.
        row_values: the last dimension.
    """
    num_chosen = min(num_rows, max(NUM_ROWS, math.ceil(MIN_VALUES / row_values)))
    return [i * (num_rows - 1) // (num_chosen - 1) for i in range(num_chosen)]


def _find_adapter(model_id: str, config_path: Path, local_files_only: bool) -> tuple[str, list[Path]]:
    """Return the model whose weights transformers loads below an adapter, and the adapter's file."""
    # transformers would leave the adapter out without a word.
    if importlib.util.find_spec("peft") is None:
        raise BackendUnavailableError(
            f"{config_path}: the model has an adapter, which needs the package peft: pip install peft (or merge it)"
        )
    base_id = model_id
    if not os.path.isdir(model_id):
        base_id = read_json_object(config_path).get("base_model_name_or_path")
        if not isinstance(base_id, str):
            raise InputError(f"{config_path}: field base_model_name_or_path must name a model")
    found = [path for name in _ADAPTER_NAMES if (path := find_model_file(model_id, name, local_files_only))]
    if not found:
        raise InputError(f"{model_id}: has {_ADAPTER_CONFIG_NAME}, but none of {', '.join(_ADAPTER_NAMES)}")
    return base_id, found[:1]


def _pack_config(config: Any) -> bytes:
    """Return the config of a model in memory as it is hashed: what differs from the class's defaults."""
    content = json.loads(config.to_json_string())
    canonical = {name: value for name, value in content.items() if name not in _CONFIG_FIELDS_OUTSIDE_MEMORY}
    return json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()


def _list_adapters(model: Any) -> Iterator[tuple[str, str]]:
    """Yield the layers that peft has put adapters into, and which of these are in force how strongly.

    Their tensors are there whether they are switched on or not, and the strength is no tensor at all.
    """
    for name, module in sorted(model.named_modules()):
        active = getattr(module, "active_adapters", None)
        if not isinstance(active, list | tuple) or not hasattr(module, "disable_adapters"):
            continue
        scaling = getattr(module, "scaling", None)
        strengths = {adapter: str(scaling.get(adapter)) for adapter in active} if isinstance(scaling, dict) else {}
        state = {
            "active": list(active),
            "merged": list(getattr(module, "merged_adapters", ())),
            "off": bool(module.disable_adapters),
            "scaling": strengths,
        }
        yield name, json.dumps(state, sort_keys=True, separators=(",", ":"))


def _list_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model's state by name.

    Raises:
        InputError: one is not in memory.
    """
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise InputError(f"{name} of the model is not in memory: load the model without offloading")
        yield name, tensor


def _read_samples(path: Path) -> Iterator[tuple[str, tuple[int, ...], list[torch.Tensor]]]:
    """Yield name, shape and sample of every tensor of a file; the rest of the file is not read.

    Raises:
        InputError: the file is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no dict)
                    view = file.get_slice(name)
                    shape = tuple(view.get_shape())
                    yield name, shape, _sample_rows(shape, view, lambda name=name: file.get_tensor(name))
        else:
            is_mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are no archives, and are read whole
            state = torch.load(path, mmap=is_mapped, weights_only=True, map_location="cpu")
            for name, tensor in state.items():
                if isinstance(tensor, torch.Tensor):
                    yield name, tuple(tensor.shape), _sample_rows(tuple(tensor.shape), tensor)
    except _READING_ERRORS as error:
        raise InputError(f"{path}: the weights cannot be read: {first_line(error)}") from error


def _sample_rows(
    shape: tuple[int, ...], view: Any, get_whole: Callable[[], torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Return a tensor's sample: all of it, or some rows.

    Args:
        view: gives a row, for an index of the leading dimensions.
        get_whole: gives the whole tensor; None where `view` is it.
    """
    if math.prod(shape) <= WHOLE_VALUES:
        return [get_whole() if get_whole is not None else view]
    leading, row_values = (shape[:-1], shape[-1]) if len(shape) > 1 else (shape, 1)
    return [view[_unravel(row, leading)] for row in choose_rows(math.prod(leading), row_values)]


def _describe_sample(name: str, shape: tuple[int, ...], rows: Sequence[torch.Tensor]) -> tuple[str, bytes]:
    """Return a tensor's description and the bytes of its sample, as they are hashed."""
    dtype = str(rows[0].dtype).removeprefix("torch.")
    sample = b"".join(row.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes() for row in rows)
    return f"{name} {dtype} {'x'.join(map(str, shape))}", sample


def _unravel(row: int, leading: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of a row along the leading dimensions, the last of which counts fastest."""
    index = []
    for size in reversed(leading):
        row, place = divmod(row, size)
        index.append(place)
    return tuple(reversed(index))


def _add(digest: Any, name: str, content: bytes) -> None:
    digest.update(f"{name}\0{len(content)}\0".encode())
    digest.update(content)
