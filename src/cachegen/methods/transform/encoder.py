"""The encoder of method `transform`: chunks of a KV cache to files, level by level, and what each level loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cachegen import _native
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import MismatchError, NotFiniteError
from cachegen.format import ALIGNMENT, LANES, MAX_LEVELS, Coder, StreamEntry, round_up
from cachegen.format.files import header_crc, join_chunk
from cachegen.format.framing import PREFIX, Buffer
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.base import Encoder, ErrorMeasure, cut_streams
from cachegen.methods.transform.document import METHOD_NUMBER, TransformDocument, share_in_groups
from cachegen.methods.transform.exact_values import ExactValues, pack_exact_values
from cachegen.methods.transform.headers import MAX_STEP_LOG, TransformChunkHeader, TransformDocumentHeader
from cachegen.methods.transform.loss import LossMeter
from cachegen.methods.transform.profile import Profile, check_profile
from cachegen.methods.transform.transform import (
    BLOCK_TOKENS,
    LEVEL_RATIO_LOG,
    GroupTransform,
    quantize_components,
    step_of_level,
)

# A lane costs about 24 bits beyond its symbols; many components cost only tenths of a bit.
SYMBOLS_PER_COMPONENT_LANE = 16384


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


def choose_component_stream(num_components: int, num_tokens: int) -> int:
    """Return how many tokens to put in a stream so that lanes have about `SYMBOLS_PER_COMPONENT_LANE` symbols.

    Returns:
        A multiple of 32. A chunk's streams come out about equally long.
    """
    return cut_streams(num_tokens, LANES * max(1, round(SYMBOLS_PER_COMPONENT_LANE / max(num_components, 1))))
