"""What a model writes by itself after a text, and where it first writes something else from another cache."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import set_length
from cachegen.pipeline.prefill import run_model


@torch.inference_mode()
def write_continuation(loaded: LoadedModel, cache: Cache, token_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Continue a text greedily, past any end-of-text token.

    Args:
        cache: with all tokens of the text but the last, and room for `num_tokens` more; what is behind is overwritten.
        token_ids: the text, integers `[num_text_tokens]`.

    Returns:
        int64 `[num_tokens]`, on the CPU.
    """
    set_length(cache, len(token_ids) - 1)
    written = token_ids[-1:].to(torch.int64)
    for _ in range(num_tokens):
        written = torch.cat([written, run_model(loaded, cache, written[-1:], 1).argmax(-1).cpu()])
    return written[1:]


@torch.inference_mode()
def count_same_tokens(loaded: LoadedModel, cache: Cache, token_ids: torch.Tensor, continuation: torch.Tensor) -> int:
    """Return how many tokens greedy generation from another cache writes before the first that differs.

    As long as nothing differs, both have written the same text. So one pass over the continuation finds the first
    difference, and need not write what comes after it.

    Args:
        cache: with all tokens of the text but the last, and room for the continuation; what is behind is overwritten.
        token_ids: the text, integers `[num_text_tokens]`.
        continuation: from `write_continuation`.
    """
    set_length(cache, len(token_ids) - 1)
    inputs = torch.cat([token_ids[-1:].to(torch.int64), continuation[:-1]])
    predicted = run_model(loaded, cache, inputs, len(inputs)).argmax(-1).cpu()
    differences = (predicted != continuation).nonzero()
    return int(differences[0]) if len(differences) else len(continuation)
