"""The codec of method `transform`: chunks of a KV cache to bytes and back, by way of a model's profile.

A document is coded at one step and up to four levels; each file of a level refines the files of the levels before it.
It is composed of the transform, its quantizer, the tables by scale index and the coder of components.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from cachegen import _native
from cachegen.coder.component_tables import LevelCoding, plan_level
from cachegen.coder.components import ComponentGroup
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import BitstreamError, InputError, MismatchError, NotFiniteError
from cachegen.format import ALIGNMENT, LANES, MAX_LEVELS, Coder, StreamEntry, round_up
from cachegen.format.files import Chunk, header_crc, join_chunk
from cachegen.format.framing import PREFIX, Buffer
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.base import DecodingPart, Document, Encoder, ErrorMeasure, cut_streams, naming_level, start_all
from cachegen.methods.layer_classes import share_first_stored
from cachegen.methods.profile_files import check_named
from cachegen.methods.transform.batched import ROW_COMPONENTS, BatchedSynthesis, can_join
from cachegen.methods.transform.exact_values import (
    ExactValues,
    check_stored,
    pack_exact_values,
    place_exact_values,
    unpack_exact_values,
)
from cachegen.methods.transform.headers import (
    MAX_STEP_LOG,
    TransformChunkHeader,
    TransformDocumentHeader,
)
from cachegen.methods.transform.integers import HALF_BYTES
from cachegen.methods.transform.loss import LossMeter
from cachegen.methods.transform.profile import Profile, check_profile
from cachegen.methods.transform.transform import (
    BLOCK_TOKENS,
    LEVEL_RATIO_LOG,
    GroupTransform,
    quantize_components,
    step_of_level,
)

METHOD_NUMBER = 3
"""How files call the method."""

# A lane costs about 24 bits beyond its symbols; many components cost only tenths of a bit.
SYMBOLS_PER_COMPONENT_LANE = 16384


class TransformDocument(Document):
    """See `Document`.

    Attributes:
        profile: None where nothing is to be decoded.
        device: of the matrix products, and of the outputs that chunks are decoded into.
    """

    header: TransformDocumentHeader  # pyright: ignore[reportIncompatibleVariableOverride]  (only `__init__` sets it)

    def __init__(
        self,
        header: TransformDocumentHeader,
        tables_hash: bytes,
        profile: Profile | None,
        device: torch.device = CPU.device,
    ) -> None:
        """Put a document's parts together.

        Raises:
            MismatchError: the profile is not the one that the document names.
        """
        super().__init__(header, tables_hash)
        self.profile, self.device = profile, device
        if profile is None:
            return
        check_named(profile, header.profile_hash)
        if header.shapes != list(profile.plane_shapes):
            raise MismatchError("planes have other shapes than the profile's")
        if header.first_stored and share_in_groups(profile, header.first_stored) != header.first_stored:
            problem = "the layers of a group of the profile do not begin at one token"
            raise BitstreamError(problem, field="first_stored")

    @cached_property
    def transforms(self) -> list[GroupTransform]:
        """One per group of layers.

        Raises:
            InputError: the document was opened without a profile.
        """
        if self.profile is None:
            raise InputError(f"the document needs the profile {self.header.profile_hash.hex()[:12]} (`profile`)")
        may_round = self.header.dtype.num_bytes == 2
        kept, key = self.profile.kept, (self.device, may_round)
        if key not in kept:
            # What an encoder needs takes longer to compute than a short document takes to encode.
            kept[key] = [
                GroupTransform(self.profile, group, self.device, may_round=may_round) for group in self.profile.groups
            ]
        return kept[key]

    def prepare(self) -> None:
        """See `Document.prepare`."""
        _ = self.transforms

    @functools.lru_cache(maxsize=MAX_LEVELS)  # noqa: B019 (a document lives as long as its folder or store is open)
    def codings(self, level: int) -> list[LevelCoding]:
        """Return how each group's components are coded at a level."""
        step_log = self.header.step_log - LEVEL_RATIO_LOG * (level - 1)
        coarse = step_log + LEVEL_RATIO_LOG if level > 1 else None
        return [plan_level(t.group.scale_logs.numpy(), step_log, coarse) for t in self.transforms]

    def gates(self, header: TransformChunkHeader) -> list[tuple[str, object, object]]:
        """See `Document.gates`."""
        codings = self.codings(header.level)
        if len(codings) == header.num_groups:
            _check_places(header, codings)
        return [
            ("step_log", header.step_log, self.header.step_log),
            ("num_groups", header.num_groups, len(codings)),
            ("num_absent", header.num_absent, self.num_absent(header.first_token, header.num_tokens)),
        ]

    def num_absent(self, first_token: int, num_tokens: int) -> tuple[int, ...]:
        """Return, per group, how many first tokens of a chunk are not stored; empty where none is in any."""
        of_layers = self.header.num_absent(first_token, num_tokens)
        return tuple(of_layers[t.group.first_layer] for t in self.transforms) if of_layers else ()

    def _start(
        self,
        chunks: Sequence[Chunk[TransformChunkHeader]],
        output: KVCache,
        first_token: int,
        num_threads: int,
        kernels: Kernels,
    ) -> Callable[[], None]:
        return start_all(self._list_parts(chunks, output, first_token, num_threads, kernels))

    def _list_parts(
        self,
        chunks: Sequence[Chunk[TransformChunkHeader]],
        output: KVCache,
        first_token: int,
        num_threads: int,
        kernels: Kernels,
    ) -> list[DecodingPart]:
        """Return a part for each batch of groups whose components are decoded together."""
        headers = [chunk.header for chunk in chunks]
        codings = [self.codings(level) for level in range(1, len(chunks) + 1)]
        with naming_level(len(chunks)):
            section = chunks[-1].behind[: headers[-1].exact_bytes]
            header = self.header
            exact = unpack_exact_values(section, header.dtype, output.num_tokens, header.values_per_token)
            check_stored(exact, header.shapes, header.num_absent(first_token, output.num_tokens))
        parts: list[DecodingPart] = []
        starts, offsets = [0] * len(chunks), [0] * len(chunks)
        widths = [coding.num_components for coding in codings[-1]]
        for batch in _batch_groups(widths, headers[-1].tokens_of_groups, kernels.components_at_a_time(num_threads)):
            streams: list[Sequence[StreamEntry]] = []
            payloads: list[memoryview | bytes] = []
            for level, (chunk, header) in enumerate(zip(chunks, headers, strict=True)):
                found = header.streams[starts[level] :][: sum(header.streams_of_groups[group] for group in batch)]
                num_bytes = sum(round_up(stream.num_bytes, ALIGNMENT) for stream in found)
                streams.append(found)
                payloads.append(chunk.payload[offsets[level] : offsets[level] + num_bytes])
                starts[level] += len(found)
                offsets[level] += num_bytes
            first, last = self.transforms[batch[0]].group, self.transforms[batch[-1]].group
            layers = range(first.first_layer, last.first_layer + last.num_layers)
            place_exact = functools.partial(_place_of_layers, exact, output, layers)
            arguments = (batch, headers, codings, payloads, streams, output, first_token, num_threads, kernels)
            parts.append(DecodingPart(layers, functools.partial(self._start_batch, *arguments, place_exact)))
        return parts

    def _start_batch(
        self,
        batch: range,
        headers: Sequence[TransformChunkHeader],
        codings: Sequence[Sequence[LevelCoding]],
        payloads: Sequence[memoryview | bytes],
        streams: Sequence[Sequence[StreamEntry]],
        output: KVCache,
        first_token: int,
        num_threads: int,
        kernels: Kernels,
        place_exact: Callable[[], None],
    ) -> Callable[[], None]:
        """Begin to decode groups with equally many tokens; the headers up to the streams are by level.

        Args:
            place_exact: puts the exact values of these groups in their places.
        """
        started: list[tuple[int, Callable[[], None]]] = []
        step = step_of_level(self.header.step_log, len(headers))
        longest = round_up(output.num_tokens, LANES)  # a file may claim longer streams, and has one then
        num_tokens = headers[-1].tokens_of_groups[batch[0]]
        if num_tokens:  # else there are no streams either
            num_absent = output.num_tokens - num_tokens
            num_coded = [codings[-1][group].num_components for group in batch]
            batched = self._join_groups(batch) if kernels.synthesis is not None else None
            decoded = self._allocate_components(num_tokens, num_coded, is_joined=batched is not None)
            for level, header in enumerate(headers):
                groups = [
                    ComponentGroup(
                        group, components, codings[level][group], min(header.tokens_per_stream[group], longest)
                    )
                    for group, components in zip(batch, decoded, strict=True)
                ]
                with naming_level(level + 1):
                    finish = kernels.start_decode_component_groups(payloads[level], streams[level], groups, num_threads)
                started.append((level + 1, finish))
            part, position = output.slice(num_absent, output.num_tokens), first_token + num_absent

            def multiply_groups() -> None:
                for group, components, count in zip(batch, decoded, num_coded, strict=True):
                    self.transforms[group].synthesize(components[:, :count], step, part, position, num_threads)

            if batched is not None and isinstance(decoded, torch.Tensor):
                is_beyond = batched.synthesize(decoded, num_coded, step, part, position, kernels.synthesis)
                started.append((len(headers), functools.partial(_do_anew_if, is_beyond, multiply_groups, place_exact)))
            else:
                multiply_groups()
        place_exact()

        def finish_all() -> None:
            for level, finish in started:
                with naming_level(level):
                    finish()

        return finish_all

    def _join_groups(self, batch: range) -> BatchedSynthesis | None:
        """Return the inverse transform of all groups of a batch in one; None where they are not alike."""
        key = (self.device, batch.start, batch.stop, self.header.dtype.num_bytes)
        if self.profile is None:
            return None
        if key not in self.profile.kept:
            groups = self.transforms[batch.start : batch.stop]
            may_round = self.header.dtype.num_bytes == HALF_BYTES
            self.profile.kept[key] = BatchedSynthesis(groups, may_round=may_round) if can_join(groups) else None
        return self.profile.kept[key]

    def _allocate_components(
        self, num_tokens: int, num_coded: Sequence[int], *, is_joined: bool
    ) -> torch.Tensor | list[torch.Tensor]:
        """Return int32 `[num_tokens, num_coded]` for each group, or one tensor that is zero behind a group's last."""
        if is_joined:
            shape = (len(num_coded), num_tokens, round_up(max(num_coded), ROW_COMPONENTS))
            return torch.zeros(shape, dtype=torch.int32, device=self.device)
        return [torch.empty(num_tokens, count, dtype=torch.int32, device=self.device) for count in num_coded]


def _place_of_layers(exact: ExactValues, output: KVCache, layers: range) -> None:
    """Put the exact values of some layers in their places."""
    if len(exact):
        widths = [plane[0].numel() for plane in output.planes]
        first, end = sum(widths[: 2 * layers.start]), sum(widths[: 2 * layers.stop])
        chosen = (exact.channels >= first) & (exact.channels < end)
        place_exact_values(ExactValues(exact.tokens[chosen], exact.channels[chosen], exact.bits[chosen]), output)


def _do_anew_if(
    is_beyond: Callable[[], bool] | None, multiply: Callable[[], None], place_exact: Callable[[], None]
) -> None:
    """Multiply once more, where components turned out to be too large for what was done."""
    if is_beyond is not None and is_beyond():
        multiply()
        place_exact()


class TransformEncoder(Encoder):
    """Encodes one saved cache with a profile; see `Encoder`."""

    document: TransformDocument

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
        kernels: Kernels = CPU,
        first_stored: Sequence[int] = (),
    ) -> None:
        """Check that cache and profile belong together.

        Args:
            cache: on the CPU; may be memory-mapped.
            profile: loaded for encoding.
            chunk_tokens: the chunks' token counts, at most the cache's in all.
            step_log: 16 log2 of level 1's step.
            kernels: on their device the matrix products are, too.
            first_stored: as for `Encoder`; the layers of a group are stored from the earliest of them on.

        Raises:
            BitstreamError: the cache's values are not those that were saved.
            MismatchError: the profile is another model's.
        """
        if not 1 <= num_levels <= MAX_LEVELS:
            raise ValueError(f"`num_levels` must be 1 to {MAX_LEVELS}, got {num_levels}")
        if abs(step_log) > MAX_STEP_LOG:
            raise ValueError(f"`step_log` must be within {MAX_STEP_LOG} of 0, got {step_log}")
        check_profile(profile, metadata.model_fingerprint, metadata.rope_hash, "the KV cache")
        if [tuple(plane.shape[1:]) for plane in cache.planes] != list(profile.plane_shapes):
            raise MismatchError("the profile's shapes are not the KV cache's: it is another model's")
        if first_stored:
            first_stored = share_in_groups(profile, first_stored)
        super().__init__(cache, metadata, chunk_tokens, num_threads, kernels, first_stored=first_stored)
        self._device = kernels.device
        header = TransformDocumentHeader(
            **self._document_fields,
            method=METHOD_NUMBER,
            coder=Coder.RANS,
            num_levels=num_levels,
            profile_hash=bytes.fromhex(profile.profile_hash),
            step_log=step_log,
            planes=tuple(PlaneShape(*shape) for shape in profile.plane_shapes),
        )
        self.tables_file = header.pack() + self.states_section
        document = TransformDocument(header, self._hash_tables(), profile, self._device)
        self.document = document  # pyright: ignore[reportIncompatibleVariableOverride]  (set here alone)
        self._quantized: _QuantizedChunk | None = None  # of the chunk that was asked for last

    def expected_header(self, index: int, level: int = 1) -> TransformChunkHeader:
        """See `Encoder.expected_header`."""
        fields, codings = self._chunk_fields(index, level), self.document.codings(level)
        num_tokens = fields["num_tokens"]
        num_absent = self.document.num_absent(fields["first_token"], num_tokens)
        return TransformChunkHeader(
            **fields,
            num_absent=num_absent,
            step_log=self.document.header.step_log,
            tokens_per_stream=tuple(
                choose_component_stream(coding.num_components, num_tokens - absent)
                for coding, absent in zip(codings, num_absent or (0,) * len(codings), strict=True)
            ),
        )

    def expected_kl(self, level: int) -> float | None:
        """Return the loss that the profile's curve says for a level, in nats per token; None beyond the curve."""
        profile = self.document.profile
        point = profile.expect(self.document.header.step_log - LEVEL_RATIO_LOG * (level - 1)) if profile else None
        return point.kl if point is not None else None

    def read_error(self, index: int, level: int, content: Sequence[Buffer]) -> ErrorMeasure:
        """Return what the chunk's file records; its first part holds the whole header."""
        fields = TransformChunkHeader.unpack_fields(
            content[0], PREFIX.size, PREFIX.size + TransformChunkHeader.num_bytes()
        )
        return ErrorMeasure(fields["max_error"], fields["mean_error"])

    def encode_chunk(self, index: int, level: int = 1) -> list[bytes | memoryview]:
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
        for group, coding in enumerate(self.document.codings(level)):
            components = quantized.components[group]
            if not components:
                continue
            coarse = components[level - 2] if level > 1 else None
            payload, entries = self._kernels.encode_components(
                components[level - 1], coarse, coding, header.tokens_per_stream[group], self._num_threads
            )
            parts.append(payload)
            streams += entries
        exact = pack_exact_values(quantized.exact[level - 1])
        built = build_chunk(header, streams, parts, exact)
        quantized.header_crcs[level - 1] = header_crc(built[0])
        return built

    def _quantize(self, index: int) -> _QuantizedChunk:
        """Transform and quantize a chunk on the kernels' device, and measure what that loses."""
        if self._quantized is None or self._quantized.index != index:
            num_tokens = self.document.header.chunk_tokens[index]
            first_token = self._stops[index] - num_tokens
            tokens = self._cache.slice(first_token, self._stops[index])
            if self._device.type != "cpu":
                tokens = KVCache(
                    [plane.to(self._device) for plane in tokens.keys],
                    [plane.to(self._device) for plane in tokens.values],
                )
            losses = [LossMeter() for _ in self.levels]
            components: list[list[torch.Tensor]] = []
            first_channel = 0
            num_absent = self.document.num_absent(first_token, num_tokens)
            for group, transform in enumerate(self.document.transforms):
                first = num_absent[group] if num_absent else 0
                arguments = (group, transform, tokens, first, first_token, first_channel, losses)
                components.append(self._quantize_group(*arguments))
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
        first_stored: int,
        first_token: int,
        first_channel: int,
        losses: Sequence[LossMeter],
    ) -> list[torch.Tensor]:
        """Return a chunk's quantized components of one group, per level; what each level loses goes to `losses`.

        Args:
            first_stored: the first of `tokens` that the group holds; of a group that holds none nothing is returned.
            first_token: the position of the first of `tokens`.
        """
        step_log = self.document.header.step_log
        steps = [step_of_level(step_log, level) for level in self.levels]
        num_coded = [self.document.codings(level)[group].num_components for level in self.levels]
        expected = [transform.expected_errors(step, count) for step, count in zip(steps, num_coded, strict=True)]
        blocks: list[list[torch.Tensor]] = []
        for begin in range(first_stored, tokens.num_tokens, BLOCK_TOKENS):
            end, position = min(begin + BLOCK_TOKENS, tokens.num_tokens), first_token + begin
            planes = [plane[begin:end] for plane in transform.planes(tokens)]
            quantized = transform.quantize_in_integers(planes, position, steps, num_coded, self._num_threads)
            if quantized is None:
                _check_finite(planes, 2 * transform.group.first_layer, position)
                block = tokens.slice(begin, end)
                components = transform.analyze_block(block, position, num_coded[-1], steps[-1], self._num_threads)
                quantized = quantize_components(components, steps[0], num_coded)
            for loss, integers, step, errors in zip(losses, quantized, steps, expected, strict=True):
                measured = transform.measure_block(integers, step, planes, position, self._num_threads)
                if measured is not None and loss.add_measured(measured, tokens.dtype, errors, len(integers)):
                    continue
                decoded = transform.decode_block(integers, step, tokens.dtype, position, self._num_threads)
                loss.add(planes, decoded, errors, begin, first_channel, self._num_threads)
            blocks.append(quantized)
        if len(blocks) == 1:
            return blocks[0]
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]  # of no blocks: nothing


def _check_finite(planes: Sequence[torch.Tensor], first_plane: int, first_token: int) -> None:
    """Refuse values that are no numbers.

    Raises:
        NotFiniteError: naming the first plane that has one, and its first token.
    """
    for number, plane in enumerate(planes):
        # A minimum is NaN where any value is; it takes a twentieth of the time of looking at each.
        if plane.numel() and not all(map(torch.isfinite, torch.aminmax(plane))):
            bad = (~torch.isfinite(plane)).flatten(1).any(1).nonzero()[0].item()
            raise NotFiniteError(first_plane + number, first_token + int(bad))


@dataclass
class _QuantizedChunk:
    """A chunk between quantizer and coder: its levels are usually encoded one after the other.

    Attributes:
        components: per group and level; nothing for a group that holds none of the chunk's tokens.
        exact: per level, the values that travel exactly.
        errors: per level, of all other values.
        header_crcs: per level, of its file, once it is encoded.
    """

    index: int
    components: list[list[torch.Tensor]]
    exact: list[ExactValues]
    errors: list[ErrorMeasure]
    header_crcs: list[int | None]


def build_chunk(
    header: TransformChunkHeader,
    streams: Sequence[StreamEntry],
    payloads: Sequence[bytes | memoryview],
    exact: bytes = b"",
) -> list[bytes | memoryview]:
    """Join a chunk's parts.

    Args:
        header: its `stream_index`, `exact_bytes` and `exact_crc` are filled in here.
        payloads: of each group of layers.
        exact: the section of exact values.

    Returns:
        The file, as parts to be written one after the other.
    """
    padded = exact.ljust(round_up(len(exact), ALIGNMENT), b"\0")
    header = dataclasses.replace(header, exact_bytes=len(exact), exact_crc=_native.crc32c(padded))
    return join_chunk(header, streams, payloads, behind=padded)


def share_in_groups(profile: Profile, first_stored: Sequence[int]) -> tuple[int, ...]:
    """Return, per layer, the first token that any layer of its group must hold."""
    groups = [range(group.first_layer, group.first_layer + group.num_layers) for group in profile.groups]
    return share_first_stored(groups, first_stored)


def _batch_groups(widths: Sequence[int], num_tokens: Sequence[int], limit: int) -> list[range]:
    """Return runs of groups with equally many tokens, whose components are at most `limit` in all, or single ones.

    Args:
        widths: components of each group.
    """
    batches: list[range] = []
    first, total = 0, 0
    for group, width in enumerate(widths):
        size = width * num_tokens[group]
        if group > first and (total + size > limit or num_tokens[group] != num_tokens[first]):
            batches.append(range(first, group))
            first, total = group, 0
        total += size
    return [*batches, range(first, len(widths))]


def choose_component_stream(num_components: int, num_tokens: int) -> int:
    """Return how many tokens to put in a stream so that lanes have about `SYMBOLS_PER_COMPONENT_LANE` symbols.

    Returns:
        A multiple of 32. A chunk's streams come out about equally long.
    """
    return cut_streams(num_tokens, LANES * max(1, round(SYMBOLS_PER_COMPONENT_LANE / max(num_components, 1))))


def _check_places(header: TransformChunkHeader, codings: Sequence[LevelCoding]) -> None:
    """Refuse streams of so many tokens that an escape's 32 bits could not name every component of theirs."""
    for tokens, coding in zip(header.tokens_per_stream, codings, strict=True):
        if tokens * coding.num_components >= 1 << 32:
            raise BitstreamError(
                f"{tokens} tokens of {coding.num_components} components are too many", field="tokens_per_stream"
            )
