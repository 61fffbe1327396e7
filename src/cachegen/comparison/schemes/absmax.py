"""Quantization by the largest magnitude of a token's vector: uniform bits, and CacheGen's bins by layer group.

The bytes are those of this project's files. `uniform` packs the symbols, the others entropy code the same symbols:
`-rans` with the document's tables, `-profile` with tables from calibration caches, so that a document carries none.
`cachegen-original` is what the original's released code sends: one arithmetic code per channel and 4096 tokens, and in
each document a table of 16-bit cumulative frequencies per layer and channel, num_bins + 1 of them.

Source: Liu et al., SIGCOMM 2024, section 5.2, and its released code; docs/format.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from cachegen.coder import cpu
from cachegen.comparison.schemes.base import ByteCount, Recoded, SavedCache, decode_files, tables_of_counts
from cachegen.format import Coder, PlaneLayout
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods import parse_chunk
from cachegen.methods.absmax.codec import AbsmaxEncoder, build_chunk
from cachegen.methods.absmax.config import AbsmaxConfig, LayerGroup

_CDF_ENTRY_BYTES = 2


class _AbsmaxScheme:
    """Encodes one quantization with several coders and checks that they decode to the same values."""

    name: str = ""
    settings: tuple[str, ...] = ()
    variants: ClassVar[dict[str, tuple[Coder, bool]]]
    """Per method name its coder, and whether its tables come from calibration caches."""

    def __init__(self) -> None:
        self._profile: dict[str, tuple[cpu.Tables, int]] = {}

    @property
    def identity(self) -> str:
        return f"{self.name} {self.variants}"

    def config(self, setting: str, num_layers: int) -> AbsmaxConfig:
        raise NotImplementedError

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        for setting in self.settings:
            counts, planes = 0, ()
            for saved in calibration:
                planes = self._encoder(saved, setting, Coder.RANS).document.header.planes
                counts = counts + cpu.measure(saved.cache, planes)[1].astype(np.int64)
            sizes = np.repeat([plane.alphabet_size for plane in planes], [plane.num_channels for plane in planes])
            self._profile[setting] = tables_of_counts(np.asarray(counts), sizes)

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        decoded, counts = None, {}
        for method, (coder, from_profile) in self.variants.items():
            if from_profile:
                cache, counts[method] = self._recode_with_profile(saved, setting)
            else:
                cache, counts[method] = self._recode_with_own_tables(saved, setting, coder)
            if decoded is not None and not all(map(torch.equal, cache.planes, decoded.planes)):
                raise AssertionError(f"{method} {setting} does not decode to what the other coders do")
            decoded = cache
        if decoded is None:
            raise AssertionError(f"{self.name} has no coder")
        return Recoded(decoded, counts)

    def _encoder(self, saved: SavedCache, setting: str, coder: Coder) -> AbsmaxEncoder:
        config = self.config(setting, saved.cache.num_layers)
        return AbsmaxEncoder(saved.cache, saved.metadata, config, [saved.cache.num_tokens], coder)

    def _recode_with_own_tables(self, saved: SavedCache, setting: str, coder: Coder) -> tuple[KVCache, ByteCount]:
        encoder = self._encoder(saved, setting, coder)
        output, num_bytes = decode_files(encoder, saved.cache)
        header = encoder.document.header
        tables_bytes = _original_tables_bytes(header.planes) if coder is Coder.AC else header.tables_bytes
        return output, ByteCount(num_bytes - header.tables_bytes + tables_bytes, tables_bytes)

    def _recode_with_profile(self, saved: SavedCache, setting: str) -> tuple[KVCache, ByteCount]:
        tables, profile_bytes = self._profile[setting]
        encoder, output = self._encoder(saved, setting, Coder.RANS), _empty_like(saved.cache)
        header = encoder.expected_header(0)
        scales, _ = cpu.measure(saved.cache, header.planes)
        payload, streams = cpu.encode(saved.cache, scales, header.planes, tables, coder=Coder.RANS)
        chunk = parse_chunk(b"".join(build_chunk(header, list(scales), streams, [payload])))
        cpu.decode(chunk.payload, chunk.header.streams, scales, header.planes, tables, output)
        chunk_bytes = chunk.header.payload_offset + len(chunk.payload)
        document = encoder.document.header
        return output, ByteCount(chunk_bytes + document.header_bytes, 0, profile_bytes)


class UniformScheme(_AbsmaxScheme):
    """The same number of bits for every value."""

    name = "uniform"
    settings: tuple[str, ...] = ("4-bit", "6-bit", "8-bit")
    variants: ClassVar = {
        "uniform": (Coder.PACKED, False),
        "uniform-rans": (Coder.RANS, False),
        "uniform-profile": (Coder.RANS, True),
    }

    def config(self, setting: str, num_layers: int) -> AbsmaxConfig:
        del num_layers
        groups = (LayerGroup(None, 1 << int(setting[0]), "bits"),)
        return AbsmaxConfig("uniform", groups, groups, Coder.PACKED)


class CacheGenScheme(_AbsmaxScheme):
    """Bins by layer group, in the proportions of the original's config for 7B models."""

    name = "cachegen"
    settings: tuple[str, ...] = ("16/8 bins", "32/16 bins", "64/32 bins", "128/64 bins")
    variants: ClassVar = {
        "cachegen": (Coder.RANS, False),
        "cachegen-original": (Coder.AC, False),
        "cachegen-profile": (Coder.RANS, True),
    }

    def config(self, setting: str, num_layers: int) -> AbsmaxConfig:
        fine, coarse = map(int, setting.removesuffix(" bins").split("/"))
        keys = (LayerGroup(max(1, num_layers // 3), fine, "key_first_bins"), LayerGroup(None, coarse, "key_third_bins"))
        values = (
            LayerGroup(max(1, num_layers // 16), fine, "value_first_bins"),
            LayerGroup(None, coarse, "value_second_bins"),
        )
        return AbsmaxConfig("cachegen", keys, values, Coder.RANS)


def _original_tables_bytes(planes: Sequence[PlaneLayout]) -> int:
    """Count the original's tables; each plane's at its own number of bins, though its code sends all at the largest."""
    return sum(plane.num_channels * (plane.num_bins + 1) * _CDF_ENTRY_BYTES for plane in planes)


def _empty_like(cache: KVCache) -> KVCache:
    return from_planes([torch.empty(plane.shape, dtype=plane.dtype) for plane in cache.planes])
