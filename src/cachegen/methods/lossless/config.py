"""The config of method `lossless`: with which profile, if any."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cachegen.errors import ConfigError
from cachegen.fields import Fields
from cachegen.format import Coder
from cachegen.methods.base import MethodConfig
from cachegen.methods.lossless.predictor import Predictor, load_predictor
from cachegen.methods.profile_files import read_profile_folder


@dataclass(frozen=True)
class LosslessConfig(MethodConfig):
    """How method `lossless` codes a cache.

    Attributes:
        profile: the profile's folder, or the profile; None fits a model on each document.
    """

    profile: str | Predictor | None = None
    method: str = "lossless"
    coder: Coder = Coder.RANS
    source: str = field(default="", compare=False)

    @property
    def model_fingerprint(self) -> str | None:
        return self.profile.model_fingerprint if isinstance(self.profile, Predictor) else None

    def read_files(self) -> LosslessConfig:
        """See `MethodConfig.read_files`: the profile."""
        return dataclasses.replace(self, profile=self.load_profile())

    def load_profile(self) -> Predictor | None:
        """Return the profile.

        Raises:
            InputError, BitstreamError: as `load_predictor`.
        """
        return load_predictor(self.profile) if isinstance(self.profile, str) else self.profile

    def with_flags(self, flags: Mapping[str, Any]) -> LosslessConfig:
        """See `MethodConfig.with_flags`: profile."""
        own = dict(flags)
        coder = own.pop("coder", Coder.RANS)
        if coder is not Coder.RANS:
            raise ConfigError(f"`coder` {coder.name.lower()}: method lossless is coded with rans")
        profile = own.pop("profile", self.profile)
        if not isinstance(profile, (str, Predictor, type(None))):
            raise ConfigError(f"`profile` is not one for method lossless, but {type(profile).__name__}")
        self.refuse_flags(own)
        return dataclasses.replace(self, profile=profile)

    def check_document(self, header: Any, path: object) -> None:
        """See `MethodConfig.check_document`; all documents of the method are alike."""


def read_lossless(fields: Fields, source: str) -> LosslessConfig:
    """Read a config of method `lossless`; see `Method.read_config`."""
    fields.refuse_unknown({"method", "description", "profile"})
    return LosslessConfig(profile=read_profile_folder(fields, source), source=source)
