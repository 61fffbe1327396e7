"""The config of method `lossless`, which has nothing to choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cachegen.errors import ConfigError
from cachegen.fields import Fields
from cachegen.format import Coder
from cachegen.methods.base import MethodConfig


@dataclass(frozen=True)
class LosslessConfig(MethodConfig):
    """See `MethodConfig`."""

    method: str = "lossless"
    coder: Coder = Coder.RANS
    source: str = field(default="", compare=False)

    def with_flags(self, flags: Mapping[str, Any]) -> LosslessConfig:
        """See `MethodConfig.with_flags`; there are none."""
        own = dict(flags)
        coder = own.pop("coder", Coder.RANS)
        if coder is not Coder.RANS:
            raise ConfigError(f"`coder` {coder.name.lower()}: method lossless is coded with rans")
        self.refuse_flags(own)
        return self

    def check_document(self, header: Any, path: object) -> None:
        """See `MethodConfig.check_document`; all documents of the method are alike."""


def read_lossless(fields: Fields, source: str) -> LosslessConfig:
    """Read a config of method `lossless`; see `Method.read_config`."""
    fields.refuse_unknown({"method", "description"})
    return LosslessConfig(source=source)
