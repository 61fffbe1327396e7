"""The codec of method `lossless`: chunks of a KV cache to bytes and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from cachegen import _native
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import BitstreamError, InputError, MismatchError
from cachegen.format import ALIGNMENT, NO_HASH, Coder, StreamEntry, round_up
from cachegen.format.files import Chunk, join_chunk
from cachegen.format.framing import Buffer
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.base import Document, Encoder, ErrorMeasure
from cachegen.methods.lossless.fit import fit_model
from cachegen.methods.lossless.headers import LosslessChunkHeader, LosslessDocumentHeader
from cachegen.methods.lossless.model import Model, join_bits, unpack_model
from cachegen.methods.lossless.predictor import Predictor

METHOD_NUMBER = 4
"""How files call the method."""


class LosslessDocument(Document):
    """See `Document`."""

    header: LosslessDocumentHeader  # pyright: ignore[reportIncompatibleVariableOverride]  (only `__init__` sets it)

    def __init__(
        self, header: LosslessDocumentHeader, tables_hash: bytes, tables: bytes, predictor: Predictor | None = None
    ) -> None:
        """Put a document's parts together.

        Args:
            tables: the document's own model; empty where it names a profile.
            predictor: the profile; None where the document names none, or nothing is to be decoded.

        Raises:
            MismatchError: the profile is not the one that the document names.
        """
        super().__init__(header, tables_hash)
        self._tables, self._predictor = tables, predictor
        if predictor is None:
            return
        if bytes.fromhex(predictor.profile_hash) != header.profile_hash:
            raise MismatchError(
                f"profile_hash is {predictor.profile_hash[:12]}, but the document was encoded with the profile "
                f"{header.profile_hash.hex()[:12]}: give `profile` its folder"
            )
        if header.planes != predictor.planes or self.dtype != predictor.dtype:
            raise MismatchError("planes have other shapes or another dtype than the profile's")

    @cached_property
    def coding(self) -> _native.LosslessModel:
        """What the native coder takes of the model.

        Raises:
            BitstreamError: the model is corrupt.
            InputError: the document names a profile and was opened without one.
        """
        if self._predictor is not None:
            model = self._predictor.model()
        elif self.header.profile_hash != NO_HASH:
            raise InputError(f"the document needs the profile {self.header.profile_hash.hex()[:12]} (`profile`)")
        else:
            model = unpack_model(self._tables, self.header.planes)
        return model.for_native(self.header.planes, is_float16=self.dtype == torch.float16)

    def prepare(self) -> None:
        """See `Document.prepare`."""
        _ = self.coding

    def gates(self, header: LosslessChunkHeader) -> list[tuple[str, object, object]]:
        """See `Document.gates`."""
        return []

    def _start(
        self,
        chunks: Sequence[Chunk[LosslessChunkHeader]],
        output: KVCache,
        first_token: int,
        num_threads: int,
        kernels: Kernels,
    ) -> Callable[[], None]:
        if len(chunks) != 1:
            raise ValueError("`contents` must be the file of level 1, method lossless has no other")
        (chunk,) = chunks
        shapes = self.header.planes
        values = np.zeros((output.num_tokens, sum(shape.num_channels for shape in shapes)), np.uint16)
        index = np.frombuffer(chunk.header.stream_index, "<u4").reshape(-1, len(StreamEntry._fields))
        try:
            failed, status = _native.lossless_decode(
                np.frombuffer(chunk.payload, np.uint8), index, values, first_token, self.coding, num_threads
            )
        except ValueError as error:
            raise BitstreamError(str(error), field="model") from None
        if status != _native.Status.OK.value:
            raise BitstreamError("does not decode", field=f"stream {failed}")
        decoded: torch.Tensor = torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType]  (torch has no type)
        parts = torch.split(decoded.view(self.dtype), [shape.num_channels for shape in shapes], dim=1)
        for plane, part in zip(output.planes, parts, strict=True):
            plane.copy_(part.reshape(plane.shape))
        return lambda: None


class LosslessEncoder(Encoder):
    """Encodes one saved cache; see `Encoder`. The model is fitted on the whole cache."""

    document: LosslessDocument

    def __init__(
        self,
        cache: KVCache,
        metadata: ContextMetadata,
        chunk_tokens: Sequence[int],
        *,
        predictor: Predictor | None = None,
        model: Model | None = None,
        num_threads: int = 1,
        kernels: Kernels = CPU,
    ) -> None:
        """Fit the model, if there is neither a profile nor a model.

        Args:
            cache: on the CPU; may be memory-mapped.
            chunk_tokens: the chunks' token counts, at most the cache's in all.
            predictor: the profile of the language model; the document names it then and holds no model.
            model: of the document; None fits one on the cache.

        Raises:
            BitstreamError: the cache's values are not those that were saved.
            MismatchError: the profile is of another language model.
            InputError: the cache's dtype has more than 16 bits.
        """
        if cache.dtype.itemsize != 2:
            dtype = str(cache.dtype).removeprefix("torch.")
            raise InputError(f"method lossless codes caches of 16 bits per value, this one is {dtype}")
        super().__init__(cache, metadata, chunk_tokens, num_threads, kernels)
        planes = tuple(PlaneShape(plane.shape[1], plane.shape[2]) for plane in cache.planes)
        if predictor is not None:
            predictor.check_cache(cache, metadata)
            tables = b""
        else:
            tables = (model or fit_model(cache, metadata.rotations_of(cache))).pack()
        header = LosslessDocumentHeader(
            **self._document_fields,
            method=METHOD_NUMBER,
            coder=Coder.RANS,
            num_levels=1,
            profile_hash=NO_HASH if predictor is None else bytes.fromhex(predictor.profile_hash),
            model_bytes=len(tables),
            model_crc=_native.crc32c(tables),
            planes=planes,
        )
        self.tables_file = header.pack() + tables
        document = LosslessDocument(header, self._hash_tables(), tables, predictor)
        self.document = document  # pyright: ignore[reportIncompatibleVariableOverride]  (set here alone)

    def expected_header(self, index: int, level: int = 1) -> LosslessChunkHeader:
        """See `Encoder.expected_header`."""
        return LosslessChunkHeader(**self._chunk_fields(index, level))

    def encode_chunk(self, index: int, level: int = 1) -> list[bytes | memoryview]:
        """See `Encoder.encode_chunk`; NaN and infinity are coded like any value."""
        header = self.expected_header(index, level)
        tokens = self._cache.slice(header.first_token, header.first_token + header.num_tokens)
        streams: list[StreamEntry] = []
        payloads: list[bytes | memoryview] = []
        bits, coding = join_bits(tokens), self.document.coding
        for stream in _native.lossless_encode(bits, header.first_token, coding, self._num_threads):
            padded = stream.ljust(round_up(len(stream), ALIGNMENT), b"\0")
            streams.append(StreamEntry(len(stream), 0, _native.crc32c(padded)))
            payloads.append(padded)
        return join_chunk(header, streams, payloads)

    def read_error(self, index: int, level: int, content: Sequence[Buffer]) -> ErrorMeasure:
        """Return zero: nothing is lost."""
        return ErrorMeasure(0.0, 0.0)

    def expected_kl(self, level: int) -> float:
        """Return zero: nothing is lost."""
        return 0.0
