"""Load a context from a store into a model's cache, computing what does not come in time."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import ConfigError, MismatchError
from cachegen.kv_cache import hash_rotary_embeddings
from cachegen.methods import method_named
from cachegen.methods.base import FindProfile
from cachegen.pipeline.decode import check_windows, copy_cache, empty_on
from cachegen.states import find_different_state
from cachegen.store.store import Store
from cachegen.streaming.load_report import LoadResult
from cachegen.streaming.loader import SILENCE_SECONDS, Loader
from cachegen.streaming.policies import POLICIES
from cachegen.streaming.policy import DecodeSpeed, Objective, Policy, PrefillSpeed, Speeds
from cachegen.streaming.policy_front_to_back import decide_fixed_level
from cachegen.streaming.remote import FetchedFile, RemoteDocument

if TYPE_CHECKING:
    from cachegen.pipeline.model import LoadedModel
    from cachegen.pipeline.model_cache import Cache

MOST_SLOWDOWN = 0.9
"""The largest share of the model's speed that decoding on the same processor is believed to take."""


class _Interrupted(Exception):
    """Leave a forward pass in the middle."""


@dataclass
class ModelWorkers:
    """A `loader.Workers` of a document in a store and a model with its cache.

    Attributes:
        cache: with room for the context, its buffers allocated.
        token_ids: the context's, integers `[num_tokens]`.
        block_size: tokens per step of the model.
    """

    document: RemoteDocument
    loaded: LoadedModel
    cache: Cache
    token_ids: torch.Tensor
    block_size: int
    device: torch.device

    def __post_init__(self) -> None:
        from cachegen.pipeline.model_cache import view_kv_cache

        self._target = view_kv_cache(self.cache, self.document.num_tokens)
        longest = max(chunk.num_tokens for chunk in self.document.manifest.chunks[: self.document.num_chunks])
        self._staging = empty_on(self.device, self._target, longest)
        shapes = [tuple(plane.shape[1:]) for plane in self._target.planes]
        self.document.expect_planes(shapes, self._target.dtype)
        manifest = self.document.manifest
        check_windows(manifest.first_stored, self.document.num_tokens, self.document.address, self.loaded)
        method = method_named(self.document.manifest.levels[0].method)
        # Tokens that are never taken from a file; see `recompute_first_tokens`.
        self._num_first = min(method.num_sink_tokens if method else 0, self.document.num_tokens)

    def fetch(self, chunk: int, level: int, on_bytes: Callable[[int], object]) -> FetchedFile:
        """Fetch a file; see `loader.Workers`."""
        return self.document.fetch(chunk, level, on_bytes)

    def decode(self, chunk: int, level: int, contents: Mapping[int, bytearray]) -> Callable[[int], object]:
        """Decode into the staging memory; see `loader.Workers`."""
        entry = self.document.manifest.chunks[chunk]
        staged = self._staging.slice(0, entry.num_tokens)
        self.document.decode(chunk, level, contents, staged)

        def place(start: int) -> None:
            start = max(start, self._num_first)
            if start < entry.end_token:
                part = staged.slice(start - entry.first_token, entry.num_tokens)
                copy_cache(part, self._target.slice(start, entry.end_token))

        return place

    def prepare(self) -> None:
        """Compute the first tokens, which method `transform` takes from the text; see `loader.Workers`."""
        from cachegen.pipeline.model_cache import empty_cache, view_kv_cache
        from cachegen.pipeline.prefill import extend_cache

        if self._num_first:
            first_tokens = empty_cache(self.loaded.cache_layout, self._num_first)
            extend_cache(self.loaded, first_tokens, self.token_ids[: self._num_first])
            copy_cache(view_kv_cache(first_tokens, self._num_first), self._target.slice(0, self._num_first))

    def compute(self, start: int, stop: int, should_stop: Callable[[], bool]) -> bool:
        """Compute a block; see `loader.Workers`. It can break off before every layer."""
        from cachegen.pipeline.model_cache import set_length
        from cachegen.pipeline.prefill import extend_cache
        from cachegen.pipeline.state_layers import keep_states, states_of_cache

        thread = threading.get_ident()

        def look(*_: object) -> None:
            # What other threads do with the same model meanwhile is not this load's.
            if threading.get_ident() == thread and should_stop():
                raise _Interrupted

        set_length(self.cache, start)
        if start:
            # Layers that were reached before it broke off have states behind the block: this leads back.
            keep_states(self.cache, states_of_cache(self.cache), start)
        hooks = [layer.register_forward_pre_hook(look) for layer in self.loaded.layers]
        try:
            extend_cache(self.loaded, self.cache, self.token_ids[start:stop], self.block_size)
            _wait_for(self.loaded.device)
        except _Interrupted:
            return False
        finally:
            for hook in hooks:
                hook.remove()
        return True


def find_for_model(
    store: Store,
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    *,
    num_threads: int,
    kernels: Kernels = CPU,
    find_profile: FindProfile | None = None,
) -> RemoteDocument:
    """Find the document that covers the longest prefix of a text, for this model.

    Raises:
        StoreError, BitstreamError, MismatchError: as `RemoteDocument.find`.
    """
    return RemoteDocument.find(
        store,
        token_ids,
        model_fingerprint=loaded.fingerprint,
        rope_hash=hash_rotary_embeddings(loaded.rotary_embeddings),
        num_threads=num_threads,
        kernels=kernels,
        find_profile=find_profile,
    )


def choose_policy(document: RemoteDocument, name: str = "ours", level: int | None = None) -> Policy:
    """Return the policy of that name; with a level, the one that fetches every chunk at it.

    Raises:
        ConfigError: the document has no such level.
    """
    if level is None:
        return POLICIES[name]
    num_levels = len(document.manifest.levels)
    if level > num_levels:
        raise ConfigError(f"`level` {level} asked for, {document.address} has {num_levels}")
    return functools.partial(decide_fixed_level, level=level)


def make_loader(
    document: RemoteDocument,
    loaded: LoadedModel,
    cache: Cache,
    token_ids: torch.Tensor,
    policy: Policy,
    objective: Objective,
    speeds: Speeds,
    *,
    kernels: Kernels = CPU,
    num_connections: int = 1,
    elapsed_seconds: float = 0.0,
    silence_seconds: float = SILENCE_SECONDS,
) -> Loader:
    """Return a loader that fills `cache` with the document's tokens; run it, then `finish_cache` and generate.

    Args:
        cache: from `allocate_cache` or `prefill`: its buffers must be there.
        token_ids: the context's, integers `[num_tokens]`.
        kernels: that decode.
    """
    workers = ModelWorkers(
        document, loaded, cache, token_ids, document.manifest.prefill_block_size, torch.device(kernels.device)
    )
    return Loader(
        document.list_levels(),
        workers,
        policy,
        objective,
        speeds,
        num_connections=num_connections,
        elapsed_seconds=elapsed_seconds,
        silence_seconds=silence_seconds,
        is_whole_only=document.is_whole_only,
    )


def finish_cache(loaded: LoadedModel, cache: Cache, document: RemoteDocument, result: LoadResult) -> None:
    """Let a cache hold what was loaded, and refuse from now on to let it hold less where layers lack tokens.

    Raises:
        BitstreamError, MismatchError: the document's recurrent states are corrupt, or of another model.
    """
    from cachegen.pipeline.model_cache import keep_whole, set_length
    from cachegen.pipeline.state_layers import state_layers
    from cachegen.pipeline.windows import find_missing

    computed = itertools.takewhile(lambda chunk: chunk.source == "text", result.chunks)
    num_computed = sum(chunk.num_tokens for chunk in computed)
    if document.manifest.has_states or state_layers(cache):
        _put_states(loaded, cache, document, num_computed)
    set_length(cache, document.num_tokens)
    first_stored = document.manifest.first_stored
    if max(first_stored, default=0) > num_computed:
        keep_whole(cache, document.num_tokens, find_missing(loaded.text_config, first_stored, document.num_tokens))


def _put_states(loaded: LoadedModel, cache: Cache, document: RemoteDocument, num_computed: int) -> None:
    """Give a cache the recurrent states at the end of a document: those computed, if all of it was."""
    from cachegen.pipeline.prefill import measure_cache
    from cachegen.pipeline.state_layers import keep_states, states_of_cache

    if num_computed == document.num_tokens:
        states = states_of_cache(cache)
    else:
        states = document.read_states()
        difference = find_different_state(states, states_of_cache(measure_cache(loaded)))
        if difference is not None:
            raise MismatchError(f"{document.address}: states: {difference}: the document is of another model")
    keep_states(cache, states, document.num_tokens)


@torch.inference_mode()
def measure_speeds(
    loaded: LoadedModel,
    cache: Cache,
    num_tokens: int,
    token_ids: torch.Tensor,
    block_size: int,
    decoding_device: torch.device,
    *,
    num_prompt_tokens: int = 0,
) -> Speeds:
    """Measure how fast the model computes, as a server knows from earlier requests; also warms it up.

    Two blocks tell the two parameters: one at the beginning, where attention costs next to nothing, and one at the
    end. The decoder's speed is not known before it has decoded; until then it is taken to cost nothing. Where it
    shares the model's processor, a third block tells how much of the model's speed that takes.

    Args:
        cache: from `allocate_cache` or `empty_cache`; its first `num_tokens` tokens are overwritten.
        num_tokens: of the context that will be loaded.
        token_ids: at least that many and one more.
        num_prompt_tokens: of context and question; those behind the loaded ones count into the first token's time.
    """
    from cachegen.pipeline.generate import generate_answer
    from cachegen.pipeline.model_cache import set_length, view_kv_cache
    from cachegen.pipeline.prefill import extend_cache
    from cachegen.pipeline.state_layers import forget_states, keep_states, states_of_cache

    num_block = min(block_size, num_tokens)
    last = num_tokens - num_block

    def hold(num_held: int) -> None:
        set_length(cache, 0)
        if num_held:
            # For the time they take, any recurrent states do; there are some once a block was computed.
            keep_states(cache, states_of_cache(cache), num_held)
            set_length(cache, num_held)

    def time_block(start: int) -> float:
        hold(start)
        begin = time.perf_counter()
        extend_cache(loaded, cache, token_ids[start : start + num_block], block_size)
        _wait_for(loaded.device)
        return time.perf_counter() - begin

    time_block(0)  # also allocates
    for plane in view_kv_cache(cache, num_tokens).slice(num_block, num_tokens).planes:
        plane.zero_()  # what was never written may be NaN
    first_seconds, last_seconds = time_block(0), time_block(last)
    slope = max(last_seconds - first_seconds, 0.0)
    attention_seconds = slope / (2 * num_block * last) if last else 0.0
    linear_seconds = max(first_seconds - attention_seconds * num_block**2, first_seconds / 10)
    hold(num_tokens)
    answer = generate_answer(loaded, cache, num_tokens, token_ids[: num_tokens + 1], 1, block_size)
    prefill = PrefillSpeed(num_block / linear_seconds, attention_seconds)
    slowdown = 0.0
    if decoding_device.type == loaded.device.type:
        slowdown = 1.0 if decoding_device.type == "cuda" else _measure_slowdown(last_seconds, lambda: time_block(last))
    forget_states(cache)
    speeds = Speeds(
        prefill=prefill,
        decode=DecodeSpeed(compute_slowdown=slowdown),
        first_token_seconds=answer.prefill_seconds,
        # The model breaks off between two layers.
        stop_seconds=last_seconds / loaded.num_layers,
    )
    return count_prompt(speeds, num_tokens, num_prompt_tokens)


def count_prompt(speeds: Speeds, num_tokens: int, num_prompt_tokens: int) -> Speeds:
    """Return speeds whose time to the first token counts the tokens of a prompt that are behind those loaded.

    Args:
        speeds: measured for a prompt that ends with one more token than is loaded.
        num_tokens: that will be loaded.
        num_prompt_tokens: of the whole prompt.
    """
    num_behind = num_prompt_tokens - 1 - num_tokens
    if num_behind <= 0:
        return speeds
    behind_seconds = speeds.prefill.seconds(num_tokens, num_behind)
    return replace(speeds, first_token_seconds=speeds.first_token_seconds + behind_seconds)


def _measure_slowdown(alone_seconds: float, time_block: Callable[[], float]) -> float:
    """Return the share of the model's speed that is lost while something else wants all cores of the processor.

    Matrix products, the larger part of what method `transform`'s decoder does, stand for the decoder.
    """
    is_over = threading.Event()

    def compete() -> None:
        factor = torch.ones(256, 256)
        while not is_over.is_set():
            torch.mm(factor, factor)

    competitor = threading.Thread(target=compete, daemon=True, name="cachegen-compete")
    competitor.start()
    try:
        beside_seconds = time_block()
    finally:
        is_over.set()
        competitor.join()
    return min(max(1 - alone_seconds / beside_seconds, 0.0), MOST_SLOWDOWN)


def _wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it, so that times and orders are what they seem."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
