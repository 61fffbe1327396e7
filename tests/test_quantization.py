"""The quantizer against an independent one in NumPy, bit for bit, ties, subnormals and overflows included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cachegen.coder import cpu
from cachegen.format import PlaneLayout, StreamEntry
from cachegen.kv_cache import from_planes
from cachegen.methods.absmax.quantization import dequantize, low_bits_for, quantize, zero_symbol
from tests.fixtures.caches import DTYPES, allocate_like, are_equal

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)


def all_finite(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a 16-bit dtype, `[num_values, 1, 1]`; the two zeros are among them."""
    values = torch.from_numpy(ALL_BITS.astype(np.int16)).view(dtype)
    return values[torch.isfinite(values)].reshape(-1, 1, 1)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16, ties to even, from the definition: of the two neighbours, the nearer."""
    bits = values.view(np.uint32).astype(np.uint64)
    low = bits & 0xFFFF
    up = (low > 0x8000) | ((low == 0x8000) & ((bits >> 16) & 1 == 1))
    return ((bits >> 16) + up).astype(np.uint16)


def to_bits(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16).numpy()


def numpy_quantize(rows: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and fp32 scales of fp32 rows, value by value."""
    middle = num_bins // 2 - 1
    scales = np.abs(rows).max(axis=1)
    symbols = np.zeros(rows.shape, dtype=np.int64)
    for token, scale in enumerate(scales):
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(middle) / np.float32(scale)
        if not np.isfinite(inverse):
            inverse = np.float32(0)
        for channel, value in enumerate(rows[token]):
            symbols[token, channel] = int(np.rint(np.float32(value) * inverse)) + middle
    return symbols, scales


def numpy_dequantize(symbols: np.ndarray, scales: np.ndarray, num_bins: int) -> np.ndarray:
    """fp32 values, before they are rounded to the cache's dtype."""
    middle = np.float32(num_bins // 2 - 1)
    levels = (symbols.astype(np.float32) - middle) / middle
    return levels * scales.astype(np.float32)[:, None]


def check_against_numpy(values: torch.Tensor, num_bins: int) -> None:
    symbols, scales = quantize(values, num_bins)
    rows = values.reshape(len(values), -1).float().numpy()
    expected, expected_scales = numpy_quantize(rows, num_bins)
    assert np.array_equal(symbols.numpy(), expected)
    assert np.array_equal(scales.float().numpy().view(np.uint32), expected_scales.view(np.uint32))
    decoded = dequantize(symbols, scales, num_bins)
    expected_values = numpy_dequantize(expected, expected_scales, num_bins)
    if values.dtype == torch.float32:
        expected_bits = expected_values.view(np.int32)
    elif values.dtype == torch.float16:
        expected_bits = expected_values.astype(np.float16).view(np.int16)
    else:
        expected_bits = round_to_bfloat16(expected_values).view(np.int16)
    assert np.array_equal(to_bits(decoded), expected_bits)


def check_native(values: torch.Tensor, num_bins: int) -> None:
    """Scales, counts and decoded values of the native kernels against this module's."""
    cache = from_planes([values, values])
    planes = [PlaneLayout(*values.shape[1:], num_bins, low_bits_for(num_bins, 1), tokens_per_stream=1 << 16)] * 2
    scales, _ = cpu.measure(cache, planes)
    symbols, expected_scales = quantize(values, num_bins)
    assert np.array_equal(to_bits(scales[0]), to_bits(expected_scales))
    payload, streams = cpu.encode(cache, scales, planes, None)
    output = allocate_like(cache, len(values))
    cpu.decode(payload, streams, scales, planes, None, output)
    expected = dequantize(symbols, expected_scales, num_bins).reshape(values.shape)
    assert are_equal(output, from_planes([expected, expected]))


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bins", [4, 6, 8, 16, 32, 34, 64, 128, 254, 256])
def test_random_values_equal_numpy(dtype: torch.dtype, num_bins: int) -> None:
    generator = torch.Generator().manual_seed(num_bins)
    exponents = torch.randint(-20, 12, (60, 1, 1), generator=generator).float()
    values = (torch.randn(60, 2, 7, generator=generator) * torch.exp2(exponents)).to(dtype)
    check_against_numpy(values, num_bins)
    check_native(values, num_bins)


finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=finite_floats),
    st.integers(2, 128),
)
def test_any_fp32_values_equal_numpy(rows: np.ndarray, half: int) -> None:
    values = torch.from_numpy(rows)[:, None]
    check_against_numpy(values, 2 * half)
    check_native(values, 2 * half)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    arrays.arrays(np.uint16, st.tuples(st.integers(1, 4), st.integers(1, 6))),
    st.integers(2, 128),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_any_16_bit_values_equal_numpy(bits: np.ndarray, half: int, dtype: torch.dtype) -> None:
    values = torch.from_numpy(bits.view(np.int16)).view(dtype)[:, None]
    values = torch.where(torch.isfinite(values), values, torch.zeros((), dtype=dtype))
    check_against_numpy(values, 2 * half)
    check_native(values, 2 * half)


def test_ties_go_to_the_even_symbol() -> None:
    # scale 7, M = 7: the inverse is 1, so x.5 is a tie.
    values = torch.tensor([[[7.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -6.5]]])
    symbols, _ = quantize(values, 16)
    assert (symbols[0] - 7).tolist() == [7, 0, 2, 2, 4, 0, -2, -2, -6]
    check_native(values, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_token_gives_the_zero_symbol_and_positive_zeros(dtype: torch.dtype) -> None:
    values = torch.tensor([[[0.0, -0.0, 0.0]], [[1.0, -0.0, 0.0]]], dtype=dtype)
    symbols, scales = quantize(values, 16)
    assert symbols.tolist() == [[7, 7, 7], [14, 7, 7]]
    assert to_bits(dequantize(symbols, scales, 16))[:, 1:].tolist() == [[0, 0], [0, 0]]
    check_native(values, 16)


@pytest.mark.parametrize("num_bins", [4, 16, 256])
def test_scale_whose_inverse_overflows_counts_as_zero(num_bins: int) -> None:
    middle = zero_symbol(num_bins)
    largest = np.finfo(np.float32).max
    edge = np.float32(middle) / largest  # about the smallest scale with a finite inverse
    scales = [edge]
    for _ in range(3):
        scales.append(np.nextafter(scales[-1], np.float32(0)))
        scales.insert(0, np.nextafter(scales[0], np.float32(1)))
    scales.append(np.float32(1e-45))
    values = torch.tensor(np.array(scales))[:, None, None].expand(-1, 1, 2).clone()
    symbols, _ = quantize(values, num_bins)
    found = symbols[:, 0].tolist()
    assert set(found) == {2 * middle, middle} and found == sorted(found, reverse=True)
    check_against_numpy(values, num_bins)
    check_native(values, num_bins)


@pytest.mark.parametrize("num_bins", [4, 8, 256])
def test_largest_and_smallest_magnitudes_are_exact(num_bins: int) -> None:
    info = torch.finfo(torch.float32)
    values = torch.tensor([[[info.max, info.max / 2, -info.max]], [[info.tiny, info.tiny / 2, -info.tiny]]])
    check_against_numpy(values, num_bins)
    check_native(values, num_bins)


def test_identity_where_values_lie_on_levels() -> None:
    symbols = torch.arange(31)[None]
    scales = torch.tensor([3.0])
    assert torch.equal(quantize(dequantize(symbols, scales, 32)[:, None], 32)[0], symbols.to(torch.int16))


@pytest.mark.parametrize("num_bins", [3, 2, 0, 5, 255, 258, -4])
def test_bins_must_be_even_and_in_range(num_bins: int) -> None:
    with pytest.raises(ValueError, match="`num_bins` must be an even number from 4 to 256"):
        zero_symbol(num_bins)


@pytest.mark.parametrize(
    ("num_bins", "table_size", "expected"), [(4, 32, 0), (32, 32, 0), (34, 32, 1), (256, 32, 3), (4, 1, 2), (256, 1, 8)]
)
def test_low_bits_for(num_bins: int, table_size: int, expected: int) -> None:
    assert low_bits_for(num_bins, table_size) == expected
    assert (num_bins - 2) >> expected < table_size


# --- widening and narrowing in C++, over all 16-bit values ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_finite_value_survives_as_the_only_one_of_its_token(dtype: torch.dtype) -> None:
    values = all_finite(dtype)
    cache = from_planes([values, values])
    planes = [PlaneLayout(1, 1, 4, 2, tokens_per_stream=1 << 16)] * 2
    scales, _ = cpu.measure(cache, planes)
    payload, streams = cpu.encode(cache, scales, planes, None)
    output = allocate_like(cache, len(values))
    cpu.decode(payload, streams, scales, planes, None, output)
    # The value is its token's scale, so it comes back as it is; only -0 loses its sign, and what no inverse reaches.
    with np.errstate(over="ignore", divide="ignore"):
        is_reached = np.isfinite(np.float32(1) / np.abs(values.float().numpy()))
    expected = np.where(is_reached, to_bits(values), 0)
    assert np.array_equal(to_bits(output.keys[0]), expected)
    assert (~is_reached).sum() == (2 if dtype == torch.float16 else 2 * 33)


@pytest.mark.parametrize("num_bins", [4, 32, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrowing_is_right_for_every_scale_and_spread_of_symbols(dtype: torch.dtype, num_bins: int) -> None:
    scales = all_finite(dtype).reshape(-1)
    scales = scales[~torch.signbit(scales)]
    num_tokens, low_bits = len(scales), low_bits_for(num_bins, 1)
    symbols = np.linspace(0, num_bins - 2, 9 if num_bins > 4 else 3).astype(np.uint16)
    symbols = np.repeat(symbols[:, None], num_tokens, axis=1)
    planes = [PlaneLayout(1, len(symbols), num_bins, low_bits, tokens_per_stream=1 << 16)] * 2
    content, num_words, _ = cpu._native.encode_symbols(symbols, None, low_bits)
    stream = StreamEntry(len(content), num_words, 0)
    padded = content.ljust(-(-len(content) // 16) * 16, b"\0")
    output = from_planes([torch.empty(num_tokens, 1, len(symbols), dtype=dtype) for _ in planes])
    cpu.decode(padded * 2, [stream] * 2, torch.stack([scales, scales]), planes, None, output)
    expected = dequantize(torch.from_numpy(symbols.astype(np.int32)).T, scales, num_bins)
    assert np.array_equal(to_bits(output.keys[0].reshape(num_tokens, -1)), to_bits(expected))
    in_numpy = numpy_dequantize(symbols.T, scales.float().numpy(), num_bins)
    in_numpy = in_numpy.astype(np.float16) if dtype == torch.float16 else round_to_bfloat16(in_numpy)
    assert np.array_equal(to_bits(expected), in_numpy.view(np.int16))
