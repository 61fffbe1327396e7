"""The vector kernels give the bytes and values of the portable ones, which the other tests hold to the reference."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cachegen.coder import cpu
from cachegen.errors import BackendUnavailableError, BitstreamError
from cachegen.format import PlaneLayout, StreamEntry
from cachegen.kv_cache import KVCache
from cachegen.quantization import low_bits_for
from cachegen.symbol_model import choose_weight_classes, pack_tables
from tests.small_documents import allocate_like, make_cache, same_bits

PATHS = [path for path in cpu.supported_paths() if path != "portable"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Tokens, (heads, head dim) of the planes, tokens per stream.
SHAPES = [
    (1, [(1, 1), (1, 64)], 32),
    (31, [(1, 31), (2, 16)], 32),
    (33, [(1, 80), (2, 64)], 64),
    (100, [(2, 64), (4, 32)] * 5, 32),  # ten planes: batches of eight, two and one; a short last row
    (257, [(1, 128), (3, 40)], 96),
    (96, [(8, 128), (8, 128)], 96),
    (1500, [(2, 64), (2, 64)], 768),
]
NUM_BINS = [4, 16, 32, 34, 64, 128, 256]


@dataclass
class Case:
    """A cache, and what encoding it needs."""

    cache: KVCache
    layouts: list[PlaneLayout]

    def measure(self, path: str) -> tuple[torch.Tensor, np.ndarray]:
        return cpu.measure(self.cache, self.layouts, 2, path=path)

    def load_tables(self, counts: np.ndarray) -> cpu.Tables | None:
        if all(layout.alphabet_size == 1 for layout in self.layouts):
            return None
        classes, stops = choose_weight_classes(counts), np.cumsum([plane.num_channels for plane in self.layouts])
        parts = [pack_tables(part) for part in np.split(classes, stops[:-1])]
        return cpu.load_tables(b"".join(parts), self.layouts, [len(part) for part in parts])


def make_case(shape, dtype: torch.dtype, num_bins: int, *, head_major: bool = True, is_packed: bool = False) -> Case:
    num_tokens, planes, tokens_per_stream = shape
    cache = make_cache(planes, num_tokens, dtype, head_major=head_major)
    for plane in cache.planes:
        plane[num_tokens // 2] = 0
        plane[:, 0, 0] = 0  # a channel of a single symbol
        if plane.shape[2] > 2:
            plane[:, -1, 1] *= 1e-3  # a skewed one
    low_bits = low_bits_for(num_bins, 1 if is_packed else 32)
    return Case(cache, [PlaneLayout(*p, num_bins, low_bits, tokens_per_stream=tokens_per_stream) for p in planes])


def check(case: Case, path: str) -> None:
    scales, counts = case.measure("portable")
    found_scales, found_counts = case.measure(path)
    assert same_bits_of(scales, found_scales) and np.array_equal(counts, found_counts)
    tables = case.load_tables(counts)
    payload, streams = cpu.encode(case.cache, scales, case.layouts, tables, 2, path="portable")
    found_payload, found_streams = cpu.encode(case.cache, scales, case.layouts, tables, 2, path=path)
    assert streams == found_streams and bytes(payload) == bytes(found_payload)
    outputs = [allocate_like(case.cache, case.cache.num_tokens, head_major=True) for _ in range(2)]
    for output, which in zip(outputs, ("portable", path), strict=True):
        cpu.decode(bytes(payload), streams, scales, case.layouts, tables, output, 2, path=which)
    assert same_bits(*outputs)


def same_bits_of(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_bins", NUM_BINS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1][0]}x{len(shape[1])}")
def test_bytes_and_values_equal_the_portable_ones(shape, dtype: torch.dtype, num_bins: int, path: str) -> None:
    check(make_case(shape, dtype, num_bins), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=lambda shape: f"{shape[0]}x{shape[1][0]}")
def test_packed_streams_and_other_strides_do_too(shape, path: str) -> None:
    check(make_case(shape, torch.bfloat16, 256, is_packed=True), path)
    check(make_case(shape, torch.float16, 32, head_major=False), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_are_found_alike(dtype: torch.dtype, value: float, path: str) -> None:
    case = make_case(SHAPES[3], dtype, 32)
    case.cache.planes[5][70:, 1, 3] = value
    messages = []
    for which in ("portable", path):
        with pytest.raises(Exception, match="NaN or infinity") as refusal:
            case.measure(which)
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_bins", [32, 64])
def test_corrupt_streams_end_alike(num_bins: int, path: str) -> None:
    case = make_case(SHAPES[3], torch.float16, num_bins)
    scales, counts = case.measure("portable")
    tables = case.load_tables(counts)
    payload, streams = cpu.encode(case.cache, scales, case.layouts, tables)
    generator, num_refused = random.Random(1), 0
    for _ in range(150):
        content, entries = bytearray(payload), list(streams)
        for _ in range(generator.choice([1, 3, 20])):
            content[generator.randrange(len(content))] = generator.randrange(256)
        if generator.random() < 0.3:
            at = generator.randrange(len(entries))
            words = max(0, entries[at].num_words + generator.choice([-3, -1, 1, 9]))
            entries[at] = StreamEntry(entries[at].num_bytes, words, 0)
        outcomes = []
        for which in ("portable", path):
            output = allocate_like(case.cache, case.cache.num_tokens, head_major=True)
            try:
                cpu.decode(bytes(content), entries, scales, case.layouts, tables, output, path=which)
                outcomes.append(output)
            except BitstreamError as error:
                outcomes.append(str(error).split(":")[0])  # the stream, if not the words
        if isinstance(outcomes[0], str) or isinstance(outcomes[1], str):
            assert outcomes[0] == outcomes[1]
            num_refused += 1
        else:
            assert same_bits(*outcomes)
    assert num_refused > 30


def test_a_path_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SHAPES[0], torch.float16, 32)
    with pytest.raises(ValueError, match="`path` must be one of portable, avx2, avx512, got 'sse'"):
        case.measure("sse")
    monkeypatch.setattr(cpu, "supported_paths", lambda: ("portable",))
    with pytest.raises(BackendUnavailableError, match="does not run the kernels for avx2"):
        case.measure("avx2")
