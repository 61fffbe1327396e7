"""Recurrent states of a context: what some layers keep of all its tokens, in tensors that do not grow.

They are those at the context's end, and stored bit for bit. A name says whose they are: `3.recurrent.0` is the first
recurrent state of the model's layer 3, `3.conv.0` what its convolution has seen last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

import safetensors
import safetensors.torch
import torch

from cachegen.errors import BitstreamError

States: TypeAlias = Mapping[str, torch.Tensor]
"""By name, ascending; nothing for a model whose layers all keep keys and values."""

STATE_KINDS = ("conv", "recurrent")
MAX_STATES = 1 << 16
STATE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NAME = re.compile(r"(0|[1-9]\d{0,4})\.(conv|recurrent)\.(0|[1-9]\d{0,2})")
_MAX_DIMS = 8


def name_state(layer: int, kind: str, index: int) -> str:
    """Return a state's name.

    Args:
        layer: of the model, counting those that keep keys and values.
        kind: one of `STATE_KINDS`.
        index: among the layer's states of that kind.
    """
    return f"{layer}.{kind}.{index}"


def split_name(name: str) -> tuple[int, str, int]:
    """Return the layer, the kind and the index that a state's name says."""
    layer, kind, index = name.split(".")
    return int(layer), kind, int(index)


def check_states(states: object) -> dict[str, torch.Tensor]:
    """Return the states of a file, sorted, having looked at their names and dtypes.

    Raises:
        BitstreamError: they are none.
    """
    if not isinstance(states, dict) or len(states) > MAX_STATES:
        raise BitstreamError(f"must be up to {MAX_STATES} named tensors", field="states")
    for name, tensor in states.items():
        if type(name) is not str or not _NAME.fullmatch(name):
            raise BitstreamError("a state has no name like 0.conv.0", field="states")
        if type(tensor) is not torch.Tensor or tensor.dtype not in STATE_DTYPES or not 0 < tensor.ndim <= _MAX_DIMS:
            raise BitstreamError(f"{name} is no tensor of fp16, bf16 or fp32", field="states")
    return {name: states[name] for name in sorted(states, key=split_name)}


def pack_states(states: States) -> bytes:
    """Return states as the bytes of a safetensors file, the same for the same states; none as no bytes."""
    if not states:
        return b""
    return safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in states.items()})


def unpack_states(content: bytes | memoryview) -> dict[str, torch.Tensor]:
    """Return what `pack_states` packed, in memory of their own.

    Raises:
        BitstreamError: the bytes are something else.
    """
    if not content:
        return {}
    try:
        states = safetensors.torch.load(bytes(content))
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise BitstreamError(f"is no safetensors file ({str(error)[:100]})", field="states") from error
    return check_states(states)


def find_different_state(states: States, expected: States) -> str | None:
    """Say which states are not those of a model, by name, shape or dtype; None where all are."""
    for name in sorted({*states, *expected}, key=split_name):
        found, wanted = (
            f"{list(of[name].shape)} in {of[name].dtype}" if name in of else "missing" for of in (states, expected)
        )
        if found != wanted:
            return f"{name} is {found}, the cache's {wanted}"
    return None


def _describe(state: torch.Tensor | None) -> str:
    return "missing" if state is None else f"{list(state.shape)} in {state.dtype}"
