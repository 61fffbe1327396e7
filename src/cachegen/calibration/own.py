"""A profile of a single document, for a model that has none: made of the document's own cache, without the model.

It is part of the document and costs bytes there, so it holds only what the document's step codes. What matters to the
model is not known without gradients; all values count alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from cachegen.calibration.calibrate import CalibrationContext, calibrate, plane_shapes_of
from cachegen.calibration.settings import CalibrationSettings
from cachegen.errors import InputError
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.base import MethodConfig
from cachegen.methods.transform.profile import PROFILE_NAME, SCALE_LOGS_PER_OCTAVE, Profile, load_profile

LAYERS_PER_GROUP = 2
STEP_DEVIATIONS = 1.2
"""The step, in root mean squares of the values' distance from their means."""
TOKENS_PER_CHANNEL = 2
"""Of a group of layers: a document with fewer tokens pays more for its bases than they save."""


def use_own_profile(
    config: MethodConfig,
    cache: KVCache,
    metadata: ContextMetadata,
    folder: Path,
    *,
    overwrite: bool = False,
) -> MethodConfig | None:
    """Give a config that lacks a profile the document's own.

    Args:
        config: one that `needs_profile`; a step that it names is kept, a target is not: nothing is
            known of what a step loses.
        folder: where the profile is kept; one that is there already and is this document's is used again.
        overwrite: replace another profile there.

    Returns:
        The config; None where the document is too short for a profile of its own to pay.

    Raises:
        OutputError: another profile is there.
        InputError: the cache holds NaN or infinity, or a file of a profile there cannot be read.
    """
    step_log = config.named_step_log
    if step_log is None:
        step_log = round(SCALE_LOGS_PER_OCTAVE * math.log2(STEP_DEVIATIONS * _root_mean_square(cache)))
    settings = _choose_settings(cache, 2.0 ** (step_log / SCALE_LOGS_PER_OCTAVE))
    if settings is None:
        return None
    context = CalibrationContext("the KV cache", cache, metadata)
    profile = _find(folder, context, settings)
    if profile is None:
        profile = calibrate([context], None, settings, device=torch.device("cpu"), work_folder=folder)
        profile.save(folder, overwrite=overwrite)
        profile = load_profile(folder, for_encoding=True)
    return config.with_own_profile(profile, step_log)


def measure_own_profile(folder: Path) -> int:
    """Return the bytes of a profile that decoding needs."""
    return load_profile(folder).num_bytes


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
    """Return the document's own profile where it was made before."""
    if not (folder / PROFILE_NAME).exists():
        return None
    profile = load_profile(folder, for_encoding=True)
    made_of = profile.calibration
    is_own = made_of.get("token_hashes") == [context.token_hash] and made_of.get("settings") == dataclasses.asdict(
        settings
    )
    return profile if is_own and profile.model_fingerprint == context.metadata.model_fingerprint else None
