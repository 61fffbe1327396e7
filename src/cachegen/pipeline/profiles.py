"""Which profile to use: the one that is named, or the one of a hash among those at hand."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cachegen.errors import CacheGenError, InputError
from cachegen.files import read_file
from cachegen.methods import load_profile, read_profile
from cachegen.methods.profile_files import MAX_PROFILE_BYTES, PROFILE_NAME, AnyProfile, folder_reader
from cachegen.methods.transform import profile_storage
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import ANALYSIS_NAME, SYNTHESIS_NAME

OWN_PROFILE_FOLDER = "profile"
"""Of a profile that is a document's own, in the folder of its files."""
MADE_OF_CACHE = "cache_hash"
"""In the calibration record of a document's own profile: which cache it was made of."""


def profile_finder(
    named: str | os.PathLike[str] | AnyProfile | None,
    places: Sequence[str | os.PathLike[str]],
    *,
    model_fingerprint: str | None = None,
) -> Callable[[bytes], AnyProfile]:
    """Return a function from a profile's hash (32 bytes) to the profile.

    Args:
        named: a profile or its folder, as the user gave it; None searches the places.
        places: folders that may hold profiles: a model's folder, which has its own in `profile`, a folder of models, or
            a folder of profiles; a GGUF file stands for its folder. A place that does not exist holds none.
        model_fingerprint: load the profiles of this model, 64 hex digits, at once, as a server that has the model in
            memory would; those that cannot be read are reported when they are asked for.
    """
    in_memory: dict[bytes, AnyProfile] = {}
    if model_fingerprint is not None and named is None:
        for path in list_profiles(places):
            with contextlib.suppress(CacheGenError):
                content = read_file(path, MAX_PROFILE_BYTES)
                if model_fingerprint.encode() in content:
                    in_memory[hashlib.sha256(content).digest()] = load_profile(path.parent)

    def find(profile_hash: bytes) -> AnyProfile:
        """Load the profile; where one is named, whether it is the right one is the codec's gate.

        Raises:
            InputError: there is none, or as `load_profile`.
        """
        if isinstance(named, (str, os.PathLike)):
            return load_profile(named)
        if named is not None:
            return named
        if profile_hash in in_memory:
            return in_memory[profile_hash]
        for path in list_profiles(places):
            content = b""
            with contextlib.suppress(CacheGenError):  # another model's profile, or a pipe there
                content = read_file(path, MAX_PROFILE_BYTES)
            if hashlib.sha256(content).digest() == profile_hash:
                return load_profile(path.parent)
        raise InputError(
            f"{', '.join(map(str, places))}: no profile there is {profile_hash.hex()[:12]}, which the document was "
            "encoded with: give its folder with `profile`"
        )

    return find


def find_profile_of_model(
    places: Sequence[str | os.PathLike[str]], model_fingerprint: str, *, needs_curve: bool = False
) -> Profile | None:
    """Return the first profile of a model for method `transform` that can be read; None where there is none.

    It is loaded for encoding.

    Args:
        places: as for `profile_finder`.
        model_fingerprint: 64 hex digits.
        needs_curve: pass by those without one, which tell no step for a target.
    """
    for path in list_profiles(places):
        with contextlib.suppress(CacheGenError):
            if model_fingerprint.encode() in read_file(path, MAX_PROFILE_BYTES):
                profile = profile_storage.load_profile(path.parent, for_encoding=True)
                if profile.model_fingerprint == model_fingerprint and (profile.curve or not needs_curve):
                    return profile
    return None


def read_decoding_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the files of a profile that decoding needs, by their names, profile.json last.

    Raises:
        InputError, BitstreamError: as `load_profile`.
    """
    files: dict[str, bytes] = {}

    read_from_folder = folder_reader(folder)

    def read(name: str, max_bytes: int) -> bytes:
        files[name] = read_from_folder(name, max_bytes)
        return files[name]

    read_profile(read, os.fspath(folder)).check()
    return {**{name: files[name] for name in files if name != PROFILE_NAME}, PROFILE_NAME: files[PROFILE_NAME]}


def read_own_profile(folder: Path, profile_hash: bytes) -> dict[str, bytes]:
    """Return the files that decoding needs of a document's own profile; empty where it has none.

    Args:
        folder: the document's.
        profile_hash: 32 bytes, as the document names it.

    Raises:
        InputError, BitstreamError: it is damaged.
    """
    record = _read_own_record(folder, profile_hash)
    return {} if record is None else read_decoding_files(folder / OWN_PROFILE_FOLDER)


def measure_own_profile(folder: Path, profile_hash: bytes) -> int:
    """Return the bytes that decoding reads of a document's own profile; 0 where it has none.

    Args:
        folder, profile_hash: as for `read_own_profile`.
    """
    record = _read_own_record(folder, profile_hash)
    if record is not None:
        with contextlib.suppress(OSError):
            return len(record) + (folder / OWN_PROFILE_FOLDER / SYNTHESIS_NAME).stat().st_size
    return 0


def _read_own_record(folder: Path, profile_hash: bytes) -> bytes | None:
    """Return profile.json of a document's own profile; None where there is none, or another one."""
    try:
        record = read_file(folder / OWN_PROFILE_FOLDER / PROFILE_NAME, MAX_PROFILE_BYTES)
    except InputError:
        return None
    return record if hashlib.sha256(record).digest() == profile_hash else None


def keep_own_profile(profile: Profile, folder: Path) -> None:
    """Write a document's own profile beside its files, in the place of another.

    Args:
        folder: the document's, which the caller has claimed.

    Raises:
        OutputError: it cannot be written.
    """
    profile.save(folder / OWN_PROFILE_FOLDER, overwrite=True)


def remove_own_profile(folder: Path) -> None:
    """Remove a document's own profile, and its folder unless that holds something else; a model's profile stays."""
    place = folder / OWN_PROFILE_FOLDER
    with contextlib.suppress(CacheGenError, OSError):
        if MADE_OF_CACHE not in profile_storage.load_profile(place).calibration:
            return
        for name in (PROFILE_NAME, ANALYSIS_NAME, SYNTHESIS_NAME):
            (place / name).unlink(missing_ok=True)
        place.rmdir()


def list_profiles(places: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    """Yield the paths of profile.json of the profiles in some places.

    Args:
        places: as for `profile_finder`.
    """
    for place in places:
        folder = Path(place).parent if os.path.isfile(place) else Path(place)
        for pattern in ("profile", "*", "*/profile"):
            yield from sorted(folder.glob(f"{pattern}/{PROFILE_NAME}"))
