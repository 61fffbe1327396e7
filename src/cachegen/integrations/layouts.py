"""Tensors as engines keep the blocks of a KV cache, seen as `KVCache` without copying a value.

[2, num_layers, num_tokens, num_channels]      keys, then values
[1, num_layers, num_tokens, num_channels]      one plane per layer, also without the 1: keys and values of each head
                                               side by side ("fused"), or latents that are neither (MLA)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cachegen.errors import InputError
from cachegen.kv_cache import SUPPORTED_DTYPES, KVCache, from_planes


@dataclass(frozen=True)
class Layout:
    """How the channels of a token are divided.

    Attributes:
        plane_shapes: heads and dims of keys and values of layer 0, of layer 1, ..., as a profile knows them; None where
            there is no profile.
        head_dim: without a profile, the dims of a head; None takes all channels of a plane as one head.
        is_fused: without a profile, a single plane has each head's keys and values side by side; else it is cut.
        first_channels: where a single plane that is not fused is cut; None cuts it in the middle.
    """

    plane_shapes: Sequence[tuple[int, int]] | None = None
    head_dim: int | None = None
    is_fused: bool = False
    first_channels: int | None = None

    def view(self, tensor: torch.Tensor) -> KVCache:
        """Return a tensor's keys and values, as views: what is written into them is in the tensor.

        Raises:
            InputError: the tensor has another layout or dtype, or the profile is of other shapes.
        """
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise InputError(f"dtype {str(tensor.dtype).removeprefix('torch.')} is not coded")
        shape = tuple(tensor.shape)
        planes = tensor[None] if tensor.ndim == 3 else tensor
        if planes.ndim != 4 or planes.shape[0] not in (1, 2) or 0 in shape:
            raise InputError(f"shape {shape} is not [2, layers, tokens, channels] or a single plane per layer")
        num_layers, num_channels = planes.shape[1], planes.shape[3]
        if self.plane_shapes is not None and len(self.plane_shapes) != 2 * num_layers:
            raise InputError(f"the profile has {len(self.plane_shapes) // 2} layers, the tensor {num_layers}")
        parts: list[torch.Tensor] = []
        for layer in range(num_layers):
            if planes.shape[0] == 2:
                for kind in range(2):
                    heads, dim = self._shape_of(2 * layer + kind, num_channels)
                    parts.append(_cut(planes[kind, layer], heads, dim))
            else:
                parts += self._divide(planes[0, layer], layer)
        try:
            return from_planes(parts)
        except ValueError as error:  # more channels than any file may have
            raise InputError(str(error)) from None

    def _shape_of(self, plane: int, num_channels: int) -> tuple[int, int]:
        if self.plane_shapes is not None:
            return self.plane_shapes[plane]
        dim = self.head_dim or num_channels
        return num_channels // dim, dim

    def _divide(self, plane: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """Return keys and values of a layer's single plane `[num_tokens, num_channels]`."""
        num_channels = plane.shape[1]
        if self.plane_shapes is None and not self.is_fused:
            first = num_channels // 2 if self.first_channels is None else self.first_channels
            if not 0 < first < num_channels:
                raise InputError(f"{num_channels} channels cannot be cut behind {first}")
            return [_cut(plane[:, :first], 1, first), _cut(plane[:, first:], 1, num_channels - first)]
        if self.plane_shapes is not None:
            (heads, key_dim), (value_heads, value_dim) = self.plane_shapes[2 * layer : 2 * layer + 2]
            if heads != value_heads:
                raise InputError("the profile's keys and values have other numbers of heads, the tensor has one plane")
        else:
            key_dim = value_dim = self.head_dim or num_channels // 2
            heads = num_channels // (2 * key_dim)
        both = _cut(plane, heads, key_dim + value_dim)
        return [both[..., :key_dim], both[..., key_dim:]]


def _cut(plane: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Return a plane `[num_tokens, num_channels]` as `[num_tokens, heads, dim]`."""
    if heads * dim != plane.shape[1]:
        raise InputError(f"{plane.shape[1]} channels are not {heads} heads of {dim} dims")
    return plane.unflatten(1, (heads, dim))


def hash_layout(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> bytes:
    """Return SHA-256 of the shapes and dtypes of an object's tensors, 32 raw bytes."""
    lines = (
        f"{str(dtype).removeprefix('torch.')} {' '.join(map(str, shape))}\n"
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return hashlib.sha256("".join(lines).encode()).digest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, of any dtype; writing into them writes into it."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
