"""The codec: chunks of a KV cache to bytes and back, composed of quantization, tables, coder and container.

A document is one saved cache. It has one tables file, whose hash stands in every chunk, and chunks that follow each
other from token 0; each chunk decodes by itself, given the tables.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import torch

from cachegen import container
from cachegen.coder import cpu
from cachegen.coder.deferred import start
from cachegen.config import QuantizationConfig
from cachegen.errors import BitstreamError, MismatchError
from cachegen.format import (
    LANES,
    NO_HASH,
    TABLE_SIZE,
    ChunkHeader,
    Coder,
    Method,
    PlaneLayout,
    TablesHeader,
)
from cachegen.framing import Buffer
from cachegen.kv_cache import ContextMetadata, KVCache, check_planes, hash_token_prefixes
from cachegen.profile import Profile
from cachegen.quantization import low_bits_for
from cachegen.transform_codec import (
    ErrorMeasure,
    TransformDocument,
    check_output,
    load_transform_document,
    start_decoding_component_chunk,
)
from cachegen.transform_format import ComponentChunkHeader, TransformTablesHeader

# A lane costs about 24 bits beyond its symbols (its state, less what the state carries). At 4096 symbols of 2 to 3 bits
# that is a quarter of a percent; longer lanes would leave a GPU, one warp per stream, too few streams. A code of coder
# `ac` costs as much, its length and its end, and has as many symbols.
SYMBOLS_PER_LANE = 4096


@dataclass(frozen=True)
class Document:
    """What decoding needs of a tables file.

    Attributes:
        tables_hash: SHA-256 of the file.
        tables_section: the file's bytes after its header.
        kernels: `cachegen.coder.cpu`, or a `cachegen.coder.cuda.CudaKernels`.
        num_threads: to unpack the tables with.
    """

    header: TablesHeader
    tables_hash: bytes
    tables_section: bytes
    kernels: Any
    num_threads: int

    @cached_property
    def tables(self) -> cpu.Tables | None:
        """The kernels' form of the tables; None for coder `packed`.

        Tables take tens of times the memory that they have in the file, so they are unpacked at their first use: a
        document of another model is refused before.

        Raises:
            BitstreamError: they are corrupt.
        """
        if not self.header.tables_bytes:
            return None
        header = self.header
        return self.kernels.load_tables(self.tables_section, header.planes, header.plane_table_bytes, self.num_threads)

    def prepare(self) -> None:
        """Do what decoding needs once, with the errors of the tables file: see `tables`."""
        _ = self.tables


class DocumentEncoder:
    """Encodes one saved cache: measures it once, makes its tables, then its chunks in any order.

    Attributes:
        document: what a decoder will know of the tables file.
        tables_file: the tables file's bytes.
    """

    def __init__(
        self,
        cache: KVCache,
        metadata: ContextMetadata,
        config: QuantizationConfig,
        chunk_tokens: Sequence[int],
        coder: Coder,
        *,
        num_threads: int = 1,
        kernels=cpu,
    ) -> None:
        """Measure the cache and make its tables.

        Args:
            cache: on the CPU; may be memory-mapped.
            chunk_tokens: the chunks' token counts, at most the cache's in all.
            kernels: `cachegen.coder.cpu`, or `cachegen.coder.reference`.

        Raises:
            InputError: the cache holds NaN or infinity.
            ConfigError: the config does not cover the cache's layers.
        """
        if sum(chunk_tokens) > cache.num_tokens or min(chunk_tokens, default=0) < 1:
            raise ValueError(f"`chunk_tokens` must be positive and at most {cache.num_tokens} in all")
        self._cache, self._coder, self._num_threads, self._kernels = cache, coder, num_threads, kernels
        self._stops = [sum(chunk_tokens[: i + 1]) for i in range(len(chunk_tokens))]
        self._token_hashes = hash_token_prefixes(metadata.token_ids, self._stops)
        planes = tuple(
            PlaneLayout(plane.shape[1], plane.shape[2], group.num_bins, _low_bits(group.num_bins, coder))
            for plane, group in zip(cache.planes, config.groups_of_planes(cache.num_layers), strict=True)
        )
        covered = cache.slice(0, self._stops[-1])
        self._scales, counts = kernels.measure(covered, planes, num_threads)
        plane_tables = [] if coder is Coder.PACKED else kernels.pack_tables(counts, planes, num_threads)
        header = TablesHeader(
            num_cache_tokens=cache.num_tokens,
            method=config.method,
            dtype=cpu.DTYPES[cache.dtype],
            prefill_block_size=metadata.block_size,
            coder=coder,
            tables_crc=0,
            model_fingerprint=bytes.fromhex(metadata.model_fingerprint),
            token_hash=bytes.fromhex(hash_token_prefixes(metadata.token_ids, [cache.num_tokens])[0]),
            rope_hash=bytes.fromhex(metadata.rope_hash),
            profile_hash=NO_HASH,
            cache_hash=check_planes(cache, metadata),
            planes=planes,
            plane_table_bytes=tuple(map(len, plane_tables)) or (0,) * len(planes),
            chunk_tokens=tuple(chunk_tokens),
        )
        self.tables_file = container.build_tables(header, b"".join(plane_tables))
        self.document = cast(Document, load_document(self.tables_file, num_threads=num_threads, kernels=kernels))

    @property
    def num_chunks(self) -> int:
        return len(self._stops)

    levels = (0,)
    """The levels of its chunks: these methods have one."""

    def expected_header(self, index: int, level: int = 0) -> ChunkHeader:
        """Return a chunk's header but for its stream index and checksums, which only encoding tells."""
        document, stop = self.document.header, self._stops[index]
        num_tokens = document.chunk_tokens[index]
        return ChunkHeader(
            first_token=stop - num_tokens,
            num_tokens=num_tokens,
            method=document.method,
            coder=self._coder,
            dtype=document.dtype,
            level=level,
            scales_crc=0,
            model_fingerprint=document.model_fingerprint,
            token_hash=bytes.fromhex(self._token_hashes[index]),
            rope_hash=document.rope_hash,
            tables_hash=self.document.tables_hash,
            profile_hash=NO_HASH,
            planes=tuple(
                dataclasses.replace(
                    p, tokens_per_stream=choose_tokens_per_stream(p.num_channels, num_tokens, self._coder)
                )
                for p in document.planes
            ),
            stream_index=b"",
        )

    def expected_kl(self, level: int) -> None:
        """Return what a level is expected to lose: nobody measured it for these methods."""
        return None

    def is_encoding_of(self, index: int, contents: Sequence[Buffer]) -> bool:
        """Tell whether files are this chunk, whole and unchanged, from this document and configuration.

        Args:
            contents: its one file.
        """
        (content,) = contents
        try:
            header = container.parse_chunk(content, self._num_threads).header
        except BitstreamError:
            return False
        if not isinstance(header, ChunkHeader):
            return False
        return dataclasses.replace(header, scales_crc=0, stream_index=b"") == self.expected_header(index)

    def read_error(self, index: int, level: int, content: Buffer) -> ErrorMeasure:
        """Return a bound of what decoding loses of a chunk's values: half a step of each token's quantizer."""
        num_tokens = self.document.header.chunk_tokens[index]
        scales = self._scales[:, self._stops[index] - num_tokens : self._stops[index]].double().amax(dim=1)
        bins = torch.tensor([plane.num_bins for plane in self.document.header.planes], dtype=torch.float64)
        # The dtype rounds what the quantizer gives once more, by half a unit in the last place.
        rounding = torch.finfo(self._cache.dtype).eps / 2
        return ErrorMeasure(float((scales * (1 / (bins - 2) + rounding)).max()))

    def encode_chunk(self, index: int, level: int = 0) -> list[bytes | memoryview]:
        """Encode one chunk; returns its file as parts to be written one after the other."""
        header = self.expected_header(index, level)
        start, stop = header.first_token, header.first_token + header.num_tokens
        scales = self._scales[:, start:stop].contiguous()
        payload, streams = self._kernels.encode(
            self._cache.slice(start, stop),
            scales,
            header.planes,
            self.document.tables,
            self._num_threads,
            coder=self._coder,
        )
        return container.build_chunk(header, scales, streams, payload)


FindProfile: TypeAlias = Callable[[bytes], Profile]
"""Returns the profile of a hash of 32 bytes."""


def load_document(
    tables_file: Buffer, *, num_threads: int = 1, kernels=cpu, find_profile: FindProfile | None = None
) -> Document | TransformDocument:
    """Parse a tables file; its frequency tables are unpacked at their first use.

    Args:
        find_profile: called where the document is of method `transform`; None where nothing will be decoded.

    Raises:
        BitstreamError: the file is corrupt.
        MismatchError: the profile found is not the one that the document names.
    """
    content = bytes(tables_file)
    header, tables = container.parse_tables(content)
    if isinstance(header, TransformTablesHeader):
        profile = find_profile(header.profile_hash) if find_profile is not None else None
        return load_transform_document(content, header, profile, kernels.device)
    return Document(header, hashlib.sha256(content).digest(), tables, kernels, num_threads)


def decode_levels(
    contents: Sequence[Buffer],
    document: Document | TransformDocument,
    output: KVCache,
    *,
    first_token: int,
    token_hash: bytes,
    num_threads: int = 1,
    kernels=cpu,
) -> None:
    """Decode one chunk from all files it needs: one, or with method `transform` those of level 1, level 2, ...

    Args and errors: as `decode_chunk` and `decode_component_chunk`.
    """
    where = {"first_token": first_token, "token_hash": token_hash, "num_threads": num_threads}
    start_decoding_levels(contents, document, output, kernels=kernels, **where)()


def start_decoding_levels(
    contents: Sequence[Buffer],
    document: Document | TransformDocument,
    output: KVCache,
    *,
    first_token: int,
    token_hash: bytes,
    num_threads: int = 1,
    kernels=cpu,
) -> Callable[[], None]:
    """Begin what `decode_levels` does, on a GPU: make all checks that need no decoding, queue the rest there.

    Returns:
        A function that waits for the GPU and raises what is left to raise: BitstreamError. Until it has returned,
        `output` holds no usable values. With kernels of the CPU all is done before.
    """
    where = {"first_token": first_token, "token_hash": token_hash, "num_threads": num_threads}
    if isinstance(document, TransformDocument):
        return start_decoding_component_chunk(contents, document, output, kernels=kernels, **where)[1]
    (content,) = contents
    return _start_decoding_chunk(content, document, output, kernels=kernels, **where)[1]


def decode_chunk(
    content: Buffer,
    document: Document,
    output: KVCache,
    *,
    first_token: int,
    token_hash: bytes,
    num_threads: int = 1,
    kernels=cpu,
) -> ChunkHeader:
    """Decode one chunk, refusing one that does not belong here.

    Args:
        content: the chunk file.
        output: where the chunk's tokens go: exactly as many as it must have, in the cache's dtype, on the CPU.
        first_token: where in the context the chunk must begin.
        token_hash: hash of the context's tokens up to the chunk's end.

    Returns:
        The chunk's header.

    Raises:
        BitstreamError: the chunk is corrupt; `output` then holds no usable values.
        MismatchError: the chunk is of another document, model, context or configuration, naming the field.
    """
    where = {"first_token": first_token, "token_hash": token_hash, "num_threads": num_threads}
    header, finish = _start_decoding_chunk(content, document, output, kernels=kernels, **where)
    finish()
    return header


def _start_decoding_chunk(
    content: Buffer,
    document: Document,
    output: KVCache,
    *,
    first_token: int,
    token_hash: bytes,
    num_threads: int,
    kernels,
) -> tuple[ChunkHeader, Callable[[], None]]:
    """Begin what `decode_chunk` does; returns the header, and what waits for the rest."""
    expected = document.header

    def check(header: ChunkHeader | ComponentChunkHeader) -> None:
        if not isinstance(header, ChunkHeader):
            raise MismatchError(
                f"method is {_show(header.method)}, but the tables file says {_show(expected.method)}: "
                "the chunk is of another document"
            )
        shapes = tuple(dataclasses.replace(plane, tokens_per_stream=0) for plane in header.planes)
        gates = [
            ("model_fingerprint", header.model_fingerprint, expected.model_fingerprint),
            ("rope_hash", header.rope_hash, expected.rope_hash),
            ("first_token", header.first_token, first_token),
            ("num_tokens", header.num_tokens, output.num_tokens),
            ("token_hash", header.token_hash, token_hash),
            ("method", header.method, expected.method),
            ("coder", header.coder, expected.coder),
            ("dtype", header.dtype, expected.dtype),
            ("planes", shapes, expected.planes),
            ("profile_hash", header.profile_hash, expected.profile_hash),
            ("tables_hash", header.tables_hash, document.tables_hash),
        ]
        for field, found, wanted in gates:
            if found != wanted:
                raise MismatchError(
                    f"{field} is {_show(found)}, but the tables file and the context say {_show(wanted)}: "
                    "the chunk is of another document, model or configuration"
                )

    check_output(expected.planes, output)
    chunk = container.parse_chunk(content, num_threads, check=check)
    header = cast(ChunkHeader, chunk.header)
    finish = start(
        kernels,
        "decode",
        chunk.payload,
        header.streams,
        chunk.scales,
        header.planes,
        document.tables,
        output,
        num_threads,
        coder=header.coder,
    )
    return header, finish


def choose_tokens_per_stream(num_channels: int, num_tokens: int, coder: Coder = Coder.RANS) -> int:
    """Return how many tokens to put in a stream so that lanes, or codes, have about `SYMBOLS_PER_LANE` symbols.

    Returns:
        A multiple of 32; for coder `ac` at most 1.5 * SYMBOLS_PER_LANE. A chunk's streams come out about equally long.
    """
    target = SYMBOLS_PER_LANE if coder is Coder.AC else LANES * max(1, round(SYMBOLS_PER_LANE / num_channels))
    num_streams = max(1, round(num_tokens / target))
    return LANES * -(-num_tokens // (num_streams * LANES))


def document_dtype(document: Document | TransformDocument) -> torch.dtype:
    """Return the torch dtype of a document's cache."""
    return next(dtype for dtype, number in cpu.DTYPES.items() if number == document.header.dtype)


def _low_bits(num_bins: int, coder: Coder) -> int:
    """How many low bits a plane stores raw: all of them with coder `packed`."""
    return low_bits_for(num_bins, 1 if coder is Coder.PACKED else TABLE_SIZE)


def _show(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()[:12]
    if isinstance(value, tuple):
        return f"{len(value)} planes of {value[0]}" if value else "none"
    return value.name.lower() if isinstance(value, (Method, Coder)) else str(value)
