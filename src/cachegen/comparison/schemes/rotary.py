"""Rotary position embedding, undone and applied, for schemes that quantize keys without it."""

from __future__ import annotations

import torch

from cachegen.errors import ConfigError
from cachegen.kv_cache import ContextMetadata
from cachegen.methods.rotary import apply_rotation, rotation_of, undo_rotation


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
    rotate = undo_rotation if undo else apply_rotation
    return rotate(keys.float(), *rotation_of(rotary, len(keys), 0, keys.device))
