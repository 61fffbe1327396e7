"""What all experiments share: the model, the contexts by data set, and the files that are kept between runs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachegen.comparison.datasets import PromptContext, tokenize_context
from cachegen.comparison.rate_distortion import Study, load_caches
from cachegen.comparison.schemes import SavedCache, Scheme
from cachegen.methods.transform.profile import Profile
from cachegen.pipeline.model import LoadedModel


@dataclass(frozen=True)
class Prices:
    """In US dollars.

    Attributes:
        storage: of a GB of object storage for a month.
        gpu_hour: of one GPU for an hour.
    """

    storage: float
    gpu_hour: float


@dataclass(frozen=True, eq=False)
class Bench:
    """A model, and what it is measured on.

    Attributes:
        loaded: the model that compares predictions, usually in fp32.
        load_for_prefill: loads it in its checkpoint's dtype, which caches and times are of.
        data_sets: the test contexts, by the data set's name.
        calibration: the contexts that methods are fitted on.
        profile: the model's, loaded for encoding; None leaves method `transform` out.
        work: folder of caches and of what is measured already.
        left_out: names of schemes that are not measured.
        block_size: tokens per prefill step.
        num_threads: that encode and decode.
        config: folder of the machines and levels that simulations run on, config/adaptation.
        prices: that costs are computed with.
        say: is called with a line for each step.
    """

    loaded: LoadedModel
    load_for_prefill: Callable[[], LoadedModel]
    data_sets: Mapping[str, Sequence[PromptContext]]
    calibration: Sequence[PromptContext]
    profile: Profile | None
    work: Path
    left_out: frozenset[str]
    block_size: int
    num_threads: int
    config: Path
    prices: Prices
    say: Callable[[str], None]

    def study(self, data_set: str, schemes: Sequence[Scheme], *, with_retrieval: bool = False) -> Study:
        """Return a study of some schemes on one data set, whose results are kept."""
        return Study(
            loaded=self.loaded,
            load_for_prefill=self.load_for_prefill,
            contexts=self.data_sets[data_set],
            calibration=self.calibration,
            schemes=schemes,
            output=self._place_of(data_set),
            kv_folder=self._place_of(data_set) / "kv",
            with_retrieval=with_retrieval,
            block_size=self.block_size,
        )

    def load_caches(self, data_set: str) -> list[SavedCache]:
        """Return the caches of a data set's contexts; those that are not saved yet are computed and saved."""
        return list(load_caches(self.study(data_set, ()), self.data_sets[data_set], "test"))

    def load_first_caches(self) -> list[SavedCache]:
        """Return the cache of each data set's first context."""
        return [self._load_first(data_set) for data_set in self.data_sets]

    def load_first_cache(self) -> SavedCache:
        """Return the cache of the first data set's first context."""
        return self._load_first(next(iter(self.data_sets)))

    def _load_first(self, data_set: str) -> SavedCache:
        return next(iter(load_caches(self.study(data_set, ()), self.data_sets[data_set][:1], "test")))

    def _place_of(self, data_set: str) -> Path:
        """Return a folder that no other texts of that name have, nor another model."""
        digest = hashlib.sha256(f"{self.loaded.fingerprint} {self.block_size}".encode())
        for context in [*self.data_sets[data_set], *self.calibration]:
            digest.update(f"{context.name} ".encode() + tokenize_context(self.loaded, context).numpy().tobytes())
        return self.work / f"{data_set}-{digest.hexdigest()[:12]}"

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the model, the texts and the profile: experiments are done again when it changes."""
        digest = hashlib.sha256(f"{self.loaded.fingerprint} {self.loaded.dtype} {self.block_size}".encode())
        digest.update(
            repr((sorted(self.left_out), None if self.profile is None else self.profile.profile_hash)).encode()
        )
        for name, contexts in [*self.data_sets.items(), ("", self.calibration)]:
            for context in contexts:
                digest.update(f"{name} {context.name} {context.questions!r}".encode())
                digest.update(tokenize_context(self.loaded, context).numpy().tobytes())
        return digest.hexdigest()
