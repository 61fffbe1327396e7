"""What must hold of a family that works; each is found out by another way than the one it checks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

import cachegen
from cachegen.coder.cpu_kernels import CPU
from cachegen.errors import InputError
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods import make_encoder
from cachegen.methods.lossless.config import LosslessConfig
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from cachegen.pipeline.generate import generate_answer
from cachegen.pipeline.hybrids import continues_in_blocks
from cachegen.pipeline.model import LoadedModel, identify_model, quiet_transformers
from cachegen.pipeline.model_cache import allocate_cache, fill_cache, set_length, view_kv_cache
from cachegen.pipeline.prefill import prefill, prefill_context, run_model
from cachegen.pipeline.state_layers import keep_states, state_layers
from cachegen.pipeline.verify import is_saved_cache
from cachegen.pipeline.windows import find_first_visible
from tests.zoo.checkpoints import Specimen, make_ids
from tests.zoo.sizes import WINDOW

BLOCK_SIZES = (7, WINDOW)
CONTEXTS = (WINDOW - 4, WINDOW + 1, 2 * WINDOW + 8)
"""Tokens of contexts: a question behind the first crosses the window, behind the second it begins a chunk, behind the
third it ends a later one; the third is itself longer than windows, chunks and original positions."""
NUM_QUESTION = 14
NUM_ANSWER = 6
EXACT_TOLERANCE = 1e-4
"""Difference of logits in fp32, relative to their spread: rounding makes 0.00001, two tokens that have each other's
values make 0.02 at least."""


def check_blocks(specimen: Specimen) -> None:
    """A cache that is computed block by block is that of one pass of transformers."""
    loaded, ids = specimen.exact, make_ids(CONTEXTS[-1])
    expected = [keep_one(pair, loaded) for pair in run_plainly(loaded.model, ids)]
    for block_size in BLOCK_SIZES:
        found = view_kv_cache(prefill(loaded, ids, block_size), len(ids))
        assert found.num_layers == len(expected)
        for layer, planes in enumerate(expected):
            for plane, wanted in zip((found.keys[layer], found.values[layer]), planes, strict=True):
                torch.testing.assert_close(plane, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def check_answers(specimen: Specimen, folder: Path) -> None:
    """What is answered from the decoded files is what transformers answers from the text, whatever is crossed.

    The files lack what windows and chunks hide from the tokens behind them.
    """
    for num_context in CONTEXTS:
        prompt = make_ids(num_context + NUM_QUESTION)
        loaded, plain = specimen.half, specimen.plain
        decoded, num_cached = encode_and_decode(
            loaded, prompt[:num_context], folder / str(num_context), len(prompt) + NUM_ANSWER
        )
        answer = generate_answer(loaded, decoded, num_cached, prompt, NUM_ANSWER, block_size=7).token_ids
        expected = generate_plainly(plain, prompt)
        if list(answer) != expected:
            check_tie(plain, prompt, list(answer), expected, specimen.family.half_tolerance)
        found = predict_from(loaded, decoded, num_cached, prompt)
        assert difference(predict_plainly(plain, prompt)[num_cached:], found) < specimen.family.half_tolerance


def check_python(specimen: Specimen, folder: Path) -> None:
    """What a notebook does, with the model as transformers loads it, gives the answer from the text, or is refused."""
    plain, num_context = specimen.plain, CONTEXTS[1]
    prompt = make_ids(num_context + NUM_QUESTION, seed=2)
    with torch.inference_mode():
        cache = plain(prompt[None, :num_context], **name_cache(plain, make_full_cache(plain)), use_cache=True)
        own = plain(prompt[None, :num_context], use_cache=True)  # its windows have dropped what they hide
    expected = generate_plainly(plain, prompt)
    for name, given in (("all", cache), ("own", own)):
        cachegen.compress(given, prompt[:num_context], plain, {"method": "lossless"}).save(folder / name)
        if not continues_in_blocks(identify_model(plain)):
            with pytest.raises(InputError, match="forgets its recurrent states"):
                cachegen.load(folder / name).to_cache(plain, prompt)
            continue
        decoded = cachegen.load(folder / name).to_cache(plain, prompt)
        answer = generate_plainly(plain, prompt, **name_cache(plain, decoded), use_cache=True)
        if answer != expected:
            check_tie(plain, prompt, answer, expected, specimen.family.half_tolerance)


def check_questions(specimen: Specimen) -> None:
    """The same in fp32, without files: closer; and a cache that is wrong shows."""
    for num_context in CONTEXTS:
        prompt = make_ids(num_context + NUM_QUESTION, seed=1)
        loaded, num_cached = specimen.exact, num_context - 1
        cache = prefill(loaded, prompt[:num_cached], BLOCK_SIZES[0], capacity=len(prompt))
        expected = predict_plainly(loaded.model, prompt)[num_cached:]
        assert difference(expected, predict_from(loaded, cache, num_cached, prompt)) < EXACT_TOLERANCE
        unharmed = from_planes([plane.clone() for plane in view_kv_cache(cache, num_cached).planes])
        for values in view_kv_cache(cache, num_cached).values:
            values.copy_(values.flip(0))
        assert difference(expected, predict_from(loaded, cache, num_cached, prompt)) > 100 * EXACT_TOLERANCE
        for layer in state_layers(cache):
            fill_cache(cache, unharmed)
            layer.keep({name: -state for name, state in layer.kept.items()}, num_cached)
            assert difference(expected, predict_from(loaded, cache, num_cached, prompt)) > 100 * EXACT_TOLERANCE
            layer.keep({name: -state for name, state in layer.kept.items()}, num_cached)


def check_windows(specimen: Specimen) -> None:
    """What a layer lets go of may be anything; what is the first to be visible may not."""
    loaded = specimen.exact
    for num_context in CONTEXTS:
        prompt = make_ids(num_context + NUM_QUESTION, seed=3)
        num_cached = num_context - 1
        first_visible = find_first_visible(loaded.text_config, num_cached)
        cache = prefill(loaded, prompt[:num_cached], BLOCK_SIZES[0], capacity=len(prompt))
        planes = view_kv_cache(cache, num_cached)
        expected = predict_from(loaded, cache, num_cached, prompt)
        for layer, first in enumerate(first_visible):
            for plane in (planes.keys[layer], planes.values[layer]):
                plane[:first] = 3 * plane[:first].flip(0) + 1
        assert difference(expected, predict_from(loaded, cache, num_cached, prompt)) < EXACT_TOLERANCE
        for layer, first in enumerate(first_visible):
            if 0 < first < num_cached:
                values = planes.values[layer][first].clone()
                planes.values[layer][first] = 3 * values + 1
                assert difference(expected, predict_from(loaded, cache, num_cached, prompt)) > EXACT_TOLERANCE
                planes.values[layer][first] = values


def check_bytes(specimen: Specimen, folder: Path) -> None:
    """All that transformers' own cache holds is stored, once, and lossless files are hardly larger than that."""
    loaded, ids = specimen.half, make_ids(WINDOW - 2)
    own = run_with_own_cache(specimen.plain, ids)
    cache, metadata = prefill_context(loaded, torch.cat([ids, ids[:1]]))
    shapes = [(len(ids), *states.shape[1:]) for pair in own for states in keep_one(pair, loaded)]
    assert [tuple(plane.shape) for plane in cache.planes] == shapes
    result = encode_document(make_encoder(LosslessConfig(), cache, metadata, [len(ids)]), folder)
    assert result.sizes.payload <= 2 * cache.num_values
    assert metadata.rotary_embeddings == loaded.rotary_embeddings


def check_limit(specimen: Specimen) -> None:
    """What is too long is refused in one line, and the model computes nothing for it."""
    loaded = specimen.exact
    assert loaded.length_limit is not None
    limit = loaded.length_limit.num_tokens
    assert prefill_context(loaded, make_ids(limit))[0].num_tokens == limit - 1
    calls: list[object] = []
    handle = loaded.model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        prefill_context(loaded, make_ids(limit + 1))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        raise AssertionError(f"{limit + 1} tokens were not refused")
    finally:
        handle.remove()
    assert not calls


def encode_and_decode(loaded: LoadedModel, context: torch.Tensor, folder: Path, capacity: int) -> tuple[Any, int]:
    """Return a context's cache, by way of the files of method `lossless`, and the tokens it holds.

    What no token behind the context attends to is not in the files.
    """
    cache, metadata = prefill_context(loaded, context, block_size=7)
    num_cached = cache.num_tokens
    chunks = [WINDOW] * (num_cached // WINDOW) + ([num_cached % WINDOW] if num_cached % WINDOW else [])
    first_stored = metadata.first_visible(num_cached)
    encode_document(make_encoder(LosslessConfig(), cache, metadata, chunks, first_stored=first_stored), folder)
    encoded = EncodedFolder(folder, 1, CPU)
    encoded.check_model(loaded)
    encoded.check_context(context, num_cached, "the context")
    decoded = allocate_cache(loaded.cache_layout, encoded.plane_shapes, capacity, encoded.dtype)
    output: KVCache = view_kv_cache(decoded, num_cached)
    encoded.decode_into(output, context, encoded.select_chunks(None))
    keep_states(decoded, encoded.document.read_states(), num_cached)
    assert is_saved_cache(output, encoded.document.header)
    return decoded, num_cached


def keep_one(pair: Sequence[torch.Tensor], loaded: LoadedModel) -> list[torch.Tensor]:
    """Return keys and values `[num_tokens, heads, dim]` with one of each head that the model repeats."""
    config = loaded.text_config
    num_repeats = config.num_attention_heads // config.num_kv_heads if loaded.num_head_repeats > 1 else 1
    for plane in pair:
        assert plane.equal(plane[:, ::num_repeats].repeat_interleave(num_repeats, dim=1))
    return [plane[:, ::num_repeats] for plane in pair]


def predict_from(loaded: LoadedModel, cache: Any, num_cached: int, prompt: torch.Tensor) -> torch.Tensor:
    """Return logits of the tokens behind those in a cache."""
    set_length(cache, num_cached)
    return run_model(loaded, cache, prompt[num_cached:], len(prompt) - num_cached)


# --- transformers alone -----------------------------------------------------------------------------------------------


def name_cache(model: Any, cache: Cache) -> dict[str, Cache]:
    """Return a cache as an argument of a model; transformers 5.24 has given it another name."""
    is_old = "past_key_values" in inspect.signature(type(model).forward).parameters
    return {"past_key_values" if is_old else "cache": cache}


def make_full_cache(model: Any) -> DynamicCache:
    """Return a cache that keeps all tokens of each layer, whatever its window; with states where the model has some."""
    own = DynamicCache(config=model.config.get_text_config(decoder=True))
    has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in own.layers)
    return own if has_states else DynamicCache()


@torch.inference_mode()
def run_plainly(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values `[num_tokens, heads, dim]` of the layers that have some, of one pass over all tokens."""
    cache = make_full_cache(model)
    model(ids[None], **name_cache(model, cache), use_cache=True)
    return [
        (layer.keys[0].permute(1, 0, 2), layer.values[0].permute(1, 0, 2))
        for layer in cache.layers
        if getattr(layer, "keys", None) is not None
    ]


@torch.inference_mode()
def run_with_own_cache(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the states that the model's own kind of cache holds after one pass, and see that it holds no others."""
    output = model(ids[None], use_cache=True)
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    held = []
    for layer in cache.layers:
        tensors = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
        tensors.pop("_sliding_window_tensor", None)
        if tensors:  # those of states are in dictionaries
            assert set(tensors) == {"keys", "values"}
            held.append(tuple(tensors[name][0].permute(1, 0, 2) for name in ("keys", "values")))
    return held


@torch.inference_mode()
def predict_plainly(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return logits `[num_tokens, vocabulary]` of one pass."""
    return model(ids[None], use_cache=False).logits[0]


def generate_plainly(model: Any, ids: torch.Tensor, **arguments: Any) -> list[int]:
    """Return the greedy answer that `generate()` gives from the text, or from what `arguments` give it beside."""
    with quiet_transformers():
        output = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            max_new_tokens=NUM_ANSWER,
            do_sample=False,
            pad_token_id=0,
            **arguments,
        )
    return output[0, len(ids) :].tolist()


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference of logits `[num_tokens, vocabulary]`, relative to their spread."""
    return float((found.double() - expected.double()).abs().max() / expected.double().std())


def check_tie(model: Any, prompt: torch.Tensor, answer: list[int], expected: list[int], tolerance: float) -> None:
    """Let two greedy answers part only where the two tokens are as likely as rounding can tell."""
    place = next(i for i, (a, b) in enumerate(zip(answer, expected, strict=True)) if a != b)
    logits = predict_plainly(model, torch.cat([prompt, torch.tensor(answer[:place], dtype=torch.int64)]))[-1]
    gap = float((logits[expected[place]] - logits[answer[place]]).abs() / logits.double().std())
    assert gap < tolerance, f"{answer} is not {expected}"
