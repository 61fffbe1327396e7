"""A whole profile: calibrated on some contexts, its curve measured on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from cachegen.calibration.calibrate import CalibrationContext, calibrate
from cachegen.calibration.curve import measure_curve, plan_steps
from cachegen.calibration.settings import CalibrationSettings
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import pack_profile
from cachegen.pipeline.model import LoadedModel


class Bar(Protocol):
    """What counts steps; a bar of tqdm is one."""

    def update(self, n: int, /) -> object:
        """Count `n` steps more."""
        ...


class _NoBar:
    def update(self, n: int, /) -> None:
        pass


def make_no_bar(label: str, total: int) -> AbstractContextManager[Bar]:
    """Return what counts nothing; see `make_profile`."""
    return nullcontext(_NoBar())


def make_profile(
    fitted_on: Sequence[CalibrationContext],
    held_out: Sequence[CalibrationContext],
    loaded: LoadedModel | None,
    settings: CalibrationSettings,
    *,
    device: torch.device,
    work_folder: Path,
    num_threads: int,
    kernels: Kernels = CPU,
    notes: Mapping[str, Any],
    make_bar: Callable[[str, int], AbstractContextManager[Bar]] = make_no_bar,
) -> Profile:
    """Make a profile, as it is saved, and as those who read it have it.

    Args:
        fitted_on: caches of one model, of different contexts.
        held_out: to measure the curve on; none leave the curve out.
        loaded: the model; may be None where the weights are "none" and nothing is held out.
        device: of sums and eigenvectors.
        work_folder: keeps sums between runs, should this one be interrupted.
        num_threads: of the coder.
        kernels: that encode and decode for the curve.
        notes: what else to note of how it was made, as JSON values.
        make_bar: makes a bar for so many contexts, by its label.

    Raises:
        InputError: as `calibrate.check_tokens`, or the caches or gradients are not finite.
        BitstreamError: a cache's values are not those that were saved.
        ValueError: `loaded` is needed.
    """
    if held_out and loaded is None:
        raise ValueError("`loaded` is needed to measure the curve")
    num_passes = 1 if settings.weights == "none" else 2
    with make_bar("calibrating", num_passes * len(fitted_on)) as bar:
        profile = calibrate(fitted_on, loaded, settings, device=device, work_folder=work_folder, progress=bar.update)
    calibration = {
        **profile.calibration,
        "num_held_out_contexts": len(held_out),
        "held_out_token_hashes": [context.token_hash for context in held_out],
        **notes,
    }
    _, profile = pack_profile(dataclasses.replace(profile, calibration=calibration))
    if loaded is None or not held_out:
        return profile
    step_logs = plan_steps(settings.finest_step)
    with make_bar("measuring", len(step_logs) * len(held_out)) as bar:
        curve = measure_curve(
            loaded, profile, held_out, step_logs, num_threads=num_threads, kernels=kernels, progress=bar.update
        )
    return pack_profile(dataclasses.replace(profile, curve=curve))[1]
