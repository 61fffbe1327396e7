"""Method `lossless`: the bits of every value, predicted from the values before it.

A value is coded as its distance from a prediction, which channels of the same token give that are coded before it: of
the layers before, and of its own. Keys are predicted with their rotary embedding undone. Weights are fitted on the
cache itself and stand in the tables file, so no profile is needed. All that decoding computes is integers: every
machine decodes the same bits.

    config       what a config file says
    fit          a cache's weights and distributions
    model        what the tables file holds of them
    headers      the fields of the files
    codec        the document and its encoder

docs/lossless.md is the specification.

Source: linear prediction by the Cholesky factor of the covariance, which removes as much as a Karhunen-Loeve transform
does (Phoong and Lin, "Prediction-based lower triangular transform", 2000).
"""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.coder.kernels import Kernels
from cachegen.fields import Fields
from cachegen.format import NO_HASH
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.base import FindProfile, Method
from cachegen.methods.lossless.codec import METHOD_NUMBER, LosslessDocument, LosslessEncoder
from cachegen.methods.lossless.config import LosslessConfig, read_lossless
from cachegen.methods.lossless.headers import LosslessChunkHeader, LosslessDocumentHeader
from cachegen.methods.lossless.predictor import FILE_FORMAT, Predictor, read_predictor
from cachegen.methods.profile_files import ReadFile

__all__ = ["METHODS", "LosslessMethod"]


class LosslessMethod(Method):
    """See the module."""

    name = "lossless"
    number = METHOD_NUMBER
    uses_profile = True
    profile_format = FILE_FORMAT
    undoes_rotations = True

    @property
    def document_header(self) -> type[LosslessDocumentHeader]:
        return LosslessDocumentHeader

    @property
    def chunk_header(self) -> type[LosslessChunkHeader]:
        return LosslessChunkHeader

    def read_config(self, fields: Fields, source: str) -> LosslessConfig:
        return read_lossless(fields, source)

    def open_document(
        self,
        header: LosslessDocumentHeader,
        tables_hash: bytes,
        tables: bytes,
        *,
        num_threads: int,
        kernels: Kernels,
        find_profile: FindProfile | None,
    ) -> LosslessDocument:
        predictor = None
        if find_profile is not None and header.profile_hash != NO_HASH:
            predictor = find_profile(header.profile_hash)
        return LosslessDocument(header, tables_hash, tables, predictor)

    def read_profile(self, read: ReadFile, place: str, *, for_encoding: bool) -> Predictor:
        return read_predictor(read, place)

    def make_encoder(
        self,
        config: LosslessConfig,
        cache: KVCache,
        metadata: ContextMetadata,
        chunk_tokens: Sequence[int],
        *,
        num_threads: int,
        kernels: Kernels,
        first_stored: Sequence[int],
    ) -> LosslessEncoder:
        return LosslessEncoder(
            cache,
            metadata,
            chunk_tokens,
            predictor=config.load_profile(),
            num_threads=num_threads,
            kernels=kernels,
            first_stored=first_stored,
        )


METHODS = (LosslessMethod(),)
