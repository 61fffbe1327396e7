"""A store's documents into a cache to generate from."""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cachegen.api.arguments import CLONE, read_token_ids
from cachegen.device import KernelChoice
from cachegen.errors import ConfigError, StoreError
from cachegen.methods.profile_files import AnyProfile
from cachegen.pipeline.chunking import DEFAULT_BLOCK_SIZE
from cachegen.pipeline.hybrids import refuse_forgetful
from cachegen.pipeline.images import forget_images
from cachegen.pipeline.model import LoadedModel, identify_checkpoint, identify_model
from cachegen.pipeline.model_cache import allocate_cache, to_dynamic_cache
from cachegen.pipeline.prefill import measure_plane_shapes
from cachegen.pipeline.profiles import profile_finder
from cachegen.store.store import Store
from cachegen.streaming.client import (
    choose_policy,
    count_prompt,
    find_for_model,
    finish_cache,
    make_loader,
    measure_speeds,
)
from cachegen.streaming.load_report import LoadResult
from cachegen.streaming.policy import Objective, Speeds
from cachegen.streaming.remote import RemoteDocument

if TYPE_CHECKING:
    from cachegen.pipeline.model import PreTrainedModel
    from cachegen.pipeline.model_cache import Cache, DynamicCache

_LOGGER = logging.getLogger("cachegen")


class CacheStore:
    """A store of compressed caches, from `load`: `to_cache` finds the one that a prompt begins with.

    What there is, how many tokens it covers and how large it is depends on model and prompt, so that only `to_cache`
    knows: `get_seq_length()` of its result is the number of tokens, and `report` of `load` is told everything else.

    Attributes:
        url: of the store.
    """

    def __init__(
        self,
        store: Store,
        choice: KernelChoice,
        num_threads: int,
        *,
        level: int | None = None,
        profile: AnyProfile | None = None,
        slo: float = Objective.deadline_seconds,
        target_kl: float = Objective.target_loss,
        report: Callable[[LoadResult], object] | None = None,
    ) -> None:
        if not (slo > 0 and math.isfinite(slo)):
            raise ValueError(f"`slo` must be a number of seconds above 0, got {slo}")
        if not (target_kl >= 0 and math.isfinite(target_kl)):
            raise ValueError(f"`target_kl` must be a number of at least 0, got {target_kl}")
        if level is not None and level < 1:
            raise ConfigError(f"`level` must be at least 1, got {level}")
        self.url = store.url
        self._store, self._choice, self._num_threads = store, choice, num_threads
        self._level, self._profile, self._report = level, profile, report
        self._objective = Objective(slo, target_kl)
        self._profiles: dict[bytes, AnyProfile] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.url}>"

    def to_cache(self, model: PreTrainedModel | LoadedModel, token_ids: torch.Tensor | Sequence[int]) -> DynamicCache:
        """Load the cache of a prompt's beginning, as much of it as the store has, computing what does not come in time.

        The longest published prefix of the prompt counts, in whole chunks. What cannot be had, is damaged or comes too
        late is computed from the prompt, which takes time and is logged, and is never wrong. The first load with a
        model also measures how fast it computes, which takes about as long as computing 1,500 tokens.

        Several threads may load at once. Of what `generate` does with the cache, `StoredCache.to_cache` says more.

        Args:
            model: the one that computed the cache, as for `StoredCache.to_cache`.
            token_ids: integers `[num_tokens]` or `[1, num_tokens]`: the whole prompt. Its last token is never taken
                from the store, since generation begins with it.

        Returns:
            A cache of one sequence, of the prompt's first tokens, each layer on its layer's device.

        Raises:
            StoreError: the store cannot be read or is too slow to say what it has, or it has nothing of this prompt for
                this model, or only the beginning of something that can only be used whole (then the error's
                `is_missing` is true): compute it from the text.
            MismatchError: the cache has another dtype than the model.
            ConfigError: it has no such level as `load` was told to take.
            BitstreamError: what the store says of itself or of the document is damaged.
            InputError: the model cannot be used; see `compress`.
            ValueError: `token_ids` have another shape; `model` is in training mode.
        """
        start = time.perf_counter()
        ids = read_token_ids(token_ids)
        loaded, document = self._find(identify_model(model), ids)
        refuse_forgetful(loaded)
        policy = choose_policy(document, level=self._level)
        shapes = measure_plane_shapes(loaded)
        document.expect_planes(shapes, loaded.dtype)
        num_tokens = document.num_tokens
        # One more, which measuring generates from.
        cache = allocate_cache(loaded.cache_layout, shapes, num_tokens + 1, loaded.dtype)
        lookup_seconds = time.perf_counter() - start
        speeds = _SPEEDS.get(loaded, document, cache, ids, self._choice.device)
        loader = make_loader(
            document,
            loaded,
            cache,
            ids,
            policy,
            self._objective,
            count_prompt(speeds, num_tokens, len(ids)),
            kernels=self._choice.kernels,
            elapsed_seconds=lookup_seconds,
        )
        with loader:
            result = loader.run()
        for problem in result.problems:
            _LOGGER.warning("%s", problem)
        if self._report is not None:
            self._report(result)
        finish_cache(loaded, cache, document, result)
        forget_images(loaded.model)
        return to_dynamic_cache(cache)

    def _find(self, loaded: LoadedModel, ids: torch.Tensor) -> tuple[LoadedModel, RemoteDocument]:
        """Look a prompt up for a model as it is in memory, and then by the name of its checkpoint."""
        places = (loaded.model.name_or_path or CLONE / "models", CLONE / "models")
        find = profile_finder(self._profile, places)

        def find_profile(profile_hash: bytes) -> AnyProfile:
            if profile_hash not in self._profiles:
                self._profiles[profile_hash] = find(profile_hash)
            return self._profiles[profile_hash]

        look_up = functools.partial(
            find_for_model,
            self._store,
            token_ids=ids,
            num_threads=self._num_threads,
            kernels=self._choice.kernels,
            find_profile=find_profile,
        )
        try:
            return loaded, look_up(loaded)
        except StoreError as error:
            known = identify_checkpoint(loaded) if error.is_missing else None
            if known is None or known.fingerprint == loaded.fingerprint:
                raise
        return known, look_up(known)


class _MeasuredSpeeds:
    """How fast models compute, measured once for each, for as long as it lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._speeds: weakref.WeakKeyDictionary[Any, dict[tuple[int, str], Speeds]] = weakref.WeakKeyDictionary()

    def get(
        self, loaded: LoadedModel, document: RemoteDocument, cache: Cache, ids: torch.Tensor, device: torch.device
    ) -> Speeds:
        """Return the speeds of a model beside a decoder; see `measure_speeds`. The cache's content is lost."""
        block_size = min(document.manifest.prefill_block_size, DEFAULT_BLOCK_SIZE)
        with self._lock:  # one at a time: two would measure each other
            of_model = self._speeds.setdefault(loaded.model, {})
            key = block_size, device.type
            if key not in of_model:
                of_model[key] = measure_speeds(loaded, cache, document.num_tokens, ids, block_size, device)
            return of_model[key]


_SPEEDS = _MeasuredSpeeds()
