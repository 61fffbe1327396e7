"""Method `transform`: keys and values of some layers become components by a model's profile, coded in levels.

    config           profile, step and levels, from a config file
    profile          what calibration learnt about a model
    profile_storage  the files of a profile
    transform        values to components and back, and their quantizer
    exact_values     values that the transform cannot represent
    headers          the fields of the files
    document         what decodes chunks
    encoder          what makes them

The components' probability tables are `cachegen.coder.component_tables`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.coder.kernels import Kernels
from cachegen.fields import Fields
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.base import FindProfile, Method
from cachegen.methods.profile_files import ReadFile
from cachegen.methods.transform.config import TransformConfig, read_transform
from cachegen.methods.transform.document import METHOD_NUMBER, TransformDocument
from cachegen.methods.transform.encoder import TransformEncoder
from cachegen.methods.transform.headers import TransformChunkHeader, TransformDocumentHeader
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import FILE_FORMAT, read_profile
from cachegen.methods.transform.transform import SINK_TOKENS


class TransformMethod(Method):
    """See `Method`."""

    name = "transform"
    number = METHOD_NUMBER
    uses_profile = True
    profile_format = FILE_FORMAT
    undoes_rotations = True
    num_sink_tokens = SINK_TOKENS

    @property
    def document_header(self) -> type[TransformDocumentHeader]:
        return TransformDocumentHeader

    @property
    def chunk_header(self) -> type[TransformChunkHeader]:
        return TransformChunkHeader

    def read_config(self, fields: Fields, source: str) -> TransformConfig:
        return read_transform(fields, source)

    def open_document(
        self,
        header: TransformDocumentHeader,
        tables_hash: bytes,
        tables: bytes,
        *,
        num_threads: int,
        kernels: Kernels,
        find_profile: FindProfile | None,
    ) -> TransformDocument:
        profile = find_profile(header.profile_hash) if find_profile is not None else None
        return TransformDocument(header, tables_hash, profile, kernels.device)

    def read_profile(self, read: ReadFile, place: str, *, for_encoding: bool) -> Profile:
        return read_profile(read, place, for_encoding=for_encoding)

    def make_encoder(
        self,
        config: TransformConfig,
        cache: KVCache,
        metadata: ContextMetadata,
        chunk_tokens: Sequence[int],
        *,
        num_threads: int,
        kernels: Kernels,
        first_stored: Sequence[int],
    ) -> TransformEncoder:
        profile = config.load_profile()
        return TransformEncoder(
            cache,
            metadata,
            profile,
            chunk_tokens,
            step_log=config.choose_step(profile),
            num_levels=config.num_levels,
            num_threads=num_threads,
            kernels=kernels,
            first_stored=first_stored,
        )


METHODS = (TransformMethod(),)
