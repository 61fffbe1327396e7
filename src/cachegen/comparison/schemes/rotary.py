"""Rotations of planes, undone and applied, for schemes that quantize keys without them."""

from __future__ import annotations

import torch

from cachegen.methods.rotary import Turns
from cachegen.rotation import Rotation


def rotate_keys(keys: torch.Tensor, rotation: Rotation | None, *, undo: bool) -> torch.Tensor:
    """Return keys with each token's rotation applied, or undone.

    Args:
        keys: `[num_tokens, num_kv_heads, head_dim]`, tokens from position 0 on.
        rotation: how they are turned.

    Returns:
        fp32 of the same shape.
    """
    turns = Turns(len(keys), 0, keys.device)
    return (turns.undo if undo else turns.apply)(keys.float(), rotation)
