"""Matrix products in fp32, by the library that is the faster on this processor.

torch's own go to Intel's MKL, which takes AVX-512 on Intel's processors alone. oneDNN, which torch has for layers of
networks, takes it wherever it is: on AMD's processors that is twice as fast. Both sum in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def multiply(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return left @ right, plus `bias` in each row.

    Args:
        left: fp32 `[num_rows, depth]`.
        right: fp32 `[depth, width]`, rows or columns contiguous and without gaps, or the product is torch's own.
        bias: fp32 `[width]`.
    """
    weight = right.T
    is_dense = weight.is_contiguous() or right.is_contiguous()
    if left.numel() and right.numel() and is_dense and _has_faster_products(left.device.type):
        return _linear()(left.contiguous(), weight, bias, "none", [], "")
    return left @ right if bias is None else torch.addmm(bias, left, right)


@cache
def _has_faster_products(device_type: str) -> bool:
    """Tell whether oneDNN's products in fp32 are by wider vectors than torch's."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return found.get("avx512_f") is True and str(found.get("cpu_name")).startswith("AMD") and _linear() is not None


def _linear() -> Any:
    """Return oneDNN's product as torch has it; None where it has none."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
