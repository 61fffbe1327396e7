"""The decorrelating transform: keys and values of a group of layers to components and back, forward and inverse.

Per token, the rotation of each plane is undone (keys of one token kind then look alike at every position), keys and
values of the group's layers are joined to one vector, and the profile's matrices turn it into components that are
uncorrelated and equally important per unit. One step quantizes all of them; a finer level divides the step by three,
so that every level refines the one before it and loses nothing for having been sent in two parts.

Source: Karhunen-Loeve transform of vectors weighted by the square root of the Fisher information (this project's
docs/rate_distortion.md); undoing RoPE as KVTC (ICLR 2026) does. The step ratio of three is that of nested mid-tread
quantizers, whose cells are split into three equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch

from cachegen.kv_cache import KVCache
from cachegen.methods.rotary import Turns
from cachegen.methods.transform.analysis import (
    CAN_GATHER,
    CAN_MULTIPLY_BF16,
    RoundedAnalysis,
    gather_rows,
)
from cachegen.methods.transform.byte_analysis import (
    ByteAnalysis,
    gather_bytes,
    has_byte_analysis,
    make_byte_analysis,
    multiply_bytes,
)
from cachegen.methods.transform.integers import (
    LEAST_TOKENS,
    ChannelSizes,
    IntegerMatrix,
    Measured,
    are_native_planes,
    has_integer_synthesis,
    make_integer_matrix,
    measure_synthesis,
    synthesize,
)
from cachegen.methods.transform.products import multiply
from cachegen.methods.transform.profile import SCALE_LOGS_PER_OCTAVE, Profile, TransformGroup
from cachegen.rotation import Rotation

LEVEL_RATIO = 3
"""The step of a level over that of the next one."""
LEVEL_RATIO_LOG = 25  # 16 log2 3, rounded
MAX_KEPT_STEPS = 4
"""Steps whose matrices in integers are kept: as many as a document has levels."""
SINK_TOKENS = 4
"""First tokens that a model computes itself: much attention rests on them, and they are unlike all others."""
BLOCK_TOKENS = 512  # at a time, so that temporaries stay small
FEW_TOKENS = 8
"""That are decoded one by one rather than with all others of their block."""
MAX_EXACT_BF16 = 256
"""Integers up to here are exact in bf16."""
BF16_ROUNDING = 2.0**-18
"""Mean square of the relative error of a product of which one side and the result are rounded to bf16, and some."""
MAX_ROUNDING_SHARE = 0.01
"""Of the error of quantizing, that rounding to bf16 may add."""
OUTLIER_DEVIATIONS = 32.0
"""Values further from the mean, in standard deviations of their channel by the profile, are not transformed."""


def step_of_level(step_log: int, level: int) -> float:
    """Return the quantization step of a level, 1 being the coarsest: 2^(step_log / 16) / 3^(level - 1)."""
    return 2.0 ** (step_log / SCALE_LOGS_PER_OCTAVE) / LEVEL_RATIO ** (level - 1)


def has_bf16_products(device: torch.device) -> bool:
    """Tell whether a device multiplies matrices in bf16 by instructions of its own; a GPU is not asked to."""
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name) is True for name in ("avx512_bf16", "amx_bf16"))


class GroupTransform:
    """The transform of one group of layers, its matrices on one device in fp32.

    Attributes:
        group: of the profile.
        plane_shapes: heads and head dim of each plane.
        rotations: what is undone in each of them.
        mean: `[num_channels]`.
    """

    def __init__(
        self, profile: Profile, group: TransformGroup, device: torch.device, *, may_round: bool = False
    ) -> None:
        """Put the matrices on `device`.

        The analysis matrix is corrected once so that it inverts the synthesis matrix to fp32 accuracy: it is stored in
        fp16, and a component of hundreds of steps would otherwise leak into others.

        Args:
            may_round: the cache has 16 bits per value: where the processor has bf16 products, several times as fast,
                the inverse transform is by these if they lose next to nothing.
        """
        self.group = group
        planes = slice(2 * group.first_layer, 2 * (group.first_layer + group.num_layers))
        self.plane_shapes = profile.plane_shapes[planes]
        self.rotations = profile.rotations[planes]
        self.device = device
        self.mean = group.mean.to(device=device, dtype=torch.float32)
        self._synthesis: torch.Tensor | None = None
        self._expected: dict[tuple[float, int], torch.Tensor] = {}
        self._may_round = may_round and has_bf16_products(device)
        self._rounded_synthesis: torch.Tensor | None = None
        self._may_use_integers = may_round and device.type == "cpu" and has_integer_synthesis()
        self._integers: dict[tuple[float, int], IntegerMatrix | None] = {}
        self._analysis: torch.Tensor | None = None
        self._rounded_analysis: RoundedAnalysis | None = None
        self._byte_analyses: dict[tuple[float, float, int], ByteAnalysis | None] = {}
        if group.analysis is not None:
            # Column after column, so that the first components' are contiguous.
            analysis = group.analysis.T.to(device=device, dtype=torch.float32).contiguous().T
            error = multiply(self.synthesis, analysis)
            error.diagonal().sub_(1)
            # One Newton step: the error of the inverse is squared. It is small, so that fp32 has it well enough.
            self._analysis = (analysis.T - multiply(error.T, analysis.T)).T

    @property
    def synthesis(self) -> torch.Tensor:
        """`[num_components, num_channels]`."""
        if self._synthesis is None:
            self._synthesis = self.group.synthesis.to(device=self.device, dtype=torch.float32)
        return self._synthesis

    @cached_property
    def _deviations(self) -> torch.Tensor:
        """Of the channels, `[num_channels]`."""
        return self.group.variances.to(self.device).sqrt()

    def join(self, cache: KVCache, first_token: int) -> torch.Tensor:
        """Return the vectors of the group's layers, fp32 `[num_tokens, num_channels]`; see `join_planes`.

        Args:
            cache: all layers.
            first_token: the position of the cache's first token.
        """
        return join_planes(self.planes(cache), self.rotations, first_token, self.device)

    def analyze(self, vectors: torch.Tensor, num_components: int | None = None) -> torch.Tensor:
        """Return the components of vectors, fp32 `[num_tokens, num_components]`.

        Args:
            vectors: from `join`, of at most `BLOCK_TOKENS` tokens.
            num_components: only the first so many.
        """
        if self._analysis is None:
            raise ValueError("the profile was loaded without its analysis matrices")
        return multiply(vectors - self.mean, self._analysis[:, :num_components])

    def quantize_in_integers(
        self,
        planes: Sequence[torch.Tensor],
        first_token: int,
        steps: Sequence[float],
        num_coded: Sequence[int],
        num_threads: int = 1,
    ) -> list[torch.Tensor] | None:
        """Find and quantize the components of a block in integers: the same on all processors that can.

        Args:
            planes: the group's, of at most `BLOCK_TOKENS` tokens.
            first_token: the block's first position.
            steps: of the levels.
            num_coded: components of each level.

        Returns:
            As `quantize_components` does; None where integers do not serve: what has no kernels for it, fine steps,
            outliers, and values that are not finite.
        """
        if self._analysis is None or not has_byte_analysis() or not self._takes_integers(planes):
            return None
        matrix = self._find_byte_analysis(steps, num_coded[-1], num_threads)
        if matrix is None:
            return None
        turns = Turns(len(planes[0]), first_token, self.device)
        angles = [turns.undoing_angles(rotation) for rotation in self.rotations]
        values = gather_bytes(matrix, planes, self.rotations, angles, self.mean, num_threads)
        if not values.has_few_excesses or not self._are_usual(values.sizes, len(planes[0])):
            return None
        levels, misfits = multiply_bytes(matrix, values, num_coded, LEVEL_RATIO, num_threads)
        left = misfits.nonzero()[0].tolist() if misfits.any() else []
        if len(left) > FEW_TOKENS:
            return None
        for token in left:
            parts = [plane[token : token + 1] for plane in planes]
            one = self.analyze(join_planes(parts, self.rotations, first_token + token, self.device))
            for level, found in zip(levels, quantize_components(one, steps[0], num_coded), strict=True):
                level[token] = found[0]
        return levels

    def _find_byte_analysis(self, steps: Sequence[float], num_components: int, num_threads: int) -> ByteAnalysis | None:
        """Return the analysis matrix in bytes for some steps; None where rounding it would lose too much."""
        key = steps[0], steps[-1], num_components
        if key not in self._byte_analyses:
            assert self._analysis is not None
            while len(self._byte_analyses) >= MAX_KEPT_STEPS:
                del self._byte_analyses[next(iter(self._byte_analyses))]
            parts = (self._analysis[:, :num_components], self._deviations, steps, num_threads)
            self._byte_analyses[key] = make_byte_analysis(*parts)
        return self._byte_analyses[key]

    def _are_usual(self, sizes: ChannelSizes, num_tokens: int) -> bool:
        """Tell whether no difference from the mean is an outlier; see `replace_outliers`."""
        return sizes.are_within(OUTLIER_DEVIATIONS, self._deviations.numpy(), num_tokens)

    def analyze_block(
        self, block: KVCache, first_token: int, num_components: int, step: float, num_threads: int = 1
    ) -> torch.Tensor:
        """Return the components of a block of a cache, fp32 `[num_tokens, num_components]`.

        Args:
            block: all layers, at most `BLOCK_TOKENS` tokens.
            first_token: the block's first position.
            num_components: only the first so many.
            step: of the finest level; components are no more exact than it needs.
        """
        found = self._analyze_in_passes(block, first_token, num_components, step, num_threads)
        if found is not None:
            return found
        return self.analyze(self.replace_outliers(self.join(block, first_token)), num_components)

    def _analyze_in_passes(
        self, block: KVCache, first_token: int, num_components: int, step: float, num_threads: int
    ) -> torch.Tensor | None:
        """Do what `analyze_block` does in native passes; None where they do not serve."""
        planes = self.planes(block)
        if not CAN_GATHER or self._analysis is None or not self._takes_integers(planes):
            return None
        turns = Turns(block.num_tokens, first_token, self.device)
        angles = [turns.undoing_angles(rotation) for rotation in self.rotations]
        arguments = (planes, self.rotations, angles, self.mean)
        rows, sizes = gather_rows(*arguments, is_bf16=CAN_MULTIPLY_BF16, num_threads=num_threads)
        if not self._are_usual(sizes, block.num_tokens):
            return None
        if not CAN_MULTIPLY_BF16:
            return multiply(torch.as_tensor(rows), self._analysis[:, :num_components])
        if self._rounded_analysis is None:
            self._rounded_analysis = RoundedAnalysis(self._analysis)
        return self._rounded_analysis.multiply(rows, num_components, step, num_threads)

    def replace_outliers(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return vectors whose values far from all that the profile knows are the profile's mean.

        Components would spread such a value's error over all channels of its token; as a value that travels exactly
        it costs nothing but itself.
        """
        distance = (vectors - self.mean).abs_()
        limit = OUTLIER_DEVIATIONS * torch.maximum(self._deviations, usual_size(distance))
        # Not `>`: what is no number is far, too.
        if bool((distance.amax(0) <= limit).all()):
            return vectors
        return torch.where(distance <= limit, vectors, self.mean)

    def synthesize(
        self, components: torch.Tensor, step: float, output: KVCache, first_token: int, num_threads: int = 1
    ) -> None:
        """Write the keys and values that quantized components stand for.

        Args:
            components: int32 `[num_tokens, num_components]`, in steps; the first components, the rest are zero.
            step: the quantization step.
            output: all layers, on the transform's device; only the group's are written.
            first_token: the position of the output's first token.
            num_threads: of the kernels in integers; torch has a number of its own.
        """
        planes = self.planes(output)
        for start in range(0, output.num_tokens, BLOCK_TOKENS):
            block = slice(start, start + BLOCK_TOKENS)
            of_block = [plane[block] for plane in planes]
            self.synthesize_block(components[block], step, of_block, first_token + start, num_threads)

    def synthesize_block(
        self,
        components: torch.Tensor,
        step: float,
        planes: Sequence[torch.Tensor],
        first_token: int,
        num_threads: int = 1,
    ) -> None:
        """Write a block's keys and values, rounded to the planes' dtype; the same for all threads and processors.

        Args:
            components: as in `synthesize`, of at most `BLOCK_TOKENS` tokens.
            planes: the group's.
        """
        matrix = self._find_integers(step, components.shape[1]) if self._takes_integers(planes) else None
        if matrix is None:
            for part, plane in zip(self.reconstruct(components, step, first_token), planes, strict=True):
                plane.copy_(part)
            return
        turns = Turns(len(components), first_token, self.device)
        angles = [turns.angles(rotation) for rotation in self.rotations]
        misfits = synthesize(matrix, components.contiguous(), planes, self.rotations, angles, num_threads)
        left = [token for token, is_left in enumerate(misfits.tolist()) if is_left] if misfits.any() else []
        if len(left) > FEW_TOKENS:
            parts = self.reconstruct(components, step, first_token)
            for part, plane in zip(parts, planes, strict=True):
                plane[left] = part[left].to(plane.dtype)
            return
        if not left:
            return
        # Few: the matrix in floats is not kept for them.
        rows = self.group.first_rows(components.shape[1])
        vectors = multiply(components[left].float() * step, rows, self.mean)
        for token, vector in zip(left, vectors, strict=True):
            for part, plane in zip(self._turn(vector[None], first_token + token), planes, strict=True):
                plane[token : token + 1].copy_(part)

    def decode_block(
        self, components: torch.Tensor, step: float, dtype: torch.dtype, first_token: int, num_threads: int = 1
    ) -> torch.Tensor:
        """Return what a block decodes to, `[num_tokens, num_channels]` of a dtype.

        Args:
            components: as in `synthesize_block`.
        """
        decoded = torch.empty(len(components), self.group.num_channels, dtype=dtype, device=self.device)
        parts = torch.split(decoded, [heads * dim for heads, dim in self.plane_shapes], dim=1)
        planes = [part.view(-1, *shape) for part, shape in zip(parts, self.plane_shapes, strict=True)]
        self.synthesize_block(components, step, planes, first_token, num_threads)
        return decoded

    def measure_block(
        self,
        components: torch.Tensor,
        step: float,
        planes: Sequence[torch.Tensor],
        first_token: int,
        num_threads: int = 1,
    ) -> Measured | None:
        """Return how far a block's values are from what they decode to, without keeping that.

        Args:
            components: as in `synthesize_block`.
            planes: the group's, which are read.

        Returns:
            None where that is not decoded in integers throughout.
        """
        matrix = self._find_integers(step, components.shape[1]) if self._takes_integers(planes) else None
        if matrix is None:
            return None
        turns = Turns(len(components), first_token, self.device)
        angles = [turns.angles(rotation) for rotation in self.rotations]
        return measure_synthesis(matrix, components.contiguous(), planes, self.rotations, angles, num_threads)

    def _takes_integers(self, planes: Sequence[torch.Tensor]) -> bool:
        """Tell whether the kernels in integers can write to these planes."""
        return self._may_use_integers and are_native_planes(planes)

    def _find_integers(self, step: float, num_components: int) -> IntegerMatrix | None:
        """Return the matrix in integers for a step; None where rounding it would lose too much."""
        key = step, num_components
        if key not in self._integers:
            channels = [heads * dim for heads, dim in self.plane_shapes]
            rows = self.group.integer_rows(num_components)
            parts = (rows, self.mean, self._scales()[:num_components], self.group.variances, channels, step)
            while len(self._integers) >= MAX_KEPT_STEPS:
                del self._integers[next(iter(self._integers))]
            self._integers[key] = make_integer_matrix(*parts)
        return self._integers[key]

    def reconstruct(self, components: torch.Tensor, step: float, first_token: int) -> list[torch.Tensor]:
        """Return the keys and values that quantized components stand for, before they are rounded to a dtype.

        Args:
            components: as in `synthesize`, of at most `BLOCK_TOKENS` tokens.

        Returns:
            fp32 `[num_tokens, num_kv_heads, head_dim]` for each plane of the group.
        """
        return self._turn(self._multiply(components, step), first_token)

    def _turn(self, vectors: torch.Tensor, first_token: int) -> list[torch.Tensor]:
        """Return vectors, fp32 `[num_tokens, num_channels]`, as planes turned by their positions."""
        turns = Turns(len(vectors), first_token, self.device)
        parts = torch.split(vectors, [heads * dim for heads, dim in self.plane_shapes], dim=1)
        return [
            turns.apply(part.view(-1, *shape), rotation)
            for part, shape, rotation in zip(parts, self.plane_shapes, self.rotations, strict=True)
        ]

    def _multiply(self, components: torch.Tensor, step: float) -> torch.Tensor:
        """Return the vectors of components, fp32 `[num_tokens, num_channels]`."""
        count = components.shape[1]
        if self._may_round and self._is_rounding_cheap(components, step):
            if self._rounded_synthesis is None:
                self._rounded_synthesis = self.synthesis.bfloat16()
            product = components.to(torch.bfloat16) @ self._rounded_synthesis[:count]
            return torch.add(self.mean, product, alpha=step)
        block = components.to(device=self.device, dtype=torch.float32) * step
        return multiply(block, self.synthesis[:count], self.mean)

    def _is_rounding_cheap(self, components: torch.Tensor, step: float) -> bool:
        """Tell whether these components may be rounded to bf16; larger ones than it has exactly are not usual."""
        if not components.numel():
            return False
        least, largest = torch.aminmax(components)
        is_exact = bool(max(-least, largest) <= MAX_EXACT_BF16)
        return is_exact and self.is_rounding_cheap(step, components.shape[1])

    def is_rounding_cheap(self, step: float, num_components: int) -> bool:
        """Tell whether rounding the matrix and its products to bf16 loses hardly more than quantizing does anyway.

        An error costs the same in every component.
        """
        powers = self._scales().double().square()
        lost = powers.clone()
        lost[:num_components] = lost[:num_components].clamp(max=step**2 / 12)
        rounded = BF16_ROUNDING * powers[:num_components].sum().item()
        return rounded <= MAX_ROUNDING_SHARE * lost.sum().item()

    def count_large(self, step: float, deviation: float) -> int:
        """Return how many components, the first ones, have at least a deviation in steps."""
        return int((self._scales() >= deviation * step).sum())

    def planes(self, cache: KVCache) -> Sequence[torch.Tensor]:
        """Return the planes of a whole cache that are the group's."""
        return cache.planes[2 * self.group.first_layer : 2 * (self.group.first_layer + self.group.num_layers)]

    def expected_errors(self, step: float, num_coded: int) -> torch.Tensor:
        """Return the error to expect of each decoded value, fp32 `[num_channels]`: a standard deviation.

        A coded component is off by that of a uniform quantizer, step / sqrt(12), one that is not coded by its own. Of
        components that the profile leaves out it is known that none is larger than the last one it has. The two dims of
        a rotated pair share the larger of their errors.

        Args:
            num_coded: the first so many components are coded.
        """
        if (step, num_coded) not in self._expected:
            self._expected[step, num_coded] = self._compute_expected_errors(step, num_coded)
        return self._expected[step, num_coded]

    def _compute_expected_errors(self, step: float, num_coded: int) -> torch.Tensor:
        errors = self._scales()
        left_out = errors[-1] * math.sqrt(max(self.group.num_channels / self.group.num_components - 1, 0.0))
        errors[:num_coded] = errors[:num_coded].clamp(max=step / math.sqrt(12))
        # torch gives no type for it.
        norms = cast("torch.Tensor", self.synthesis.norm(dim=0))  # pyright: ignore[reportUnknownMemberType]
        spread = torch.hypot(self._spread(errors), left_out * norms)
        parts: list[torch.Tensor] = []
        split = torch.split(spread, [heads * dim for heads, dim in self.plane_shapes])
        for part, shape, rotation in zip(split, self.plane_shapes, self.rotations, strict=True):
            values = part.view(shape).clone()
            if rotation is not None:
                larger = torch.maximum(values[..., rotation.firsts], values[..., rotation.seconds])
                larger = larger * rotation.attention_scaling
                values[..., rotation.firsts], values[..., rotation.seconds] = larger, larger
            parts.append(values.flatten())
        return torch.cat(parts)

    def _scales(self) -> torch.Tensor:
        """Return the components' standard deviations, fp32 `[num_components]`."""
        return torch.exp2(self.group.scale_logs.to(self.device, torch.float32) / SCALE_LOGS_PER_OCTAVE)

    def _spread(self, component_errors: torch.Tensor) -> torch.Tensor:
        """Return what independent errors of components come to in each channel."""
        return (component_errors.square() @ self.synthesis.square()).sqrt()


def usual_size(sizes: torch.Tensor) -> torch.Tensor:
    """Return the mean size in each channel of a block, `[num_channels]`; zero for a block too short to tell.

    A profile that leaves out most of a channel's components knows too little of it; a few sizes far from the others
    hardly move the mean.
    """
    if len(sizes) < LEAST_TOKENS:
        return torch.zeros_like(sizes[0])
    return sizes.mean(0).nan_to_num(0.0, 0.0, 0.0)


def join_planes(
    planes: Sequence[torch.Tensor], rotations: Sequence[Rotation | None], first_token: int, device: torch.device
) -> torch.Tensor:
    """Return the vectors that a transform works on.

    Args:
        planes: of consecutive layers `[num_tokens, num_heads, head_dim]`, keys then values of each.
        rotations: what is undone in each of the planes.
        first_token: the position of the planes' first token.
        device: where the vectors belong.

    Returns:
        fp32 `[num_tokens, num_channels]`.
    """
    turns = Turns(planes[0].shape[0], first_token, device)
    parts = [
        turns.undo(plane.to(device=device, dtype=torch.float32), rotation).flatten(1)
        for plane, rotation in zip(planes, rotations, strict=True)
    ]
    return torch.cat(parts, dim=1)


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
