"""The codec of method `transform`: chunks of a KV cache to bytes and back, by way of a model's profile.

A document is one saved cache, coded at one step and up to four levels; each file of a level refines the files of the
levels before it. It is composed of the transform, its quantizer, the tables by scale index, the coder of components
and the container.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import container
from cachegen.coder import components as cpu_components
from cachegen.coder import cpu
from cachegen.coder.components import ComponentGroup
from cachegen.coder.cpu import DTYPES
from cachegen.coder.deferred import start
from cachegen.coder.reference import not_finite_error
from cachegen.component_tables import LevelCoding, plan_level
from cachegen.errors import BitstreamError, InputError, MismatchError
from cachegen.exact_values import (
    ExactValues,
    gather_exact_values,
    pack_exact_values,
    place_exact_values,
    unpack_exact_values,
)
from cachegen.format import ALIGNMENT, LANES, ChunkHeader, Coder, PlaneLayout, StreamEntry, round_up
from cachegen.framing import Buffer
from cachegen.kv_cache import ContextMetadata, KVCache, check_planes, describe_difference, hash_token_prefixes
from cachegen.profile import Profile, check_profile
from cachegen.transform import (
    BLOCK_TOKENS,
    LEVEL_RATIO_LOG,
    GroupTransform,
    join_planes,
    quantize_components,
    step_of_level,
)
from cachegen.transform_format import (
    MAX_LEVELS,
    MAX_STEP_LOG,
    ComponentChunkHeader,
    PlaneShape,
    TransformTablesHeader,
)

# A lane costs about 24 bits beyond its symbols; many components cost only tenths of a bit.
SYMBOLS_PER_LANE = 16384

EXPECTED_ERRORS = 32.0
"""A value travels exactly where the transform misses it by more than so many times the error to expect of its channel,
the dtype's own rounding aside. Real caches stay below 21."""
_ROUNDING = 2.0**-18  # of sums in fp32, over the largest magnitude of a token
_MARGIN = 2.0**-8
_FIELDS_OF_ENCODING = ("stream_index", "refines", "max_error", "mean_error", "exact_bytes", "exact_crc")

Result = TypeVar("Result")


@dataclass(frozen=True)
class TransformDocument:
    """What decoding needs: the tables file, the profile it names, and where to compute.

    Attributes:
        tables_hash: SHA-256 of the tables file.
        profile: None where nothing is to be decoded.
        device: of the matrix products, and of the outputs that chunks are decoded into.
    """

    header: TransformTablesHeader
    tables_hash: bytes
    profile: Profile | None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def transforms(self) -> list[GroupTransform]:
        """One per group of layers.

        Raises:
            InputError: the document was loaded without a profile.
        """
        if self.profile is None:
            raise InputError(f"the document needs the profile {self.header.profile_hash.hex()[:12]} (--profile)")
        return [GroupTransform(self.profile, group, self.device) for group in self.profile.groups]

    def prepare(self) -> None:
        """Do what decoding needs once: see `transforms`."""
        _ = self.transforms

    def codings(self, level: int) -> list[LevelCoding]:
        """Return how each group's components are coded at a level."""
        step_log = self.header.step_log - LEVEL_RATIO_LOG * (level - 1)
        coarse = step_log + LEVEL_RATIO_LOG if level > 1 else None
        return [plan_level(t.group.scale_logs.numpy(), step_log, coarse) for t in self.transforms]


class TransformEncoder:
    """Encodes one saved cache with a profile: its chunks and levels in any order.

    Attributes:
        document: what a decoder will know.
        tables_file: the tables file's bytes.
        levels: their numbers, 1 to the last.
    """

    def __init__(
        self,
        cache: KVCache,
        metadata: ContextMetadata,
        profile: Profile,
        chunk_tokens: Sequence[int],
        *,
        step_log: int,
        num_levels: int = 1,
        num_threads: int = 1,
        kernels=cpu,
    ) -> None:
        """Check that cache and profile belong together.

        Args:
            cache: on the CPU; may be memory-mapped.
            profile: loaded for encoding.
            chunk_tokens: the chunks' token counts, at most the cache's in all.
            step_log: 16 log2 of level 1's step.
            kernels: `cachegen.coder.cpu`, or a `cachegen.coder.cuda.CudaKernels`, on whose device the matrix products
                are, too.

        Raises:
            MismatchError: the profile is another model's.
        """
        if sum(chunk_tokens) > cache.num_tokens or min(chunk_tokens, default=0) < 1:
            raise ValueError(f"`chunk_tokens` must be positive and at most {cache.num_tokens} in all")
        if not 1 <= num_levels <= MAX_LEVELS:
            raise ValueError(f"`num_levels` must be 1 to {MAX_LEVELS}, got {num_levels}")
        if abs(step_log) > MAX_STEP_LOG:
            raise ValueError(f"`step_log` must be within {MAX_STEP_LOG} of 0, got {step_log}")
        check_profile(profile, metadata.model_fingerprint, metadata.rope_hash, "the KV cache")
        if [tuple(plane.shape[1:]) for plane in cache.planes] != list(profile.plane_shapes):
            raise MismatchError("the profile's shapes are not the KV cache's: it is another model's")
        self._cache, self._num_threads = cache, num_threads
        self._coder, self._device = component_kernels(kernels), kernels.device
        self._stops = [sum(chunk_tokens[: i + 1]) for i in range(len(chunk_tokens))]
        self._token_hashes = hash_token_prefixes(metadata.token_ids, self._stops)
        header = TransformTablesHeader(
            num_cache_tokens=cache.num_tokens,
            num_levels=num_levels,
            dtype=DTYPES[cache.dtype],
            prefill_block_size=metadata.block_size,
            step_log=step_log,
            model_fingerprint=bytes.fromhex(metadata.model_fingerprint),
            token_hash=bytes.fromhex(hash_token_prefixes(metadata.token_ids, [cache.num_tokens])[0]),
            rope_hash=bytes.fromhex(metadata.rope_hash),
            profile_hash=bytes.fromhex(profile.profile_hash),
            cache_hash=check_planes(cache, metadata),
            planes=tuple(PlaneShape(*shape) for shape in profile.plane_shapes),
            chunk_tokens=tuple(chunk_tokens),
        )
        self.tables_file = container.build_transform_tables(header)
        tables_hash = hashlib.sha256(self.tables_file).digest()
        self.document = TransformDocument(header, tables_hash, profile, self._device)
        self.levels = tuple(range(1, num_levels + 1))
        self._codings = {level: self.document.codings(level) for level in self.levels}
        self._quantized: _QuantizedChunk | None = None  # of the chunk that was asked for last

    @property
    def num_chunks(self) -> int:
        return len(self._stops)

    def expected_header(self, index: int, level: int) -> ComponentChunkHeader:
        """Return a chunk's header but for its stream index, which only encoding tells."""
        document = self.document.header
        num_tokens = document.chunk_tokens[index]
        return ComponentChunkHeader(
            first_token=self._stops[index] - num_tokens,
            num_tokens=num_tokens,
            num_layers=len(document.planes) // 2,
            coder=Coder.RANS,
            dtype=document.dtype,
            level=level,
            step_log=document.step_log,
            model_fingerprint=document.model_fingerprint,
            token_hash=bytes.fromhex(self._token_hashes[index]),
            rope_hash=document.rope_hash,
            tables_hash=self.document.tables_hash,
            profile_hash=document.profile_hash,
            tokens_per_stream=tuple(
                choose_component_stream(coding.num_components, num_tokens) for coding in self._codings[level]
            ),
        )

    def expected_kl(self, level: int) -> float | None:
        """Return the loss that the profile's curve says for a level, in nats per token; None beyond the curve."""
        profile = self.document.profile
        point = profile.expect(self.document.header.step_log - LEVEL_RATIO_LOG * (level - 1)) if profile else None
        return point.kl if point is not None else None

    def is_encoding_of(self, index: int, contents: Sequence[Buffer]) -> bool:
        """Tell whether files are this chunk, whole and unchanged, from this document.

        Args:
            contents: the files of level 1, of level 2, ... to the last.
        """
        refines = 0
        for level, content in zip(self.levels, contents, strict=True):
            try:
                header = container.parse_chunk(content, self._num_threads).header
            except BitstreamError:
                return False
            expected = self.expected_header(index, level)
            if not isinstance(header, ComponentChunkHeader) or header.refines != refines:
                return False
            written = {name: getattr(header, name) for name in _FIELDS_OF_ENCODING}
            if header != dataclasses.replace(expected, **written):
                return False
            refines = header.header_crc
        return True

    def read_error(self, index: int, level: int, content: Buffer) -> ErrorMeasure:
        """Return what decoding loses of a chunk's values at a level, as its file records it."""
        header = container.parse_chunk(content, self._num_threads).header
        assert isinstance(header, ComponentChunkHeader)
        return ErrorMeasure(header.max_error, header.mean_error)

    def encode_chunk(self, index: int, level: int) -> list[bytes | memoryview]:
        """Encode one chunk at one level; returns its file as parts to be written one after the other.

        Raises:
            InputError: the cache holds NaN or infinity.
        """
        quantized = self._quantize(index)
        if level > 1 and quantized.header_crcs[level - 2] is None:
            self.encode_chunk(index, level - 1)
        error = quantized.errors[level - 1]
        header = dataclasses.replace(
            self.expected_header(index, level),
            refines=(quantized.header_crcs[level - 2] or 0) if level > 1 else 0,
            max_error=error.largest,
            mean_error=error.mean,
        )
        parts: list[bytes | memoryview] = []
        streams: list[StreamEntry] = []
        for group, coding in enumerate(self._codings[level]):
            components = quantized.components[group]
            coarse = components[level - 2] if level > 1 else None
            payload, entries = self._coder.encode_components(
                components[level - 1], coarse, coding, header.tokens_per_stream[group], self._num_threads
            )
            parts.append(payload)
            streams += entries
        exact = pack_exact_values(quantized.exact[level - 1])
        built = container.build_component_chunk(header, streams, parts, exact)
        quantized.header_crcs[level - 1] = container.header_crc(built[0])
        return built

    def _quantize(self, index: int) -> _QuantizedChunk:
        """Transform and quantize a chunk on the kernels' device, and measure what that loses."""
        if self._quantized is None or self._quantized.index != index:
            num_tokens = self.document.header.chunk_tokens[index]
            first_token = self._stops[index] - num_tokens
            tokens = self._cache.slice(first_token, self._stops[index])
            for number, plane in enumerate(tokens.planes):
                if not torch.isfinite(plane).all():
                    bad = (~torch.isfinite(plane)).flatten(1).any(1).nonzero()[0].item()
                    raise not_finite_error(number, first_token + int(bad))
            if self._device.type != "cpu":
                tokens = KVCache(
                    [plane.to(self._device) for plane in tokens.keys],
                    [plane.to(self._device) for plane in tokens.values],
                )
            losses = [_LossMeter() for _ in self.levels]
            components, first_channel = [], 0
            for group, transform in enumerate(self.document.transforms):
                components.append(self._quantize_group(group, transform, tokens, first_token, first_channel, losses))
                first_channel += transform.group.num_channels
            self._quantized = _QuantizedChunk(
                index,
                components,
                [loss.gather(tokens) for loss in losses],
                [loss.measure() for loss in losses],
                [None] * len(self.levels),
            )
        return self._quantized

    def _quantize_group(
        self,
        group: int,
        transform: GroupTransform,
        tokens: KVCache,
        first_token: int,
        first_channel: int,
        losses: Sequence[_LossMeter],
    ) -> list[torch.Tensor]:
        """Return a chunk's quantized components of one group, per level; what each level loses goes to `losses`."""
        step_log = self.document.header.step_log
        steps = [step_of_level(step_log, level) for level in self.levels]
        num_coded = [self._codings[level][group].num_components for level in self.levels]
        expected = [transform.expected_errors(step, count) for step, count in zip(steps, num_coded, strict=True)]
        blocks = []
        for begin in range(0, tokens.num_tokens, BLOCK_TOKENS):
            block = tokens.slice(begin, min(begin + BLOCK_TOKENS, tokens.num_tokens))
            position = first_token + begin
            vectors = transform.replace_outliers(transform.join(block, position))
            quantized = quantize_components(transform.analyze(vectors, num_coded[-1]), steps[0], num_coded)
            values = join_planes(transform.planes(block), None, position, self._device)
            for loss, components, step, errors in zip(losses, quantized, steps, expected, strict=True):
                decoded = torch.cat(
                    [plane.flatten(1) for plane in transform.reconstruct(components, step, position)], 1
                )
                loss.add(values, decoded, errors, block.dtype, begin, first_channel)
            blocks.append(quantized)
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]


@dataclass(frozen=True)
class ErrorMeasure:
    """How far decoded values are from those of the cache.

    Attributes:
        largest: the largest difference, or a bound of it.
        mean: over all values; None where it was not measured.
    """

    largest: float
    mean: float | None = None


@dataclass
class _QuantizedChunk:
    """A chunk between quantizer and coder: its levels are usually encoded one after the other.

    Attributes:
        components: per group and level.
        exact: per level, the values that travel exactly.
        errors: per level, of all other values.
        header_crcs: per level, of its file, once it is encoded.
    """

    index: int
    components: list[list[torch.Tensor]]
    exact: list[ExactValues]
    errors: list[ErrorMeasure]
    header_crcs: list[int | None]


class _LossMeter:
    """Compares what a level decodes to with the cache, and lists the values that must travel exactly."""

    def __init__(self) -> None:
        self._largest, self._total, self._count = 0.0, 0.0, 0
        self._tokens: list[NDArray[np.int64]] = []
        self._channels: list[NDArray[np.int64]] = []

    def add(
        self,
        values: torch.Tensor,
        decoded: torch.Tensor,
        expected: torch.Tensor,
        dtype: torch.dtype,
        first_token: int,
        first_channel: int,
    ) -> None:
        """Compare a block.

        Args:
            values, decoded: fp32 `[num_tokens, num_channels]`; the latter are not rounded to `dtype` yet.
            expected: the error to expect, `[num_channels]`.
            dtype: of the cache.
            first_token, first_channel: of the block, in the chunk.
        """
        info = torch.finfo(dtype)
        magnitudes = values.abs()
        bound = EXPECTED_ERRORS * expected + info.eps * magnitudes + _ROUNDING * magnitudes.amax(dim=1, keepdim=True)
        errors = (values - decoded.to(dtype).float()).abs_()
        # Not `>`: an error that is no number is out of bounds. Another device may round away from zero where ours did
        # not, so that what comes near the largest number of the dtype must not be left to it.
        is_exact = ~((errors <= bound) & (decoded.abs() <= info.max * (1 - _MARGIN)))
        errors.masked_fill_(is_exact, 0.0)
        self._largest = max(self._largest, float(errors.max()))
        self._total += float(errors.sum(dtype=torch.float64))
        self._count += errors.numel()
        if is_exact.any():
            tokens, channels = is_exact.nonzero(as_tuple=True)
            self._tokens.append(tokens.cpu().numpy() + first_token)
            self._channels.append(channels.cpu().numpy() + first_channel)

    def gather(self, cache: KVCache) -> ExactValues:
        """Return the values that travel exactly, from the chunk's cache."""
        if not self._tokens:
            return gather_exact_values(cache, np.empty(0, np.int64), np.empty(0, np.int64))
        return gather_exact_values(cache, np.concatenate(self._tokens), np.concatenate(self._channels))

    def measure(self) -> ErrorMeasure:
        return ErrorMeasure(_round_up(self._largest), float(np.float32(self._total / self._count)))


def _round_up(value: float) -> float:
    """Return the smallest fp32 number that is at least `value`."""
    rounded = np.float32(value)
    return float(rounded if rounded >= value else np.nextafter(rounded, np.float32(np.inf)))


def load_transform_document(
    tables_file: bytes, header: TransformTablesHeader, profile: Profile | None, device: torch.device
) -> TransformDocument:
    """Put a document's parts together, its tables file already parsed.

    Raises:
        MismatchError: the profile is not the one that the document names.
    """
    if profile is not None and bytes.fromhex(profile.profile_hash) != header.profile_hash:
        raise MismatchError(
            f"profile_hash is {profile.profile_hash[:12]}, but the document was encoded with the profile "
            f"{header.profile_hash.hex()[:12]}: give --profile its folder"
        )
    if profile is not None and [(p.num_kv_heads, p.head_dim) for p in header.planes] != list(profile.plane_shapes):
        raise MismatchError("planes have other shapes than the profile's")
    return TransformDocument(header, hashlib.sha256(tables_file).digest(), profile, device)


def decode_component_chunk(
    contents: Sequence[Buffer],
    document: TransformDocument,
    output: KVCache,
    *,
    first_token: int,
    token_hash: bytes,
    num_threads: int = 1,
    kernels=cpu,
) -> ComponentChunkHeader:
    """Decode one chunk from the files of its levels 1 to n, refusing those that do not belong here.

    Args:
        contents: the files of level 1, of level 2, ...; more of them give a finer result.
        output: where the chunk's tokens go: exactly as many as it must have, on the document's device.
        first_token: where in the context the chunk must begin.
        token_hash: hash of the context's tokens up to the chunk's end.
        kernels: `cachegen.coder.cpu`, or a `cachegen.coder.cuda.CudaKernels`; of the document's device.

    Returns:
        The header of the last level's file.

    Raises:
        BitstreamError: a file is corrupt; `output` then holds no usable values.
        MismatchError: a file is of another document, model, context or level, naming the field.
    """
    where = {"first_token": first_token, "token_hash": token_hash, "num_threads": num_threads}
    header, finish = start_decoding_component_chunk(contents, document, output, kernels=kernels, **where)
    finish()
    return header


def start_decoding_component_chunk(
    contents: Sequence[Buffer],
    document: TransformDocument,
    output: KVCache,
    *,
    first_token: int,
    token_hash: bytes,
    num_threads: int = 1,
    kernels=cpu,
) -> tuple[ComponentChunkHeader, Callable[[], None]]:
    """Begin what `decode_component_chunk` does, on a GPU: make all checks that need no decoding, queue the rest there.

    Returns:
        The header of the last level's file, and a function that waits for the GPU and raises BitstreamError where a
        file is corrupt. Until it has returned, `output` holds no usable values.
    """
    if not contents:
        raise ValueError("`contents` must have at least the file of level 1")
    check_output(document.header.planes, output)
    codings = [document.codings(level) for level in range(1, len(contents) + 1)]
    chunks: list[container.Chunk] = []
    headers: list[ComponentChunkHeader] = []
    for level, content in enumerate(contents, 1):

        def check(header: ChunkHeader | ComponentChunkHeader, level: int = level) -> None:
            headers.append(_check_gates(header, document, level, output.num_tokens, first_token, token_hash))
            _check_places(headers[-1], codings[level - 1])
            if level > 1 and headers[-1].refines != headers[-2].header_crc:
                raise MismatchError(
                    f"refines a file of level {level - 1} that is not the one beside it: encode the chunk again"
                )

        try:
            chunk = container.parse_chunk(content, num_threads, check=check)
        except (BitstreamError, MismatchError) as error:
            error.level = level
            raise
        chunks.append(chunk)
    try:
        num_channels = sum(plane.num_channels for plane in document.header.planes)
        exact = unpack_exact_values(chunks[-1].exact, document.header.dtype, output.num_tokens, num_channels)
    except BitstreamError as error:
        error.level = len(chunks)
        raise
    coder = component_kernels(kernels)
    started: list[tuple[int, Callable[[], None]]] = []
    step = step_of_level(document.header.step_log, len(chunks))
    longest = round_up(output.num_tokens, LANES)  # a file may claim longer streams, and has one then
    starts, offsets = [0] * len(chunks), [0] * len(chunks)
    widths = [coding.num_components for coding in codings[-1]]
    for batch in _batch_groups([width * output.num_tokens for width in widths], coder.COMPONENTS_AT_A_TIME):
        decoded = [
            torch.zeros(output.num_tokens, widths[group], dtype=torch.int32, device=document.device) for group in batch
        ]
        for level, (chunk, header) in enumerate(zip(chunks, headers, strict=True)):
            groups = [
                ComponentGroup(group, components, codings[level][group], min(header.tokens_per_stream[group], longest))
                for group, components in zip(batch, decoded, strict=True)
            ]
            streams = header.streams[starts[level] :][: sum(header.streams_of_groups[group] for group in batch)]
            num_bytes = sum(round_up(stream.num_bytes, ALIGNMENT) for stream in streams)
            payload = chunk.payload[offsets[level] : offsets[level] + num_bytes]
            begin = functools.partial(start, coder, "decode_component_groups", payload, streams, groups, num_threads)
            started.append((level + 1, _call_at_level(level + 1, begin)))
            starts[level] += len(streams)
            offsets[level] += num_bytes
        for group, components in zip(batch, decoded, strict=True):
            document.transforms[group].synthesize(components, step, output, first_token)
    place_exact_values(exact, output)

    def finish() -> None:
        for level, finish_level in started:
            _call_at_level(level, finish_level)

    return headers[-1], finish


def check_output(planes: Sequence[PlaneShape | PlaneLayout], output: KVCache) -> None:
    """Refuse to decode into a cache of other shapes than a document's.

    Raises:
        MismatchError: naming the first plane that differs.
    """
    difference = describe_difference(
        [(plane.num_kv_heads, plane.head_dim) for plane in planes], [tuple(plane.shape[1:]) for plane in output.planes]
    )
    if difference is not None:
        raise MismatchError(f"{difference}: the document is of another model")


def _call_at_level(level: int, decode: Callable[[], Result]) -> Result:
    """Begin to decode, or wait for it; an error is about the file of that level."""
    try:
        return decode()
    except BitstreamError as error:
        located = BitstreamError(error.problem, field=error.field)
        located.level = level
        raise located from error


def component_kernels(kernels):
    """Return the component coder of kernels: the CPU's is a module of its own."""
    return kernels if hasattr(kernels, "decode_component_groups") else cpu_components


def _batch_groups(sizes: Sequence[int], limit: int) -> list[range]:
    """Return runs of groups whose sizes sum to at most `limit`, or single ones."""
    batches, first, total = [], 0, 0
    for group, size in enumerate(sizes):
        if group > first and total + size > limit:
            batches.append(range(first, group))
            first, total = group, 0
        total += size
    return [*batches, range(first, len(sizes))]


def choose_component_stream(num_components: int, num_tokens: int) -> int:
    """Return how many tokens to put in a stream so that lanes have about `SYMBOLS_PER_LANE` symbols.

    Returns:
        A multiple of 32. A chunk's streams come out about equally long.
    """
    target = LANES * max(1, round(SYMBOLS_PER_LANE / max(num_components, 1)))
    num_streams = max(1, round(num_tokens / target))
    return LANES * -(-num_tokens // (num_streams * LANES))


def _check_places(header: ComponentChunkHeader, codings: Sequence[LevelCoding]) -> None:
    """Refuse streams of so many tokens that an escape's 32 bits could not name every component of theirs."""
    for tokens, coding in zip(header.tokens_per_stream, codings, strict=True):
        if tokens * coding.num_components >= 1 << 32:
            raise BitstreamError(
                f"{tokens} tokens of {coding.num_components} components are too many", field="tokens_per_stream"
            )


def _check_gates(
    header: object, document: TransformDocument, level: int, num_tokens: int, first_token: int, token_hash: bytes
) -> ComponentChunkHeader:
    """Refuse a chunk that does not belong here; returns its header."""
    if not isinstance(header, ComponentChunkHeader):
        raise MismatchError("method is not transform, but the tables file says so: the chunk is of another document")
    expected = document.header
    gates = [
        ("model_fingerprint", header.model_fingerprint, expected.model_fingerprint),
        ("rope_hash", header.rope_hash, expected.rope_hash),
        ("first_token", header.first_token, first_token),
        ("num_tokens", header.num_tokens, num_tokens),
        ("token_hash", header.token_hash, token_hash),
        ("dtype", header.dtype, expected.dtype),
        ("num_layers", header.num_layers, len(expected.planes) // 2),
        ("level", header.level, level),
        ("step_log", header.step_log, expected.step_log),
        ("profile_hash", header.profile_hash, expected.profile_hash),
        ("tables_hash", header.tables_hash, document.tables_hash),
        ("num_groups", len(header.tokens_per_stream), len(document.transforms)),
    ]
    for field_name, found, wanted in gates:
        if found != wanted:
            shown = [value.hex()[:12] if isinstance(value, bytes) else value for value in (found, wanted)]
            raise MismatchError(
                f"{field_name} is {shown[0]}, but the tables file, the profile and the context say {shown[1]}: "
                "the chunk is of another document, model, profile or level"
            )
    return header
