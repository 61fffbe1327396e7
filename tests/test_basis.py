"""The basis inverts, decorrelates, and makes one step mean the same quality in every direction."""

from __future__ import annotations

import pytest
import torch

from cachegen.calibration.basis import LEAST_ROW_LEVELS, RIDGE, ROUNDING_SHARE, fit_basis, weigh
from cachegen.errors import InputError
from cachegen.methods.transform.integer_rows import IntegerRows

NUM_CHANNELS = 48


def make_matrix(seed: int, spread: float = 3.0) -> torch.Tensor:
    """A random symmetric positive definite matrix, fp64, its eigenvalues `spread` orders of magnitude apart."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(NUM_CHANNELS, NUM_CHANNELS, generator=generator, dtype=torch.float64)
    vectors, _ = torch.linalg.qr(random)
    eigenvalues = 10 ** torch.linspace(spread / 2, -spread / 2, NUM_CHANNELS, dtype=torch.float64)
    return (vectors * eigenvalues) @ vectors.T


@pytest.fixture
def covariance() -> torch.Tensor:
    return make_matrix(0)


@pytest.fixture
def fisher() -> torch.Tensor:
    matrix = make_matrix(1)
    return matrix / matrix.trace() * NUM_CHANNELS


@pytest.mark.parametrize("weights", ["fisher", "diagonal", "none"])
def test_analysis_inverts_synthesis(covariance, fisher, weights):
    basis = fit_basis(covariance, weigh(fisher, weights), finest_step=1e-3)
    assert (basis.analysis.dtype, basis.synthesis.dtype) == (torch.float16, torch.float32)
    identity = torch.eye(NUM_CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(basis.synthesis.double() @ basis.analysis.double(), identity, atol=5e-3, rtol=0)
    torch.testing.assert_close(basis.analysis.double() @ basis.synthesis.double(), identity, atol=5e-2, rtol=0)


@pytest.mark.parametrize("weights", ["fisher", "diagonal", "none"])
def test_components_are_uncorrelated_with_the_deviations_of_scale_logs(covariance, fisher, weights):
    basis = fit_basis(covariance, weigh(fisher, weights), finest_step=1e-3)
    analysis = basis.analysis.double()
    found = analysis.T @ covariance @ analysis
    deviations = found.diagonal().sqrt()
    correlation = found / torch.outer(deviations, deviations)
    assert (correlation - torch.diag(correlation.diagonal())).abs().max() < 0.02  # fp16
    torch.testing.assert_close(16 * deviations.log2(), basis.scale_logs.double(), atol=0.6, rtol=0)
    assert (basis.scale_logs[1:] <= basis.scale_logs[:-1]).all()


def test_an_error_in_any_component_costs_the_same_quality(covariance, fisher):
    basis = fit_basis(covariance, fisher, finest_step=1e-3)
    weights = fisher + RIDGE * torch.eye(NUM_CHANNELS, dtype=torch.float64)
    errors = torch.eye(NUM_CHANNELS, dtype=torch.float64)
    vectors = errors @ basis.synthesis.double()
    costs = (vectors @ weights * vectors).sum(1)
    torch.testing.assert_close(costs, torch.ones_like(costs), atol=0.02, rtol=0)


def test_without_weights_the_matrices_are_orthogonal(covariance):
    basis = fit_basis(covariance, None, finest_step=1e-3)
    torch.testing.assert_close(basis.analysis.float(), basis.synthesis.T, atol=2e-3, rtol=0)


def test_rows_are_integers_of_16_bits_and_coarser_where_components_are_smaller(covariance, fisher):
    basis = fit_basis(covariance, fisher, finest_step=0.5)
    made = IntegerRows.of(basis.synthesis, basis.channel_exponents)
    integers, exponents = made.integers, made.row_exponents
    rows = integers.double() * torch.exp2(exponents.double())[:, None]
    assert (rows * torch.exp2(basis.channel_exponents.double())).equal(basis.synthesis.double())
    assert exponents[0] < exponents[-1] and integers[-1].abs().max() >= LEAST_ROW_LEVELS


def test_rounding_does_its_share_of_the_harm(covariance, fisher):
    step = 0.5
    exact = fit_basis(covariance, fisher, finest_step=1e-6)
    rounded = fit_basis(covariance, fisher, finest_step=step)
    count = len(rounded.scale_logs)
    deviations = torch.exp2(rounded.scale_logs.double() / 16)
    errors = deviations[:, None] * (rounded.synthesis - exact.synthesis[:count]).double()
    weights = fisher + RIDGE * torch.eye(NUM_CHANNELS, dtype=torch.float64)
    harm = ((errors @ weights) * errors).sum().item()
    # Steps are powers of two: up to a factor of two more or less in one row.
    assert 0.7 < harm / (ROUNDING_SHARE * count * step**2 / 12) < 1.4


def test_components_that_the_finest_step_does_not_code_are_left_out(covariance, fisher):
    whole = fit_basis(covariance, fisher, finest_step=1e-3)
    some = fit_basis(covariance, fisher, finest_step=2.0)
    count = len(some.scale_logs)
    assert 0 < count < len(whole.scale_logs)
    assert some.scale_logs[-1] - 16 >= -30 > whole.scale_logs[count] - 16
    torch.testing.assert_close(some.synthesis[0], whole.synthesis[0], atol=0.02, rtol=0.01)


def test_at_most_so_many_components_and_at_least_one_are_kept(covariance, fisher):
    assert fit_basis(covariance, fisher, finest_step=1e-3, max_components=5).synthesis.shape == (5, NUM_CHANNELS)
    assert fit_basis(covariance, fisher, finest_step=1e9).analysis.shape == (NUM_CHANNELS, 1)


def test_constant_channels_are_no_trouble(fisher):
    basis = fit_basis(torch.zeros(NUM_CHANNELS, NUM_CHANNELS, dtype=torch.float64), fisher, finest_step=0.1)
    assert basis.scale_logs.shape == (1,)


def test_nan_zero_weights_and_what_fp16_cannot_hold_are_refused(covariance, fisher):
    with pytest.raises(InputError, match="NaN"):
        fit_basis(covariance * torch.nan, fisher, finest_step=0.1)
    with pytest.raises(InputError, match="NaN"):
        fit_basis(covariance, fisher * torch.inf, finest_step=0.1)
    with pytest.raises(InputError, match="gradients are zero"):
        fit_basis(covariance, fisher * 0, finest_step=0.1)
    with pytest.raises(InputError, match="fp16"):
        fit_basis(covariance, fisher * 1e12, finest_step=0.1)
