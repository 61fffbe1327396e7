"""The codec of method `lossless`: chunks of a KV cache to bytes and back, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import BitstreamError, InputError, MismatchError
from cachegen.format import ALIGNMENT, NO_HASH, Coder, StreamEntry, round_up
from cachegen.format.constants import streams_bytes
from cachegen.format.files import Chunk, join_chunk
from cachegen.format.framing import Buffer
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.base import Document, Encoder, ErrorMeasure
from cachegen.methods.layer_classes import LayerClass, layer_classes, share_first_stored
from cachegen.methods.lossless.fit import fit_model
from cachegen.methods.lossless.headers import BLOCK_TOKENS, LosslessChunkHeader, LosslessDocumentHeader
from cachegen.methods.lossless.model import Model, join_bits, unpack_models
from cachegen.methods.lossless.predictor import Predictor
from cachegen.methods.profile_files import check_named

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
        check_named(predictor, header.profile_hash)
        if header.planes != predictor.planes or self.dtype != predictor.dtype:
            raise MismatchError("planes have other shapes or another dtype than the profile's")

    @cached_property
    def classes(self) -> list[tuple[LayerClass, _native.LosslessModel]]:
        """The classes of layers that hold tokens, each with what the native coder takes of its model.

        Raises:
            BitstreamError: a model is corrupt.
            InputError: the document names a profile and was opened without one.
        """
        if self._predictor is not None:
            groups = self._predictor.layer_groups
            found = [LayerClass(group, self._first_stored_of(group), len(groups) == 1) for group in groups]
            models = self._predictor.models()
        elif self.header.profile_hash != NO_HASH:
            raise InputError(f"the document needs the profile {self.header.profile_hash.hex()[:12]} (`profile`)")
        else:
            found = coded_classes(self.header)
            models = unpack_models(self._tables, [layers.pick(self.header.planes) for layers in found])
        is_float16 = self.dtype == torch.float16
        return [
            (layers, model.for_native(layers.pick(self.header.planes), is_float16=is_float16))
            for layers, model in zip(found, models, strict=True)
        ]

    def _first_stored_of(self, group: Sequence[int]) -> int:
        """Return the first token that layers of one window of the profile hold."""
        first_stored = self.header.first_stored or (0,) * self.header.num_layers
        firsts = {first_stored[layer] for layer in group}
        if len(firsts) > 1:
            problem = "the layers of one window of the profile do not begin at one token"
            raise BitstreamError(problem, field="first_stored")
        return firsts.pop()

    def prepare(self) -> None:
        """See `Document.prepare`."""
        _ = self.classes

    def gates(self, header: LosslessChunkHeader) -> list[tuple[str, object, object]]:
        """See `Document.gates`."""
        return [("num_absent", header.num_absent, self.header.num_absent(header.first_token, header.num_tokens))]

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
        index = np.frombuffer(chunk.header.stream_index, "<u4").reshape(-1, len(StreamEntry._fields))
        payload = np.frombuffer(chunk.payload, np.uint8)
        first_stream = offset = 0
        for layers, coding in self.classes:
            part = layers.part_of(output, first_token)
            end_stream = first_stream + len(layers.layers) * -(-part.num_tokens // BLOCK_TOKENS)
            of_class = index[first_stream:end_stream]
            end = offset + streams_bytes(of_class.tobytes())
            position = first_token + output.num_tokens - part.num_tokens
            self._decode_class(payload[offset:end], of_class, coding, part, position, first_stream, num_threads)
            first_stream, offset = end_stream, end
        return lambda: None

    def _decode_class(
        self,
        payload: NDArray[np.uint8],
        index: NDArray[np.uint32],
        coding: _native.LosslessModel,
        output: KVCache,
        first_token: int,
        first_stream: int,
        num_threads: int,
    ) -> None:
        """Decode the layers of a class; `first_stream` is the number of the first of their streams."""
        if not output.num_tokens:
            return
        num_channels = [plane.shape[1] * plane.shape[2] for plane in output.planes]
        values = np.zeros((output.num_tokens, sum(num_channels)), np.uint16)
        try:
            failed, status = _native.lossless_decode(payload, index, values, first_token, coding, num_threads)
        except ValueError as error:
            raise BitstreamError(str(error), field="model") from None
        if status != _native.Status.OK.value:
            raise BitstreamError("does not decode", field=f"stream {first_stream + failed}")
        decoded: torch.Tensor = torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType]  (torch has no type)
        for plane, part in zip(output.planes, torch.split(decoded.view(self.dtype), num_channels, dim=1), strict=True):
            plane.copy_(part.reshape(plane.shape))


class LosslessEncoder(Encoder):
    """Encodes one saved cache; see `Encoder`. Models are fitted on all that is stored of it."""

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
        first_stored: Sequence[int] = (),
    ) -> None:
        """Fit the models, if there is neither a profile nor a model.

        Args:
            cache: on the CPU; may be memory-mapped.
            chunk_tokens: the chunks' token counts, at most the cache's in all.
            predictor: the profile of the language model; the document names it then and holds no model. Layers of one
                of its windows are stored from the earliest of them on.
            model: of the document, whose layers all have the same tokens then; None fits those that it takes.
            first_stored: as for `Encoder`.

        Raises:
            BitstreamError: the cache's values are not those that were saved.
            MismatchError: the profile is of another language model.
            InputError: the cache's dtype has more than 16 bits.
        """
        if cache.dtype.itemsize != 2:
            dtype = str(cache.dtype).removeprefix("torch.")
            raise InputError(f"method lossless codes caches of 16 bits per value, this one is {dtype}")
        if first_stored and predictor is not None:
            first_stored = share_first_stored(predictor.layer_groups, first_stored)
        super().__init__(cache, metadata, chunk_tokens, num_threads, kernels, first_stored=first_stored)
        planes = tuple(PlaneShape(plane.shape[1], plane.shape[2]) for plane in cache.planes)
        if predictor is not None:
            predictor.check_cache(cache, metadata)
        header = LosslessDocumentHeader(
            **self._document_fields,
            method=METHOD_NUMBER,
            coder=Coder.RANS,
            num_levels=1,
            profile_hash=NO_HASH if predictor is None else bytes.fromhex(predictor.profile_hash),
            model_bytes=0,
            model_crc=_native.crc32c(b""),
            planes=planes,
        )
        tables = b""
        if model is not None:
            tables = model.pack()
        elif predictor is None:
            rotations = metadata.rotations_of(cache)
            for layers in coded_classes(header):
                part, of_part = layers.part_of(cache, 0), tuple(layers.pick(rotations))
                tables += fit_model(part, of_part, first_token=layers.first_stored).pack()
        header = dataclasses.replace(header, model_bytes=len(tables), model_crc=_native.crc32c(tables))
        self.tables_file = header.pack() + tables + self.states_section
        document = LosslessDocument(header, self._hash_tables(), tables, predictor)
        self.document = document  # pyright: ignore[reportIncompatibleVariableOverride]  (set here alone)

    def expected_header(self, index: int, level: int = 1) -> LosslessChunkHeader:
        """See `Encoder.expected_header`."""
        return LosslessChunkHeader(**self._chunk_fields(index, level), num_absent=self._num_absent(index))

    def encode_chunk(self, index: int, level: int = 1) -> list[bytes | memoryview]:
        """See `Encoder.encode_chunk`; NaN and infinity are coded like any value."""
        header = self.expected_header(index, level)
        tokens = self._cache.slice(header.first_token, header.first_token + header.num_tokens)
        streams: list[StreamEntry] = []
        payloads: list[bytes | memoryview] = []
        for layers, coding in self.document.classes:
            part = layers.part_of(tokens, header.first_token)
            if not part.num_tokens:
                continue
            position = header.first_token + header.num_tokens - part.num_tokens
            for stream in _native.lossless_encode(join_bits(part), position, coding, self._num_threads):
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


def coded_classes(header: LosslessDocumentHeader) -> list[LayerClass]:
    """Return the classes of layers that hold tokens at all; each has a model of its own."""
    return [layers for layers in layer_classes(header) if layers.first_stored < header.num_covered_tokens]
