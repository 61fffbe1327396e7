"""Which directions of keys and values matter: the Fisher information of what a model predicts from a saved cache.

A change d of a token's vector x (its keys with the rotary embedding undone, and its values) changes the model's
predictions by a KL divergence of about d^T G d / 2, with G = E[g g^T] the Fisher information, g the gradient of the
log-likelihood of labels that are drawn from the model's own predictions.

Source: Fisher information as the curvature of KL (Kullback and Leibler 1951); labels sampled from the model, not the
text's (Martens 2014, section 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as functional
from transformers.cache_utils import Cache, DynamicLayer

from cachegen.errors import InputError
from cachegen.kv_cache import ContextMetadata, KVCache, hash_token_prefixes
from cachegen.methods.transform.transform import BLOCK_TOKENS, join_planes
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import repeat_heads

TOKENS_PER_WINDOW = 256
"""Tokens whose predictions are differentiated at once: what bounds the memory of the backward pass."""


class _LeafLayer(DynamicLayer):
    """Hold a layer's saved keys and values as leaves of the graph, `[1, num_kv_heads, num_tokens, head_dim]`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, num_head_repeats: int) -> None:
        super().__init__()
        self.leaves = [tensor.detach().requires_grad_(True) for tensor in (keys, values)]
        self.keys, self.values = self.leaves
        if num_head_repeats > 1:
            with torch.enable_grad():
                self.keys, self.values = (repeat_heads(leaf, num_head_repeats) for leaf in self.leaves)
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


def accumulate_fisher(
    loaded: LoadedModel,
    cache: KVCache,
    metadata: ContextMetadata,
    layer_groups: Sequence[tuple[int, int]],
    totals: Sequence[torch.Tensor],
    *,
    num_forced: int,
    num_samples: int,
    seed: int,
    first_token: int = 0,
) -> int:
    """Add one context's outer products of gradients, one per token, label sample and window, to the groups' totals.

    Windows of up to 256 tokens, spread evenly over the context, are forced through the model on the saved cache before
    them, as an answer is; the gradients are with respect to that cache.

    Args:
        loaded: the model; the dtype it computes in is the gradients'.
        cache: the context's, on any device.
        metadata: the cache's.
        layer_groups: (first layer, number of layers) of each group.
        totals: fp64 `[num_channels, num_channels]` per group, or `[num_channels]` for the diagonals alone; they are
            added to, on their own device.
        num_forced: tokens forced in all.
        num_samples: label samples per window.
        first_token: of those whose gradients count; see `SINK_TOKENS`.
        seed: of the labels, together with the context's tokens; the order of contexts does not matter.

    Returns:
        The number of outer products added.

    Raises:
        InputError: what the model predicts is not finite.
    """
    token_hash = hash_token_prefixes(metadata.token_ids, [cache.num_tokens])[0]
    generator = torch.Generator().manual_seed((int(token_hash[:12], 16) + seed) % (1 << 63))
    # The gradient with respect to x of f(a R x) is a R^T times that of f: rotated back, and scaled by a, not by 1 / a.
    rotations = [
        None if rotation is None else dataclasses.replace(rotation, attention_scaling=1 / rotation.attention_scaling)
        for rotation in metadata.rotations_of(cache)
    ]
    count = 0
    for start, stop in plan_windows(cache.num_tokens, num_forced):
        before, window = cache.slice(0, start), metadata.token_ids[start:stop]
        for gradients in _sample_gradients(loaded, before, window, num_samples, generator):
            for (first_layer, num_layers), total in zip(layer_groups, totals, strict=True):
                of_group = slice(2 * first_layer, 2 * (first_layer + num_layers))
                planes = gradients[of_group]
                for block in range(first_token, start, BLOCK_TOKENS):
                    part = [plane[block : block + BLOCK_TOKENS] for plane in planes]
                    add_outer_products(total, join_planes(part, rotations[of_group], block, total.device))
            count += max(start - first_token, 0)
    return count


def plan_windows(num_tokens: int, num_forced: int) -> list[tuple[int, int]]:
    """Return start and stop of windows of up to 256 tokens, `num_forced` in all, the last at the context's end.

    A context too short for them has fewer: each window leaves as many tokens before it as it has.
    """
    num_windows = max(1, min(-(-num_forced // TOKENS_PER_WINDOW), num_tokens // (2 * TOKENS_PER_WINDOW)))
    length = min(-(-num_forced // num_windows), TOKENS_PER_WINDOW, num_tokens // 2)
    stops = [num_tokens * (i + 1) // num_windows for i in range(num_windows)]
    return [(stop - length, stop) for stop in stops]


def add_outer_products(total: torch.Tensor, vectors: torch.Tensor) -> None:
    """Add the sum of x x^T over the rows of `vectors` to `total`, fp64 `[num_channels, num_channels]`.

    Where `total` is `[num_channels]`, only the diagonal is added. The rows, a block of at most `BLOCK_TOKENS`, are
    multiplied in fp32; only blocks are summed in fp64.
    """
    rows = vectors.to(device=total.device, dtype=torch.float32)
    total += rows.T @ rows if total.dim() == 2 else rows.square().sum(0)


def _sample_gradients(
    loaded: LoadedModel, before: KVCache, window: torch.Tensor, num_samples: int, generator: torch.Generator
) -> Iterator[list[torch.Tensor]]:
    """Yield, per label sample, the gradients of the window's log-likelihood, shaped and ordered as `before.planes`."""
    layers = []
    for keys, values, device in zip(before.keys, before.values, loaded.layer_devices, strict=True):
        pair = [plane.to(device=device, dtype=loaded.dtype).transpose(0, 1)[None] for plane in (keys, values)]
        layers.append(_LeafLayer(pair[0], pair[1], loaded.num_head_repeats))
    leaves = [leaf for layer in layers for leaf in layer.leaves]
    inputs = window.to(device=loaded.device, dtype=torch.int64)[None]
    with torch.enable_grad():
        with loaded.fixed_frequencies():
            output = loaded.model(input_ids=inputs, **loaded.name_cache(Cache(layers=layers)), use_cache=True)
        logits = output.logits[0].float()
        if not torch.isfinite(logits).all():
            raise InputError("the model's predictions from it are NaN or infinite; the cache or the model is damaged")
        # Drawn on the CPU, so that every device draws the same from the same probabilities.
        probabilities = logits.detach().softmax(-1).cpu()
        for sample in range(num_samples):
            labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            gradients = torch.autograd.grad(
                loss, leaves, retain_graph=sample + 1 < num_samples, allow_unused=True, materialize_grads=True
            )
            yield [gradient[0].transpose(0, 1) for gradient in gradients]
