"""A press of kvpress that drops no token: what the pipeline answers from is the cache, encoded and decoded.

Source: kvpress 0.5.5, `kvpress.pipeline`.
"""

# The package is in no environment but its own: see docs/kvpress.md.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from kvpress import BasePress

from cachegen.api.compressing import compress
from cachegen.errors import InputError
from cachegen.methods.base import MethodConfig
from cachegen.methods.profile_files import AnyProfile
from cachegen.pipeline.model import LoadedModel


class CacheGenPress(BasePress):
    """Encodes and decodes the cache of a context once the pipeline has computed it.

    Attributes:
        num_bytes, num_values: of all contexts so far: of the compressed caches, and numbers in them.
    """

    def __init__(
        self,
        config: str | Mapping[str, Any] | MethodConfig | None = None,
        *,
        profile: str | AnyProfile | None = None,
        model: LoadedModel | None = None,
        device: str = "auto",
        num_threads: int | None = None,
    ) -> None:
        """Take what `cachegen.compress` takes.

        Args:
            model: by which profiles of the scripts know it; None takes the pipeline's own.
        """
        self._options: dict[str, Any] = {
            "config": config,
            "profile": profile,
            "device": device,
            "num_threads": num_threads,
        }
        self._model = model
        self.num_bytes = 0
        self.num_values = 0

    @property
    def bits_per_value(self) -> float:
        """Bits of the files per number of the caches so far, everything counted."""
        return 8 * self.num_bytes / max(self.num_values, 1)

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Let the pipeline compute a context, and replace what its cache holds.

        Raises:
            InputError: the pipeline did not compute one context in one pass.
            MismatchError, BitstreamError, ConfigError: as `cachegen.compress` and `to_cache`.
        """
        calls: list[tuple[torch.Tensor, Any]] = []

        def note(module: Any, given: Any, keywords: Mapping[str, Any]) -> None:
            calls.append((keywords["input_ids"], keywords["past_key_values"]))

        hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
        if len(calls) != 1:
            raise InputError(f"kvpress's pipeline computed its context in {len(calls)} passes, not in one")
        ids, cache = calls[0]
        known = self._model if self._model is not None else model
        compressed = compress(cache, ids, known, keep_all_tokens=True, **self._options)
        decoded: Any = compressed.to_cache(known, ids)
        for layer, found in zip(cache.layers, decoded.layers, strict=True):
            layer.keys, layer.values = found.keys, found.values
        self.num_bytes += compressed.num_bytes
        self.num_values += compressed.num_values
