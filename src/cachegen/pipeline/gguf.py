"""Models in a GGUF file, llama.cpp's format: how one is named, where it is, and what transformers makes of it.

A GGUF file is named like a model: by its path, or `OWNER/REPOSITORY/FILE.gguf` on the Hugging Face hub. It holds
config, tokenizer and weights. The weights, most often in blocks of a few bits, are unpacked on loading.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cachegen.errors import BackendUnavailableError, ConfigError, InputError
from cachegen.files import open_file
from cachegen.pipeline.model_files import find_model_file

GGUF_SUFFIX = ".gguf"
GGUF_DTYPE = torch.bfloat16
"""What `dtype` "auto" is for a GGUF file, whose blocks have no dtype that a model computes in."""

_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")


def name_gguf_model(model_id: str, gguf_file: str | None) -> str:
    """Return the one name of a model that may be a GGUF file: `model_id` itself without one.

    Raises:
        ConfigError: `gguf_file` is no name of a GGUF file, or `model_id` is one already.
    """
    if gguf_file is None:
        return model_id
    if not gguf_file.lower().endswith(GGUF_SUFFIX):
        raise ConfigError(f"`gguf_file` must be the name of a {GGUF_SUFFIX} file, got {gguf_file!r}")
    if split_gguf_name(model_id) is not None:
        raise ConfigError(f"`gguf_file` names a file of `model_id`, but {model_id} is a GGUF file itself")
    return os.path.join(model_id, gguf_file)


def split_gguf_name(model_id: str) -> tuple[str, str] | None:
    """Return the folder or Hugging Face id of a GGUF file, and its name there; None for a model of another kind."""
    if not model_id.lower().endswith(GGUF_SUFFIX) or os.path.isdir(model_id):
        return None
    folder, name = os.path.split(model_id)
    parts = model_id.split("/")
    if len(parts) > 3 and not os.path.isdir(folder) and parts[0] not in ("", ".", ".."):
        return "/".join(parts[:2]), "/".join(parts[2:])  # a folder within a repository
    return folder or ".", name


def find_gguf_file(model_id: str, local_files_only: bool) -> Path:
    """Return the local path of a GGUF file, downloaded if need be.

    Raises:
        ValueError: `model_id` does not name a GGUF file.
        InputError: there is none of this name, or it is not one.
    """
    names = split_gguf_name(model_id)
    if names is None:
        raise ValueError(f"`model_id` must name a GGUF file, got {model_id!r}")
    path = find_model_file(*names, local_files_only)
    if path is None:
        raise InputError(f"{model_id}: no such GGUF file")
    with open_file(path) as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise InputError(f"{model_id}: is not a GGUF file")
    return path


def hash_gguf_file(path: Path) -> bytes:
    """Return the SHA-256 of all bytes of a GGUF file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open_file(path) as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def require_gguf(model_id: str) -> None:
    """Refuse to load a GGUF file without the packages that read it.

    Raises:
        BackendUnavailableError: one is missing.
    """
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise BackendUnavailableError(
            f"{model_id}: a GGUF file needs the package {missing[0]}, of the extra gguf: pip install 'cachegen[gguf]'"
        )


def unpacking() -> Any:
    """Return the argument `quantization_config` of from_pretrained that unpacks a GGUF file's weights."""
    from transformers import GgufConfig  # not in every release that serves other models

    return GgufConfig(dequantize=True)


@contextmanager
def hidden_bar() -> Iterator[None]:
    """Hide the progress bar of transformers' reader of GGUF files, which no setting of transformers turns off."""
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    shown = reader.tqdm
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = shown


def forget_blocks(model: Any) -> None:
    """Let a model whose weights were unpacked be like one that never had blocks: it can be moved, cast and saved."""
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized = False
    model.hf_quantizer = None
