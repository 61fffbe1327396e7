"""The codec of methods `cachegen` and `uniform`: quantization, the document's tables and the coder.

Kernels quantize and code in one pass; `quantization` has the formula, `cachegen.coder.symbol_model` the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from cachegen import _native
from cachegen.coder.cpu import TORCH_DTYPES
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.format import ALIGNMENT, LANES, NO_HASH, TABLE_SIZE, Coder, PlaneLayout, StreamEntry, round_up
from cachegen.format.files import Chunk, join_chunk
from cachegen.format.framing import Buffer
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.absmax.config import AbsmaxConfig
from cachegen.methods.absmax.headers import AbsmaxChunkHeader, AbsmaxDocumentHeader
from cachegen.methods.absmax.quantization import low_bits_for
from cachegen.methods.base import Document, Encoder, ErrorMeasure, cut_streams

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
    def tables(self) -> Any:
        """The kernels' form of the frequency tables; None for coder `packed`.

        Tables take tens of times the memory that they have in the file, so they are unpacked at their first use: a
        document of another model is refused before.

        Raises:
            BitstreamError: they are corrupt.
        """
        header = self.header
        if not header.tables_bytes:
            return None
        return self._kernels.load_tables(
            self._tables_section, header.planes, header.plane_table_bytes, self._num_threads
        )

    def prepare(self) -> None:
        """See `Document.prepare`."""
        _ = self.tables

    def gates(self, header: AbsmaxChunkHeader) -> list[tuple[str, object, object]]:
        """See `Document.gates`."""
        return [("planes", _with_streams(header.planes, lambda plane: 0), self.header.planes)]

    def _start(
        self,
        chunks: Sequence[Chunk[AbsmaxChunkHeader]],
        output: KVCache,
        first_token: int,
        num_threads: int,
        kernels: Kernels,
    ) -> Callable[[], None]:
        (chunk,) = chunks
        header = chunk.header
        arguments = (chunk.payload, header.streams, read_scales(chunk), header.planes, self.tables, output)
        return kernels.start_decode(*arguments, num_threads, coder=header.coder)


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
    ) -> None:
        """Measure the cache and make its tables.

        Args:
            cache: on the CPU; may be memory-mapped.
            chunk_tokens: the chunks' token counts, at most the cache's in all.

        Raises:
            BitstreamError: the cache's values are not those that were saved.
            InputError: the cache holds NaN or infinity.
            ConfigError: the config does not cover the cache's layers.
        """
        super().__init__(cache, metadata, chunk_tokens, num_threads, kernels)
        planes = tuple(
            PlaneLayout(plane.shape[1], plane.shape[2], group.num_bins, _low_bits(group.num_bins, coder))
            for plane, group in zip(cache.planes, config.groups_of_planes(cache.num_layers), strict=True)
        )
        covered = cache.slice(0, self._stops[-1])
        self._scales, counts = kernels.measure(covered, planes, num_threads)
        plane_tables = [] if coder is Coder.PACKED else kernels.pack_tables(counts, planes, num_threads)
        tables = b"".join(plane_tables)
        header = AbsmaxDocumentHeader(
            **self._document_fields,
            method=config.number,
            coder=coder,
            num_levels=1,
            profile_hash=NO_HASH,
            tables_crc=_native.crc32c(tables),
            planes=planes,
            plane_table_bytes=tuple(map(len, plane_tables)) or (0,) * len(planes),
        )
        self.tables_file = header.pack() + tables
        document = AbsmaxDocument(header, self._hash_tables(), tables, num_threads, kernels)
        self.document = document  # pyright: ignore[reportIncompatibleVariableOverride]  (set here alone)

    def expected_header(self, index: int, level: int = 1) -> AbsmaxChunkHeader:
        """See `Encoder.expected_header`."""
        document = self.document.header
        num_tokens = document.chunk_tokens[index]
        return AbsmaxChunkHeader(
            **self._chunk_fields(index, level),
            scales_crc=0,
            planes=_with_streams(
                document.planes, lambda plane: choose_tokens_per_stream(plane.num_channels, num_tokens, document.coder)
            ),
        )

    def read_error(self, index: int, level: int, content: Sequence[Buffer]) -> ErrorMeasure:
        """Return a bound of what decoding loses of a chunk's values: half a step of each token's quantizer."""
        num_tokens = self.document.header.chunk_tokens[index]
        largest = self._scales[:, self._stops[index] - num_tokens : self._stops[index]].amax(dim=1)
        scales = [float(scale) for scale in largest]
        # The dtype rounds what the quantizer gives once more, by half a unit in the last place.
        rounding = torch.finfo(self._cache.dtype).eps / 2
        planes = self.document.header.planes
        bounds = (scale * (1 / (plane.num_bins - 2) + rounding) for scale, plane in zip(scales, planes, strict=True))
        return ErrorMeasure(max(bounds))

    def encode_chunk(self, index: int, level: int = 1) -> list[bytes | memoryview]:
        """See `Encoder.encode_chunk`."""
        header = self.expected_header(index, level)
        start, stop = header.first_token, header.first_token + header.num_tokens
        scales = self._scales[:, start:stop].contiguous()
        payload, streams = self._kernels.encode(
            self._cache.slice(start, stop),
            scales,
            header.planes,
            self.document.tables,
            self._num_threads,
            coder=header.coder,
        )
        return build_chunk(header, scales, streams, payload)


def read_scales(chunk: Chunk[AbsmaxChunkHeader]) -> torch.Tensor:
    """Return a chunk's scales, `[num_planes, num_tokens]` in the cache's dtype."""
    header = chunk.header
    # A copy: torch wants writable memory, and scales are few.
    scale_bytes = torch.frombuffer(bytearray(chunk.before[: header.scales_bytes]), dtype=torch.uint8)
    return scale_bytes.view(TORCH_DTYPES[header.dtype]).reshape(len(header.planes), header.num_tokens)


def build_chunk(
    header: AbsmaxChunkHeader, scales: torch.Tensor, streams: Sequence[StreamEntry], payload: bytes | memoryview
) -> list[bytes | memoryview]:
    """Join a chunk's parts.

    Args:
        header: its `stream_index` and `scales_crc` are filled in here.
        scales: `[num_planes, num_tokens]` in the cache's dtype.

    Returns:
        The file, as parts to be written one after the other.
    """
    content = scales.contiguous().view(torch.uint8).numpy().tobytes()
    padded = content.ljust(round_up(len(content), ALIGNMENT), b"\0")
    header = dataclasses.replace(header, scales_crc=_native.crc32c(padded))
    return join_chunk(header, streams, [payload], before=padded)


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
