"""Rotations of planes, applied and undone.

Source: rotary position embedding (Su et al. 2021).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from cachegen.coder.kernels import Angles
from cachegen.rotation import Rotation

MAX_KEPT_TOKENS = 1024
"""Angles of longer runs are not kept: a run's take 8 bytes per token and pair."""


def angles_of(rotation: Rotation, num_tokens: int, first_token: int, device: torch.device) -> Angles:
    """Return the angles of tokens from position `first_token` on."""
    positions = torch.arange(first_token, first_token + num_tokens, dtype=torch.float64, device=device)
    frequencies = torch.tensor(rotation.inv_freq, dtype=torch.float64, device=device)
    angles = (positions[:, None] * frequencies)[:, None, :]
    return angles.cos().float(), angles.sin().float()


@lru_cache(maxsize=16)
def _kept_angles(rotation: Rotation, num_tokens: int, first_token: int, device: torch.device) -> Angles:
    """Return what `angles_of` does: the groups of layers ask for those of the same few runs one after the other."""
    return angles_of(rotation, num_tokens, first_token, device)


class Turns:
    """The angles of a run of tokens, computed once for all planes of one rotation."""

    def __init__(self, num_tokens: int, first_token: int, device: torch.device) -> None:
        self._run = num_tokens, first_token, device
        self._angles: dict[Rotation, Angles] = {}

    def angles(self, rotation: Rotation | None) -> Angles | None:
        """Return the cosines and sines of a rotation, times its attention scaling; None where `rotation` is None."""
        if rotation is None:
            return None
        cosines, sines = self._of(rotation)
        if rotation.attention_scaling == 1.0:
            return cosines, sines
        return cosines * rotation.attention_scaling, sines * rotation.attention_scaling

    def unscaled_angles(self, rotation: Rotation) -> Angles:
        """Return the cosines and sines of a rotation, as `apply_rotation` takes them."""
        return self._of(rotation)

    def undoing_angles(self, rotation: Rotation | None) -> Angles | None:
        """Return the same over its attention scaling, which undoes what `angles` does."""
        if rotation is None:
            return None
        cosines, sines = self._of(rotation)
        if rotation.attention_scaling == 1.0:
            return cosines, sines
        return cosines / rotation.attention_scaling, sines / rotation.attention_scaling

    def apply(self, vectors: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """Turn vectors `[..., num_tokens, num_heads, head_dim]` by their positions; as they are without a rotation."""
        return vectors if rotation is None else apply_rotation(vectors, rotation, self._of(rotation))

    def undo(self, vectors: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """Turn vectors back; the inverse of `apply`."""
        return vectors if rotation is None else undo_rotation(vectors, rotation, self._of(rotation))

    def _of(self, rotation: Rotation) -> Angles:
        if rotation not in self._angles:
            find = _kept_angles if self._run[0] <= MAX_KEPT_TOKENS else angles_of
            self._angles[rotation] = find(rotation, *self._run)
        return self._angles[rotation]


def apply_rotation(vectors: torch.Tensor, rotation: Rotation, angles: Angles) -> torch.Tensor:
    """Turn vectors, fp32 `[..., num_tokens, num_heads, head_dim]`; dims that are of no pair are left as they are."""
    cosines, sines = angles
    first, second = vectors[..., rotation.firsts], vectors[..., rotation.seconds]
    turned = vectors.clone() if rotation.num_dims < vectors.shape[-1] else torch.empty_like(vectors)
    # In place: each pass over the values that is saved counts.
    for target, along, across, sign in (
        (turned[..., rotation.firsts], first, second, -1),
        (turned[..., rotation.seconds], second, first, 1),
    ):
        torch.mul(along, cosines, out=target).addcmul_(across, sines, value=sign)
        if rotation.attention_scaling != 1.0:
            target.mul_(rotation.attention_scaling)
    return turned


def undo_rotation(vectors: torch.Tensor, rotation: Rotation, angles: Angles) -> torch.Tensor:
    """Turn vectors back; the inverse of `apply_rotation`."""
    cosines, sines = angles
    first, second = vectors[..., rotation.firsts], vectors[..., rotation.seconds]
    turned = vectors.clone()
    turned[..., rotation.firsts] = (first * cosines + second * sines) / rotation.attention_scaling
    turned[..., rotation.seconds] = (second * cosines - first * sines) / rotation.attention_scaling
    return turned
