"""A profile of a single document, for a model that has none: made of the document's own cache, without the model.

It is part of the document and costs bytes there, so it holds only what the document's step codes. What matters to the
model is not known without gradients; all planes count alike. Whether it pays against method cachegen depends on how
long the document is, and is told from predicted sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.calibration.basis import LEAST_ROW_LEVELS, ROUNDING_SHARE
from cachegen.calibration.calibrate import (
    CalibrationContext,
    calibrate,
    measure_covariances,
    plan_groups,
    plane_shapes_of,
    weigh_planes,
)
from cachegen.calibration.settings import CalibrationSettings
from cachegen.coder.component_tables import component_frequencies, plan_level
from cachegen.coder.kernels import Kernels
from cachegen.errors import CacheGenError
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods import default_config, make_encoder
from cachegen.methods.base import MethodConfig
from cachegen.methods.profile_files import refuse_other
from cachegen.methods.transform.profile import SCALE_LOGS_PER_OCTAVE, Profile
from cachegen.methods.transform.profile_storage import load_profile, pack_profile
from cachegen.methods.transform.transform import LEVEL_RATIO_LOG, SINK_TOKENS, step_of_level
from cachegen.pipeline.profiles import MADE_OF_CACHE, OWN_PROFILE_FOLDER

STEP_LOG = 8
"""16 log2 of the step, in deviations of a plane, where the config names none."""
MAX_GROUP_CHANNELS = 2048
"""Of a group of several layers."""
MAX_SHARE = 0.95
"""Of the bytes of method cachegen, that a document with a profile of its own is predicted to take at most."""
_LEAST_TOKENS = 64
_BYTES_PER_STREAM = 100


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
    is_kept: bool = False


def make_own_profile(
    config: MethodConfig,
    cache: KVCache,
    metadata: ContextMetadata,
    chunk_tokens: Sequence[int],
    kernels: Kernels,
    *,
    num_threads: int = 1,
    folder: Path | None = None,
    overwrite: bool = False,
    max_share: float = MAX_SHARE,
    first_stored: Sequence[int] = (),
) -> OwnProfile | None:
    """Give a config that lacks a profile the document's own; nothing is written.

    Args:
        config: one that `needs_profile`; a step that it names is kept, a target is not: nothing is known of what a step
            loses.
        cache: all of it; the tokens of `chunk_tokens` are what will be encoded.
        folder: the document's. A whole profile there that was made of the same cache for the same step is used again.
        overwrite: another profile may be there.
        max_share: of the bytes of method `cachegen`, that profile and files are predicted to take at most.
        first_stored: as for `make_encoder`.

    Returns:
        None where they are predicted to take more, or there are fewer tokens than channels.

    Raises:
        OutputError: another profile is there.
        InputError: the cache holds NaN or infinity.
    """
    step_log = STEP_LOG if config.named_step_log is None else config.named_step_log
    covered = cache.slice(0, sum(chunk_tokens))
    context = CalibrationContext("the KV cache", covered, _of_tokens(metadata, covered))
    settings = CalibrationSettings(weights="none", finest_step=step_of_level(step_log, config.num_levels))
    place = None if folder is None else folder / OWN_PROFILE_FOLDER
    kept = None if place is None else _find(place, context, metadata, settings)
    if kept is not None:
        return OwnProfile(config.with_own_profile(kept, step_log), kept, is_kept=True)
    # Layers of two windows in a group share what they have in common, but all their tokens are stored.
    choices: list[tuple[float, int | None, CalibrationContext]] = []
    for windows in (metadata.windows, None) if any(first_stored) else (None,):
        parted = dataclasses.replace(context, metadata=dataclasses.replace(context.metadata, windows=windows))
        layers, num_bytes = _choose_layers(parted, chunk_tokens, step_log, config.num_levels, first_stored)
        choices.append((num_bytes, layers, parted))
    num_bytes, layers, context = min(choices, key=lambda choice: choice[0])
    if layers is None:
        return None
    if max_share < math.inf:
        default_bytes = _predict_default(cache, metadata, chunk_tokens, num_threads, kernels, first_stored)
        if num_bytes > max_share * default_bytes:
            return None
    settings = dataclasses.replace(settings, layers_per_group=layers)
    made = calibrate([context], None, settings, device=torch.device("cpu"), work_folder=Path())
    made.calibration[MADE_OF_CACHE] = metadata.cache_hash
    profile = pack_profile(made)[1]
    if place is not None and not overwrite:
        refuse_other(place, profile.profile_hash)
    return OwnProfile(config.with_own_profile(profile, step_log), profile)


def _of_tokens(metadata: ContextMetadata, cache: KVCache) -> ContextMetadata:
    """Return the metadata of a cache's first tokens, which no file's hash is of."""
    return dataclasses.replace(metadata, token_ids=metadata.token_ids[: cache.num_tokens], cache_hash=None)


def _choose_layers(
    context: CalibrationContext,
    chunk_tokens: Sequence[int],
    step_log: int,
    num_levels: int,
    first_stored: Sequence[int],
) -> tuple[int | None, float]:
    """Return with how many layers a group profile and files are smallest, and how many bytes these are predicted to be.

    Returns:
        None where there are too few tokens for any.
    """
    cache = context.cache
    shapes = plane_shapes_of(cache)
    outline = Profile("", (), shapes, (), (), {})
    best: tuple[int | None, float] = (None, float("inf"))
    for layers in range(1, cache.num_layers + 1):
        groups = plan_groups(shapes, layers, context.metadata.windows)
        widths = [outline.channels_of(*group) for group in groups]
        is_too_short = cache.num_tokens - SINK_TOKENS < max(*widths, _LEAST_TOKENS)
        if is_too_short or (layers > 1 and max(widths) > MAX_GROUP_CHANNELS):
            break
        _, covariances = measure_covariances([context], groups, widths, torch.device("cpu"))
        planes = [shapes[2 * first : 2 * (first + count)] for first, count in groups]
        absent = [min(first_stored[first : first + count], default=0) for first, count in groups]
        num_bytes = sum(
            _predict_group(covariance, weigh_planes(of_group, covariance), num_tokens, step_log, num_levels)
            for covariance, of_group, num_tokens in zip(
                covariances, planes, (sum(chunk_tokens) - count for count in absent), strict=True
            )
        )
        num_bytes += len(groups) * _BYTES_PER_STREAM * len(chunk_tokens)
        if num_bytes > best[1]:
            break  # the basis grows with the group, what it saves grows less and less
        best = layers, num_bytes
    return best


def _predict_group(
    covariance: torch.Tensor, weights: torch.Tensor, num_tokens: int, step_log: int, num_levels: int
) -> float:
    """Return the bytes that a group's part of profile and files will take, but for the ends of streams.

    Args:
        covariance: fp64 `[num_channels, num_channels]`.
        weights: fp64 `[num_channels]`.
        num_tokens: that are stored of the group.
    """
    roots, width = weights.sqrt(), len(weights)
    variances = torch.linalg.eigvalsh(roots[:, None] * covariance * roots).flip(0).clamp_min(1e-60)
    logs = torch.round(0.5 * SCALE_LOGS_PER_OCTAVE * variances.log2()).clamp(-(1 << 14), 1 << 14)
    finest_log = step_log - LEVEL_RATIO_LOG * (num_levels - 1)
    coding = plan_level(logs.to(torch.int16).numpy(), finest_log, None)
    bits = _table_bits()[coding.table_indices] + coding.low_bits
    # Elements of an orthogonal matrix are about normal; they are rounded to steps as `basis` has them, and DEFLATE
    # takes a bit at least for each.
    step = ROUNDING_SHARE**0.5 * step_of_level(step_log, num_levels)
    levels = (variances[: len(bits)].sqrt() / step).clamp_min(LEAST_ROW_LEVELS / 3)
    matrix_bits = width * (levels.log2() + 2.05).clamp_min(1.2).sum().item()
    total = num_tokens * float(bits.sum()) + matrix_bits + 40 * width + 24 * len(bits)
    return total / 8


def _table_bits() -> NDArray[np.float64]:
    """Return the entropy of each table of components, in bits."""
    shares = component_frequencies().astype(np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1)


def _predict_default(
    cache: KVCache,
    metadata: ContextMetadata,
    chunk_tokens: Sequence[int],
    num_threads: int,
    kernels: Kernels,
    first_stored: Sequence[int],
) -> float:
    """Return the bytes of the document by the method that needs no profile, from those of its fullest chunk."""
    config = default_config(cache.num_layers)
    encoder = make_encoder(
        config, cache, metadata, chunk_tokens, num_threads=num_threads, kernels=kernels, first_stored=first_stored
    )
    num_values = encoder.document.header.stored_values_of_chunks
    fullest = num_values.index(max(num_values))
    num_bytes = sum(map(len, encoder.encode_chunk(fullest)))
    return len(encoder.tables_file) + num_bytes * sum(num_values) / num_values[fullest]


def _find(
    place: Path, context: CalibrationContext, metadata: ContextMetadata, settings: CalibrationSettings
) -> Profile | None:
    """Return the document's own profile where it was made before and is whole."""
    try:
        profile = load_profile(place, for_encoding=True)
    except CacheGenError:
        return None
    made_of: dict[str, Any] = profile.calibration
    found = made_of.get("settings")
    expected = dataclasses.asdict(settings)
    is_own = (
        metadata.cache_hash is not None
        and made_of.get(MADE_OF_CACHE) == metadata.cache_hash
        and made_of.get("token_hashes") == [context.token_hash]
        and isinstance(found, dict)
        and {**found, "layers_per_group": None} == expected
        and profile.model_fingerprint == metadata.model_fingerprint
        and profile.plane_rotations == metadata.plane_rotations
    )
    return profile if is_own else None
