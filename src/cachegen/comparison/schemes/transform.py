"""This project's transform codec, with the model's profile: one level per step, and one document of several levels.

The bytes are those of the files. `-256` are those of chunks of 256 tokens, the others those of a single chunk. Nothing
is fitted here: run_calibration.py made the profile, from other text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cachegen.calibration.own import make_own_profile
from cachegen.coder.cpu_kernels import CPU
from cachegen.comparison.schemes.base import ByteCount, Recoded, SavedCache, decode_files
from cachegen.errors import InputError
from cachegen.kv_cache import KVCache
from cachegen.methods.transform.config import TransformConfig
from cachegen.methods.transform.encoder import TransformEncoder
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.transform import SINK_TOKENS
from cachegen.pipeline.chunking import plan_chunks

STEP_LOGS = (28, 20, 12, 4, -8, -24, -40, -66, -90)
"""Of one level each: 16 log2 of the step."""
OWN_STEP_LOGS = (24, 16, 8, 0, -16, -32)
"""The same with the document's own profile, whose steps are in deviations of a plane."""
LEVELS_STEP_LOG = 24
"""Of level 1 of the document of three levels."""
NUM_LEVELS = 3


SMALL_CHUNK = 256
"""Tokens of a chunk that can be looked up and loaded by itself; vLLM's and LMCache's stores have such."""


@dataclass
class TransformScheme:
    """One document per step, as one chunk and in chunks of 256 tokens."""

    profile: Profile
    name: str = "transform"
    settings: tuple[str, ...] = tuple(f"step {step_log:+d}" for step_log in STEP_LOGS)

    @property
    def identity(self) -> str:
        return f"{self.name} {self.profile.profile_hash} {SMALL_CHUNK}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Do nothing: the profile was made before."""

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        step_log = int(setting.split()[1])
        whole, num_bytes = recode(saved, self.profile, step_log, 1, 1, saved.cache.num_tokens)
        chunked, chunked_bytes = recode(saved, self.profile, step_log, 1, 1, SMALL_CHUNK)
        # Blocks of another length may round sums otherwise, and a component to the other side of a tie.
        for a, b in zip(whole.planes, chunked.planes, strict=True):
            if (a.float() - b.float()).abs().mean() > 1e-3 * a.float().abs().mean():
                raise AssertionError(f"{setting} does not decode from small chunks to what it does from one")
        counts = {self.name: num_bytes, f"{self.name}-{SMALL_CHUNK}": chunked_bytes}
        return Recoded(whole, {name: ByteCount(count, 0, self.profile.num_bytes) for name, count in counts.items()})


@dataclass
class TransformSinksScheme:
    """One document per step, its first four tokens recomputed from text after decoding, as the scripts do.

    Their bytes are counted all the same; their recomputation is exact, so the saved cache has them.
    """

    profile: Profile
    name: str = "transform-sinks"
    settings: tuple[str, ...] = tuple(f"step {step_log:+d}" for step_log in STEP_LOGS)

    @property
    def identity(self) -> str:
        return f"{self.name} {self.profile.profile_hash} {SINK_TOKENS}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Do nothing: the profile was made before."""

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        num_tokens = saved.cache.num_tokens
        cache, num_bytes = recode(saved, self.profile, int(setting.split()[1]), 1, 1, num_tokens)
        _restore_sinks(cache, saved)
        return Recoded(cache, {self.name: ByteCount(num_bytes, 0, self.profile.num_bytes)})


@dataclass
class TransformOwnScheme:
    """One document per step, with a profile of its own whose bytes are counted; its first tokens are recomputed."""

    name: str = "transform-own"
    settings: tuple[str, ...] = tuple(f"step {step_log:+d}" for step_log in OWN_STEP_LOGS)

    @property
    def identity(self) -> str:
        return f"{self.name} {SINK_TOKENS}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Do nothing: each document has its own."""

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        num_tokens, step_log = saved.cache.num_tokens, int(setting.split()[1])
        config = TransformConfig(None, step_log, None, None)
        own = make_own_profile(config, saved.cache, saved.metadata, [num_tokens], CPU, max_share=math.inf)
        if own is None:
            raise InputError(f"`schemes`: {num_tokens} tokens are too few for {self.name}")
        cache, num_bytes = recode(saved, own.profile, step_log, 1, 1, num_tokens)
        _restore_sinks(cache, saved)
        return Recoded(cache, {self.name: ByteCount(num_bytes + own.profile.num_bytes, own.profile.num_bytes)})


@dataclass
class TransformLevelsScheme:
    """One document of levels that refine each other, used up to one of them."""

    profile: Profile
    name: str = "transform-levels"
    settings: tuple[str, ...] = tuple(f"levels 1 to {level}" for level in range(1, NUM_LEVELS + 1))

    @property
    def identity(self) -> str:
        return f"{self.name} {self.profile.profile_hash} {LEVELS_STEP_LOG}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Do nothing: the profile was made before."""

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        level = int(setting.split()[-1])
        cache, num_bytes = recode(saved, self.profile, LEVELS_STEP_LOG, NUM_LEVELS, level, saved.cache.num_tokens)
        return Recoded(cache, {self.name: ByteCount(num_bytes, 0, self.profile.num_bytes)})


def _restore_sinks(cache: KVCache, saved: SavedCache) -> None:
    """Make the first tokens what recomputing them from text gives: they are exact then."""
    for plane, source in zip(cache.planes, saved.cache.planes, strict=True):
        plane[:SINK_TOKENS] = source[:SINK_TOKENS]


def recode(
    saved: SavedCache, profile: Profile, step_log: int, num_levels: int, level: int, chunk_size: int
) -> tuple[KVCache, int]:
    """Encode a cache and decode levels 1 to `level`; also returns the bytes of their files and the tables file."""
    num_tokens = saved.cache.num_tokens
    chunk_tokens = plan_chunks(num_tokens, None, chunk_size)
    encoder = TransformEncoder(
        saved.cache, saved.metadata, profile, chunk_tokens, step_log=step_log, num_levels=num_levels
    )
    return decode_files(encoder, saved.cache, level)
