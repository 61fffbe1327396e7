"""The rotary position embedding of keys, applied and undone.

Source: rotary position embedding (Su et al. 2021), pairs as transformers' Llama has them.
"""

from __future__ import annotations

import torch

from cachegen.kv_cache import RotaryEmbedding


def rotation_of(
    rotary: RotaryEmbedding, num_tokens: int, first_token: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return cosines and sines, fp32 `[num_tokens, 1, len(inv_freq)]`, and the attention scaling."""
    positions = torch.arange(first_token, first_token + num_tokens, dtype=torch.float64, device=device)
    frequencies = torch.tensor(rotary.inv_freq, dtype=torch.float64, device=device)
    angles = (positions[:, None] * frequencies)[:, None, :]
    return angles.cos().float(), angles.sin().float(), rotary.attention_scaling


def apply_rotation(keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, scaling: float) -> torch.Tensor:
    """Rotate keys `[num_tokens, num_heads, head_dim]` by their positions.

    Dims i and i + n of a head, n = len(inv_freq), are a pair; dims from 2n on are left as they are.

    Source: rotary position embedding (Su et al. 2021), pairs as transformers' Llama has them.
    """
    first, second, rest = split_pairs(keys, cosines.shape[-1])
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat([part * scaling for part in rotated] + [rest], dim=-1)


def undo_rotation(keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, scaling: float) -> torch.Tensor:
    """Rotate keys back; the inverse of `apply_rotation`."""
    first, second, rest = split_pairs(keys, cosines.shape[-1])
    rotated = (first * cosines + second * sines, second * cosines - first * sines)
    return torch.cat([part / scaling for part in rotated] + [rest], dim=-1)


def split_pairs(keys: torch.Tensor, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the first dims of all pairs, the second ones, and the dims that are not rotated."""
    return keys[..., :num_pairs], keys[..., num_pairs : 2 * num_pairs], keys[..., 2 * num_pairs :]
