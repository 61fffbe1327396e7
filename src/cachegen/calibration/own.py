"""A profile of a single document, for a model that has none: made of the document's own cache, without the model.

It is part of the document and costs bytes there, so it holds only what the document's step codes. What matters to the
model is not known without gradients; all values count alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cachegen.calibration.calibrate import CalibrationContext, calibrate, plane_shapes_of
from cachegen.calibration.settings import CalibrationSettings
from cachegen.errors import CacheGenError, InputError
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.base import MethodConfig
from cachegen.methods.transform.profile import SCALE_LOGS_PER_OCTAVE, Profile, load_profile, pack_profile

LAYERS_PER_GROUP = 2
STEP_DEVIATIONS = 1.2
"""The step, in root mean squares of the values' distance from their means."""
TOKENS_PER_CHANNEL = 2
"""Of a group of layers: a document with fewer tokens pays more for its bases than they save."""


@dataclass(frozen=True)
class OwnProfile:
    """A document's own profile.

    Attributes:
        config: with the profile and the step that it was made for.
        profile: loaded for encoding.
        is_kept: whether it stands in its folder already, whole.
    """

    config: MethodConfig
    profile: Profile
    is_kept: bool


def make_own_profile(
    config: MethodConfig, cache: KVCache, metadata: ContextMetadata, folder: Path, *, overwrite: bool = False
) -> OwnProfile | None:
    """Give a config that lacks a profile the document's own; nothing is written.

    Args:
        config: one that `needs_profile`; a step that it names is kept, a target is not: nothing is known of what a step
            loses.
        folder: where the profile will be kept; a whole one that is there already and is this document's is used again.
        overwrite: another profile may be there.

    Returns:
        None where the document is too short for a profile of its own to pay.

    Raises:
        OutputError: another profile is there.
        InputError: the cache holds NaN or infinity.
    """
    step_log = config.named_step_log
    if step_log is None:
        step_log = round(SCALE_LOGS_PER_OCTAVE * math.log2(STEP_DEVIATIONS * _root_mean_square(cache)))
    settings = _choose_settings(cache, 2.0 ** (step_log / SCALE_LOGS_PER_OCTAVE))
    if settings is None:
        return None
    context = CalibrationContext("the KV cache", cache, metadata)
    kept = _find(folder, context, settings)
    if kept is not None:
        return OwnProfile(config.with_own_profile(kept, step_log), kept, is_kept=True)
    made = calibrate([context], None, settings, device=torch.device("cpu"), work_folder=folder)
    profile = pack_profile(made)[1]
    if not overwrite:
        profile.refuse_other(folder)
    return OwnProfile(config.with_own_profile(profile, step_log), profile, is_kept=False)


def _root_mean_square(cache: KVCache) -> float:
    """Return the root mean square of the values' distance from their channel's mean."""
    total, count = 0.0, 0
    for number, plane in enumerate(cache.planes):
        variance = plane.double().var(0, correction=0)
        if not torch.isfinite(variance).all():
            raise InputError(
                f"the KV cache holds NaN or infinity ({'values' if number % 2 else 'keys'} of layer {number // 2})"
            )
        total, count = total + variance.sum().item(), count + variance.numel()
    return max(math.sqrt(total / count), 1e-6)


def _choose_settings(cache: KVCache, step: float) -> CalibrationSettings | None:
    """Return how the profile is made: of as many layers a group as the document is long enough for."""
    widths = [heads * dim for heads, dim in plane_shapes_of(cache)]
    channels = [keys + values for keys, values in zip(widths[::2], widths[1::2], strict=True)]
    for layers in range(LAYERS_PER_GROUP, 0, -1):
        groups: Sequence[int] = [sum(channels[i : i + layers]) for i in range(0, len(channels), layers)]
        if cache.num_tokens >= TOKENS_PER_CHANNEL * max(groups):
            return CalibrationSettings(layers_per_group=layers, weights="none", finest_step=step)
    return None


def _find(folder: Path, context: CalibrationContext, settings: CalibrationSettings) -> Profile | None:
    """Return the document's own profile where it was made before and is whole."""
    try:
        profile = load_profile(folder, for_encoding=True)
    except CacheGenError:
        return None
    expected = {"token_hashes": [context.token_hash], "settings": dataclasses.asdict(settings)}
    is_own = all(profile.calibration.get(name) == value for name, value in expected.items())
    metadata = context.metadata
    is_own = is_own and profile.plane_rotations == metadata.plane_rotations
    return profile if is_own and profile.model_fingerprint == metadata.model_fingerprint else None
