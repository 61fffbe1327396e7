"""Profiles in a store, by their hash: for clients that have no folder of them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping

from cachegen.errors import BitstreamError
from cachegen.methods import read_profile
from cachegen.methods.profile_files import PROFILE_NAME, AnyProfile
from cachegen.store.store import Store


def profile_object(profile_hash: str, name: str) -> str:
    """Return the name of a profile's file in a store.

    Args:
        profile_hash: 64 hex digits.
    """
    return f"profiles/{profile_hash}/{name}"


def profile_objects(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return what a store keeps of a profile, by the objects' names, in the order of writing.

    Args:
        files: those that decoding needs, profile.json, which names the others, last.
    """
    profile_hash = hashlib.sha256(files[PROFILE_NAME]).hexdigest()
    return {profile_object(profile_hash, name): content for name, content in files.items()}


class ProfileFetcher:
    """Fetches profiles, and keeps the last ones in memory: a hash stands for the same profile in any store."""

    def __init__(self, num_kept: int = 2) -> None:
        self._num_kept = num_kept
        self._kept: dict[str, AnyProfile] = {}
        self._lock = threading.Lock()

    def fetch(self, store: Store, profile_hash: str) -> AnyProfile:
        """Return a profile; see `fetch_profile`."""
        with self._lock:
            profile = self._kept.get(profile_hash)
        # Not under the lock: a store that is slow is nobody else's business.
        profile = profile or fetch_profile(store, profile_hash)
        with self._lock:
            self._kept.pop(profile_hash, None)
            self._kept[profile_hash] = profile  # the last one used is the last
            while len(self._kept) > self._num_kept:
                del self._kept[next(iter(self._kept))]
        return profile


def fetch_profile(store: Store, profile_hash: str) -> AnyProfile:
    """Return a profile, for decoding.

    Args:
        profile_hash: 64 hex digits.

    Raises:
        StoreError: it is not there, or cannot be read.
        BitstreamError: it is damaged, or another one.
        UnsupportedVersionError: it was written by a later release.
    """
    profile = read_profile(
        lambda name, max_bytes: store.get(profile_object(profile_hash, name), max_bytes),
        store.describe(f"profiles/{profile_hash}"),
    )
    if profile.profile_hash != profile_hash:
        raise BitstreamError(
            "is not the profile of its name", path=store.describe(profile_object(profile_hash, PROFILE_NAME))
        )
    return profile
