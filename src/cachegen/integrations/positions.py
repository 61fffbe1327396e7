"""Where in its context a block of tokens begins, found in its keys: an engine that names blocks by hashes does not say.

A key at position p is turned by p. Turned back by its place in the block alone, the mean key of a block is what the
profile knows as the model's mean key, turned by the block's position: all pairs of dims of all layers and heads must
agree on one. Of the candidates, multiples of the block's length, at most one fits.

Source: phase correlation (Kuglin and Hines 1975), over the frequencies of the rotary position embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cachegen.kv_cache import KVCache
from cachegen.methods.rotary import Turns
from cachegen.rotation import PlaneRotations, Rotation

LEAST_FIT = 0.5
"""Of the sum over frequencies, that the best position must have; 1 where all of them agree on it."""


def find_position(
    block: KVCache, means: Sequence[torch.Tensor], rotations: PlaneRotations, max_tokens: int
) -> int | None:
    """Return the position of a block's first token.

    Args:
        block: its tokens follow each other.
        means: per plane, the model's mean with its rotation undone, `[num_heads, head_dim]`.
        rotations: per plane.
        max_tokens: the longest context there is.

    Returns:
        A multiple of the block's length, 0 where nothing turns; None where no candidate fits.
    """
    agreed = _agreement(block, means, rotations)
    if not agreed:
        return 0
    candidates = torch.arange(0, max(max_tokens - block.num_tokens, 0) + 1, block.num_tokens, dtype=torch.float64)
    scores, most = torch.zeros(len(candidates), dtype=torch.float64), 0.0
    for rotation, phases in agreed.items():
        frequencies = torch.tensor(rotation.inv_freq, dtype=torch.float64)
        angles = candidates[:, None] * frequencies
        scores += angles.cos() @ phases.real + angles.sin() @ phases.imag
        most += phases.abs().sum().item()
    best = int(scores.argmax())
    if not most or not scores[best].item() >= LEAST_FIT * most:
        return None
    return best * block.num_tokens


def _agreement(
    block: KVCache, means: Sequence[torch.Tensor], rotations: PlaneRotations
) -> dict[Rotation, torch.Tensor]:
    """Return, per rotation, how block and model are turned to each other: complex128, one number per frequency."""
    turns = Turns(block.num_tokens, 0, block.planes[0].device)
    agreed: dict[Rotation, torch.Tensor] = {}
    for plane, mean, rotation in zip(block.planes, means, rotations, strict=True):
        if rotation is None:
            continue
        found = _as_pairs(turns.undo(plane.float(), rotation).mean(0), rotation)
        products = (_as_pairs(mean, rotation).conj() * found).sum(0)
        agreed[rotation] = agreed[rotation] + products if rotation in agreed else products
    return agreed


def _as_pairs(vectors: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Return the pairs of dims that turn as complex numbers, `[num_heads, num_pairs]`."""
    wide = vectors.double()
    return torch.complex(wide[..., rotation.firsts], wide[..., rotation.seconds])
