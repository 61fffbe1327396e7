"""The inverse transform of several groups of layers at once, as a GPU wants it: one product for all of them.

Components stay where the decoder has put them; they become bf16, which has integers up to 256 exactly, and are
multiplied on tensor cores with sums in fp32. The first components, which may be larger, have a second digit. Where
rounding to bf16 would be noticed, all is in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cachegen.kv_cache import KVCache
from cachegen.methods.rotary import Turns
from cachegen.methods.transform.transform import MAX_EXACT_BF16, GroupTransform

BATCH_TOKENS = 2048  # at a time, so that temporaries stay small
_LARGEST_DEVIATION = 32.0
"""In steps: a component that varies less than this is not expected beyond 256 steps, and has one digit."""
_DIGIT_BITS = 8
_RETURNS_FP32 = hasattr(torch.ops.aten.bmm, "dtype")
"""Whether this torch leaves products of bf16 in the fp32 that they are summed in."""


@dataclass(frozen=True)
class _Matrices:
    """The synthesis matrices of all groups for one step.

    Attributes:
        products: `[num_groups, num_components + num_large, num_channels]`, the last rows being those of high digits.
        num_large: components with a second digit.
    """

    products: torch.Tensor
    num_large: int

    @property
    def is_rounded(self) -> bool:
        return self.products.dtype == torch.bfloat16


def can_join(groups: Sequence[GroupTransform]) -> bool:
    """Tell whether groups are alike: layers, heads and rotations of all keys, and of all values."""
    first = groups[0]
    return all(
        group.plane_shapes == first.plane_shapes and group.rotations == first.rotations for group in groups
    ) and all(
        first.plane_shapes[i] == first.plane_shapes[i % 2] and first.rotations[i] == first.rotations[i % 2]
        for i in range(len(first.plane_shapes))
    )


class BatchedSynthesis:
    """The inverse transform of groups that `can_join` takes, on their device."""

    def __init__(self, groups: Sequence[GroupTransform], *, may_round: bool) -> None:
        """Put the groups' means side by side; matrices follow when a step is known.

        Args:
            may_round: the cache has 16 bits per value.
        """
        self._groups = groups
        self._may_round = may_round and _multiplies_bf16(groups[0].device)
        self._means = torch.stack([group.mean for group in groups])[:, None]
        self._matrices: dict[tuple[float, tuple[int, ...]], _Matrices] = {}

    def synthesize(
        self, components: torch.Tensor, num_coded: Sequence[int], step: float, output: KVCache, first_token: int
    ) -> torch.Tensor | None:
        """Queue the writing of the keys and values that quantized components stand for.

        Args:
            components: int32 `[num_groups, num_tokens, at least the most of num_coded]`, zero behind a group's last.
            num_coded: of each group.
            step: the quantization step.
            output: all layers; only the groups' are written.
            first_token: the position of the output's first token.

        Returns:
            A bool on the device, to be read once all has run: some component was too large to be exact, so that all is
            to be written once more by `GroupTransform.synthesize`. None where that cannot be.
        """
        matrices = self._find_matrices(step, num_coded)
        is_beyond: torch.Tensor | None = None
        for start in range(0, output.num_tokens, BATCH_TOKENS):
            stop = min(start + BATCH_TOKENS, output.num_tokens)
            block = components[:, start:stop]
            if matrices.is_rounded:
                found = _find_beyond(block, matrices.num_large)
                is_beyond = found if is_beyond is None else is_beyond | found
            product = _multiply(_to_digits(block, matrices), matrices.products)
            self._place(
                torch.add(self._means, product, alpha=step, out=product), output.slice(start, stop), first_token + start
            )
        return is_beyond

    def _find_matrices(self, step: float, num_coded: Sequence[int]) -> _Matrices:
        key = step, tuple(num_coded)
        if key not in self._matrices:
            self._matrices.clear()  # a document has few steps, and mostly one is used
            self._matrices[key] = self._make_matrices(step, num_coded)
        return self._matrices[key]

    def _make_matrices(self, step: float, num_coded: Sequence[int]) -> _Matrices:
        pairs = list(zip(self._groups, num_coded, strict=True))
        is_rounded = self._may_round and all(group.is_rounding_cheap(step, count) for group, count in pairs)
        most = max(num_coded)
        num_large = max((group.count_large(step, _LARGEST_DEVIATION) for group in self._groups), default=0)
        num_large = min(num_large, most) if is_rounded else 0
        dtype = torch.bfloat16 if is_rounded else torch.float32
        channels = self._means.shape[2]
        products = torch.zeros(len(pairs), most + num_large, channels, dtype=dtype, device=self._means.device)
        for target, (group, count) in zip(products, pairs, strict=True):
            target[:count] = group.synthesis[:count]
            large = min(num_large, count)
            target[most : most + large] = target[:large] * (1 << _DIGIT_BITS)
        return _Matrices(products, num_large)

    def _place(self, vectors: torch.Tensor, output: KVCache, first_token: int) -> None:
        """Turn vectors, fp32 `[num_groups, num_tokens, num_channels]`, and round them into the groups' planes."""
        first = self._groups[0]
        turns = Turns(output.num_tokens, first_token, vectors.device)
        num_layers, begin = len(first.plane_shapes) // 2, 0
        widths = [heads * dim for heads, dim in first.plane_shapes[:2]]
        num_groups, num_tokens = vectors.shape[:2]
        layers = vectors.view(num_groups, num_tokens, num_layers, sum(widths))
        for kind in range(2):
            heads, dim = first.plane_shapes[kind]
            # [num_groups, num_layers, num_tokens, heads, dim]
            part = layers[..., begin : begin + widths[kind]].transpose(1, 2)
            part = part.view(num_groups, num_layers, num_tokens, heads, dim)
            begin += widths[kind]
            turned = turns.apply(part, first.rotations[kind])
            planes = [plane for group in self._groups for plane in group.planes(output)[kind::2]]
            for plane, values in zip(planes, turned.flatten(0, 1), strict=True):
                plane.copy_(values)


def _to_digits(components: torch.Tensor, matrices: _Matrices) -> torch.Tensor:
    """Return components as the matrices' rows want them."""
    if not matrices.is_rounded:
        return components.to(torch.float32)
    if not matrices.num_large:
        return components.to(torch.bfloat16)
    large = components[..., : matrices.num_large]
    high = (large + (1 << _DIGIT_BITS - 1)) >> _DIGIT_BITS
    low = large - (high << _DIGIT_BITS)
    digits = [low, components[..., matrices.num_large :], high]
    return torch.cat([digit.to(torch.bfloat16) for digit in digits], dim=-1)


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right for each group, in fp32."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.device.type == "cuda" and _RETURNS_FP32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    if left.device.type == "cuda":
        return torch.bmm(left, right).float()  # rounds the product to bf16
    return torch.bmm(left.float(), right.float())  # the products are exact, as on a GPU


def _find_beyond(components: torch.Tensor, num_large: int) -> torch.Tensor:
    """Tell, on the device, whether digits of components are beyond what bf16 has exactly."""
    found = (components[..., num_large:].abs() > MAX_EXACT_BF16).any()
    if num_large:
        found = found | (components[..., :num_large].abs() >= MAX_EXACT_BF16 << _DIGIT_BITS).any()
    return found


def _multiplies_bf16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
