"""What calibration learnt about a model: the transform's bases, its components' scales, and the measured curve."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cachegen.errors import InputError
from cachegen.kv_cache import RotaryEmbedding, hash_rotary_embeddings, rotations_by_rule
from cachegen.methods.profile_files import check_same_model, refuse_other
from cachegen.methods.transform.integer_rows import DeflatedRows, IntegerRows
from cachegen.rotation import PlaneRotations

SCALE_LOGS_PER_OCTAVE = 16
"""Scales and steps are compared as integers: 16 times their binary logarithm, rounded."""


@dataclass(frozen=True)
class TransformGroup:
    """Consecutive layers whose keys and values are transformed together, per token.

    Per token the vector x is, layer after layer, the keys and the values with their rotations undone. It is
    coded as components c = (x - mean) @ analysis and rebuilt as mean + c @ synthesis.

    Attributes:
        first_layer, num_layers: the group's layers.
        mean: fp32 `[num_channels]`, of the vectors.
        stored_synthesis: the matrix `synthesis`; of a saved profile as the file has it.
        scale_logs: int16 `[num_components]`, not increasing: 16 log2 of each component's standard deviation.
        analysis: fp16 `[num_channels, num_components]`; None where only decoding was asked for.
        channel_exponents: int8 `[num_channels]`, the logarithms of the channels' powers of two; None: all zero.
        stored_variances: the channels' `variances`; None where they are to be found.
    """

    first_layer: int
    num_layers: int
    mean: torch.Tensor
    stored_synthesis: torch.Tensor | IntegerRows | DeflatedRows
    scale_logs: torch.Tensor
    analysis: torch.Tensor | None = None
    channel_exponents: torch.Tensor | None = None
    stored_variances: torch.Tensor | None = None

    @property
    def synthesis(self) -> torch.Tensor:
        """The synthesis matrix, fp32 `[num_components, num_channels]`; of a saved profile made anew each time.

        Raises:
            BitstreamError: the file holds something else.
        """
        return self.first_rows()

    def first_rows(self, num_components: int | None = None) -> torch.Tensor:
        """Return the first rows of `synthesis`; None: all of them."""
        stored = self.stored_synthesis
        if isinstance(stored, torch.Tensor):
            return stored[:num_components].float()
        return self.integer_rows(num_components).multiply()

    def integer_rows(self, num_components: int | None = None) -> IntegerRows:
        """Return the synthesis matrix in integers, which that of a saved profile is; made anew each time.

        Args:
            num_components: only the first so many rows.

        Raises:
            BitstreamError: as `synthesis`.
        """
        stored = self.stored_synthesis
        if isinstance(stored, DeflatedRows):
            return stored.inflate(num_components)
        if not isinstance(stored, IntegerRows):
            return IntegerRows.of(stored[:num_components], self.channel_exponents)
        return stored.first(num_components)

    @property
    def variances(self) -> torch.Tensor:
        """The variance of each channel that the components have together, fp32 `[num_channels]`."""
        if self.stored_variances is not None:
            return self.stored_variances
        powers = torch.exp2(self.scale_logs.float() / (SCALE_LOGS_PER_OCTAVE / 2))
        return powers @ self.synthesis.square()

    @property
    def num_components(self) -> int:
        return self.stored_synthesis.shape[0]

    @property
    def num_channels(self) -> int:
        return self.stored_synthesis.shape[1]


@dataclass(frozen=True)
class CurvePoint:
    """One measured point: what a quantization step costs and gives.

    Attributes:
        step_log: 16 log2 of the step.
        bits_per_value: of whole documents, every byte but the profile's counted.
        kl: in nats per token, mean over the measured contexts.
    """

    step_log: int
    bits_per_value: float
    kl: float


@dataclass(frozen=True)
class Profile:
    """A model's profile.

    Attributes:
        model_fingerprint: SHA-256 in hex, as in a KV cache file.
        rotary_embeddings: the model's.
        plane_shapes: (num_kv_heads, head_dim) of the keys and the values of layer 0, of layer 1, ...
        groups: in layer order, covering all layers.
        curve: in descending order of step; empty where nothing was measured.
        calibration: what the profile was made from, for people.
        profile_hash: SHA-256 in hex of profile.json.
        num_bytes: of the files that decoding needs.
        plane_rotations: what is undone in each plane; None: as `rotations_by_rule` says.
    """

    model_fingerprint: str
    rotary_embeddings: tuple[RotaryEmbedding, ...]
    plane_shapes: tuple[tuple[int, int], ...]
    groups: tuple[TransformGroup, ...]
    curve: tuple[CurvePoint, ...]
    calibration: dict[str, Any]
    profile_hash: str = ""
    num_bytes: int = 0
    plane_rotations: PlaneRotations | None = None

    @property
    def rotations(self) -> PlaneRotations:
        """What is undone in each plane."""
        if self.plane_rotations is not None:
            return self.plane_rotations
        return rotations_by_rule(self.rotary_embeddings, [dim for _, dim in self.plane_shapes])

    @property
    def plane_means(self) -> list[torch.Tensor]:
        """The mean of each plane with its rotation undone, fp32 `[num_kv_heads, head_dim]`."""
        means = torch.cat([group.mean for group in self.groups])
        parts = torch.split(means, [heads * dim for heads, dim in self.plane_shapes])
        return [part.view(shape) for part, shape in zip(parts, self.plane_shapes, strict=True)]

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What documents of the profile compute of it alone and share, as long as it lives."""
        return {}

    @property
    def rope_hash(self) -> str:
        """SHA-256 in hex of the rotary embeddings; see `hash_rotary_embeddings`."""
        return hash_rotary_embeddings(self.rotary_embeddings)

    @property
    def num_layers(self) -> int:
        return len(self.plane_shapes) // 2

    def __repr__(self) -> str:
        components = sum(group.num_components for group in self.groups)
        channels = sum(group.num_channels for group in self.groups)
        return (
            f"<{type(self).__name__} {self.profile_hash[:12]}: {self.num_layers} layers, {components:,} components of "
            f"{channels:,} channels, {self.num_bytes:,} bytes to decode>"
        )

    def check(self) -> None:
        """See `AnyProfile.check`: inflate the synthesis matrices."""
        for group in self.groups:
            _ = group.integer_rows()

    def channels_of(self, first_layer: int, num_layers: int) -> int:
        """Return the channels of keys and values of consecutive layers together."""
        planes = self.plane_shapes[2 * first_layer : 2 * (first_layer + num_layers)]
        return sum(heads * dim for heads, dim in planes)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the profile's files into a folder, each whole or not at all.

        Args:
            folder: is made if need be; `compress` and `load` take it as `profile`, the scripts as `--profile`.
            overwrite: replace another profile that is there.

        Raises:
            OutputError: another profile is there, or the folder cannot be written.
        """
        from cachegen.methods.transform.profile_storage import save_profile  # which reads profiles, too

        if not overwrite:
            refuse_other(folder, self.profile_hash)
        save_profile(folder, self)

    def describe(self) -> dict[str, object]:
        """Return what there is to say of it, for people."""
        curve = self.curve
        return {
            "method": "transform",
            "profile_hash": self.profile_hash,
            "model_id": self.calibration.get("model_id"),
            "model_fingerprint": self.model_fingerprint,
            "can_encode": all(group.analysis is not None for group in self.groups),
            "num_layers": self.num_layers,
            "num_groups": len(self.groups),
            "num_components": sum(group.num_components for group in self.groups),
            "num_channels": sum(group.num_channels for group in self.groups),
            "bytes": self.num_bytes,
            "finest_bits_per_value": curve[-1].bits_per_value if curve else None,
            "finest_kl": curve[-1].kl if curve else None,
        }

    def choose_step(self, *, bits_per_value: float | None = None, kl: float | None = None) -> int:
        """Return the largest step that keeps a target, by interpolation in the measured curve.

        Args:
            bits_per_value: the target; the step is the smallest that costs at most so many bits.
            kl: the target instead, in nats per token; the step is the largest that keeps at most this divergence.

        Returns:
            16 log2 of the step.

        Raises:
            InputError: the profile has no curve.
            ValueError: not exactly one target is given, or it is not positive.
        """
        if (bits_per_value is None) == (kl is None):
            raise ValueError("exactly one of `bits_per_value` and `kl` must be given")
        if len(self.curve) < 2:
            raise InputError("the profile has no measured curve to choose a step from; make it with run_calibration.py")
        target = bits_per_value if bits_per_value is not None else kl
        if target is None or not target > 0:
            raise ValueError(f"the target must be positive, got {target}")
        costs = [(p.bits_per_value if bits_per_value is not None else p.kl, p.step_log) for p in self.curve]
        costs.sort(key=lambda cost: cost[1])
        step = _interpolate(math.log(target), [math.log(max(c, 1e-12)) for c, _ in costs], [s for _, s in costs])
        # Fewer bits: a larger step; a smaller divergence: a smaller one.
        return math.ceil(step) if bits_per_value is not None else math.floor(step)

    def expect(self, step_log: int) -> CurvePoint | None:
        """Return the interpolated curve at a step; None where the profile has no curve or the step lies outside."""
        points = sorted(self.curve, key=lambda point: point.step_log)
        for low, high in itertools.pairwise(points):
            if low.step_log <= step_log <= high.step_log:
                share = (step_log - low.step_log) / max(high.step_log - low.step_log, 1)

                def between(a: float, b: float, share: float = share) -> float:
                    return math.exp((1 - share) * math.log(max(a, 1e-12)) + share * math.log(max(b, 1e-12)))

                return CurvePoint(step_log, between(low.bits_per_value, high.bits_per_value), between(low.kl, high.kl))
        return None


def check_profile(profile: Profile, model_fingerprint: str, rope_hash: str, source: str) -> None:
    """Refuse a profile of another model.

    Raises:
        MismatchError: naming the field that differs.
    """
    check_same_model(
        source,
        ("model_fingerprint", profile.model_fingerprint, model_fingerprint),
        ("rope_hash", profile.rope_hash, rope_hash),
    )


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[int]) -> float:
    """Piecewise-linear y at x over points in any monotone order; the ends beyond them are extended flat."""
    points = sorted(zip(xs, ys, strict=True))
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
