"""The loss of recoded caches of one context, whose uncompressed predictions are made once."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from cachegen.kv_cache import KVCache
from cachegen.methods.transform.transform import SINK_TOKENS
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import allocate_cache, fill_cache
from cachegen.pipeline.verify import compare_with_predictions, count_verified_tokens, predict_from

FIRST = range(SINK_TOKENS)
"""The tokens that decoding recomputes from text with method `transform`."""


class ContextLoss:
    """What the model predicts of the last tokens of a context, from its uncompressed cache and from others.

    Attributes:
        start: the first token that is predicted from; what a cache holds from there on does not matter.
    """

    def __init__(self, loaded: LoadedModel, cache: KVCache, token_ids: torch.Tensor) -> None:
        """Predict from the uncompressed cache.

        Args:
            token_ids: of the context, integers `[num_tokens]`, at least the cache's.
        """
        self._loaded, self._cache, self._token_ids = loaded, cache, token_ids[: cache.num_tokens]
        self.start = cache.num_tokens - count_verified_tokens(cache.num_tokens)
        self._predictions = predict_from(
            loaded, self._token_ids, fill_new_cache(loaded, cache), start=self.start, num_held_tokens=cache.num_tokens
        )

    def measure(self, recoded: KVCache, *exact: range) -> float:
        """Return the KL divergence that a cache of the same tokens causes, in nats per token.

        Args:
            recoded: is changed: its tokens of the spans `exact` become the uncompressed cache's.
        """
        for span in exact:
            kept = self._cache.slice(span.start, span.stop).planes
            for target, source in zip(recoded.slice(span.start, span.stop).planes, kept, strict=True):
                target.copy_(source)
        return compare_with_predictions(
            self._loaded,
            self._token_ids,
            self._predictions,
            fill_new_cache(self._loaded, recoded),
            num_decoded_tokens=self._cache.num_tokens,
        ).fidelity.kl


def fill_new_cache(loaded: LoadedModel, planes: KVCache, capacity: int | None = None) -> Cache:
    """Return a cache of the model's that holds these tokens, with room for `capacity`; None: for just these."""
    shapes = [(plane.shape[1], plane.shape[2]) for plane in planes.planes]
    cache = allocate_cache(loaded.cache_layout, shapes, capacity or planes.num_tokens, loaded.dtype)
    fill_cache(cache, planes)
    return cache
