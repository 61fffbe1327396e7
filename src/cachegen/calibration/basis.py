"""A basis for keys and values in which components are uncorrelated, and a change of any by one costs the same quality.

With G the Fisher information of the vectors x and C their covariance: W = (G + ridge)^(1/2), and the Karhunen-Loeve
transform U of W x gives c = U^T W (x - mean). An error e in c then costs a KL divergence of about |e|^2 / 2 times a
constant, whatever its direction, which is what lets one step quantize all components.

Source: Karhunen-Loeve transform with a weighted error measure; reverse water-filling (Cover and Thomas, section 10.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch

from cachegen.errors import InputError
from cachegen.methods.transform.integer_rows import MAX_CHANNEL_EXPONENT, MAX_INTEGER
from cachegen.methods.transform.profile import SCALE_LOGS_PER_OCTAVE

Weights = Literal["fisher", "diagonal", "none"]
WEIGHTS: tuple[Weights, ...] = ("fisher", "diagonal", "none")
RIDGE = 1e-3
"""Added to the eigenvalues of the weights, in units of their mean: no direction is free of cost."""
ROUNDING_SHARE = 0.45
"""How much of the loss at the finest step comes from rounding the matrices."""
LEAST_ROW_LEVELS = 4
"""The largest value of a row is at least so many of its steps."""
MIN_SCALE_LOG = -30
"""16 log2 of the smallest standard deviation, in steps, that is coded: scale index 0 of component_tables lies below."""


@dataclass(frozen=True)
class Basis:
    """The transform of one group of layers, its components in descending order of standard deviation.

    Attributes:
        analysis: fp16 `[num_channels, num_components]`.
        synthesis: fp32 `[num_components, num_channels]`, its inverse on the components that are kept: integers of 16
            bits, times a power of two for each component and one for each channel.
        channel_exponents: int8 `[num_channels]`, the logarithms of the latter.
        scale_logs: int16 `[num_components]`, 16 log2 of the standard deviations.
    """

    analysis: torch.Tensor
    synthesis: torch.Tensor
    channel_exponents: torch.Tensor
    scale_logs: torch.Tensor


def fit_basis(
    covariance: torch.Tensor, fisher: torch.Tensor | None, *, finest_step: float, max_components: int | None = None
) -> Basis:
    """Fit the basis of one group.

    Args:
        covariance: fp64 `[num_channels, num_channels]`.
        fisher: the same, its unit chosen by the caller, or its diagonal alone; None weights all channels alike.
        finest_step: components too small to be coded at this step are left out.
        max_components: the largest ones only.

    Returns:
        On the CPU; at least one component.

    Raises:
        InputError: the matrices are not finite, or do not invert each other in fp16.
    """
    if not torch.isfinite(covariance).all() or (fisher is not None and not torch.isfinite(fisher).all()):
        raise InputError("the caches or the gradients hold NaN or infinity")
    root, inverse_root, channel_weights = _square_roots(fisher, covariance)
    variances, vectors = torch.linalg.eigh(root @ covariance @ root)
    variances, vectors = variances.flip(0), vectors.flip(1)
    smallest = torch.finfo(torch.float64).eps * variances[0].clamp_min(1e-300)
    scale_logs = torch.round(0.5 * SCALE_LOGS_PER_OCTAVE * variances.clamp_min(smallest).log2())
    finest_log = round(SCALE_LOGS_PER_OCTAVE * torch.tensor(finest_step, dtype=torch.float64).log2().item())
    count = max(1, int((scale_logs - finest_log >= MIN_SCALE_LOG).sum()))
    count = min(count, max_components or count)
    analysis = root @ vectors[:, :count]
    # Errors of a channel cost by the square of its weight: steps are coarser where it is smaller.
    channel_exponents = (-0.5 * channel_weights.log2()).round().clamp(-MAX_CHANNEL_EXPONENT, MAX_CHANNEL_EXPONENT)
    synthesis = _round_rows(
        vectors[:, :count].T @ inverse_root, channel_exponents, scale_logs[:count], finest_step, channel_weights
    )
    # What is lost by rounding is not made good by components, but they stay independent of each other.
    product = synthesis @ analysis
    analysis = analysis @ cast("torch.Tensor", torch.linalg.pinv(product))  # pyright: ignore[reportUnknownMemberType]
    variances = (analysis.T @ covariance * analysis.T).sum(1).clamp_min(smallest)
    order = variances.argsort(descending=True, stable=True)
    scale_logs = torch.round(0.5 * SCALE_LOGS_PER_OCTAVE * variances[order].log2())
    basis = Basis(
        analysis=analysis[:, order].half().contiguous().cpu(),
        synthesis=synthesis[order].float().contiguous().cpu(),
        channel_exponents=channel_exponents.to(torch.int8).cpu(),
        scale_logs=scale_logs.to(torch.int16).cpu(),
    )
    _check_inverse(basis)
    return basis


def _round_rows(
    rows: torch.Tensor,
    channel_exponents: torch.Tensor,
    scale_logs: torch.Tensor,
    finest_step: float,
    channel_weights: torch.Tensor,
) -> torch.Tensor:
    """Round a synthesis matrix to integers times powers of two, finer where components are larger.

    A rounding error does harm in proportion to the component. All rows do about the same harm then, together
    `ROUNDING_SHARE` of what quantizing as many components at the finest step does.

    Args:
        rows: fp64 `[num_components, num_channels]`.
        channel_exponents: fp64 `[num_channels]`, whole numbers.
        channel_weights: fp64 `[num_channels]`, what an error of one in each channel costs.
    """
    scaled = rows * torch.exp2(-channel_exponents)
    weight = (channel_weights * torch.exp2(2 * channel_exponents)).sum()
    deviations = torch.exp2(scale_logs / SCALE_LOGS_PER_OCTAVE)
    steps = (ROUNDING_SHARE / weight).sqrt() * finest_step / deviations
    largest = scaled.abs().amax(1).clamp_min(1e-30)
    exponents = torch.minimum(steps.log2().round(), (largest / LEAST_ROW_LEVELS).log2().floor())
    exponents = torch.maximum(exponents, (largest / MAX_INTEGER).log2().ceil())
    integers = (scaled * torch.exp2(-exponents)[:, None]).round()
    return integers * torch.exp2(exponents)[:, None] * torch.exp2(channel_exponents)


def diagonal_of(fisher: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of the Fisher information, which may be all there is of it."""
    return fisher if fisher.dim() == 1 else fisher.diagonal()


def weigh(fisher: torch.Tensor, weights: Weights) -> torch.Tensor | None:
    """Return the weights of a kind: the Fisher information itself, its diagonal, or None."""
    if weights == "none":
        return None
    return diagonal_of(fisher) if weights == "diagonal" else fisher


def _square_roots(fisher: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the square root of the weights, ridge added, its inverse, both symmetric, and the weights' diagonal."""
    if fisher is None:
        identity = torch.eye(len(like), dtype=like.dtype, device=like.device)
        return identity, identity, identity.diagonal()
    mean = diagonal_of(fisher).mean()
    if not mean > 0:
        raise InputError("the model's predictions do not depend on its cache: its gradients are zero")
    diagonal = diagonal_of(fisher).clamp_min(0) + RIDGE * mean
    if fisher.dim() == 1:
        return torch.diag(diagonal.sqrt()), torch.diag(diagonal.rsqrt()), diagonal
    eigenvalues, vectors = torch.linalg.eigh(fisher)
    eigenvalues = eigenvalues.clamp_min(0) + RIDGE * mean
    return (vectors * eigenvalues.sqrt()) @ vectors.T, (vectors * eigenvalues.rsqrt()) @ vectors.T, diagonal


def _check_inverse(basis: Basis) -> None:
    """Refuse matrices that fp16 cannot hold; what it rounds away otherwise, decoders' one Newton step makes good."""
    product = basis.synthesis.double() @ basis.analysis.double()
    error = (product - torch.eye(len(product), dtype=product.dtype)).abs().max().item()
    if not error < 0.1:  # NaN, too
        raise InputError(
            f"the transform does not fit fp16 (its inverse is off by {error:.2g}): these caches need `weights` none, "
            "or more calibration tokens"
        )
