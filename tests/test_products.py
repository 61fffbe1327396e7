"""Matrix products in fp32: oneDNN's, where they are the faster, are those of torch."""

import pytest
import torch

from cachegen.methods.transform import products

SHAPES = [(1, 1, 1), (3, 7, 1), (2, 1, 5), (17, 33, 65), (64, 300, 70), (0, 5, 5), (4, 5, 0)]


@pytest.fixture(params=[False, True], ids=["torch", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param and not (torch.backends.mkldnn.is_available() and products._linear()):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_has_faster_products", lambda device_type: request.param)
    return "oneDNN" if request.param else "torch"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(("rows", "depth", "width"), SHAPES)
def test_products_are_right_to_fp32(rows: int, depth: int, width: int, by_columns: bool, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, depth, generator=generator)
    right = torch.randn(width, depth, generator=generator).T if by_columns else torch.randn(depth, width)
    bias = torch.randn(width, generator=generator) if has_bias else None
    found = products.multiply(left, right, bias)
    expected = left.double() @ right.double() + (0 if bias is None else bias.double())
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("library")
def test_matrices_with_gaps_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    # oneDNN takes a thousand times as long over such.
    monkeypatch.setattr(products, "_linear", lambda: pytest.fail("oneDNN was asked"))
    left, right = torch.randn(8, 16), torch.randn(16, 40)[:, 3:30]
    assert torch.allclose(products.multiply(left, right), left @ right)
