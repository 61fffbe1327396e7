"""Which profile to use: the one that is named, or the one of a hash among those at hand."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from cachegen.config import TransformConfig
from cachegen.errors import CacheGenError, ConfigError, InputError
from cachegen.files import read_file
from cachegen.profile import MAX_PROFILE_BYTES, PROFILE_NAME, Profile, load_profile
from cachegen.transform_format import MAX_STEP_LOG


def profile_finder(
    named: str | os.PathLike[str] | None, shelf: str | os.PathLike[str], *, model_fingerprint: str | None = None
) -> Callable[[bytes], Profile]:
    """Return a function from a profile's hash (32 bytes) to the profile.

    Args:
        named: a profile's folder that the user gave; None searches the shelf.
        shelf: a folder of profiles.
        model_fingerprint: load the profiles of this model, 64 hex digits, at once, as a server that has the model in
            memory would; those that cannot be read are reported when they are asked for.
    """
    in_memory: dict[bytes, Profile] = {}
    if model_fingerprint is not None and named is None:
        for path in sorted(Path(shelf).glob(f"*/{PROFILE_NAME}")):
            with contextlib.suppress(CacheGenError):
                content = read_file(path, MAX_PROFILE_BYTES)
                if model_fingerprint.encode() in content:
                    in_memory[hashlib.sha256(content).digest()] = load_profile(path.parent)

    def find(profile_hash: bytes) -> Profile:
        """Load the profile; where one is named, whether it is the right one is the codec's gate.

        Raises:
            InputError: there is none, or as `load_profile`.
        """
        if named is not None:
            return load_profile(named)
        if profile_hash in in_memory:
            return in_memory[profile_hash]
        for path in sorted(Path(shelf).glob(f"*/{PROFILE_NAME}")):
            content = b""
            with contextlib.suppress(CacheGenError):  # another profile of the shelf, or a pipe there
                content = read_file(path, MAX_PROFILE_BYTES)
            if hashlib.sha256(content).digest() == profile_hash:
                return load_profile(path.parent)
        raise InputError(
            f"{shelf}: no profile there is {profile_hash.hex()[:12]}, which the document was encoded with: "
            "give its folder with --profile"
        )

    return find


def choose_step(config: TransformConfig, profile: Profile) -> int:
    """Return 16 log2 of level 1's step, as the config gives it or as its target and the profile's curve do.

    Raises:
        InputError: a target is given and the profile has no curve.
        ConfigError: the step is out of the format's range.
    """
    step_log = config.step_log
    if step_log is None:
        step_log = profile.choose_step(bits_per_value=config.target_bits, kl=config.target_kl)
    if abs(step_log) > MAX_STEP_LOG:
        raise ConfigError(f"{config.source}: the step 2^({step_log} / 16) is out of range")
    return step_log
