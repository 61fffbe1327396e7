"""The config of method `transform`: with which profile, how finely, in how many levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cachegen.errors import ConfigError
from cachegen.fields import Fields
from cachegen.format import MAX_LEVELS, Coder
from cachegen.methods.base import MethodConfig
from cachegen.methods.profile_files import read_profile_folder
from cachegen.methods.transform.headers import MAX_STEP_LOG
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import load_profile

_FIELDS = {"method", "description", "profile", "levels", "step_log", "target_bits", "target_kl"}
_FLAGS = ("profile", "levels", "target_bits", "target_kl")


@dataclass(frozen=True)
class TransformConfig(MethodConfig):
    """How method `transform` codes a cache.

    Attributes:
        profile: the profile's folder, or the profile, loaded for encoding; None where a flag must name it.
        step_log: 16 log2 of level 1's step; None where a target chooses it.
        target_bits: bits per value that level 1 may cost, by the profile's curve.
        target_kl: nats per token that level 1 may lose, by the profile's curve.
        num_levels: 1 to 4; each divides the step of the one before by three.
    """

    profile: str | Profile | None
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

    @property
    def model_fingerprint(self) -> str | None:
        return self.profile.model_fingerprint if isinstance(self.profile, Profile) else None

    @property
    def needs_profile(self) -> bool:
        """See `MethodConfig.needs_profile`."""
        return self.profile is None

    @property
    def named_step_log(self) -> int | None:
        """See `MethodConfig.named_step_log`."""
        return self.step_log

    def with_own_profile(self, profile: Profile, step_log: int) -> TransformConfig:
        """See `MethodConfig.with_own_profile`."""
        return dataclasses.replace(self, profile=profile, step_log=step_log, target_bits=None, target_kl=None)

    def read_files(self) -> TransformConfig:
        """See `MethodConfig.read_files`: the profile."""
        return dataclasses.replace(self, profile=self.load_profile())

    def load_profile(self) -> Profile:
        """Return the profile, loaded for encoding.

        Raises:
            ConfigError: none is named.
            InputError, BitstreamError: as `profile.load_profile`.
        """
        if self.profile is None:
            raise ConfigError(f"{self.source}: has no field profile: give a profile's folder (`profile`)")
        return self.profile if isinstance(self.profile, Profile) else load_profile(self.profile, for_encoding=True)

    def with_flags(self, flags: Mapping[str, Any]) -> TransformConfig:
        """See `MethodConfig.with_flags`: profile, levels, and target_bits or target_kl, which replace the step."""
        own = dict(flags)
        coder = own.pop("coder", Coder.RANS)
        if coder is not Coder.RANS:
            raise ConfigError(f"`coder` {coder.name.lower()}: method transform is coded with rans")
        self.refuse_flags({name: value for name, value in own.items() if name not in _FLAGS})
        if {"target_bits", "target_kl"} <= set(own):
            raise ConfigError("`target_bits` and `target_kl` exclude each other")
        profile = own.get("profile", self.profile)
        if not isinstance(profile, (str, Profile, type(None))):
            raise ConfigError(f"`profile` is not one for method transform, but {type(profile).__name__}")
        config = self
        if "target_bits" in own or "target_kl" in own:
            config = dataclasses.replace(
                config, step_log=None, target_bits=own.get("target_bits"), target_kl=own.get("target_kl")
            )
        return dataclasses.replace(config, profile=profile, num_levels=own.get("levels", config.num_levels))

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


def read_transform(fields: Fields, source: str) -> TransformConfig:
    """Read a config of method `transform`; see `Method.read_config`."""
    fields.refuse_unknown(_FIELDS)
    targets = {
        name: fields.number(name, 0, 1e6, above=True) if fields.has_value(name) else None
        for name in ("target_bits", "target_kl")
    }
    return TransformConfig(
        profile=read_profile_folder(fields, source),
        step_log=fields.integer("step_log", -MAX_STEP_LOG, MAX_STEP_LOG) if fields.has_value("step_log") else None,
        num_levels=fields.integer("levels", 1, MAX_LEVELS) if "levels" in fields else 1,
        source=source,
        **targets,
    )
