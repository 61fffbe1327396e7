"""The codec of methods `cachegen` and `uniform`: quantization, the document's tables and the coder.

Kernels quantize and code in one pass; `quantization` has the formula, `cachegen.coder.symbol_model` the tables.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cachegen import _native
from cachegen.coder.cpu import TORCH_DTYPES
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import NotFiniteError
from cachegen.format import ALIGNMENT, LANES, NO_HASH, TABLE_SIZE, Coder, PlaneLayout, StreamEntry, round_up
from cachegen.format.files import Chunk, join_chunk
from cachegen.format.framing import Buffer
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.absmax.config import AbsmaxConfig
from cachegen.methods.absmax.headers import AbsmaxChunkHeader, AbsmaxDocumentHeader
from cachegen.methods.absmax.quantization import low_bits_for
from cachegen.methods.base import Document, Encoder, ErrorMeasure, cut_streams
from cachegen.methods.layer_classes import LayerClass, layer_classes

# A lane costs about 24 bits beyond its symbols (its state, less what the state carries). At 4096 symbols of 2 to 3 bits
# that is a quarter of a percent; longer lanes would leave a GPU, one warp per stream, too few streams. A code of coder
# `ac` costs as much, its length and its end, and has as many symbols.
SYMBOLS_PER_PLANE_LANE = 4096


class AbsmaxDocument(Document):
    """See `Document`."""

    header: AbsmaxDocumentHeader  # pyright: ignore[reportIncompatibleVariableOverride]  (only `__init__` sets it)

    def __init__(
        self,
        header: AbsmaxDocumentHeader,
        tables_hash: bytes,
        tables_section: bytes,
        num_threads: int = 1,
        kernels: Kernels = CPU,
    ) -> None:
        super().__init__(header, tables_hash)
        self._tables_section, self._num_threads, self._kernels = tables_section, num_threads, kernels

    @cached_property
    def classes(self) -> list[tuple[LayerClass, Any]]:
        """The classes of layers, each with the kernels' form of its frequency tables; None for coder `packed`.

        Tables take tens of times the memory that they have in the file, so they are unpacked at their first use: a
        document of another model is refused before.

        Raises:
            BitstreamError: they are corrupt.
        """
        header = self.header
        found = layer_classes(header)
        if not header.tables_bytes:
            return [(layers, None) for layers in found]
        ends = list(itertools.accumulate(header.plane_table_bytes))
        content = memoryview(self._tables_section)
        pieces = [content[end - size : end] for end, size in zip(ends, header.plane_table_bytes, strict=True)]
        return [
            (
                layers,
                self._kernels.load_tables(
                    self._tables_section if layers.is_all else b"".join(layers.pick(pieces)),
                    layers.pick(header.planes),
                    layers.pick(header.plane_table_bytes),
                    self._num_threads,
                ),
            )
            for layers in found
        ]

    def prepare(self) -> None:
        """See `Document.prepare`."""
        _ = self.classes

    def gates(self, header: AbsmaxChunkHeader) -> list[tuple[str, object, object]]:
        """See `Document.gates`."""
        return [
            ("planes", _with_streams(header.planes, lambda plane: 0), self.header.planes),
            ("num_absent", header.num_absent, self.header.num_absent(header.first_token, header.num_tokens)),
        ]

    def _start(
        self,
        chunks: Sequence[Chunk[AbsmaxChunkHeader]],
        output: KVCache,
        first_token: int,
        num_threads: int,
        kernels: Kernels,
    ) -> Callable[[], None]:
        (chunk,) = chunks
        header, scales = chunk.header, split_scales(chunk)
        parts = [(layers, tables, layers.part_of(output, first_token)) for layers, tables in self.classes]
        parts = [part for part in parts if part[2].num_tokens]
        finish: Callable[[], None] | None = None
        for layers, tables, part in parts:
            if finish is not None:
                finish()  # kernels have only so many chunks in flight
            streams, payload = header.streams, chunk.payload
            if not layers.is_all:
                chosen = layers.pick(_split_payload(header, chunk.payload))
                streams = [stream for of_plane, _ in chosen for stream in of_plane]
                payload = b"".join(content for _, content in chosen)
            arguments = (payload, streams, torch.stack(layers.pick(scales)), layers.pick(header.planes), tables, part)
            finish = kernels.start_decode(*arguments, num_threads, coder=header.coder)
        return finish or (lambda: None)


class AbsmaxEncoder(Encoder):
    """Measures a cache once, makes its tables, then its chunks; see `Encoder`."""

    document: AbsmaxDocument

    def __init__(
        self,
        cache: KVCache,
        metadata: ContextMetadata,
        config: AbsmaxConfig,
        chunk_tokens: Sequence[int],
        coder: Coder,
        *,
        num_threads: int = 1,
        kernels: Kernels = CPU,
        first_stored: Sequence[int] = (),
    ) -> None:
        """Measure the cache and make its tables.

        Args:
            cache: on the CPU; may be memory-mapped.
            chunk_tokens: the chunks' token counts, at most the cache's in all.
            first_stored: as for `Encoder`.

        Raises:
            BitstreamError: the cache's values are not those that were saved.
            InputError: the cache holds NaN or infinity.
            ConfigError: the config does not cover the cache's layers.
        """
        super().__init__(cache, metadata, chunk_tokens, num_threads, kernels, first_stored=first_stored)
        planes = tuple(
            PlaneLayout(plane.shape[1], plane.shape[2], group.num_bins, _low_bits(group.num_bins, coder))
            for plane, group in zip(cache.planes, config.groups_of_planes(cache.num_layers), strict=True)
        )
        header = AbsmaxDocumentHeader(
            **self._document_fields,
            method=config.number,
            coder=coder,
            num_levels=1,
            profile_hash=NO_HASH,
            tables_crc=0,
            planes=planes,
            plane_table_bytes=(0,) * len(planes),
        )
        plane_tables = self._measure(header)
        tables = b"".join(plane_tables)
        if plane_tables:
            lengths = tuple(map(len, plane_tables))
            header = dataclasses.replace(header, tables_crc=_native.crc32c(tables), plane_table_bytes=lengths)
        self.tables_file = header.pack() + tables + self.states_section
        document = AbsmaxDocument(header, self._hash_tables(), tables, num_threads, kernels)
        self.document = document  # pyright: ignore[reportIncompatibleVariableOverride]  (set here alone)

    def _measure(self, header: AbsmaxDocumentHeader) -> list[bytes]:
        """Find the scales of all tokens that are stored; returns the tables of each plane, none for coder `packed`."""
        covered = self._cache.slice(0, self._stops[-1])
        self._scales: list[torch.Tensor] = [torch.empty(0)] * len(header.planes)
        tables = [b""] * len(header.planes)
        for layers in layer_classes(header):
            part, planes = layers.part_of(covered, 0), layers.pick(header.planes)
            if part.num_tokens:
                try:
                    scales, counts = self._kernels.measure(part, planes, self._num_threads)
                except NotFiniteError as error:
                    raise layers.name_in(error) from None
            else:  # a table must have a symbol
                scales = torch.empty(len(planes), 0, dtype=covered.dtype)
                counts = np.zeros((sum(plane.num_channels for plane in planes), TABLE_SIZE), np.uint32)
                counts[:, 0] = 1
            packed = [b""] * len(planes)
            if header.coder is not Coder.PACKED:
                packed = self._kernels.pack_tables(counts, planes, self._num_threads)
            for plane, plane_scales, table in zip(layers.planes, scales, packed, strict=True):
                self._scales[plane], tables[plane] = plane_scales, table
        return tables if header.coder is not Coder.PACKED else []

    def expected_header(self, index: int, level: int = 1) -> AbsmaxChunkHeader:
        """See `Encoder.expected_header`."""
        document = self.document.header
        num_tokens, num_absent = document.chunk_tokens[index], self._num_absent(index)

        def choose(plane: PlaneLayout, num_stored: int) -> int:
            return choose_tokens_per_stream(plane.num_channels, num_stored, document.coder)

        planes = _with_streams(document.planes, lambda plane: choose(plane, num_tokens))
        if num_absent:
            planes = tuple(
                dataclasses.replace(plane, tokens_per_stream=choose(plane, num_tokens - num_absent[number // 2]))
                for number, plane in enumerate(planes)
            )
        fields = self._chunk_fields(index, level)
        return AbsmaxChunkHeader(**fields, scales_crc=0, planes=planes, num_absent=num_absent)

    def read_error(self, index: int, level: int, content: Sequence[Buffer]) -> ErrorMeasure:
        """Return a bound of what decoding loses of a chunk's values: half a step of each token's quantizer."""
        scales = [float(of_plane.amax()) if len(of_plane) else 0.0 for of_plane in self._scales_of(index)]
        # The dtype rounds what the quantizer gives once more, by half a unit in the last place.
        rounding = torch.finfo(self._cache.dtype).eps / 2
        planes = self.document.header.planes
        bounds = (scale * (1 / (plane.num_bins - 2) + rounding) for scale, plane in zip(scales, planes, strict=True))
        return ErrorMeasure(max(bounds))

    def encode_chunk(self, index: int, level: int = 1) -> list[bytes | memoryview]:
        """See `Encoder.encode_chunk`."""
        header, scales = self.expected_header(index, level), self._scales_of(index)
        tokens = self._cache.slice(header.first_token, header.first_token + header.num_tokens)
        streams: list[list[StreamEntry]] = [[] for _ in header.planes]
        payloads: list[bytes | memoryview] = [b""] * len(header.planes)
        for layers, tables in self.document.classes:
            part, planes = layers.part_of(tokens, header.first_token), layers.pick(header.planes)
            if not part.num_tokens:
                continue
            part_scales = torch.stack(layers.pick(scales))
            payload, entries = self._kernels.encode(
                part, part_scales, planes, tables, self._num_threads, coder=header.coder
            )
            if layers.is_all:
                return build_chunk(header, scales, entries, [payload])
            place, offset = 0, 0
            for number, plane in zip(layers.planes, planes, strict=True):
                streams[number] = entries[place : place + -(-part.num_tokens // plane.tokens_per_stream)]
                size = sum(round_up(entry.num_bytes, ALIGNMENT) for entry in streams[number])
                payloads[number] = payload[offset : offset + size]
                place, offset = place + len(streams[number]), offset + size
        return build_chunk(header, scales, [entry for of_plane in streams for entry in of_plane], payloads)

    def _scales_of(self, index: int) -> list[torch.Tensor]:
        """Return a chunk's scales of each plane, `[num_stored]` in the cache's dtype."""
        start, stop = self._stops[index] - self.document.header.chunk_tokens[index], self._stops[index]
        first_stored = self._first_stored or (0,) * self._cache.num_layers
        return [
            scales[max(start - first_stored[number // 2], 0) : max(stop - first_stored[number // 2], 0)]
            for number, scales in enumerate(self._scales)
        ]


def split_scales(chunk: Chunk[AbsmaxChunkHeader]) -> list[torch.Tensor]:
    """Return a chunk's scales of each plane, `[num_stored]` in the cache's dtype."""
    header = chunk.header
    num_stored = [header.num_tokens - absent for absent in header.num_absent or (0,) * header.num_layers]
    dtype = TORCH_DTYPES[header.dtype]
    # A copy: torch wants writable memory, and scales are few.
    content = bytearray(chunk.before[: header.scales_bytes])
    scales = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return list(torch.split(scales, [num_stored[number // 2] for number in range(len(header.planes))]))


def read_scales(chunk: Chunk[AbsmaxChunkHeader]) -> torch.Tensor:
    """Return the scales of a chunk that holds all its tokens, `[num_planes, num_tokens]` in the cache's dtype."""
    return torch.stack(split_scales(chunk))


def build_chunk(
    header: AbsmaxChunkHeader,
    scales: Sequence[torch.Tensor],
    streams: Sequence[StreamEntry],
    payloads: Sequence[bytes | memoryview],
) -> list[bytes | memoryview]:
    """Join a chunk's parts.

    Args:
        header: its `stream_index` and `scales_crc` are filled in here.
        scales: of each plane, `[num_stored]` in the cache's dtype.
        payloads: the streams, in any number of pieces.

    Returns:
        The file, as parts to be written one after the other.
    """
    content = torch.cat(list(scales)).view(torch.uint8).numpy().tobytes()
    padded = content.ljust(round_up(len(content), ALIGNMENT), b"\0")
    header = dataclasses.replace(header, scales_crc=_native.crc32c(padded))
    return join_chunk(header, streams, payloads, before=padded)


def _split_payload(header: AbsmaxChunkHeader, payload: memoryview) -> list[tuple[list[StreamEntry], memoryview]]:
    """Return the streams of each plane, and their bytes with padding."""
    parts: list[tuple[list[StreamEntry], memoryview]] = []
    place, offset = 0, 0
    num_absent = header.num_absent or (0,) * header.num_layers
    for number, plane in enumerate(header.planes):
        count = -(-(header.num_tokens - num_absent[number // 2]) // plane.tokens_per_stream)
        streams = header.streams[place : place + count]
        size = sum(round_up(stream.num_bytes, ALIGNMENT) for stream in streams)
        parts.append((streams, payload[offset : offset + size]))
        place, offset = place + count, offset + size
    return parts


def choose_tokens_per_stream(num_channels: int, num_tokens: int, coder: Coder = Coder.RANS) -> int:
    """Return how many tokens to put in a stream so that lanes, or codes, have about `SYMBOLS_PER_PLANE_LANE` symbols.

    Returns:
        A multiple of 32; for coder `ac` at most 1.5 * SYMBOLS_PER_PLANE_LANE. A chunk's streams are about equally long.
    """
    rows = max(1, round(SYMBOLS_PER_PLANE_LANE / num_channels))
    return cut_streams(num_tokens, SYMBOLS_PER_PLANE_LANE if coder is Coder.AC else LANES * rows)


def _with_streams(planes: Sequence[PlaneLayout], choose: Callable[[PlaneLayout], int]) -> tuple[PlaneLayout, ...]:
    """Return planes with other tokens per stream; most planes of a model are alike, and are made once."""
    made = {plane: dataclasses.replace(plane, tokens_per_stream=choose(plane)) for plane in set(planes)}
    return tuple(made[plane] for plane in planes)


def _low_bits(num_bins: int, coder: Coder) -> int:
    """How many low bits a plane stores raw: all of them with coder `packed`."""
    return low_bits_for(num_bins, 1 if coder is Coder.PACKED else TABLE_SIZE)
