"""The inverse transform of several groups of layers at once, as a GPU wants it: one product for all of them.

Components stay where the decoder has put them; they become bf16, which has integers up to 256 exactly, and are
multiplied on tensor cores with sums in fp32. The first components, which may be larger, have a second digit. Where
rounding to bf16 would be noticed, all is in fp32.

What is before and behind the product is a device's kernels', where it has them, or torch's. The integers remain as they
are beside their digits: a level refines them, and where they turn out too large they are multiplied once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cachegen.coder.kernels import Angles, SynthesisKernels
from cachegen.format import round_up
from cachegen.kv_cache import KVCache
from cachegen.methods.rotary import Turns, apply_rotation
from cachegen.methods.transform.transform import MAX_EXACT_BF16, GroupTransform
from cachegen.rotation import Rotation

BATCH_TOKENS = 2048  # at a time, so that temporaries stay small
ANGLE_TOKENS = 16384
"""Angles of so many tokens are computed at once, for the chunks to come: 8 MiB for 64 pairs of dims."""
ROW_COMPONENTS = 8
"""Rows of bf16 are best multiples of 16 bytes: for the kernels, and for products on tensor cores."""
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
        self._means = torch.stack([group.mean for group in groups])
        self._matrices: dict[tuple[float, tuple[int, ...], int], _Matrices] = {}
        self._turns: tuple[range, Turns] | None = None

    def synthesize(
        self,
        components: torch.Tensor,
        num_coded: Sequence[int],
        step: float,
        output: KVCache,
        first_token: int,
        kernels: SynthesisKernels | None = None,
    ) -> Callable[[], bool] | None:
        """Queue the writing of the keys and values that quantized components stand for.

        Args:
            components: int32 `[num_groups, num_tokens, at least the most of num_coded]`, zero behind a group's last;
                best a multiple of `ROW_COMPONENTS`.
            num_coded: of each group.
            step: the quantization step.
            output: all layers; only the groups' are written.
            first_token: the position of the output's first token.
            kernels: of the device; None: torch's.

        Returns:
            A function that waits until all has run, and tells whether some component was too large to be exact, so that
            all is to be written once more by `GroupTransform.synthesize`. None where that cannot be.
        """
        kernels = kernels if kernels is not None else TorchSynthesis()
        matrices = self._find_matrices(step, num_coded, components.shape[2])
        beyond = torch.zeros(1, dtype=torch.int32, device=components.device) if matrices.is_rounded else None
        rotations = self._groups[0].rotations[:2]
        for start in range(0, output.num_tokens, BATCH_TOKENS):
            stop = min(start + BATCH_TOKENS, output.num_tokens)
            block, part = components[:, start:stop], output.slice(start, stop)
            if beyond is None:
                digits = block.to(torch.float32)
            else:
                shape = (*block.shape[:2], block.shape[2] + matrices.num_large)
                digits = torch.empty(shape, dtype=torch.bfloat16, device=block.device)
                kernels.split_digits(block, matrices.num_large, digits, beyond)
            product = _multiply(digits, matrices.products)
            planes = [plane for group in self._groups for plane in group.planes(part)]
            angles = [self._find_angles(rotation, first_token + start, stop - start) for rotation in rotations]
            kernels.place_vectors(product, self._means, step, planes, rotations, angles)
        return kernels.start_reading(beyond) if beyond is not None else None

    def _find_angles(self, rotation: Rotation | None, first_token: int, num_tokens: int) -> Angles | None:
        """Return the angles of some tokens, out of those of a longer run that tokens before them have begun."""
        if rotation is None:
            return None
        stop, kept = first_token + num_tokens, self._turns
        if kept is None or first_token < kept[0].start or stop > kept[0].stop:
            run = range(first_token, max(stop, first_token + ANGLE_TOKENS))
            kept = self._turns = run, Turns(len(run), first_token, self._means.device)
        run, turns = kept
        cosines, sines = turns.unscaled_angles(rotation)
        begin = first_token - run.start
        return cosines[begin : begin + num_tokens], sines[begin : begin + num_tokens]

    def _find_matrices(self, step: float, num_coded: Sequence[int], depth: int) -> _Matrices:
        key = step, tuple(num_coded), depth
        if key not in self._matrices:
            self._matrices.clear()  # a document has few steps, and mostly one is used
            self._matrices[key] = self._make_matrices(step, num_coded, depth)
        return self._matrices[key]

    def _make_matrices(self, step: float, num_coded: Sequence[int], depth: int) -> _Matrices:
        """Return the matrices; their rows behind a group's last component are zero, up to `depth` of them."""
        pairs = list(zip(self._groups, num_coded, strict=True))
        is_rounded = self._may_round and all(group.is_rounding_cheap(step, count) for group, count in pairs)
        num_large = max((group.count_large(step, _LARGEST_DEVIATION) for group in self._groups), default=0)
        num_large = min(round_up(num_large, ROW_COMPONENTS), depth) if is_rounded else 0
        dtype = torch.bfloat16 if is_rounded else torch.float32
        channels = self._means.shape[1]
        products = torch.zeros(len(pairs), depth + num_large, channels, dtype=dtype, device=self._means.device)
        for target, (group, count) in zip(products, pairs, strict=True):
            target[:count] = group.synthesis[:count]
            large = min(num_large, count)
            target[depth : depth + large] = target[:large] * (1 << _DIGIT_BITS)
        return _Matrices(products, num_large)


class TorchSynthesis:
    """See `cachegen.coder.kernels.SynthesisKernels`: by passes of torch's, on any device."""

    def split_digits(
        self, components: torch.Tensor, num_large: int, digits: torch.Tensor, beyond: torch.Tensor
    ) -> None:
        """See `SynthesisKernels`."""
        beyond |= _find_beyond(components, num_large)
        large = components[..., :num_large]
        high = (large + (1 << _DIGIT_BITS - 1)) >> _DIGIT_BITS
        low = large - (high << _DIGIT_BITS)
        torch.cat([part.to(torch.bfloat16) for part in (low, components[..., num_large:], high)], dim=-1, out=digits)

    def start_reading(self, beyond: torch.Tensor) -> Callable[[], bool]:
        """See `SynthesisKernels`."""
        return lambda: bool(beyond.item())

    def place_vectors(
        self,
        product: torch.Tensor,
        means: torch.Tensor,
        step: float,
        planes: Sequence[torch.Tensor],
        rotations: Sequence[Rotation | None],
        angles: Sequence[Angles | None],
    ) -> None:
        """See `SynthesisKernels`."""
        vectors = torch.add(means[:, None], product, alpha=step, out=product)
        num_groups, num_tokens = vectors.shape[:2]
        num_layers, begin = len(planes) // (2 * num_groups), 0
        widths = [plane.shape[1] * plane.shape[2] for plane in planes[:2]]
        layers = vectors.view(num_groups, num_tokens, num_layers, sum(widths))
        for kind, (rotation, turned) in enumerate(zip(rotations, angles, strict=True)):
            heads, dim = planes[kind].shape[1:]
            # [num_groups, num_layers, num_tokens, heads, dim]
            part = layers[..., begin : begin + widths[kind]].transpose(1, 2)
            part = part.view(num_groups, num_layers, num_tokens, heads, dim)
            begin += widths[kind]
            if rotation is not None and turned is not None:
                part = apply_rotation(part, rotation, turned)
            for plane, values in zip(planes[kind::2], part.flatten(0, 1), strict=True):
                plane.copy_(values)


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
