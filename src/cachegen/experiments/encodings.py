"""The encodings that experiments on files compare: a method and its setting under the name that tables show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachegen.api import CompressedCache, compress
from cachegen.comparison.schemes import SavedCache
from cachegen.experiments.bench import Bench
from cachegen.methods.transform.profile import Profile
from cachegen.pipeline.decode import EncodedFolder

_STEP_LOG = 12  # about the loss of llama.cpp's q4_0, on the models that were measured


@dataclass(frozen=True)
class Encoding:
    """A method and its setting.

    Attributes:
        config: for `compress`; None is method `cachegen` at the original's bins for 7B models.
        profile: the model's, where the method takes one.
    """

    name: str
    config: Mapping[str, Any] | None
    profile: Profile | None = None


def choose_encodings(bench: Bench) -> list[Encoding]:
    """Return what is compared; method `transform` where the model has a profile."""
    found = [
        Encoding("uniform, 8 bits", {"method": "uniform", "bits": 8}),
        Encoding("lossless", {"method": "lossless"}),
        Encoding("cachegen, 32/16 bins", None),
    ]
    if bench.profile is not None:
        config = {"method": "transform", "step_log": _STEP_LOG}
        found.append(Encoding(f"transform, step {_STEP_LOG:+d}", config, bench.profile))
    return found


def encode(bench: Bench, saved: SavedCache, encoding: Encoding, chunk_tokens: int) -> CompressedCache:
    """Return a cache encoded in chunks of `chunk_tokens`."""
    return compress(
        saved.cache,
        saved.metadata.token_ids,
        bench.load_for_prefill(),
        encoding.config,
        profile=encoding.profile,
        chunk_tokens=chunk_tokens,
        block_size=saved.metadata.block_size,
        num_threads=bench.num_threads,
    )


def open_encoding(bench: Bench, folder: Path) -> EncodedFolder:
    """Open the files that an encoding was saved to, to be decoded as the scripts do."""
    return EncodedFolder(folder, bench.num_threads, find_profile=lambda _: bench.profile)
