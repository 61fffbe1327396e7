"""The absolute-maximum quantizer of methods `cachegen` and `uniform`, and its inverse.

Per token and plane, over all channels: the scale is the largest magnitude, and a value becomes one of 2M + 1 symbols,
M = num_bins // 2 - 1, symbol M standing for zero. The whole computation is exact in the sense that it is the same on
every machine: fp32, each operation rounded once, ties to even, no fused multiply-add. src/csrc/quantization.h is its
twin; this module is the only Python that states the formula.

Source: the quantizer of CacheGen (Liu et al., SIGCOMM 2024) as its released code has it. Two differences: the inverse
keeps the brackets that the code lost for keys, and a scale of zero gives zeros rather than NaN.
"""

from __future__ import annotations

import torch

from cachegen.format import check_num_bins


def zero_symbol(num_bins: int) -> int:
    """Return M, the symbol of zero and the largest quantized magnitude.

    Raises:
        ValueError: `num_bins` is odd or not within 4 to 256.
    """
    check_num_bins(num_bins)
    return num_bins // 2 - 1


def quantize(values: torch.Tensor, num_bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize one plane.

    Args:
        values: `[num_tokens, num_kv_heads, head_dim]`, fp16, bf16 or fp32, finite.
        num_bins: even, 4 to 256.

    Returns:
        The symbols, int16 `[num_tokens, num_channels]`, and the scales, `[num_tokens]` in the dtype of `values`.
    """
    middle = zero_symbol(num_bins)
    rows = values.reshape(values.shape[0], -1)
    scales = rows.abs().amax(dim=1)
    # Tensor by tensor: torch turns a division by or of a Python number into a product with a reciprocal, which rounds
    # twice.
    inverse = torch.full_like(scales, middle, dtype=torch.float32) / scales.float()
    # The scale is zero, or so small that the inverse overflows: the token becomes zeros.
    inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
    symbols = torch.round(rows.float() * inverse[:, None]) + middle
    return symbols.to(torch.int16), scales


def dequantize(symbols: torch.Tensor, scales: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Return the values that symbols and scales stand for.

    Args:
        symbols: integers `[num_tokens, num_channels]`, 0 to num_bins - 2.
        scales: `[num_tokens]`.

    Returns:
        `[num_tokens, num_channels]` in the dtype of `scales`: (symbol - M) / M * scale in fp32, rounded once more.
    """
    middle = zero_symbol(num_bins)
    steps = symbols.float() - middle
    levels = steps / torch.full_like(steps, middle)
    return (levels * scales.float()[:, None]).to(scales.dtype)


def low_bits_for(num_bins: int, table_size: int) -> int:
    """Return how many low bits to store raw so that the high part has at most `table_size` values."""
    low_bits = 0
    while (num_bins - 2) >> low_bits >= table_size:
        low_bits += 1
    return low_bits
