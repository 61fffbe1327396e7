"""What the CUDA kernels must do, for any `CudaKernels`: on a GPU, and emulated on the CPU."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cachegen.coder import cpu
from cachegen.coder.cuda import CudaKernels
from cachegen.coder.symbol_model import choose_weight_classes, pack_tables
from cachegen.errors import BitstreamError
from cachegen.format import Coder, PlaneLayout, StreamEntry
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods.absmax.quantization import low_bits_for
from tests.fixtures.caches import allocate_like, are_equal, make_shaped_cache


@dataclass(frozen=True)
class Shape:
    """One cache of two planes, keys and values."""

    num_tokens: int
    heads: tuple[int, int]
    dims: tuple[int, int]
    num_bins: tuple[int, int]
    tokens_per_stream: tuple[int, int]
    head_major: bool = False

    def __str__(self) -> str:
        numbers = (self.num_tokens, *self.heads, *self.dims, *self.num_bins, *self.tokens_per_stream)
        return "-".join(map(str, numbers)) + ("-head_major" if self.head_major else "")


SHAPES = [
    Shape(1, (1, 1), (1, 2), (4, 32), (32, 32)),  # one lane
    Shape(31, (1, 2), (7, 8), (16, 64), (32, 64)),  # a short row alone
    Shape(70, (2, 1), (16, 24), (32, 256), (32, 96), head_major=True),  # whole sectors; low bits with a tail
    Shape(64, (1, 1), (65, 128), (32, 16), (64, 32)),  # a tile and a channel; two tiles
    Shape(300, (3, 1), (8, 4), (38, 32), (32, 32)),  # more streams than the warps of a block; groups across heads
    Shape(4161, (1, 1), (2, 3), (32, 128), (8192, 4160)),  # more rows than a warp stages
    Shape(130, (2, 1), (20, 33), (32, 32), (64, 128), head_major=True),  # pieces only partly aligned; bands and a rest
]


class OnDevice:
    """Kernels of a GPU for tests that keep their caches on the CPU."""

    def __init__(self, kernels: CudaKernels) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def decode(
        self, payload, streams, scales, planes, tables, output: KVCache, num_threads: int = 1, **options
    ) -> None:
        on_device = from_planes([plane.to(self._kernels.device) for plane in output.planes])
        self._kernels.decode(payload, streams, scales, planes, tables, on_device, num_threads, **options)
        for plane, decoded in zip(output.planes, on_device.planes, strict=True):
            plane.copy_(decoded)

    def decode_component_groups(self, payload, streams, groups, num_threads: int = 1) -> None:
        device = self._kernels.device
        moved = [dataclasses.replace(group, components=group.components.to(device)) for group in groups]
        try:
            self._kernels.decode_component_groups(payload, streams, moved, num_threads)
        finally:
            for group, decoded in zip(groups, moved, strict=True):
                group.components.copy_(decoded.components)


@dataclass(frozen=True)
class Encoded:
    """A cache of a shape, and what the CPU's kernels make of it."""

    cache: KVCache
    layouts: list[PlaneLayout]
    scales: torch.Tensor
    counts: np.ndarray
    tables: tuple[Any, ...] | None  # arguments of load_tables
    payload: bytes
    streams: list[StreamEntry]
    coder: Coder

    def load_tables(self, kernels) -> Any:
        return kernels.load_tables(*self.tables) if self.tables is not None else None

    def decode(self, kernels, payload: bytes | None = None, streams: list[StreamEntry] | None = None) -> KVCache:
        output = allocate_like(self.cache, self.cache.num_tokens, head_major=not self.cache.planes[0].is_contiguous())
        content, entries = payload or self.payload, streams or self.streams
        tables = self.load_tables(kernels)
        kernels.decode(content, entries, self.scales, self.layouts, tables, output, coder=self.coder)
        return output


def encode_on_cpu(shape: Shape, dtype: torch.dtype, coder: Coder) -> Encoded:
    shapes = list(zip(shape.heads, shape.dims, strict=True))
    cache = make_shaped_cache(shapes, shape.num_tokens, dtype, head_major=shape.head_major)
    for plane in cache.planes:
        plane[shape.num_tokens // 2] = 0
    table_size = 1 if coder is Coder.PACKED else 32
    layouts = [
        PlaneLayout(heads, dim, bins, low_bits_for(bins, table_size), tokens_per_stream=tokens)
        for heads, dim, bins, tokens in zip(
            shape.heads, shape.dims, shape.num_bins, shape.tokens_per_stream, strict=True
        )
    ]
    scales, counts = cpu.measure(cache, layouts)
    tables = None
    if coder is not Coder.PACKED:
        classes, first = choose_weight_classes(counts), layouts[0].num_channels
        parts = [pack_tables(classes[:first]), pack_tables(classes[first:])]
        tables = (b"".join(parts), layouts, [len(part) for part in parts])
    native_tables = cpu.load_tables(*tables) if tables is not None else None
    payload, streams = cpu.encode(cache, scales, layouts, native_tables, coder=coder)
    return Encoded(cache, layouts, scales, counts, tables, bytes(payload), streams, coder)


def check_shape(kernels, shape: Shape, dtype: torch.dtype, coder: Coder) -> None:
    """All numbers and bytes equal the CPU's, and each device decodes what the other has encoded."""
    expected = encode_on_cpu(shape, dtype, coder)
    scales, counts = kernels.measure(expected.cache, expected.layouts)
    assert torch.equal(scales, expected.scales) and np.array_equal(counts, expected.counts)
    tables = expected.load_tables(kernels)
    payload, streams = kernels.encode(expected.cache, expected.scales, expected.layouts, tables, coder=coder)
    assert streams == expected.streams and bytes(payload) == expected.payload
    assert are_equal(expected.decode(kernels), expected.decode(cpu))
    assert are_equal(expected.decode(cpu, bytes(payload), streams), expected.decode(kernels))


def outcome(encoded: Encoded, kernels, payload: bytes, streams: list[StreamEntry]) -> KVCache | str:
    """The decoded cache, or the error with the stream's index."""
    try:
        return encoded.decode(kernels, payload, streams)
    except BitstreamError as error:
        return str(error)


def check_corrupt_streams(kernels, encoded: Encoded, num_tries: int) -> None:
    """Corrupt bytes and lengths are refused as on the CPU, with the same stream's index, or decode to the same."""
    generator = random.Random(1)
    num_refused = 0
    for _ in range(num_tries):
        payload, streams = bytearray(encoded.payload), list(encoded.streams)
        for _ in range(generator.choice([1, 2, 8])):
            payload[generator.randrange(len(payload))] = generator.randrange(256)
        if generator.random() < 0.3:
            index = generator.randrange(len(streams))
            entry, change = streams[index], generator.choice([-4, -2, 2, 4, 2**31])
            # The padded length stays, as the container checks it.
            num_bytes = max(0, -(-entry.num_bytes // 16) * 16 - generator.randrange(16))
            streams[index] = StreamEntry(num_bytes, max(0, entry.num_words + change), 0)
            payload = bytearray(bytes(payload).ljust(sum(-(-s.num_bytes // 16) * 16 for s in streams), b"\0"))
        found, expected = (outcome(encoded, which, bytes(payload), streams) for which in (kernels, cpu))
        if isinstance(expected, str):
            assert found == expected
            num_refused += 1
        else:
            assert isinstance(found, KVCache) and are_equal(found, expected)
    assert num_refused > num_tries // 4


def check_word_counts(kernels) -> None:
    """A stream with a word more or less than its symbols take is refused as on the CPU."""
    encoded = encode_on_cpu(Shape(32, (1, 1), (40, 3), (32, 32), (32, 32)), torch.float16, Coder.RANS)
    first = encoded.streams[0]
    body, rest = encoded.payload[: first.num_bytes], encoded.payload[-(-first.num_bytes // 16) * 16 :]
    for change in (1, 2, -1, -2):
        num_bytes = first.num_bytes + 2 * change
        changed = body[:num_bytes].ljust(num_bytes, b"\0")
        payload = changed.ljust(-(-num_bytes // 16) * 16, b"\0") + rest
        streams = [StreamEntry(num_bytes, first.num_words + change, 0), *encoded.streams[1:]]
        found, expected = (outcome(encoded, which, payload, streams) for which in (kernels, cpu))
        assert isinstance(expected, str) and found == expected
