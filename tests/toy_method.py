"""A method of coding in one file, as short as the interface allows: the values as they are, a stream per plane.

`test_methods.py` registers it and takes it through the scripts; CONTRIBUTING.md has the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachegen import _native
from cachegen.coder.kernels import Kernels
from cachegen.errors import BitstreamError
from cachegen.fields import Fields
from cachegen.format import ALIGNMENT, NO_HASH, Coder, StreamEntry, round_up
from cachegen.format.files import Chunk, join_chunk
from cachegen.format.framing import Buffer
from cachegen.format.headers import ChunkHeader, PlaneShape, ShapesDocumentHeader
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.base import Document, Encoder, ErrorMeasure, FindProfile, Method, MethodConfig

NUMBER = 200


@dataclass(frozen=True, kw_only=True)
class ToyDocumentHeader(ShapesDocumentHeader):
    @property
    def tables_bytes(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class ToyChunkHeader(ChunkHeader):
    @classmethod
    def num_streams_of(cls, fields: Mapping[str, Any], num_absent: Sequence[int]) -> int:
        return 2 * fields["num_layers"]

    @property
    def arrays_bytes(self) -> int:
        return 0

    @property
    def payload_offset(self) -> int:
        return self.header_bytes

    def without_encoding(self) -> ToyChunkHeader:
        return dataclasses.replace(self, stream_index=b"")

    def pack_arrays(self) -> bytes:
        return b""

    @classmethod
    def unpack_arrays(
        cls, fields: dict[str, Any], content: Buffer, at: int, header_bytes: int
    ) -> tuple[dict[str, Any], int]:
        return {}, at


class ToyDocument(Document):
    def prepare(self) -> None:
        pass

    def gates(self, header: ToyChunkHeader) -> list[tuple[str, object, object]]:
        return []

    def _start(
        self,
        chunks: Sequence[Chunk[ToyChunkHeader]],
        output: KVCache,
        first_token: int,
        num_threads: int,
        kernels: Kernels,
    ) -> Callable[[], None]:
        (chunk,) = chunks
        offset = 0
        num_absent = chunk.header.num_absent or (0,) * chunk.header.num_layers
        for index, (plane, stream) in enumerate(zip(output.planes, chunk.header.streams, strict=True)):
            plane = plane[num_absent[index // 2] :]
            content = chunk.payload[offset : offset + stream.num_bytes]
            if len(content) != plane.numel() * plane.element_size():
                raise BitstreamError("has another length than its plane", field=f"stream {index}")
            values = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(plane.dtype)
            plane.copy_(values.reshape(plane.shape))
            offset += round_up(stream.num_bytes, ALIGNMENT)
        return lambda: None


class ToyEncoder(Encoder):
    def __init__(
        self,
        cache: KVCache,
        metadata: ContextMetadata,
        chunk_tokens: Sequence[int],
        num_threads: int,
        kernels: Kernels,
        first_stored: Sequence[int],
    ) -> None:
        super().__init__(cache, metadata, chunk_tokens, num_threads, kernels, first_stored=first_stored)
        header = ToyDocumentHeader(
            **self._document_fields,
            method=NUMBER,
            coder=Coder.PACKED,
            num_levels=1,
            profile_hash=NO_HASH,
            planes=tuple(PlaneShape(plane.shape[1], plane.shape[2]) for plane in cache.planes),
        )
        self.tables_file = header.pack()
        self.document = ToyDocument(header, self._hash_tables())

    def expected_header(self, index: int, level: int = 1) -> ToyChunkHeader:
        return ToyChunkHeader(**self._chunk_fields(index, level), num_absent=self._num_absent(index))

    def encode_chunk(self, index: int, level: int = 1) -> list[bytes | memoryview]:
        header = self.expected_header(index, level)
        chunk = self._cache.slice(header.first_token, header.first_token + header.num_tokens)
        streams, payloads = [], []
        for index, plane in enumerate(chunk.planes):
            stored = plane[header.num_absent[index // 2] :] if header.num_absent else plane
            content = stored.contiguous().view(torch.uint8).numpy().tobytes()
            payloads.append(content.ljust(round_up(len(content), ALIGNMENT), b"\0"))
            streams.append(StreamEntry(len(content), 0, _native.crc32c(payloads[-1])))
        return join_chunk(header, streams, payloads)

    def read_error(self, index: int, level: int, content: Sequence[Buffer]) -> ErrorMeasure:
        return ErrorMeasure(0.0, 0.0)


@dataclass(frozen=True)
class ToyConfig(MethodConfig):
    source: str
    method: str = "toy"
    coder: Coder = Coder.PACKED

    def with_flags(self, flags: Mapping[str, Any]) -> ToyConfig:
        self.refuse_flags(flags)
        return self

    def check_document(self, header: ToyDocumentHeader, path: object) -> None:
        pass


class ToyMethod(Method):
    name = "toy"
    number = NUMBER
    document_header = ToyDocumentHeader
    chunk_header = ToyChunkHeader

    def read_config(self, fields: Fields, source: str) -> ToyConfig:
        fields.refuse_unknown({"method"})
        return ToyConfig(source)

    def open_document(
        self,
        header: ToyDocumentHeader,
        tables_hash: bytes,
        tables: bytes,
        *,
        num_threads: int,
        kernels: Kernels,
        find_profile: FindProfile | None,
    ) -> ToyDocument:
        return ToyDocument(header, tables_hash)

    def make_encoder(
        self,
        config: ToyConfig,
        cache: KVCache,
        metadata: ContextMetadata,
        chunk_tokens: Sequence[int],
        *,
        num_threads: int,
        kernels: Kernels,
        first_stored: Sequence[int],
    ) -> ToyEncoder:
        return ToyEncoder(cache, metadata, chunk_tokens, num_threads, kernels, first_stored)
