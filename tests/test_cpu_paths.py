"""The kernels' paths, portable, AVX2 and AVX-512: all give the same bytes, values and errors."""

import os
import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from cachegen import _native
from cachegen.coder import cpu
from cachegen.coder.symbol_model import choose_weight_classes, pack_tables
from cachegen.errors import BackendUnavailableError, BitstreamError
from cachegen.format import PlaneLayout, StreamEntry
from cachegen.kv_cache import KVCache
from cachegen.methods.absmax.quantization import low_bits_for
from tests.reference import planes as reference

PATHS = cpu.supported_paths()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Case:
    """A cache with everything that its coding needs."""

    def __init__(self, cache, num_bins, *, tokens_per_stream=64, is_packed=False):
        low_bits = low_bits_for(num_bins, 1 if is_packed else 32)
        self.cache = cache
        self.planes = tuple(
            PlaneLayout(plane.shape[1], plane.shape[2], num_bins, low_bits, tokens_per_stream=tokens_per_stream)
            for plane in cache.planes
        )
        self.scales, self.counts = cpu.measure(cache, self.planes, path="portable")
        self.table_bytes, self.table_sizes = b"", [0] * len(self.planes)
        if not is_packed:
            classes, first, parts = choose_weight_classes(self.counts), 0, []
            for plane in self.planes:
                parts.append(pack_tables(classes[first : first + plane.num_channels]))
                first += plane.num_channels
            self.table_bytes, self.table_sizes = b"".join(parts), [len(part) for part in parts]
        self.tables = self.load_tables(cpu)

    def load_tables(self, kernels):
        if not self.table_bytes:
            return None
        return kernels.load_tables(self.table_bytes, self.planes, self.table_sizes)

    def encode(self, path, num_threads=1):
        return cpu.encode(self.cache, self.scales, self.planes, self.tables, num_threads, path=path)

    def decode(self, payload, streams, path, num_threads=1, output=None):
        output = output or empty_like(self.cache)
        cpu.decode(payload, streams, self.scales, self.planes, self.tables, output, num_threads, path=path)
        return output

    def problem(self, payload, streams, path):
        """What decoding says of damaged streams; None where it notices nothing."""
        try:
            self.decode(payload, streams, path)
        except BitstreamError as error:
            return str(error)
        return None


def empty_like(cache):
    def like(plane):
        # The same strides, in memory that is written nowhere else.
        storage = torch.full((plane.untyped_storage().nbytes() // plane.element_size(),), -7.0, dtype=plane.dtype)
        return torch.as_strided(storage, plane.shape, plane.stride(), plane.storage_offset())

    return KVCache([like(key) for key in cache.keys], [like(value) for value in cache.values])


def random_cache(num_tokens, num_kv_heads, head_dim, dtype=torch.float16, num_layers=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def plane():
        deviation = torch.exp(torch.randn(num_kv_heads, head_dim, generator=generator))
        values = torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator) * deviation
        return values.to(dtype)

    return KVCache([plane() for _ in range(num_layers)], [plane() for _ in range(num_layers)])


def bits_of(cache):
    return [plane.contiguous().view(torch.uint8) for plane in cache.planes]


def assert_all_paths_agree(case):
    expected_payload, expected_streams = case.encode("portable")
    expected = bits_of(case.decode(expected_payload, expected_streams, "portable"))
    for path in PATHS:
        scales, counts = cpu.measure(case.cache, case.planes, path=path)
        assert torch.equal(scales, case.scales) and np.array_equal(counts, case.counts), path
        payload, streams = case.encode(path)
        assert list(streams) == list(expected_streams) and bytes(payload) == bytes(expected_payload), path
        for found, wanted in zip(bits_of(case.decode(payload, streams, path)), expected, strict=True):
            assert torch.equal(found, wanted), path


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 1), (1, 31), (2, 32), (1, 80), (2, 64), (3, 80), (8, 128)])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 96, 100, 257])
def test_paths_agree_on_all_shapes(num_kv_heads, head_dim, num_tokens):
    for dtype in DTYPES:
        assert_all_paths_agree(Case(random_cache(num_tokens, num_kv_heads, head_dim, dtype), 32))


def test_paths_agree_on_long_streams():
    cache = random_cache(1500, 2, 64, torch.bfloat16, num_layers=3)
    for tokens_per_stream in (32, 512, 1504):
        assert_all_paths_agree(Case(cache, 32, tokens_per_stream=tokens_per_stream))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("num_bins", [4, 6, 16, 18, 32, 34, 64, 100, 128, 256])
def test_paths_agree_on_all_bins(num_bins, is_packed):
    for dtype, num_tokens in product(DTYPES, (33, 160)):
        assert_all_paths_agree(Case(random_cache(num_tokens, 2, 32, dtype), num_bins, is_packed=is_packed))


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 8])
def test_paths_agree_on_any_number_of_streams(num_layers):
    assert_all_paths_agree(Case(random_cache(130, 1, 64, num_layers=num_layers), 32))


def test_paths_agree_on_skewed_and_single_symbol_tables():
    cache = random_cache(200, 2, 64)
    for plane in cache.planes:
        plane[:, 0, :7] = 0  # one symbol only
        plane[:, 1, 40:] *= 1e-3  # nearly one symbol only
        plane[:, 0, 9] = 60000  # always the largest symbol
        plane[50:60] = 0  # tokens without a scale
    for num_bins in (16, 32, 64, 256):
        assert_all_paths_agree(Case(cache, num_bins))


def test_paths_agree_on_a_cache_of_zeros():
    assert_all_paths_agree(Case(KVCache([torch.zeros(70, 2, 40)], [torch.zeros(70, 2, 40)]), 32))


def test_paths_agree_on_subnormal_and_extreme_values():
    cache = random_cache(64, 1, 64)
    for plane in cache.planes:
        plane[:20] *= 2.0**-20
        plane[20] = torch.finfo(torch.float16).tiny / 64
        plane[21, 0, 5] = torch.finfo(torch.float16).max
    assert_all_paths_agree(Case(cache, 32))
    tiny = KVCache([torch.full((40, 1, 33), 1e-42)], [torch.full((40, 1, 33), 3e38)])
    assert_all_paths_agree(Case(tiny, 256))


@pytest.mark.parametrize("layout", ["heads first", "token padding", "odd offset", "interleaved planes"])
def test_paths_write_only_inside_strided_planes(layout):
    num_tokens, num_kv_heads, head_dim = 100, 3, 64

    def plane(seed):
        generator = torch.Generator().manual_seed(seed)
        if layout == "heads first":
            return torch.randn(num_kv_heads, num_tokens, head_dim, generator=generator).transpose(0, 1)
        if layout == "token padding":
            return torch.randn(num_tokens, num_kv_heads + 2, head_dim + 8, generator=generator)[:, 1:-1, 3:-5]
        if layout == "odd offset":
            flat = torch.randn(num_tokens * num_kv_heads * head_dim + 1, generator=generator)
            return flat[1:].reshape(num_tokens, num_kv_heads, head_dim)
        return torch.randn(num_tokens, num_kv_heads, 2, head_dim, generator=generator)[:, :, 1]

    for dtype in DTYPES:
        # .to() would lose the strides: convert the storage.
        planes = []
        for seed in (1, 2):
            strided = plane(seed)
            storage = torch.as_strided(strided, (strided.untyped_storage().nbytes() // 4,), (1,), 0).to(dtype)
            planes.append(torch.as_strided(storage, strided.shape, strided.stride(), strided.storage_offset()))
        case = Case(KVCache(planes[:1], planes[1:]), 32)
        assert_all_paths_agree(case)
        payload, streams = case.encode("portable")
        for path in PATHS:
            output = case.decode(payload, streams, path)
            for decoded in output.planes:
                everything = torch.as_strided(
                    decoded, (decoded.untyped_storage().nbytes() // decoded.element_size(),), (1,), 0
                )
                num_untouched = everything.numel() - decoded.numel()
                assert int((everything == -7).sum()) >= num_untouched
                decoded.fill_(-7)
                assert torch.equal(everything, torch.full_like(everything, -7)), path


@pytest.mark.parametrize(("num_bins", "is_packed"), [(4, False), (32, False), (64, False), (256, False), (32, True)])
def test_paths_equal_the_reference(num_bins, is_packed):
    for num_tokens, head_dim in ((33, 5), (70, 3)):
        case = Case(random_cache(num_tokens, 1, head_dim), num_bins, tokens_per_stream=64, is_packed=is_packed)
        tables = case.load_tables(reference)
        payload, streams = reference.encode(case.cache, case.scales, case.planes, tables)
        expected = empty_like(case.cache)
        reference.decode(payload, list(streams), case.scales, case.planes, tables, expected)
        for path in PATHS:
            found_payload, found_streams = case.encode(path)
            assert bytes(found_payload) == payload and np.array_equal(found_streams, streams)
            decoded = case.decode(payload, streams, path)
            assert all(map(torch.equal, bits_of(decoded), bits_of(expected)))


def test_paths_agree_for_any_number_of_threads():
    case = Case(random_cache(300, 2, 64, num_layers=4), 32)
    payload, streams = case.encode("portable")
    expected = bits_of(case.decode(payload, streams, "portable"))
    for path, num_threads in product(PATHS, (2, 3, 16)):
        found, _ = case.encode(path, num_threads)
        assert bytes(found) == bytes(payload)
        assert all(map(torch.equal, bits_of(case.decode(payload, streams, path, num_threads)), expected))


@pytest.mark.parametrize("num_bins", [32, 64])
def test_paths_give_the_same_errors_for_damaged_streams(num_bins):
    case = Case(random_cache(100, 2, 64, num_layers=2), num_bins)
    payload, streams = case.encode("portable")
    payload, entries = bytearray(payload), [StreamEntry(*map(int, entry)) for entry in streams]
    generator = np.random.default_rng(5)
    seen = set()
    for _ in range(60):
        damaged = bytearray(payload)
        for position in generator.integers(0, len(payload), 1 + generator.integers(4)):
            damaged[position] ^= 1 << generator.integers(8)
        problems = {case.problem(bytes(damaged), entries, path) for path in PATHS}
        assert len(problems) == 1
        seen |= problems
    assert len(seen - {None}) > 0


def test_paths_refuse_streams_with_too_few_and_too_many_words():
    case = Case(random_cache(64, 2, 64), 32)
    payload, streams = case.encode("portable")
    entries = [StreamEntry(*map(int, entry)) for entry in streams]
    for stream, change in product(range(len(entries)), (-9, -1, 1)):
        changed = list(entries)
        changed[stream] = entries[stream]._replace(num_words=entries[stream].num_words + change)
        assert {case.problem(payload, changed, path) for path in PATHS} == {case.problem(payload, changed, "portable")}
        # The parts add up, but the words run out or are left over.
        shorter = changed[stream]._replace(num_bytes=entries[stream].num_bytes + 2 * change)
        if -(-shorter.num_bytes // 16) != -(-entries[stream].num_bytes // 16):
            continue
        changed[stream] = shorter
        problems = {case.problem(payload, changed, path) for path in PATHS}
        assert len(problems) == 1 and None not in problems


def test_a_payload_that_ends_with_its_memory_is_read_to_the_end():
    case = Case(random_cache(96, 1, 64), 32)
    payload, streams = case.encode("portable")
    for path in PATHS:
        # A buffer of exactly this length: a sanitizer sees what reads beyond.
        assert case.problem(np.frombuffer(bytes(payload), np.uint8).copy(), streams, path) is None


def test_measure_names_the_first_token_that_is_not_finite_on_all_paths():
    for dtype, bad in product(DTYPES, (float("nan"), float("inf"), -float("inf"))):
        cache = random_cache(200, 2, 40, dtype)
        cache.values[0][150, 1, 39] = bad
        cache.values[0][170, 0, 0] = bad
        planes = tuple(PlaneLayout(2, 40, 32, 0) for _ in cache.planes)
        for path in PATHS:
            with pytest.raises(Exception, match="layer 0, values, token 150"):
                cpu.measure(cache, planes, path=path)


def test_encoding_a_cache_that_changed_since_measuring_is_refused_on_all_paths():
    case = Case(random_cache(64, 1, 64), 32)
    case.cache.keys[0][10, 0, 3] = 1000.0
    for path in PATHS:
        with pytest.raises(ValueError, match="NOT_FINITE"):
            case.encode(path)
    case.cache.keys[0][10, 0, 3] = float("nan")
    for path in PATHS:
        with pytest.raises(ValueError, match="NOT_FINITE"):
            case.encode(path)


def test_encoding_a_symbol_without_frequency_is_refused_on_all_paths():
    narrow, wide = Case(random_cache(64, 1, 64, seed=1), 32), Case(random_cache(64, 1, 64, seed=2), 32)
    wide.tables = narrow.tables
    for path in PATHS:
        with pytest.raises(ValueError, match="NO_FREQUENCY"):
            wide.encode(path)


def test_checksums_equal_the_reference_for_all_lengths():
    content = np.random.default_rng(3).integers(0, 256, 10000, dtype=np.uint8).tobytes()
    for length in (0, 1, 7, 8, 9, 63, 1024, 3071, 3072, 3073, 6144, 9999):
        assert cpu.crc32c(content[:length]) == reference.crc32c(content[:length])
        assert cpu.crc32c(memoryview(content)[1 : 1 + length]) == reference.crc32c(content[1 : 1 + length])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_gets_threads_of_its_own():
    case = Case(random_cache(300, 2, 64, num_layers=4), 32)
    payload, _ = case.encode(None, num_threads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks with threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if bytes(case.encode(None, num_threads=2)[0]) == bytes(payload) else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_path_must_be_one_that_exists_and_runs(monkeypatch):
    case = Case(random_cache(32, 1, 8), 32)
    with pytest.raises(ValueError, match="`path` must be one of portable, avx2, avx512, got 'sse9'"):
        case.encode("sse9")
    monkeypatch.setattr(cpu, "supported_paths", lambda: ("portable",))
    with pytest.raises(BackendUnavailableError, match="does not run the kernels for avx512; it runs portable"):
        case.encode("avx512")


@pytest.mark.parametrize("dtype", DTYPES)
def test_paths_agree_on_symbols_that_the_quantizer_does_not_have(dtype):
    # Tables and low bits may spell them all the same; the values are the formula's.
    for num_bins, is_packed in ((4, False), (16, False), (32, False), (4, True), (16, True)):
        case = Case(random_cache(70, 2, 40, dtype), num_bins, tokens_per_stream=32, is_packed=is_packed)
        if is_packed:
            case.planes = tuple(replace(plane, low_bits=5) for plane in case.planes)
            payload, streams = case.encode("portable")
            payload = np.random.default_rng(7).integers(0, 256, len(payload), dtype=np.uint8)
        else:
            case.tables = cpu.Tables.from_frequencies(np.full((2 * 80, 32), 128, np.uint16))
            payload, streams = spell_all_symbols(case)
        outcomes = [bits_of(case.decode(payload, streams, path)) for path in PATHS]
        for outcome in outcomes[1:]:
            assert all(map(torch.equal, outcome, outcomes[0]))


def spell_all_symbols(case):
    """Streams of random symbols of 0 to 31, in place of the cache's."""
    generator = np.random.default_rng(8)
    parts, entries = [], []
    for plane in case.planes:
        for first in range(0, case.cache.num_tokens, plane.tokens_per_stream):
            num_tokens = min(plane.tokens_per_stream, case.cache.num_tokens - first)
            symbols = generator.integers(0, 32, (plane.num_channels, num_tokens)).astype(np.uint16)
            tables = cpu.Tables.from_frequencies(np.full((plane.num_channels, 32), 128, np.uint16))
            content, num_words, status = _native.encode_symbols(symbols, tables, 0)
            assert status == _native.Status.OK.value
            parts.append(content.ljust(-(-len(content) // 16) * 16, b"\0"))
            entries.append(StreamEntry(len(content), num_words, 0))
    return b"".join(parts), entries
