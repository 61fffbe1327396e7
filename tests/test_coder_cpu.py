"""The native coder: the reference's bytes, the reference's refusals, and checks that keep it inside its memory."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from cachegen import _native
from cachegen.coder import cpu
from cachegen.errors import BitstreamError
from cachegen.format import Coder, PlaneLayout, StreamEntry
from cachegen.kv_cache import from_planes
from tests.coder_cases import CASES, Case, make_frequencies
from tests.fixtures.caches import allocate_like, are_equal, make_shaped_cache
from tests.reference import planes as reference
from tests.reference.planes import StreamCoding, decode_stream, encode_stream

OK, TRUNCATED, CORRUPT, NO_FREQUENCY = (
    getattr(_native.Status, name) for name in ("OK", "TRUNCATED", "CORRUPT", "NO_FREQUENCY")
)


def make_tables(coding: StreamCoding) -> cpu.Tables | None:
    if coding.frequencies is None:
        return None
    return cpu.Tables.from_frequencies(np.array(coding.frequencies, dtype=np.uint16))


def indices_of(coding: StreamCoding) -> np.ndarray | None:
    return None if coding.table_indices is None else np.array(coding.table_indices, dtype=np.uint16)


def encode_natively(symbols, coding: StreamCoding) -> tuple[bytes, int, object]:
    content, num_words, status = _native.encode_symbols(
        np.array(symbols, dtype=np.uint16),
        make_tables(coding),
        coding.low_bits,
        indices_of(coding),
    )
    return content, num_words, _native.Status(status)


def decode_natively(content: bytes, num_words: int, num_tokens: int, num_channels: int, coding: StreamCoding):
    symbols, status = _native.decode_symbols(
        np.frombuffer(content, np.uint8),
        num_words,
        num_tokens,
        num_channels,
        make_tables(coding),
        coding.low_bits,
        indices_of(coding),
    )
    return symbols.tolist(), _native.Status(status)


# --- equal to the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_equal_the_references_and_round_trip(case: Case) -> None:
    content, num_words = encode_stream(case.symbols, case.coding)
    assert encode_natively(case.symbols, case.coding) == (content, num_words, OK)
    shape = len(case.symbols[0]), len(case.symbols)
    assert decode_natively(content, num_words, *shape, case.coding) == (case.symbols, OK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_measure_equals_the_reference(dtype: torch.dtype) -> None:
    cache = make_shaped_cache([(2, 9), (1, 33)], 50, dtype, head_major=True)
    planes = [PlaneLayout(2, 9, 64, 1), PlaneLayout(1, 33, 16, 0)]
    expected_scales, expected_counts = reference.measure(cache, planes)
    for num_threads in (1, 2, 5):
        scales, counts = cpu.measure(cache, planes, num_threads)
        assert torch.equal(scales, expected_scales) and np.array_equal(counts, expected_counts)
        assert counts.sum() == cache.num_values


def decode_both(content: bytes, num_words: int, num_tokens: int, num_channels: int, coding: StreamCoding) -> str:
    """Decode with both coders, which must agree; says how it went."""
    try:
        expected = decode_stream(content, num_words, num_tokens, num_channels, coding)
    except BitstreamError:
        _, status = decode_natively(content, num_words, num_tokens, num_channels, coding)
        assert status in (TRUNCATED, CORRUPT)
        return "refused"
    assert decode_natively(content, num_words, num_tokens, num_channels, coding) == (expected, OK)
    return "decoded"


SMALL_CASES = [case for case in CASES if case.is_small]


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_every_truncation_is_refused_as_by_the_reference(case: Case) -> None:
    content, num_words = encode_stream(case.symbols, case.coding)
    shape = len(case.symbols[0]), len(case.symbols)
    for length in range(len(content)):
        assert decode_natively(content[:length], num_words, *shape, case.coding)[1] != OK
        fewer = max(0, num_words - (len(content) - length) // 2)
        assert decode_natively(content[:length], fewer, *shape, case.coding)[1] != OK
    for words in (num_words + 1, num_words + 2, 2**31, 2**32 - 1):
        assert decode_natively(content, words, *shape, case.coding)[1] != OK
        assert decode_natively(content + b"\0\0", words, *shape, case.coding)[1] != OK


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_corrupt_streams_decode_or_are_refused_as_by_the_reference(case: Case) -> None:
    generator = random.Random(2)
    content, num_words = encode_stream(case.symbols, case.coding)
    for _ in range(60 if content else 0):
        changed = bytearray(content)
        for _ in range(generator.choice([1, 2, 10])):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        decode_both(bytes(changed), num_words, len(case.symbols[0]), len(case.symbols), case.coding)


def test_streams_of_random_bytes_decode_or_are_refused_as_by_the_reference() -> None:
    generator = random.Random(3)
    coding = StreamCoding([make_frequencies(generator, 4) for _ in range(2)], 1)
    outcomes = set()
    for _ in range(400):
        num_tokens = generator.randrange(1, 4)
        num_words = generator.randrange(3)
        size = 4 * num_tokens + 4 + 2 * num_words + generator.choice([0, 0, 0, 1, -1])
        states = [generator.choice([65536, 65537, 1 << 18, generator.randrange(1 << 32)]) for _ in range(num_tokens)]
        content = b"".join(state.to_bytes(4, "little") for state in states) + generator.randbytes(20)
        outcomes.add(decode_both(content[:size], num_words, num_tokens, 2, coding))
    assert "refused" in outcomes


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_symbol_without_a_frequency_is_refused() -> None:
    coding = StreamCoding([[0, 0, 4096] + [0] * 29])
    for symbol in (3, 31, 32, 65535):
        assert encode_natively([[2, symbol]], coding)[2] == NO_FREQUENCY


@pytest.mark.parametrize("indices", [[0], [0, 0, 0], [0, 2], [65535, 0]])
def test_table_indices_out_of_range_are_refused(indices: list[int]) -> None:
    coding = StreamCoding([[4096] + [0] * 31] * 2, 0, indices)
    with pytest.raises(ValueError, match="table index"):
        encode_natively([[0], [0]], coding)


@pytest.mark.parametrize("low_bits", [-1, 9])
def test_low_bits_out_of_range_are_refused(low_bits: int) -> None:
    with pytest.raises(ValueError, match="low_bits is out of range"):
        encode_natively([[0]], StreamCoding(None, low_bits))


@pytest.mark.parametrize("row", [[4095] + [0] * 31, [4097] + [0] * 31, [0] * 32, [65535, 4097] + [0] * 30])
def test_frequencies_that_do_not_sum_to_4096_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="must sum to 4096"):
        cpu.Tables.from_frequencies(np.array([row], dtype=np.uint16))


def test_fewer_tables_than_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="one table per channel"):
        encode_natively([[0], [0]], StreamCoding([[4096] + [0] * 31]))


# --- caches: what keeps the kernels inside their memory ---------------------------------------------------------------

PLANES = [PlaneLayout(2, 4, 16, 0, tokens_per_stream=32)] * 2


def flat_tables(num_tables: int) -> cpu.Tables:
    return cpu.Tables.from_frequencies(np.full((num_tables, 32), 128, dtype=np.uint16))


def encode_cache(planes=PLANES, *, cache=None, scales=None, tables=None):
    cache = cache or make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16)
    measured = cpu.measure(make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16), PLANES)[0]
    return cpu.encode(cache, measured if scales is None else scales, planes, tables or flat_tables(16))


def test_cache_round_trip_with_several_streams_per_plane() -> None:
    cache = make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16)
    scales, _ = cpu.measure(cache, PLANES)
    payload, streams = encode_cache()
    assert len(streams) == 4 and len(payload) == sum(-(-stream.num_bytes // 16) * 16 for stream in streams)
    output, expected = allocate_like(cache, 40), allocate_like(cache, 40)
    cpu.decode(payload, streams, scales, PLANES, flat_tables(16), output)
    reference.decode(bytes(payload), streams, scales, PLANES, reference.Tables([[[128] * 32] * 8] * 2), expected)
    assert are_equal(output, expected)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (PlaneLayout(2, 4, 15, 0, tokens_per_stream=32), "`num_bins` must be an even number"),
        (PlaneLayout(2, 4, 2, 0, tokens_per_stream=32), "`num_bins` must be an even number"),
        (PlaneLayout(2, 4, 258, 4, tokens_per_stream=32), "`num_bins` must be an even number"),
        (PlaneLayout(2, 4, 256, 0, tokens_per_stream=32), "`low_bits` of plane 0 must fit 256 bins, got 0"),
        (PlaneLayout(2, 4, 16, 9, tokens_per_stream=32), "`low_bits` of plane 0 must fit 16 bins, got 9"),
        (PlaneLayout(2, 4, 16, -1, tokens_per_stream=32), "`low_bits` of plane 0 must fit 16 bins, got -1"),
        (PlaneLayout(2, 4, 16, 0, tokens_per_stream=33), "`tokens_per_stream` must be a multiple of 32, got 33"),
        (PlaneLayout(2, 4, 16, 0, tokens_per_stream=-32), "`tokens_per_stream` must be a multiple of 32, got -32"),
        (PlaneLayout(4, 2, 16, 0, tokens_per_stream=32), "plane 0 must be a CPU tensor"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout: PlaneLayout, message: str) -> None:
    cache = make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16)
    for call in (lambda: cpu.measure(cache, [layout, PLANES[1]]), lambda: encode_cache([layout, PLANES[1]])):
        with pytest.raises(ValueError, match=message):
            call()


def test_other_arguments_that_do_not_fit_are_refused() -> None:
    cache = make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16)
    scales = cpu.measure(cache, PLANES)[0]
    with pytest.raises(ValueError, match="`planes` must describe 2 planes, got 1"):
        encode_cache(PLANES[:1])
    with pytest.raises(ValueError, match="`tables` must hold 16 tables, got 15"):
        encode_cache(tables=flat_tables(15))
    for wrong in (scales[:, :39], scales[:1], scales.float()):
        with pytest.raises(ValueError, match="`scales` must be"):
            encode_cache(scales=wrong)
    with pytest.raises(ValueError, match="`scales` must be contiguous"):
        encode_cache(scales=scales.T.contiguous().T)
    strided = from_planes([torch.zeros(40, 2, 8, dtype=torch.float16)[:, :, ::2] for _ in range(2)])
    with pytest.raises(ValueError, match="contiguous head dims"):
        encode_cache(cache=strided)


def test_tables_that_do_not_go_with_the_coder_are_refused() -> None:
    cache = make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16)
    scales = cpu.measure(cache, PLANES)[0]
    for tables, coder in ((None, Coder.AC), (None, Coder.RANS), (flat_tables(16), Coder.PACKED)):
        with pytest.raises(ValueError, match="`tables` must go with the coder"):
            cpu.encode(cache, scales, PLANES, tables, coder=coder)


def test_streams_too_long_for_coder_ac_are_refused() -> None:
    layout = PlaneLayout(2, 4, 16, 0, tokens_per_stream=16416)
    cache = make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16)
    scales = cpu.measure(cache, PLANES)[0]
    with pytest.raises(ValueError, match="at most 16384 tokens per stream"):
        cpu.encode(cache, scales, [layout] * 2, flat_tables(16), coder=Coder.AC)


def test_scales_of_another_cache_are_refused() -> None:
    cache = make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16)
    with pytest.raises(ValueError, match="stream 0 cannot be encoded: NOT_FINITE"):
        encode_cache(cache=cache, scales=cpu.measure(cache, PLANES)[0] / 16)


def test_tables_without_the_symbols_are_refused() -> None:
    single = cpu.Tables.from_frequencies(np.array([[4096] + [0] * 31] * 16, dtype=np.uint16))
    with pytest.raises(ValueError, match="stream 0 cannot be encoded: NO_FREQUENCY"):
        encode_cache(tables=single)


@pytest.mark.parametrize("num_threads", [1, 5])
def test_corrupt_stream_is_named(num_threads: int) -> None:
    cache = make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16)
    scales = cpu.measure(cache, PLANES)[0]
    payload, streams = encode_cache()
    changed, offset = bytearray(payload), sum(-(-stream.num_bytes // 16) * 16 for stream in streams[:2])
    changed[offset + 3] = 0xFF
    with pytest.raises(BitstreamError) as caught:
        cpu.decode(changed, streams, scales, PLANES, flat_tables(16), allocate_like(cache, 40), num_threads)
    assert caught.value.field == "stream 2"


def test_index_and_payload_that_do_not_belong_together_are_refused() -> None:
    cache = make_shaped_cache([(2, 4), (2, 4)], 40, torch.float16)
    scales = cpu.measure(cache, PLANES)[0]
    payload, streams = encode_cache()
    output = allocate_like(cache, 40)
    with pytest.raises(ValueError, match="the payload is not as long as its streams"):
        cpu.decode(bytes(payload)[:-16], streams, scales, PLANES, flat_tables(16), output)
    with pytest.raises(ValueError, match="one row of three per stream"):
        cpu.decode(payload, streams[:-1], scales, PLANES, flat_tables(16), output)
    with pytest.raises(ValueError, match="the payload is not as long as its streams"):
        cpu.checksum_streams(bytes(payload) + bytes(16), streams)


# --- checksums --------------------------------------------------------------------------------------------------------


def test_crc32c_equals_the_reference_at_every_length_and_alignment() -> None:
    content = random.Random(0).randbytes(120)
    for start in range(9):
        for stop in range(start, 120, 7):
            assert cpu.crc32c(memoryview(content)[start:stop]) == reference.crc32c(content[start:stop])
    assert cpu.crc32c(b"123456789") == 0xE3069283


def test_crc32c_refuses_memory_with_gaps() -> None:
    with pytest.raises(ValueError, match="contiguous bytes"):
        cpu.crc32c(memoryview(bytes(10))[::2])


def test_checksum_streams_covers_the_padding() -> None:
    payload = random.Random(0).randbytes(48)
    streams = [StreamEntry(17, 0, 0), StreamEntry(16, 0, 0)]
    expected = [reference.crc32c(payload[:32]), reference.crc32c(payload[32:])]
    for num_threads in (1, 3):
        assert cpu.checksum_streams(payload, streams, num_threads).tolist() == expected


def test_default_num_threads_is_at_least_one() -> None:
    assert cpu.default_num_threads() >= 1
