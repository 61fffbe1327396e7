"""The decorrelating transform: keys and values of a group of layers to components and back, forward and inverse.

Per token, the keys' rotary embedding is undone (keys of one token kind then look alike at every position), keys and
values of the group's layers are joined to one vector, and the profile's matrices turn it into components that are
uncorrelated and equally important per unit. One step quantizes all of them; a finer level divides the step by three,
so that every level refines the one before it and loses nothing for having been sent in two parts.

Source: Karhunen-Loeve transform of vectors weighted by the square root of the Fisher information (this project's
docs/rate_distortion.md); undoing RoPE as KVTC (ICLR 2026) does. The step ratio of three is that of nested mid-tread
quantizers, whose cells are split into three equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cachegen.kv_cache import KVCache, RotaryEmbedding
from cachegen.profile import SCALE_LOGS_PER_OCTAVE, Profile, TransformGroup

LEVEL_RATIO = 3
"""The step of a level over that of the next one."""
LEVEL_RATIO_LOG = 25  # 16 log2 3, rounded
BLOCK_TOKENS = 512  # at a time, so that temporaries stay small


def step_of_level(step_log: int, level: int) -> float:
    """Return the quantization step of a level, 1 being the coarsest: 2^(step_log / 16) / 3^(level - 1)."""
    return 2.0 ** (step_log / SCALE_LOGS_PER_OCTAVE) / LEVEL_RATIO ** (level - 1)


class GroupTransform:
    """The transform of one group of layers, its matrices on one device in fp32."""

    def __init__(self, profile: Profile, group: TransformGroup, device: torch.device) -> None:
        """Put the matrices on `device`.

        The analysis matrix is corrected once so that it inverts the synthesis matrix to fp32 accuracy: both are stored
        in fp16, and a component of hundreds of steps would otherwise leak into others.
        """
        self.group = group
        self._shapes = profile.plane_shapes[2 * group.first_layer : 2 * (group.first_layer + group.num_layers)]
        self._rotary = profile.rotary_embeddings[0] if profile.rotary_embeddings else None
        self._device = device
        self._mean = group.mean.to(device=device, dtype=torch.float32)
        self._synthesis = group.synthesis.to(device=device, dtype=torch.float32)
        self._analysis: torch.Tensor | None = None
        if group.analysis is not None:
            analysis = group.analysis.to(device=device, dtype=torch.float64)
            product = self._synthesis.double() @ analysis
            # One Newton step: the error of the inverse is squared.
            self._analysis = (2 * analysis - analysis @ product).float()

    def analyze(self, cache: KVCache, first_token: int, num_components: int | None = None) -> torch.Tensor:
        """Return the components of the group's layers.

        Args:
            cache: all layers, on the transform's device.
            first_token: the position of the cache's first token.
            num_components: only the first so many.

        Returns:
            fp32 `[num_tokens, num_components]`.
        """
        if self._analysis is None:
            raise ValueError("the profile was loaded without its analysis matrices")
        analysis = self._analysis[:, :num_components]
        components = torch.empty(cache.num_tokens, analysis.shape[1], device=self._device)
        for start in range(0, cache.num_tokens, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, cache.num_tokens)
            vectors = self._gather(cache.slice(start, stop), first_token + start)
            torch.matmul(vectors - self._mean, analysis, out=components[start:stop])
        return components

    def synthesize(self, components: torch.Tensor, step: float, output: KVCache, first_token: int) -> None:
        """Write the keys and values that quantized components stand for.

        Args:
            components: integers `[num_tokens, num_components]`, in steps; the first components, the rest are zero.
            step: the quantization step.
            output: all layers, on the transform's device; only the group's are written.
            first_token: the position of the output's first token.
        """
        synthesis = self._synthesis[: components.shape[1]]
        for start in range(0, output.num_tokens, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, output.num_tokens)
            block = components[start:stop].to(device=self._device, dtype=torch.float32) * step
            vectors = torch.addmm(self._mean, block, synthesis)
            self._scatter(vectors, output.slice(start, stop), first_token + start)

    def _planes(self, cache: KVCache) -> Sequence[torch.Tensor]:
        return cache.planes[2 * self.group.first_layer : 2 * (self.group.first_layer + self.group.num_layers)]

    def _gather(self, cache: KVCache, first_token: int) -> torch.Tensor:
        return join_planes(self._planes(cache), self._rotary, first_token, self._device)

    def _scatter(self, vectors: torch.Tensor, output: KVCache, first_token: int) -> None:
        rotation = self._rotation(output.num_tokens, first_token)
        widths = [heads * dim for heads, dim in self._shapes]
        for index, (part, plane) in enumerate(zip(vectors.split(widths, dim=1), self._planes(output), strict=True)):
            values = part.view(plane.shape)
            if index % 2 == 0 and rotation is not None:
                values = apply_rotation(values, *rotation)
            plane.copy_(values)

    def _rotation(self, num_tokens: int, first_token: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        if self._rotary is None or not self._rotary.inv_freq:
            return None
        return rotation_of(self._rotary, num_tokens, first_token, self._device)


def join_planes(
    planes: Sequence[torch.Tensor], rotary: RotaryEmbedding | None, first_token: int, device: torch.device
) -> torch.Tensor:
    """Return the vectors that a transform works on.

    Args:
        planes: of consecutive layers `[num_tokens, num_heads, head_dim]`, keys then values of each.
        rotary: what is undone in the keys; None or without frequencies: nothing.
        first_token: the position of the planes' first token.
        device: where the vectors belong.

    Returns:
        fp32 `[num_tokens, num_channels]`.
    """
    rotation = None
    if rotary is not None and rotary.inv_freq:
        rotation = rotation_of(rotary, planes[0].shape[0], first_token, device)
    parts = []
    for index, plane in enumerate(planes):
        values = plane.to(device=device, dtype=torch.float32)
        if index % 2 == 0 and rotation is not None:
            values = undo_rotation(values, *rotation)
        parts.append(values.flatten(1))
    return torch.cat(parts, dim=1)


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
    first, second, rest = _pairs(keys, cosines.shape[-1])
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat([part * scaling for part in rotated] + [rest], dim=-1)


def undo_rotation(keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, scaling: float) -> torch.Tensor:
    """Rotate keys back; the inverse of `apply_rotation`."""
    first, second, rest = _pairs(keys, cosines.shape[-1])
    rotated = (first * cosines + second * sines, second * cosines - first * sines)
    return torch.cat([part / scaling for part in rotated] + [rest], dim=-1)


def _pairs(keys: torch.Tensor, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return keys[..., :num_pairs], keys[..., num_pairs : 2 * num_pairs], keys[..., 2 * num_pairs :]


def quantize_components(components: torch.Tensor, step: float, num_coded: Sequence[int]) -> list[torch.Tensor]:
    """Quantize components to every level, each refining the one before it.

    Args:
        components: fp32 `[num_tokens, num_components]`.
        step: of level 1.
        num_coded: components coded at each level, not decreasing. A component is not refined but coded anew at the
            first level that codes it.

    Returns:
        Per level int32 `[num_tokens, num_coded of the level]`, in steps of that level, ties to even. Where the level
        before coded a component as q, it is 3q - 1, 3q or 3q + 1.
    """
    levels: list[torch.Tensor] = []
    for level, count in enumerate(num_coded):
        scaled = components[:, :count] * (LEVEL_RATIO**level / step)
        # Beyond any real cache's; keeps the integers and their refinements within 32 bits.
        quantized = scaled.round().clamp(-MAX_COMPONENT, MAX_COMPONENT).to(torch.int32)
        if levels:
            coarse = LEVEL_RATIO * levels[-1]
            known = coarse.shape[1]
            quantized[:, :known] = coarse + (quantized[:, :known] - coarse).clamp(-1, 1)
        levels.append(quantized)
    return levels


MAX_COMPONENT = 1 << 24
"""The largest magnitude of a component in steps of the level that codes it anew."""
