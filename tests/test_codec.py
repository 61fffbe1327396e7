"""The codec: what is decoded is exactly what the quantizer says, and nothing that does not belong is decoded."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cachegen.coder import cpu
from cachegen.coder.cpu_kernels import CPU, CpuKernels
from cachegen.errors import BitstreamError, ConfigError, InputError, MismatchError
from cachegen.format import Coder
from cachegen.kv_cache import KVCache, from_planes, hash_planes
from cachegen.methods import open_document, parse_chunk
from cachegen.methods.absmax.codec import AbsmaxEncoder, choose_tokens_per_stream
from tests.fixtures.absmax import (
    decode_all,
    encode_all,
    make_config,
    quantize_and_dequantize,
    start_encoder,
    tiny_document,
)
from tests.fixtures.caches import DTYPES, allocate_like, are_equal, make_metadata, make_shaped_cache
from tests.reference.kernels import REFERENCE

SHAPES = [(2, 16), (1, 40), (1, 5), (3, 11)]
NUM_BINS = [32, 16, 64, 256]


def check_round_trip(cache: KVCache, num_bins, chunk_tokens, coder=Coder.RANS, *, head_major=False, threads=1) -> None:
    files = encode_all(start_encoder(cache, num_bins, chunk_tokens, coder, num_threads=threads))
    num_tokens = sum(chunk_tokens)
    output = allocate_like(cache, num_tokens, head_major=head_major)
    decode_all(files, output, num_threads=threads)
    assert are_equal(output, quantize_and_dequantize(cache.slice(0, num_tokens), make_config(num_bins)))


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coder", Coder, ids=lambda coder: coder.name.lower())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "chunk_tokens",
    [(1,), (1, 1, 1), (31, 1, 32, 33), (97,), (64, 33), (100,), (5,) * 20],
    ids=lambda tokens: str(tokens[:4]),
)
def test_decoded_cache_is_the_quantized_one(dtype: torch.dtype, chunk_tokens: tuple[int, ...], coder: Coder) -> None:
    check_round_trip(make_shaped_cache(SHAPES, sum(chunk_tokens), dtype), NUM_BINS, chunk_tokens, coder)


@pytest.mark.parametrize("num_channels", [1, 5, 31, 32, 33, 80, 128])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 100])
def test_any_channel_count_and_tail(num_channels: int, num_tokens: int) -> None:
    cache = make_shaped_cache([(1, num_channels), (num_channels, 1)], num_tokens, torch.bfloat16, seed=num_tokens)
    check_round_trip(cache, (32, 100), (num_tokens,))


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_do_not_change_bytes_or_values(num_threads: int) -> None:
    cache = make_shaped_cache([(8, 64), (8, 64)] * 2, 300, torch.float16)
    chunk_tokens = (260, 40)
    files = encode_all(start_encoder(cache, (16,) * 4, chunk_tokens))
    assert encode_all(start_encoder(cache, (16,) * 4, chunk_tokens, num_threads=num_threads)) == files
    output = allocate_like(cache, 300)
    decode_all(files, output, num_threads=num_threads)
    assert are_equal(output, quantize_and_dequantize(cache, make_config((16,) * 4)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_major_strides_are_read_and_written(dtype: torch.dtype) -> None:
    cache = make_shaped_cache(SHAPES, 70, dtype, head_major=True)
    contiguous = from_planes([plane.contiguous() for plane in cache.planes])
    files = encode_all(start_encoder(cache, NUM_BINS, (40, 30)))
    assert files == encode_all(start_encoder(contiguous, NUM_BINS, (40, 30)))
    output = allocate_like(cache, 70, head_major=True)
    decode_all(files, output)
    assert are_equal(output, quantize_and_dequantize(contiguous, make_config(NUM_BINS)))


def test_decoding_writes_nothing_but_its_tokens() -> None:
    cache = make_shaped_cache([(2, 8), (2, 8)], 40, torch.float32)
    files = encode_all(start_encoder(cache, (16, 16), (40,)))
    storages = [torch.full((2, 50, 8), 7.0) for _ in range(2)]
    output = from_planes([storage[:, 4:44].permute(1, 0, 2) for storage in storages])
    decode_all(files, output)
    for storage in storages:
        assert (storage[:, :4] == 7).all() and (storage[:, 44:] == 7).all()
        assert not (storage[:, 4:44] == 7).any()


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=["reference", "cpu"])
@pytest.mark.parametrize("coder", Coder, ids=lambda coder: coder.name.lower())
def test_zero_tokens_and_single_symbol_channels(kernels, coder: Coder) -> None:
    cache = make_shaped_cache([(1, 6), (1, 6)], 40, torch.float16)
    for plane in cache.planes:
        plane[3] = 0.0
        plane[:, :, 2] = -0.0
    cache.keys[0][:] = 0.0  # a plane of nothing else
    files = encode_all(start_encoder(cache, (16, 64), (40,), coder, kernels=kernels))
    output = allocate_like(cache, 40)
    decode_all(files, output, kernels=kernels)
    assert are_equal(output, quantize_and_dequantize(cache, make_config((16, 64))))
    assert not torch.signbit(output.values[0][3]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_and_cpu_write_the_same_files(dtype: torch.dtype) -> None:
    cache = make_shaped_cache([(1, 33), (2, 5)], 45, dtype)
    for coder in Coder:
        plain = encode_all(start_encoder(cache, (128, 16), (33, 12), coder, kernels=REFERENCE))
        assert encode_all(start_encoder(cache, (128, 16), (33, 12), coder)) == plain


def test_tokens_beyond_the_chunks_are_not_looked_at() -> None:
    cache = make_shaped_cache(SHAPES, 60, torch.float16)
    for plane in cache.planes:
        plane[50:] = torch.nan
    check_round_trip(cache, NUM_BINS, (32, 18))


def test_document_says_what_it_was_made_from() -> None:
    cache = make_shaped_cache(SHAPES, 60, torch.bfloat16)
    encoder = start_encoder(cache, NUM_BINS, (40, 11))
    header = encoder.document.header
    assert (header.num_cache_tokens, header.chunk_tokens, header.prefill_block_size) == (60, (40, 11), 512)
    assert [plane.num_bins for plane in header.planes] == NUM_BINS
    assert [plane.low_bits for plane in header.planes] == [0, 0, 1, 3]
    assert encoder.num_chunks == 2 and encoder.document.dtype is torch.bfloat16
    assert encoder.expected_header(1).first_token == 40


# --- caches and arguments that are refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=["reference", "cpu"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("plane", "kind", "layer"), [(0, "keys", 0), (3, "values", 1)])
def test_nan_and_infinity_are_refused_naming_layer_and_token(kernels, value, dtype, plane, kind, layer) -> None:
    cache = make_shaped_cache(SHAPES, 40, dtype)
    cache.planes[plane][37, 0, 2] = value
    cache.planes[plane][39, 0, 0] = value
    message = rf"NaN or infinity \(layer {layer}, {kind}, token 37\)"
    with pytest.raises(InputError, match=message):
        start_encoder(cache, NUM_BINS, (38,), kernels=kernels)
    with pytest.raises(InputError, match=message):
        start_encoder(cache, NUM_BINS, (20, 20), kernels=kernels, num_threads=3)


@pytest.mark.parametrize("chunk_tokens", [(), (0,), (10, 0), (-1, 5), (20, 21)])
def test_chunks_that_do_not_fit_the_cache_are_refused(chunk_tokens: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`chunk_tokens` must be positive and at most 40 in all"):
        start_encoder(make_shaped_cache(SHAPES, 40, torch.float16), NUM_BINS, chunk_tokens)


def test_config_that_does_not_cover_the_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no key group covers layers 1 to 1"):
        start_encoder(make_shaped_cache(SHAPES, 40, torch.float16), (16, 16), (40,))


# --- gates ------------------------------------------------------------------------------------------------------------


def decode_with(content: bytes, tables_file: bytes, **arguments) -> None:
    encoder = tiny_document()[0]
    expected = {"first_token": 0, "token_hash": encoder.expected_header(0).token_hash}
    output = arguments.pop("output", None) or allocate_like(make_shaped_cache([(1, 3), (1, 2)], 34, torch.bfloat16), 34)
    open_document(tables_file).decode([content], output, **(expected | arguments))


@pytest.mark.parametrize("shapes", [[(3, 1), (1, 2)], [(1, 3), (2, 2)], [(1, 3), (1, 2)] * 2])
def test_an_output_of_other_shapes_is_refused_before_the_chunk_is_read(shapes: list[tuple[int, int]]) -> None:
    _, tables_file, _ = tiny_document()
    output = allocate_like(make_shaped_cache(shapes, 34, torch.bfloat16), 34)
    with pytest.raises(MismatchError, match=r"the cache.*the document is of another model"):
        decode_with(b"", tables_file, output=output)


def test_chunk_of_another_coder_is_refused() -> None:
    cache = make_shaped_cache([(1, 3), (1, 2)], 34, torch.bfloat16)
    tables_file, chunk = encode_all(start_encoder(cache, (64, 8), (34,), Coder.PACKED))
    with pytest.raises(MismatchError, match=r"^coder is packed, but .* say rans"):
        decode_with(chunk, tiny_document()[1])
    with pytest.raises(MismatchError, match=r"^coder is rans, but .* say packed"):
        decode_with(tiny_document()[2], tables_file)


def test_tables_are_not_unpacked_before_their_document_is_known_to_fit() -> None:
    # A tables file of 32 KB can say what takes 2.5 MB: 65,536 channels of a symbol each.
    unpacked = []

    class Counting(CpuKernels):
        @staticmethod
        def load_tables(*arguments):
            unpacked.append(arguments)
            return cpu.load_tables(*arguments)

    _, tables_file, content = tiny_document()
    document = open_document(tables_file, kernels=Counting())
    output = allocate_like(make_shaped_cache([(1, 3), (1, 2)], 34, torch.bfloat16), 34)
    with pytest.raises(MismatchError):
        document.decode([content], output, first_token=1, token_hash=bytes(32))
    assert unpacked == []
    document.prepare()
    assert len(unpacked) == 1


def test_a_caches_values_must_be_those_that_were_saved() -> None:
    cache = make_shaped_cache(SHAPES, 40, torch.float16)
    metadata = dataclasses.replace(make_metadata(40), cache_hash=hash_planes(cache))
    config = make_config(NUM_BINS)
    AbsmaxEncoder(cache, metadata, config, (40,), Coder.RANS)
    cache.planes[3][39, 0, 0] += 1
    with pytest.raises(BitstreamError, match="values are not what was saved") as caught:
        AbsmaxEncoder(cache, metadata, config, (40,), Coder.RANS)
    assert caught.value.field == "cache_hash"


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_is_encoding_of_knows_its_own_chunks_only() -> None:
    cache = make_shaped_cache(SHAPES, 60, torch.float16)
    encoder = start_encoder(cache, NUM_BINS, (30, 30))
    first, second = encode_all(encoder)[1:]
    assert encoder.is_encoding_of(0, [first]) and encoder.is_encoding_of(1, [second])
    assert not encoder.is_encoding_of(0, [second])
    assert not encoder.is_encoding_of(0, [first[:-1]])
    assert not encoder.is_encoding_of(0, [first[:-1] + bytes([first[-1] ^ 1])])
    other = start_encoder(make_shaped_cache(SHAPES, 60, torch.float16, seed=1), NUM_BINS, (30, 30))
    assert not other.is_encoding_of(0, [first])


# --- how streams are cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_channels", [1, 5, 80, 128, 1024, 4096, 65536])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 256, 1000, 70_000])
def test_streams_are_whole_rows_and_not_too_long(num_channels: int, num_tokens: int) -> None:
    tokens = choose_tokens_per_stream(num_channels, num_tokens)
    assert tokens > 0 and tokens % 32 == 0
    # A stream is at most half as long again as it should be, and a row.
    assert tokens <= 1.5 * 32 * max(1, round(4096 / num_channels)) + 32


@pytest.mark.parametrize("num_tokens", [1, 33, 1000, 4096, 6143, 6144, 10_240, 70_000, 1 << 24])
def test_codes_of_coder_ac_fit_their_length_fields(num_tokens: int) -> None:
    tokens = choose_tokens_per_stream(5, num_tokens, Coder.AC)
    assert tokens % 32 == 0 and min(num_tokens, 2048) <= tokens <= 1.5 * 4096


def test_container_of_a_chunk_has_the_chosen_streams() -> None:
    cache = make_shaped_cache([(8, 64), (1, 4)], 300, torch.float16)
    content = encode_all(start_encoder(cache, (16, 16), (300,)))[1]
    planes = parse_chunk(content).header.planes
    assert [plane.tokens_per_stream for plane in planes] == [320, 320]
    assert choose_tokens_per_stream(512, 600) == 320
