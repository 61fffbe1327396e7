"""Caches and profiles of a large model's shape, made of random numbers.

The profile has orthonormal bases, one per layer, and standard deviations that fall like a power of the component's
number; the cache has the profile's own distribution. So sizes say nothing of a real model; seconds and memory do not
depend on the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cachegen.kv_cache import ContextMetadata, KVCache, RotaryEmbedding
from cachegen.methods.rotary import Turns
from cachegen.methods.transform.profile import Profile, TransformGroup

FINGERPRINT = "00" * 32


@dataclass(frozen=True)
class Shape:
    """The shape of a model's cache; keys and values are alike."""

    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def rotary(self) -> RotaryEmbedding:
        frequencies = tuple(10000.0 ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2))
        return RotaryEmbedding("rotary_emb", "default", frequencies, 1.0)


def make_profile(shape: Shape, components: int, generator: torch.Generator) -> Profile:
    """One group per layer, with so many components of its keys and values together."""
    channels = 2 * shape.kv_heads * shape.head_dim
    deviations = 8.0 * torch.arange(1, components + 1).float() ** -0.5
    logs = torch.round(16 * deviations.log2()).to(torch.int16)
    groups = []
    for layer in range(shape.layers):
        basis = torch.linalg.qr(torch.randn(channels, components, generator=generator)).Q
        groups.append(TransformGroup(layer, 1, torch.zeros(channels), basis.T.half(), logs.clone(), basis.half()))
    shapes = ((shape.kv_heads, shape.head_dim),) * (2 * shape.layers)
    calibration = {"text": "none: random numbers"}
    return Profile(FINGERPRINT, (shape.rotary,), shapes, tuple(groups), (), calibration)


def make_cache(
    profile: Profile, num_tokens: int, generator: torch.Generator, dtype: torch.dtype = torch.float16
) -> KVCache:
    """Vectors of the profile's own distribution, keys turned by their positions."""
    keys, values = [], []
    turns = Turns(num_tokens, 0, torch.device("cpu"))
    heads, head_dim = profile.plane_shapes[0]
    for group, rotation in zip(profile.groups, profile.rotations[0::2], strict=True):
        scales = 2.0 ** (group.scale_logs.float() / 16)
        components = torch.randn(num_tokens, len(scales), generator=generator) * scales
        vectors = components @ group.synthesis.float()
        key, value = (part.reshape(num_tokens, heads, head_dim) for part in vectors.chunk(2, dim=1))
        keys.append(turns.apply(key, rotation).to(dtype).contiguous())
        values.append(value.to(dtype).contiguous())
    return KVCache(keys, values)


def make_metadata(shape: Shape, num_tokens: int) -> ContextMetadata:
    ids = torch.arange(num_tokens, dtype=torch.int32)
    return ContextMetadata("synthetic", FINGERPRINT, ids, (shape.rotary,), 512)
