"""Methods `cachegen` and `uniform`: per token, values are quantized by the largest magnitude of their plane.

`cachegen` has a number of bins per layer group, `uniform` one for all; files differ in nothing else.

    config          bins per layer group, from a config file
    quantization    the formula
    headers         the fields of the files
    codec           the document and its encoder

Source: Liu et al., CacheGen, SIGCOMM 2024, section 5.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachegen.coder.kernels import Kernels
from cachegen.fields import Fields
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.absmax.codec import AbsmaxDocument, AbsmaxEncoder
from cachegen.methods.absmax.config import NUMBERS, AbsmaxConfig, default_config, read_cachegen, read_uniform
from cachegen.methods.absmax.headers import AbsmaxChunkHeader, AbsmaxDocumentHeader
from cachegen.methods.base import FindProfile, Method

__all__ = ["METHODS", "AbsmaxMethod", "default_config"]


@dataclass(frozen=True)
class AbsmaxMethod(Method):
    """One of the two methods."""

    name: str
    number: int

    @property
    def document_header(self) -> type[AbsmaxDocumentHeader]:
        return AbsmaxDocumentHeader

    @property
    def chunk_header(self) -> type[AbsmaxChunkHeader]:
        return AbsmaxChunkHeader

    def read_config(self, fields: Fields, source: str) -> AbsmaxConfig:
        return (read_cachegen if self.name == "cachegen" else read_uniform)(fields, source)

    def open_document(
        self,
        header: AbsmaxDocumentHeader,
        tables_hash: bytes,
        tables: bytes,
        *,
        num_threads: int,
        kernels: Kernels,
        find_profile: FindProfile | None,
    ) -> AbsmaxDocument:
        return AbsmaxDocument(header, tables_hash, tables, num_threads, kernels)

    def make_encoder(
        self,
        config: AbsmaxConfig,
        cache: KVCache,
        metadata: ContextMetadata,
        chunk_tokens: Sequence[int],
        *,
        num_threads: int,
        kernels: Kernels,
        first_stored: Sequence[int],
    ) -> AbsmaxEncoder:
        return AbsmaxEncoder(
            cache,
            metadata,
            config,
            chunk_tokens,
            config.coder,
            num_threads=num_threads,
            kernels=kernels,
            first_stored=first_stored,
        )


METHODS = tuple(AbsmaxMethod(name, number) for name, number in NUMBERS.items())
