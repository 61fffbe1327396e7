"""What decides a profile, beside the caches and the model."""

from __future__ import annotations

from dataclasses import dataclass

from cachegen.calibration.basis import Weights


@dataclass(frozen=True)
class CalibrationSettings:
    """What decides a profile, beside the caches and the model.

    Attributes:
        layers_per_group: None for as many as have 8192 channels together, and 1.4 tokens to fit on for each; at least
            one.
        weights: see `weigh`; "none" needs no model.
        fisher_tokens: tokens of each context whose predictions are differentiated.
        fisher_samples: label samples for each of them.
        seed: of the samples.
        finest_step: components too small to be coded at this step are left out.
        max_components: of each group; None for no further limit.
    """

    layers_per_group: int | None = None
    weights: Weights = "diagonal"
    fisher_tokens: int = 1024
    fisher_samples: int = 2
    seed: int = 0
    finest_step: float = 0.25
    max_components: int | None = None
