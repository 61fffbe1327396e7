"""The config of method `transform`: with which profile, how finely, in how many levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachegen.config import read_integer, refuse_unknown, shown
from cachegen.errors import ConfigError
from cachegen.format import MAX_LEVELS, Coder
from cachegen.methods.base import MethodConfig
from cachegen.methods.transform.headers import MAX_STEP_LOG
from cachegen.methods.transform.profile import Profile

_FIELDS = {"method", "description", "profile", "levels", "step_log", "target_bits", "target_kl"}
_FLAGS = ("profile", "levels", "target_bits", "target_kl")


@dataclass(frozen=True)
class TransformConfig(MethodConfig):
    """How method `transform` codes a cache.

    Attributes:
        profile: the profile's folder.
        step_log: 16 log2 of level 1's step; None where a target chooses it.
        target_bits: bits per value that level 1 may cost, by the profile's curve.
        target_kl: nats per token that level 1 may lose, by the profile's curve.
        num_levels: 1 to 4; each divides the step of the one before by three.
    """

    profile: str
    step_log: int | None
    target_bits: float | None
    target_kl: float | None
    num_levels: int = 1
    source: str = field(default="", compare=False)

    method = "transform"
    coder = Coder.RANS

    def __post_init__(self) -> None:
        if [self.step_log, self.target_bits, self.target_kl].count(None) != 2:
            raise ConfigError(f"{self.source}: give exactly one of step_log, target_bits and target_kl")

    def with_flags(self, flags: Mapping[str, Any]) -> TransformConfig:
        """See `MethodConfig.with_flags`: profile, levels, and target_bits or target_kl, which replace the step."""
        own = dict(flags)
        coder = own.pop("coder", Coder.RANS)
        if coder is not Coder.RANS:
            raise ConfigError(f"--coder {coder.name.lower()}: method transform is coded with rans")
        self.refuse_flags({name: value for name, value in own.items() if name not in _FLAGS})
        if {"target_bits", "target_kl"} <= set(own):
            raise ConfigError("--target_bits and --target_kl exclude each other")
        config = self
        if "target_bits" in own or "target_kl" in own:
            config = dataclasses.replace(
                config, step_log=None, target_bits=own.get("target_bits"), target_kl=own.get("target_kl")
            )
        return dataclasses.replace(
            config, profile=own.get("profile", config.profile), num_levels=own.get("levels", config.num_levels)
        )

    def check_document(self, header: Any, path: object) -> None:
        """See `MethodConfig.check_document`: steps and levels may be those of any config."""

    def choose_step(self, profile: Profile) -> int:
        """Return 16 log2 of level 1's step, as given or as the target and the profile's curve say.

        Raises:
            InputError: a target is given and the profile has no curve.
            ConfigError: the step is out of the format's range.
        """
        step_log = self.step_log
        if step_log is None:
            step_log = profile.choose_step(bits_per_value=self.target_bits, kl=self.target_kl)
        if abs(step_log) > MAX_STEP_LOG:
            raise ConfigError(f"{self.source}: the step 2^({step_log} / 16) is out of range")
        return step_log


def read_transform(source: str, content: Mapping[str, Any]) -> TransformConfig:
    """Read a config of method `transform`; see `Method.read_config`."""
    refuse_unknown(source, content, _FIELDS)
    profile = content.get("profile")
    if not isinstance(profile, str) or not profile:
        raise ConfigError(f"{source}: field profile must name a profile's folder")
    step_log = content.get("step_log")
    if step_log is not None and (not isinstance(step_log, int) or isinstance(step_log, bool)):
        raise ConfigError(f"{source}: step_log must be an integer, got {shown(step_log)}")
    if step_log is not None and abs(step_log) > MAX_STEP_LOG:
        raise ConfigError(f"{source}: step_log must be within {MAX_STEP_LOG} of 0, got {step_log}")
    return TransformConfig(
        # As files beside the config: it may be used from any folder.
        profile=str(Path(source).parent / profile),
        step_log=step_log,
        target_bits=_read_target(source, content, "target_bits"),
        target_kl=_read_target(source, content, "target_kl"),
        num_levels=read_integer(source, content, "levels", 1, MAX_LEVELS) if "levels" in content else 1,
        source=source,
    )


def _read_target(source: str, content: Mapping[str, Any], name: str) -> float | None:
    value = content.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
        raise ConfigError(f"{source}: {name} must be a number above 0, got {shown(value)}")
    return float(value)
