"""Rotary position embedding, undone and applied, for schemes that quantize keys without it.

Source: Su et al., "RoFormer" (2021), in the half-split layout that transformers' models have.
"""

from __future__ import annotations

import torch

from cachegen.errors import ConfigError
from cachegen.kv_cache import ContextMetadata


def rotate_keys(keys: torch.Tensor, metadata: ContextMetadata, *, undo: bool) -> torch.Tensor:
    """Return keys with each token's rotation applied, or undone.

    Args:
        keys: `[num_tokens, num_kv_heads, head_dim]`, tokens from position 0 on.
        metadata: of a model with one rotary embedding, or none.

    Returns:
        fp32 of the same shape.
    """
    if not metadata.rotary_embeddings:
        return keys.float()
    rotary, *others = metadata.rotary_embeddings
    if others:
        raise ConfigError("models with several rotary embeddings are not supported by this scheme")
    angles = torch.arange(len(keys), dtype=torch.float64)[:, None] * torch.tensor(rotary.inv_freq, dtype=torch.float64)
    cosines, sines = angles.cos().float()[:, None], angles.sin().float()[:, None]
    scaling = 1 / rotary.attention_scaling if undo else rotary.attention_scaling
    half = len(rotary.inv_freq)
    first, second, rest = keys.float().split([half, half, keys.shape[2] - 2 * half], dim=2)
    if undo:
        sines = -sines
    return torch.cat(
        [scaling * (first * cosines - second * sines), scaling * (second * cosines + first * sines), rest], dim=2
    )
