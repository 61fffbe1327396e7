"""Coders that lose nothing: this project's method `lossless`, and what general compressors make of the same bits.

`lossless` is a document's files, its tables file included; `-profile` the same with a profile fitted on the calibration
caches. `-zlib` (level 6) and `-lzma` (level 1) compress each plane
by itself, all high bytes before all low ones, which suits them better than the values in order. `-order-0` is no coder
but a bound: the entropy of each plane's values, as if its distribution cost nothing.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from cachegen.calibration.calibrate import CalibrationContext
from cachegen.calibration.predictor import make_predictor
from cachegen.comparison.schemes.base import ByteCount, Recoded, SavedCache, decode_files
from cachegen.kv_cache import KVCache, hash_planes
from cachegen.methods.lossless.codec import LosslessEncoder
from cachegen.methods.lossless.predictor import Predictor
from cachegen.pipeline.chunking import DEFAULT_CHUNK_SIZE, plan_chunks


class ExactScheme:
    """See the module."""

    name = "lossless"
    settings: tuple[str, ...] = ("exact",)
    identity = f"lossless {DEFAULT_CHUNK_SIZE} profile"

    def __init__(self) -> None:
        self._predictor: Predictor | None = None

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Fit the profile of `lossless-profile`."""
        contexts = [
            CalibrationContext(f"calibration cache {index}", saved.cache, saved.metadata)
            for index, saved in enumerate(calibration)
        ]
        self._predictor = make_predictor(contexts, notes={})

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        if self._predictor is None:
            raise ValueError("`fit` must be called first")
        cache = saved.cache
        output, num_bytes, tables_bytes = _recode(saved, None)
        also, profile_bytes, profile_tables_bytes = _recode(saved, self._predictor)
        if hash_planes(also) != hash_planes(output):
            raise AssertionError("both models must decode to the same bits")
        zlib_bytes, lzma_bytes, entropy_bits = 0, 0, 0.0
        for plane in cache.planes:
            values = plane.contiguous().view(torch.uint16).numpy().ravel()
            halves = (values >> 8).astype(np.uint8).tobytes() + values.astype(np.uint8).tobytes()
            zlib_bytes += len(zlib.compress(halves, 6))
            lzma_bytes += len(lzma.compress(halves, preset=1))
            counts = np.unique(values, return_counts=True)[1]
            entropy_bits -= float((counts * np.log2(counts / len(values))).sum())
        counts = {
            self.name: ByteCount(num_bytes, tables_bytes),
            "lossless-profile": ByteCount(profile_bytes, profile_tables_bytes, self._predictor.num_bytes),
            "lossless-order-0": ByteCount(round(entropy_bits / 8)),
            "lossless-lzma": ByteCount(lzma_bytes),
            "lossless-zlib": ByteCount(zlib_bytes),
        }
        return Recoded(output, counts)


def _recode(saved: SavedCache, predictor: Predictor | None) -> tuple[KVCache, int, int]:
    """Encode a cache and decode it; also returns the bytes of all files and of the tables file."""
    cache = saved.cache
    chunk_tokens = plan_chunks(cache.num_tokens, None, DEFAULT_CHUNK_SIZE)
    encoder = LosslessEncoder(cache, saved.metadata, chunk_tokens, predictor=predictor)
    return *decode_files(encoder, cache), len(encoder.tables_file)
