"""With which profile a document is encoded whose config names none: the model's, one of its own, or none at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cachegen.calibration.own import make_own_profile
from cachegen.coder.kernels import Kernels
from cachegen.errors import ConfigError
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods import default_config
from cachegen.methods.base import MethodConfig
from cachegen.methods.transform.profile import Profile
from cachegen.pipeline.profiles import find_profile_of_model


@dataclass(frozen=True)
class ChosenProfile:
    """With what a document is encoded.

    Attributes:
        config: complete; of another method where no profile pays.
        own: the document's own profile, which is to be kept with its files; None where it has none.
        is_kept: whether that stands in the document's folder already, whole.
        note: what was chosen, a line for people; empty where there was nothing to choose.
    """

    config: MethodConfig
    own: Profile | None = None
    is_kept: bool = False
    note: str = ""


def choose_profile(
    config: MethodConfig,
    cache: KVCache,
    metadata: ContextMetadata,
    chunk_tokens: Sequence[int],
    kernels: Kernels,
    *,
    places: Sequence[str | os.PathLike[str]],
    num_threads: int,
    folder: Path | None = None,
    overwrite: bool = False,
    first_stored: Sequence[int] = (),
) -> ChosenProfile:
    """Complete a config that needs a profile and names none.

    Args:
        config: any; one that lacks nothing is returned as it is.
        places: where the model's profile may be, as for `profile_finder`.
        folder, overwrite, first_stored: as for `make_own_profile`.

    Raises:
        OutputError, InputError: as `make_own_profile`.
        ConfigError: the document is too short for a profile of its own, and several levels were asked for.
    """
    if not config.needs_profile:
        return ChosenProfile(config)
    needs_curve = config.named_step_log is None
    found = find_profile_of_model(places, metadata.model_fingerprint, needs_curve=needs_curve)
    if found is not None:
        note = f"profile {found.profile_hash[:12]} of the model"
        return ChosenProfile(config.with_flags({"profile": found}), note=note)
    own = make_own_profile(
        config,
        cache,
        metadata,
        chunk_tokens,
        kernels,
        num_threads=num_threads,
        folder=folder,
        overwrite=overwrite,
        first_stored=first_stored,
    )
    if own is not None:
        note = f"the document's own profile, {own.profile.num_bytes:,} bytes"
        return ChosenProfile(own.config, own.profile, own.is_kept, note)
    num_tokens = sum(chunk_tokens)
    if config.num_levels > 1:
        raise ConfigError(
            f"{num_tokens} tokens are too few for a profile of their own, which `levels` needs: give `profile`"
        )
    note = f"{num_tokens} tokens are too few for a profile of their own: coded with method cachegen instead"
    return ChosenProfile(default_config(cache.num_layers), note=note)
