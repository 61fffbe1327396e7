"""Many contexts' caches, compressed, in the memory of one: for prompts that begin as earlier ones did."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cachegen.api.arguments import read_token_ids
from cachegen.api.compressing import CompressedCache, compress
from cachegen.methods.base import MethodConfig
from cachegen.methods.profile_files import AnyProfile
from cachegen.pipeline.model import LoadedModel

if TYPE_CHECKING:
    from cachegen.pipeline.model import PreTrainedModel
    from cachegen.pipeline.model_cache import DynamicCache

DEFAULT_CHUNK_TOKENS = 256
"""A prompt finds whole chunks only; small ones cost little where a context's chunks share their tables."""

_LOGGER = logging.getLogger("cachegen")


class PrefixCache:
    """Compressed caches of one model, in memory; `to_cache` decodes the longest that a prompt begins with.

    Where it gets too large, what was not used for longest goes first. Several threads may use it at once.

    Example:
        >>> import torch, cachegen
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        >>> document, question = torch.randint(256, (1, 600)), torch.randint(256, (1, 5))
        >>> prefixes = cachegen.PrefixCache(model)
        >>> compressed = prefixes.add(model(document), document)
        >>> prompt = torch.cat([document, question], dim=1)
        >>> prefixes.to_cache(prompt).get_seq_length()
        600
        >>> print(prefixes.to_cache(question))
        None
    """

    def __init__(
        self,
        model: PreTrainedModel | LoadedModel,
        config: str | os.PathLike[str] | Mapping[str, Any] | MethodConfig | None = None,
        *,
        profile: str | os.PathLike[str] | AnyProfile | None = None,
        max_bytes: int | None = None,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        device: str = "auto",
        num_threads: int | None = None,
    ) -> None:
        """Begin with none.

        Args:
            model: whose caches these are. It is not copied: where its weights change, decoding refuses what is there.
            config, profile, device, num_threads: as for `compress`. A profile that is given as an object, such as
                `calibrate` returns, is kept once for all.
            max_bytes: of all compressed caches together; None for no limit. A shared profile is not counted.
            chunk_tokens: tokens of a chunk: a prompt that leaves a context in the middle of one uses those before.
        """
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"`max_bytes` must be at least 1, got {max_bytes}")
        if chunk_tokens < 1:
            raise ValueError(f"`chunk_tokens` must be at least 1, got {chunk_tokens}")
        self.max_bytes = max_bytes
        self._model = model
        self._options: dict[str, Any] = {
            "config": config,
            "profile": profile,
            "chunk_tokens": chunk_tokens,
            "device": device,
            "num_threads": num_threads,
        }
        self._lock = threading.Lock()
        # By their tokens, the one that was used last at the end.
        self._kept: OrderedDict[bytes, CompressedCache] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} contexts, {self.num_tokens:,} tokens, {self.num_bytes:,} bytes>"

    @property
    def num_bytes(self) -> int:
        """Bytes of all compressed caches."""
        with self._lock:
            return sum(one.num_bytes for one in self._kept.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all compressed caches."""
        with self._lock:
            return sum(one.num_tokens for one in self._kept.values())

    def add(self, cache: Any, token_ids: torch.Tensor | Sequence[int]) -> CompressedCache:
        """Compress a cache and keep that; the cache itself is neither changed nor kept.

        Args:
            cache, token_ids: as for `compress`. Where the same tokens are there already, nothing is done. `generate`
                caches all but the last token of its result.

        Returns:
            What is kept. One that is larger than `max_bytes` by itself is not, and that is logged.

        Raises:
            MismatchError, InputError, ConfigError, TypeError, ValueError: as `compress`.
        """
        ids = read_token_ids(token_ids)
        key = ids.numpy().tobytes()
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
                return known
        compressed = compress(cache, ids, self._model, **self._options)
        with self._lock:
            if self.max_bytes is not None and compressed.num_bytes > self.max_bytes:
                _LOGGER.warning(
                    "a context of %d tokens is not kept: it has %d bytes, and `max_bytes` is %d",
                    compressed.num_tokens,
                    compressed.num_bytes,
                    self.max_bytes,
                )
                return compressed
            self._kept[key] = compressed
            self._kept.move_to_end(key)
            total = sum(one.num_bytes for one in self._kept.values())
            while self.max_bytes is not None and total > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                total -= oldest.num_bytes
        return compressed

    def to_cache(self, token_ids: torch.Tensor | Sequence[int]) -> DynamicCache | None:
        """Decode the cache of a prompt's beginning, as much of it as there is.

        `generate` appends to the cache: call this for each prompt.

        Args:
            token_ids: integers `[num_tokens]` or `[1, num_tokens]`: the whole prompt. Its last token is never taken,
                since generation begins with it.

        Returns:
            A cache of one sequence, of the prompt's first tokens, in whole chunks. None where nothing of the prompt is
            there: `model.generate(prompt, past_key_values=None)` then computes all.

        Raises:
            MismatchError: the model is not what it was.
            InputError, TypeError, ValueError: as `StoredCache.to_cache`.
        """
        ids = read_token_ids(token_ids)
        with self._lock:
            best, num_chunks, num_tokens = None, 0, 0
            for key, one in self._kept.items():
                found_chunks, found_tokens = one.count_shared_chunks(ids[:-1])
                if found_chunks and found_tokens >= num_tokens:
                    best, num_chunks, num_tokens = key, found_chunks, found_tokens
            if best is None:
                return None
            self._kept.move_to_end(best)
            compressed = self._kept[best]
        return compressed.decode(self._model, ids, num_chunks)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()
