"""A document of method `transform`: its chunks to a KV cache, by way of a model's profile.

A document is coded at one step and up to four levels; each file of a level refines the files of the levels before it.
It is composed of the transform, its quantizer, the tables by scale index and the coder of components.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from cachegen.coder.component_tables import LevelCoding, plan_level
from cachegen.coder.components import ComponentGroup
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import BitstreamError, InputError, MismatchError
from cachegen.format import ALIGNMENT, LANES, MAX_LEVELS, StreamEntry, round_up
from cachegen.format.files import Chunk
from cachegen.kv_cache import KVCache
from cachegen.methods.base import DecodingPart, Document, naming_level, start_all
from cachegen.methods.layer_classes import share_first_stored
from cachegen.methods.profile_files import check_named
from cachegen.methods.transform.batched import ROW_COMPONENTS, BatchedSynthesis, can_join
from cachegen.methods.transform.exact_values import (
    ExactValues,
    check_stored,
    place_exact_values,
    unpack_exact_values,
)
from cachegen.methods.transform.headers import (
    TransformChunkHeader,
    TransformDocumentHeader,
)
from cachegen.methods.transform.integers import HALF_BYTES
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.transform import (
    LEVEL_RATIO_LOG,
    GroupTransform,
    step_of_level,
)

METHOD_NUMBER = 3
"""How files call the method."""


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


def _check_places(header: TransformChunkHeader, codings: Sequence[LevelCoding]) -> None:
    """Refuse streams of so many tokens that an escape's 32 bits could not name every component of theirs."""
    for tokens, coding in zip(header.tokens_per_stream, codings, strict=True):
        if tokens * coding.num_components >= 1 << 32:
            raise BitstreamError(
                f"{tokens} tokens of {coding.num_components} components are too many", field="tokens_per_stream"
            )
