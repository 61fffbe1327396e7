"""A document's files into a cache to generate from, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cachegen.api.arguments import read_token_ids
from cachegen.errors import MismatchError
from cachegen.methods import method_of
from cachegen.pipeline.decode import EncodedFiles
from cachegen.pipeline.frequencies import match_frequencies
from cachegen.pipeline.hybrids import refuse_forgetful
from cachegen.pipeline.images import forget_images
from cachegen.pipeline.model import LoadedModel, identify_model
from cachegen.pipeline.model_cache import allocate_cache, keep_whole, set_length, to_dynamic_cache, view_kv_cache
from cachegen.pipeline.prefill import recompute_first_tokens
from cachegen.pipeline.state_layers import keep_states
from cachegen.pipeline.windows import find_missing

if TYPE_CHECKING:
    from cachegen.pipeline.model import PreTrainedModel
    from cachegen.pipeline.model_cache import DynamicCache


def decode_cache(
    encoded: EncodedFiles,
    model: PreTrainedModel | LoadedModel,
    token_ids: torch.Tensor | Sequence[int] | None = None,
    num_chunks: int | None = None,
) -> DynamicCache:
    """Decode into a new cache.

    Args:
        num_chunks: the first chunks only; None for all.
        model, token_ids: as of `StoredCache.to_cache`.

    Raises:
        ConfigError: the document can only be used whole, and a part of it was asked for.
        MismatchError, InputError, BitstreamError, ValueError: as of `StoredCache.to_cache`.
    """
    header = encoded.document.header
    loaded = identify_model(model, header.model_fingerprint.hex())
    num_sinks = method_of(header).num_sink_tokens
    chunk_tokens = encoded.select_chunks(num_chunks)
    num_tokens = sum(chunk_tokens)
    ids = None if token_ids is None else read_token_ids(token_ids)
    if ids is None and num_sinks:
        raise ValueError(f"`token_ids` must be given: the first {num_sinks} tokens are computed from them")
    if ids is not None and len(ids) < num_tokens:
        raise MismatchError(
            f"{encoded.path}: caches {num_tokens} tokens, `token_ids` has {len(ids)}: it is another context"
        )
    loaded = match_frequencies(loaded, header.rope_hash.hex())
    encoded.check_model(loaded)
    refuse_forgetful(loaded)
    cache = allocate_cache(loaded.cache_layout, encoded.plane_shapes, num_tokens, encoded.dtype)
    encoded.decode_into(view_kv_cache(cache, num_tokens), ids, chunk_tokens)
    keep_states(cache, encoded.document.read_states(), num_tokens)
    set_length(cache, num_tokens)
    if ids is not None:
        recompute_first_tokens(loaded, cache, ids, num_sinks, num_tokens)
    keep_whole(cache, num_tokens, find_missing(loaded.text_config, header.first_stored, num_tokens))
    forget_images(loaded.model)
    return to_dynamic_cache(cache)
