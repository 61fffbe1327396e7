"""The schemes that are compared, one file per family; a new one is a line in `make_schemes`."""

from __future__ import annotations

from cachegen.comparison.schemes.absmax import CacheGenScheme, UniformScheme
from cachegen.comparison.schemes.anchor_delta import AnchorDeltaScheme
from cachegen.comparison.schemes.base import ByteCount, Recoded, SavedCache, Scheme
from cachegen.comparison.schemes.grouped import GroupedScheme
from cachegen.comparison.schemes.pca import PcaScheme
from cachegen.comparison.schemes.transform import TransformLevelsScheme, TransformScheme, TransformSinksScheme
from cachegen.methods.transform.profile import Profile

__all__ = ["ByteCount", "Recoded", "SavedCache", "Scheme", "make_schemes"]


def make_schemes(profile: Profile | None = None) -> list[Scheme]:
    """Return every scheme, not fitted yet, in the order of the table.

    Args:
        profile: of the model, loaded for encoding; None leaves out what needs one.
    """
    schemes: list[Scheme] = [UniformScheme(), CacheGenScheme(), AnchorDeltaScheme(), GroupedScheme(), PcaScheme()]
    if profile is not None:
        schemes += [TransformScheme(profile), TransformSinksScheme(profile), TransformLevelsScheme(profile)]
    return schemes
