"""The schemes that are compared, one file per family; a new one is a line in `make_schemes`."""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.comparison.schemes.absmax import CacheGenScheme, UniformScheme
from cachegen.comparison.schemes.anchor_delta import AnchorDeltaScheme
from cachegen.comparison.schemes.base import ByteCount, Recoded, SavedCache, Scheme
from cachegen.comparison.schemes.blocks import BlockScheme
from cachegen.comparison.schemes.exact import ExactScheme
from cachegen.comparison.schemes.grouped import GroupedScheme, KiviScheme
from cachegen.comparison.schemes.pca import PcaScheme
from cachegen.comparison.schemes.rotated import HadamardScheme, SpectralScheme
from cachegen.comparison.schemes.transform import (
    TransformLevelsScheme,
    TransformOwnScheme,
    TransformScheme,
    TransformSinksScheme,
)
from cachegen.comparison.schemes.uncompressed import UncompressedScheme
from cachegen.errors import ConfigError
from cachegen.methods.transform.profile import Profile

__all__ = ["ByteCount", "Recoded", "SavedCache", "Scheme", "UncompressedScheme", "choose_schemes", "make_schemes"]


def make_schemes(profile: Profile | None = None) -> list[Scheme]:
    """Return every scheme, not fitted yet, in the order of the table.

    Args:
        profile: of the model, loaded for encoding; None leaves out what needs one.
    """
    schemes: list[Scheme] = [
        UniformScheme(),
        CacheGenScheme(),
        AnchorDeltaScheme(),
        BlockScheme(),
        GroupedScheme(),
        KiviScheme(),
        HadamardScheme(),
        SpectralScheme(),
        PcaScheme(),
        ExactScheme(),
        TransformOwnScheme(),
    ]
    if profile is not None:
        schemes += [TransformScheme(profile), TransformSinksScheme(profile), TransformLevelsScheme(profile)]
    return schemes


def choose_schemes(schemes: Sequence[Scheme], wanted: Sequence[str]) -> list[Scheme]:
    """Return the schemes that are asked for, in their order, each with the settings that are asked for.

    Args:
        schemes: from `make_schemes`.
        wanted: of each a scheme's name, or its name and settings: "uniform=4-bit,8-bit".

    Raises:
        ConfigError: there is no such scheme or setting.
    """
    by_name = {scheme.name: scheme for scheme in schemes}
    settings: dict[str, list[str] | None] = {}
    for text in wanted:
        name, has_settings, names = text.partition("=")
        if name not in by_name:
            raise ConfigError(f"`schemes`: there is no scheme {name} (known: {', '.join(by_name)})")
        settings[name] = names.split(",") if has_settings else None
        for setting in settings[name] or ():
            if setting not in (known := by_name[name].settings):
                raise ConfigError(f"`schemes`: {name} has no setting {setting!r} (known: {', '.join(known)})")
    chosen = [scheme for scheme in schemes if scheme.name in settings]
    for scheme in chosen:
        names = settings[scheme.name]
        if names is not None:
            scheme.settings = tuple(setting for setting in scheme.settings if setting in names)
    return chosen
