"""This project's transform codec, with the model's profile: one level per step, and one document of several levels.

The bytes are those of the files. Nothing is fitted here: run_profiling.py made the profile, from other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cachegen.evaluation.schemes.base import ByteCount, Recoded, SavedCache
from cachegen.kv_cache import from_planes, hash_token_prefixes
from cachegen.profile import Profile
from cachegen.transform_codec import TransformEncoder, decode_component_chunk

STEP_LOGS = (28, 20, 12, 4, -8, -24, -40)
"""Of one level each: 16 log2 of the step."""
LEVELS_STEP_LOG = 24
"""Of level 1 of the document of three levels."""
NUM_LEVELS = 3


@dataclass
class TransformScheme:
    """One document per step."""

    profile: Profile
    chunk_size: int | None = None
    name: str = "transform"

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(f"step {step_log:+d}" for step_log in STEP_LOGS)

    @property
    def identity(self) -> str:
        return f"{self.name} {self.profile.profile_hash} {self.chunk_size}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Do nothing: the profile was made before."""

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        return _recode(saved, self.profile, int(setting.split()[1]), 1, 1, self.chunk_size, self.name)


@dataclass
class TransformLevelsScheme:
    """One document of levels that refine each other, used up to one of them."""

    profile: Profile
    name: str = "transform-levels"

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(f"levels 1 to {level}" for level in range(1, NUM_LEVELS + 1))

    @property
    def identity(self) -> str:
        return f"{self.name} {self.profile.profile_hash} {LEVELS_STEP_LOG}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Do nothing: the profile was made before."""

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        return _recode(saved, self.profile, LEVELS_STEP_LOG, NUM_LEVELS, int(setting.split()[-1]), None, self.name)


def _recode(
    saved: SavedCache,
    profile: Profile,
    step_log: int,
    num_levels: int,
    level: int,
    chunk_size: int | None,
    name: str,
) -> Recoded:
    """Encode a cache, decode levels 1 to `level` of it, and count their files and the tables file."""
    num_tokens = saved.cache.num_tokens
    size = chunk_size or num_tokens
    chunk_tokens = [min(size, num_tokens - start) for start in range(0, num_tokens, size)]
    encoder = TransformEncoder(
        saved.cache, saved.metadata, profile, chunk_tokens, step_log=step_log, num_levels=num_levels
    )
    output = from_planes([torch.empty(plane.shape, dtype=plane.dtype) for plane in saved.cache.planes])
    num_bytes, start = len(encoder.tables_file), 0
    for index, count in enumerate(chunk_tokens):
        contents = [b"".join(encoder.encode_chunk(index, number)) for number in range(1, level + 1)]
        token_hash = hash_token_prefixes(saved.metadata.token_ids, [start + count])[0]
        decode_component_chunk(
            contents,
            encoder.document,
            output.slice(start, start + count),
            first_token=start,
            token_hash=bytes.fromhex(token_hash),
        )
        num_bytes += sum(map(len, contents))
        start += count
    return Recoded(output, {name: ByteCount(num_bytes, 0, profile.num_bytes)})
