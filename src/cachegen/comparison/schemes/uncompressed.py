"""The cache as it is, used by the model in the checkpoint's dtype: what that dtype's arithmetic alone does to KL."""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.comparison.schemes.base import ByteCount, Recoded, SavedCache


class UncompressedScheme:
    """The noise floor: below its KL, a difference between two methods is none in use."""

    name = "uncompressed"
    settings: tuple[str, ...] = ("checkpoint's dtype",)

    @property
    def identity(self) -> str:
        return self.name

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Do nothing: there is nothing to fit."""

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        del setting
        num_bytes = saved.cache.num_values * saved.cache.dtype.itemsize
        return Recoded(saved.cache, {self.name: ByteCount(num_bytes)})
