"""What the CUDA coder of method `transform` must do, for any `CudaKernels`: on a GPU, and emulated on the CPU."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cachegen.coder import components
from cachegen.coder.component_tables import LevelCoding, plan_level
from cachegen.coder.components import ComponentGroup
from cachegen.coder.cpu_kernels import CPU
from cachegen.errors import BitstreamError
from cachegen.format import StreamEntry
from cachegen.kv_cache import KVCache, RotaryEmbedding, from_planes
from cachegen.methods.transform.document import TransformDocument
from cachegen.methods.transform.encoder import TransformEncoder
from cachegen.methods.transform.profile import Profile, TransformGroup
from cachegen.methods.transform.transform import LEVEL_RATIO_LOG, quantize_components
from tests.fixtures.caches import make_metadata, make_shaped_cache


@dataclass(frozen=True)
class ComponentShape:
    """Some groups of layers, each with its number of components and its streams' length.

    Attributes:
        octaves: 2 to this power is the standard deviation of a group's first component, in steps of level 1. The last
            one is not coded at any level, those before it only from level 2 or 3 on.
    """

    num_tokens: int
    num_components: tuple[int, ...]
    tokens_per_stream: tuple[int, ...]
    octaves: float = 7.0

    def __str__(self) -> str:
        parts = (self.num_components, self.tokens_per_stream)
        return "-".join([str(self.num_tokens), *("x".join(map(str, part)) for part in parts)])


COMPONENT_SHAPES = [
    ComponentShape(1, (1,), (32,)),  # one lane
    ComponentShape(31, (7, 40), (32, 64)),  # a short row alone; more components than a warp stages
    ComponentShape(70, (33, 5, 64), (32, 96, 64)),  # tails; groups of different streams
    ComponentShape(300, (9,), (32,)),  # more streams than the warps of a block
    ComponentShape(2113, (5, 3), (4096, 2112), 3.0),  # more rows than a warp stages
    ComponentShape(64, (1, 12), (64, 32), 16.0),  # nothing but low bits; more of them than tables say
]
NUM_LEVELS = 3
_SMALLEST_LOG = -90  # 16 log2 of the last component's standard deviation, in steps of level 1


@dataclass(frozen=True)
class EncodedComponents:
    """What the CPU makes of the components of a shape: per level the groups' codings, integers and streams."""

    shape: ComponentShape
    codings: list[list[LevelCoding]]
    levels: list[list[torch.Tensor]]
    payloads: list[bytes]
    streams: list[list[StreamEntry]]

    def coarse(self, level: int, group: int) -> torch.Tensor | None:
        return self.levels[level - 1][group] if level else None

    def start(self, level: int) -> list[ComponentGroup]:
        """Return groups to decode a level into: of what the level before left, with room beside it."""
        groups = []
        for number, coding in enumerate(self.codings[level]):
            values = torch.full((self.shape.num_tokens, coding.num_components + 3), 77, dtype=torch.int32)
            values[:, : coding.num_refined] = 0
            coarse = self.coarse(level, number)
            if coarse is not None:
                values[:, : coding.num_refined] = coarse[:, : coding.num_refined]
            groups.append(ComponentGroup(number, values, coding, self.shape.tokens_per_stream[number]))
        return groups


def encode_components_on_cpu(shape: ComponentShape, seed: int = 0) -> EncodedComponents:
    """Logistic components; those of two tokens so far out that many are escapes."""
    generator = torch.Generator().manual_seed(seed)
    codings: list[list[LevelCoding]] = [[] for _ in range(NUM_LEVELS)]
    levels: list[list[torch.Tensor]] = [[] for _ in range(NUM_LEVELS)]
    for count in shape.num_components:
        logs = torch.linspace(16 * shape.octaves, _SMALLEST_LOG, count).round().to(torch.int16).numpy()
        step_logs = [-LEVEL_RATIO_LOG * level for level in range(NUM_LEVELS)]
        for level, step_log in enumerate(step_logs):
            codings[level].append(plan_level(logs, step_log, step_logs[level - 1] if level else None))
        uniform = torch.rand(shape.num_tokens, count, generator=generator).clamp(1e-6, 1 - 1e-6)
        values = uniform.logit() * 0.55 * torch.from_numpy(2.0 ** (logs.astype(np.float32) / 16))
        values[shape.num_tokens // 2] *= 300
        values[-1] *= -2000
        coded = [codings[level][-1].num_components for level in range(NUM_LEVELS)]
        for level, integers in enumerate(quantize_components(values, 1.0, coded)):
            levels[level].append(integers)
    payloads, streams = [], []
    for level in range(NUM_LEVELS):
        payload, entries = b"", []
        for group, coding in enumerate(codings[level]):
            coarse = levels[level - 1][group] if level else None
            part, found = components.encode_components(
                levels[level][group], coarse, coding, shape.tokens_per_stream[group]
            )
            payload, entries = payload + bytes(part), entries + found
        payloads.append(payload)
        streams.append(entries)
    return EncodedComponents(shape, codings, levels, payloads, streams)


def check_component_shape(kernels, shape: ComponentShape) -> None:
    """All bytes and integers of every level equal the CPU's, and nothing is written beside them."""
    encoded = encode_components_on_cpu(shape)
    for level in range(NUM_LEVELS):
        payload, streams = b"", []
        for group, coding in enumerate(encoded.codings[level]):
            fine, coarse = encoded.levels[level][group], encoded.coarse(level, group)
            part, found = kernels.encode_components(fine, coarse, coding, shape.tokens_per_stream[group])
            payload, streams = payload + bytes(part), streams + found
        assert streams == encoded.streams[level] and payload == encoded.payloads[level]
        groups = encoded.start(level)
        kernels.decode_component_groups(encoded.payloads[level], encoded.streams[level], groups)
        for group, expected in zip(groups, encoded.levels[level], strict=True):
            assert torch.equal(torch.as_tensor(group.components)[:, : expected.shape[1]], expected)
            assert (torch.as_tensor(group.components)[:, expected.shape[1] :] == 77).all()


def components_outcome(
    kernels, encoded: EncodedComponents, level: int, payload: bytes, streams: list[StreamEntry]
) -> list[torch.Tensor] | str:
    """The decoded components, or the error with group and stream."""
    groups = encoded.start(level)
    try:
        kernels.decode_component_groups(payload, streams, groups)
    except BitstreamError as error:
        return str(error)
    return [torch.as_tensor(group.components) for group in groups]


def check_corrupt_components(kernels, encoded: EncodedComponents, num_tries: int) -> None:
    """Corrupt bytes and lengths are refused as on the CPU, naming the same stream, or decode to the same."""
    generator = random.Random(2)
    num_refused = 0
    for attempt in range(num_tries):
        level = attempt % NUM_LEVELS
        payload, streams = bytearray(encoded.payloads[level]), list(encoded.streams[level])
        kind = generator.random()
        if kind < 0.6:
            for _ in range(generator.choice([1, 2, 8])):
                payload[generator.randrange(len(payload))] = generator.randrange(256)
        if kind > 0.3:
            # Lengths that move where words and escapes are; the padded length stays, as the container checks it.
            index = generator.randrange(len(streams))
            entry, change = streams[index], generator.choice([-8, -4, -2, -1, 1, 2, 4, 2**31])
            padded = -(-entry.num_bytes // 16) * 16
            num_bytes = generator.choice([entry.num_bytes, max(0, padded - generator.randrange(16))])
            streams[index] = StreamEntry(num_bytes, max(0, entry.num_words + change), 0)
            payload = bytearray(bytes(payload).ljust(sum(-(-s.num_bytes // 16) * 16 for s in streams), b"\0"))
        found, expected = (
            components_outcome(which, encoded, level, bytes(payload), streams) for which in (kernels, components)
        )
        if isinstance(expected, str):
            assert found == expected
            num_refused += 1
        else:
            assert isinstance(found, list) and all(map(torch.equal, found, expected))
    assert num_refused > num_tries // 4


def check_corrupt_escapes(kernels) -> None:
    """A list of escapes that is wrong in one way is refused as on the CPU, and one at the limits is not."""
    encoded = encode_components_on_cpu(ComponentShape(40, (12,), (64,)))
    (coding,), (entry,), payload = encoded.codings[1], encoded.streams[1], encoded.payloads[1]
    width, anew, limit = coding.num_components, coding.num_refined, 1 << 24
    last = 40 * width - 1
    assert 0 < anew < width - 1
    wrong = [
        [(last + 1, 1)],  # behind the stream
        [(2**32 - 1, 1)],
        [(anew + width, 1), (anew, 1)],  # not ascending
        [(anew, 1), (anew, 1)],
        [(anew, 1), (anew + 2 * width, 1), (anew + width, 1)],
        [(0, 1)],  # of a refined component
        [(width + anew - 1, 1)],
        [(anew, limit + 1)],
        [(anew, -limit - 1)],
        [(anew, -(2**31))],
        [(token * width + anew, limit) for token in range(40)] + [(anew, 0)],  # the last of many
    ]
    right = [[(anew, -limit), (last, limit)], [(token * width + width - 1, token) for token in range(40)]]
    num_low_bits = 40 * int(coding.low_bits.sum(dtype=np.int64))
    words_end = 4 * 32 + -(-num_low_bits // 32) * 4 + 2 * entry.num_words
    for escapes in wrong + right:
        body = payload[:words_end].ljust(-(-words_end // 4) * 4, b"\0")
        body += b"".join(struct.pack("<Ii", *escape) for escape in escapes)
        content, streams = body.ljust(-(-len(body) // 16) * 16, b"\0"), [StreamEntry(len(body), entry.num_words, 0)]
        found, expected = (components_outcome(which, encoded, 1, content, streams) for which in (kernels, components))
        assert isinstance(expected, str) == (escapes in wrong)
        if isinstance(expected, str):
            assert found == expected
        else:
            assert isinstance(found, list) and torch.equal(found[0], expected[0])


# --- whole documents --------------------------------------------------------------------------------------------------

ROTARY = RotaryEmbedding("rotary_emb.inv_freq", "default", (1.0, 0.1, 0.01), 1.0)
CHUNK_TOKENS = (50, 40)


def make_transform_document(
    kernels,
    num_key_heads: int = 2,
    num_levels: int = NUM_LEVELS,
    *,
    first_stored: Sequence[int] = (),
    has_large: bool = False,
) -> tuple[KVCache, TransformEncoder, list[list[bytes]]]:
    """A cache of four layers in two groups, its encoder, and per chunk the files of its levels.

    Args:
        first_stored: as for `Encoder`.
        has_large: the first token is 25 times the first component of each group, more than 256 steps of level 2.
    """
    generator = torch.Generator().manual_seed(3)
    cache = make_shaped_cache([(num_key_heads, 8), (1, 8)] * 4, sum(CHUNK_TOKENS), torch.float16)
    metadata = dataclasses.replace(make_metadata(cache.num_tokens), rotary_embeddings=(ROTARY,))
    groups, width = [], 2 * 8 * (num_key_heads + 1)
    for first_layer in (0, 2):
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        logs = torch.linspace(0, -120, width).round().to(torch.int16)
        mean = torch.randn(width, generator=generator) / 8
        if has_large:
            planes = cache.planes[2 * first_layer : 2 * (first_layer + 2)]
            for plane, values in zip(planes, basis[:, 0].split([plane[0].numel() for plane in planes]), strict=True):
                plane[0] = (25 * values).view(plane[0].shape)  # nothing is turned at position 0
        groups.append(TransformGroup(first_layer, 2, mean, basis.T.half(), logs, basis.half()))
    shapes = tuple((plane.shape[1], plane.shape[2]) for plane in cache.planes)
    profile = Profile(metadata.model_fingerprint, (ROTARY,), shapes, tuple(groups), (), {}, "cd" * 32)
    encoder = TransformEncoder(
        cache,
        metadata,
        profile,
        CHUNK_TOKENS,
        step_log=-40,
        num_levels=num_levels,
        kernels=kernels,
        first_stored=first_stored,
    )
    files = [
        [b"".join(encoder.encode_chunk(index, level)) for level in encoder.levels] for index in range(len(CHUNK_TOKENS))
    ]
    return cache, encoder, files


def decode_transform_document(kernels, encoder: TransformEncoder, files: list[list[bytes]], level: int) -> KVCache:
    """Decode a document's chunks from the files of its first levels; returns it on the CPU."""
    made = encoder.document
    document = TransformDocument(made.header, made.tables_hash, made.profile, kernels.device)
    decoded = []
    for index, contents in enumerate(files):
        header = encoder.expected_header(index, 1)
        shapes = [(header.num_tokens, plane.num_kv_heads, plane.head_dim) for plane in encoder.document.header.planes]
        planes = [torch.full(shape, torch.nan, dtype=torch.float16, device=kernels.device) for shape in shapes]
        document.decode(
            contents[:level],
            from_planes(planes),
            first_token=header.first_token,
            token_hash=header.token_hash,
            kernels=kernels,
        )
        decoded.append([plane.cpu() for plane in planes])
    return from_planes([torch.cat(parts) for parts in zip(*decoded, strict=True)])


def check_transform_document(kernels) -> None:
    """Every device decodes what either has encoded to the same values, but for the rounding of matrix products."""
    cache, cpu_encoder, cpu_files = make_transform_document(CPU)
    _, encoder, files = make_transform_document(kernels)
    assert encoder.tables_file == cpu_encoder.tables_file
    before = torch.inf
    for level in cpu_encoder.levels:
        for which, contents in ((cpu_encoder, cpu_files), (encoder, files)):
            found, expected = (decode_transform_document(k, which, contents, level) for k in (kernels, CPU))
            for a, b in zip(found.planes, expected.planes, strict=True):
                # The CPU rounds its matrix to bytes, a GPU to bf16, both for components as large as the profile says;
                # these are larger.
                assert (a.float() - b.float()).abs().max() <= b.float().abs().max() / 100
        pairs = zip(decode_transform_document(kernels, encoder, files, level).planes, cache.planes, strict=True)
        error = sum((a.float() - b.float()).square().sum().item() for a, b in pairs)
        assert error < before
        before = error
