"""A transformers cache with memory of a fixed size: filled block by block or by the decoder, and reused.

transformers' own DynamicLayer concatenates, which needs every layer twice and copies all of it for each block. Here
each layer owns one buffer per tensor; what attention sees are views of its first tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from cachegen.errors import InputError
from cachegen.kv_cache import KVCache
from cachegen.pipeline.architecture import LayerCache
from cachegen.pipeline.state_layers import StateLayer, copy_states, state_layers


class WholeLayer(DynamicLayer):
    """A layer of transformers that must not be cropped into what was decoded: other layers lack tokens then.

    Attributes:
        least_length: the tokens that were decoded.
        num_missing: first tokens that the layer does not hold.
    """

    num_missing = 0

    def __init__(self, least_length: int) -> None:
        super().__init__()
        self.least_length = least_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove so many of the last tokens, as a negative number.

        Raises:
            ValueError: they are of those that were decoded.
        """
        # Releases differ in what a positive number means; nobody may mean less than all that was decoded.
        length = self.get_seq_length()
        if (length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove) < self.least_length:
            raise ValueError(
                f"the cache can only be used whole, {self.least_length} tokens: compress with keep_all_tokens=True to "
                "go on from fewer"
            )
        super().crop(tokens_to_remove)


class WindowedLayer(WholeLayer):
    """A layer with a window, without the tokens that no token behind the decoded ones attends to.

    As transformers' own layers of this kind it tells the mask where its tokens begin; unlike these it drops none later,
    so that a question and its answer can be cropped again.
    """

    is_sliding = True

    def __init__(self, least_length: int, num_missing: int) -> None:
        super().__init__(least_length)
        self.num_missing = num_missing

    def get_seq_length(self) -> int:
        """Return the number of tokens, those that are missing among them."""
        return self.num_missing + (self.keys.shape[-2] if isinstance(self.keys, torch.Tensor) else 0)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return how many tokens attention will see, and the position of the first."""
        kv_length, kv_offset = super().get_mask_sizes(*args, **kwargs)
        return kv_length - self.num_missing, kv_offset + self.num_missing

    def reset(self) -> None:
        """Forget the tokens."""
        super().reset()
        self.num_missing = self.least_length = 0


class PreallocatedLayer(DynamicLayer):
    """Hold one layer's keys and values in buffers of a fixed capacity; `update` copies in place.

    Attributes:
        capacity: the most tokens the layer holds.
        keys, values: views `[1, num_kv_heads, num_tokens, head_dim]` of the buffers; heads and dims of the two may
            differ. None before the first use.
        num_head_repeats: how often the model repeats each head, of which one is kept.
        least_length: fewer tokens, but none, it must not be set to: tokens of some layer's window are missing then.
        num_missing: first tokens that are not to be relied upon, and that no later token attends to.

    It is no sliding-window layer, whatever the model: all tokens are kept, and the model's mask does the rest.
    """

    def __init__(self, capacity: int, num_head_repeats: int = 1) -> None:
        if capacity < 1:
            raise ValueError(f"`capacity` must be at least 1 token, got {capacity}")
        super().__init__()
        self.capacity = capacity
        self.num_head_repeats = num_head_repeats
        self.least_length = self.num_missing = 0
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values `[1, num_kv_heads, capacity, head_dim]`; undefined beyond what was written."""
        return self._buffers

    def allocate(
        self, key_shape: tuple[int, int], value_shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the buffers, undefined, for (num_kv_heads, head_dim) of the keys and of the values; length 0."""
        self._make_buffers(key_shape, value_shape, (dtype, dtype), device)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the buffers for states `[1, num_kv_heads, any, head_dim]` like these."""
        if key_states.shape[0] != 1:
            raise ValueError(f"the cache holds one sequence, got a batch of {key_states.shape[0]}")
        self._make_buffers(
            (key_states.shape[1] // self.num_head_repeats, key_states.shape[3]),
            (value_states.shape[1] // self.num_head_repeats, value_states.shape[3]),
            (key_states.dtype, value_states.dtype),
            key_states.device,
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states `[1, num_kv_heads, num_new, head_dim]` and return all keys and values so far.

        They are views, or copies where the model repeats heads.

        Raises:
            ValueError: they would outgrow the capacity.
        """
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        stop = length + key_states.shape[-2]
        if stop > self.capacity:
            raise ValueError(f"the cache was allocated for {self.capacity} tokens and cannot hold {stop}")
        for buffer, states in zip(self._buffers or (), (key_states, value_states), strict=True):
            buffer[:, :, length:stop].copy_(states[:, :: self.num_head_repeats])
        self.set_length(stop)
        if self.num_head_repeats > 1:
            return repeat_heads(self.keys, self.num_head_repeats), repeat_heads(self.values, self.num_head_repeats)
        return self.keys, self.values  # pyright: ignore[reportReturnType]  (tensors after set_length)

    def set_length(self, num_tokens: int) -> None:
        """Let the layer hold the first `num_tokens` of its buffers, fewer or more than now.

        Whoever lengthens a layer has written the tokens.

        Raises:
            ValueError: there is no room for so many, or no buffer yet; or the layer must be used whole.
        """
        if 0 < num_tokens < self.least_length:
            raise ValueError(
                f"`num_tokens` must be 0 or at least {self.least_length}, got {num_tokens}: the cache lacks what "
                "earlier tokens attend to"
            )
        if num_tokens == 0:
            self.least_length = self.num_missing = 0  # what follows is computed
        if self._buffers is None:
            if num_tokens != 0:
                raise ValueError(f"the layer is still empty and cannot be set to {num_tokens} tokens")
            return
        if not 0 <= num_tokens <= self.capacity:
            raise ValueError(f"`num_tokens` must be within the capacity of {self.capacity}, got {num_tokens}")
        self.keys, self.values = (buffer[:, :, :num_tokens] for buffer in self._buffers)

    def reset(self) -> None:
        """Forget the tokens and keep the memory."""
        self.set_length(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        """Refuse: the layer holds one sequence."""
        self._refuse_batches()

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refuse: the layer holds one sequence."""
        self._refuse_batches()

    def batch_select_indices(self, indices: torch.Tensor) -> NoReturn:
        """Refuse: the layer holds one sequence."""
        self._refuse_batches()

    def _refuse_batches(self) -> NoReturn:
        raise NotImplementedError("a preallocated cache holds one sequence: no beams, no batches")

    def _make_buffers(
        self,
        key_shape: tuple[int, int],
        value_shape: tuple[int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
    ) -> None:
        # Tensors born in inference mode cannot be written outside it, where generate() updates them.
        with torch.inference_mode(False):
            self._buffers = (
                torch.empty((1, key_shape[0], self.capacity, key_shape[1]), dtype=dtypes[0], device=device),
                torch.empty((1, value_shape[0], self.capacity, value_shape[1]), dtype=dtypes[1], device=device),
            )
        self.dtype, self.device = dtypes[0], device
        self.is_initialized = True
        self.set_length(0)


class PreallocatedStateLayer(StateLayer, PreallocatedLayer):
    """A layer with recurrent states beside its keys and values."""

    def __init__(self, num_states: int, device: torch.device, capacity: int, num_head_repeats: int) -> None:
        PreallocatedLayer.__init__(self, capacity, num_head_repeats)
        StateLayer.__init__(self, num_states, device)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make the buffers, for keys and values, or states, which transformers names."""
        if args:
            PreallocatedLayer.lazy_initialization(self, *args)
        else:
            StateLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget the tokens and keep the memory."""
        PreallocatedLayer.reset(self)
        self.return_to(0, 0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        """Refuse: the layer holds one sequence."""
        self._refuse_batches()


def repeat_heads(states: Any, num_repeats: int) -> torch.Tensor:
    """Return states `[1, num_kv_heads, num_tokens, head_dim]` with each head as often as the model has it."""
    return states.repeat_interleave(num_repeats, dim=1)


def keep_distinct_heads(cache: KVCache, num_repeats: int) -> KVCache:
    """Return views of a cache with one of each head that the model repeats.

    Raises:
        ValueError: they differ.
    """
    for plane in cache.planes:
        if not all(plane[:, i::num_repeats].equal(plane[:, ::num_repeats]) for i in range(1, num_repeats)):
            raise ValueError(f"`cache` must have every head {num_repeats} times")
    return KVCache([k[:, ::num_repeats] for k in cache.keys], [v[:, ::num_repeats] for v in cache.values])


@dataclass(frozen=True)
class CacheLayout:
    """What a model's cache holds.

    Attributes:
        layers: of the model, all that keep anything, and those between them.
        devices: of each of these.
        num_head_repeats: how often the model repeats each head of keys and values, of which one is kept.
    """

    layers: tuple[LayerCache, ...]
    devices: tuple[torch.device, ...]
    num_head_repeats: int = 1

    @property
    def plane_layers(self) -> list[int]:
        """The numbers of the layers with keys and values."""
        return [index for index, layer in enumerate(self.layers) if layer.has_planes]


def empty_cache(layout: CacheLayout, capacity: int) -> Cache:
    """Return a cache whose layers take the shapes, dtype and device of the first states they are given."""
    return Cache(
        layers=[
            _make_layer(layer, device, capacity, layout.num_head_repeats)
            for layer, device in zip(layout.layers, layout.devices, strict=True)
        ]
    )


def _make_layer(kept: LayerCache, device: torch.device, capacity: int, num_head_repeats: int) -> Any:
    if not kept.has_planes:
        return StateLayer(kept.num_states, device) if kept.num_states else _dummy_layer()
    if not kept.num_states:
        return PreallocatedLayer(capacity, num_head_repeats)
    return PreallocatedStateLayer(kept.num_states, device, capacity, num_head_repeats)


def _dummy_layer() -> Any:
    return cache_utils.DummyLayer()  # not in every release that is allowed, but in those with layers that need it


def allocate_cache(
    layout: CacheLayout, plane_shapes: Sequence[tuple[int, int]], capacity: int, dtype: torch.dtype
) -> Cache:
    """Return a cache of length 0 to decode into: write through `view_kv_cache`, then `set_length`.

    Args:
        plane_shapes: (num_kv_heads, head_dim) of each plane, in the order of `KVCache.planes`.
        capacity: the most tokens it will ever hold: context, question and answer.
        dtype: of all planes.
    """
    numbers = layout.plane_layers
    if len(plane_shapes) != 2 * len(numbers):
        raise ValueError(
            f"`plane_shapes` must have two shapes per layer, got {len(plane_shapes)} for {len(numbers)} layers"
        )
    cache = empty_cache(layout, capacity)
    for i, (layer, number) in enumerate(zip(preallocated_layers(cache), numbers, strict=True)):
        layer.allocate(plane_shapes[2 * i], plane_shapes[2 * i + 1], dtype, layout.devices[number])
    return cache


def view_kv_cache(cache: Cache, num_tokens: int) -> KVCache:
    """Return the first `num_tokens` of the buffers as planes `[num_tokens, num_kv_heads, head_dim]`, without copying.

    The current length does not matter, so that a decoder can write before the length is set. The planes share the
    buffers' memory: what is saved of them is the whole capacity.

    Raises:
        ValueError: a layer has no buffer yet or less room, or the dtypes differ or are not fp16, bf16 or fp32.
    """
    keys, values = [], []
    for layer in preallocated_layers(cache):
        if layer.buffers is None or not 0 <= num_tokens <= layer.capacity:
            raise ValueError(f"`num_tokens` must be within an allocated capacity, got {num_tokens}")
        # [1, heads, capacity, dim] -> [num_tokens, heads, dim]
        key_view, value_view = (buffer[0, :, :num_tokens].permute(1, 0, 2) for buffer in layer.buffers)
        keys.append(key_view)
        values.append(value_view)
    return KVCache(keys, values)


def fill_cache(cache: Cache, kv: KVCache) -> None:
    """Copy `kv` into the first tokens of the buffers, and set the length to them.

    Raises:
        ValueError: as `view_kv_cache`, or the shapes differ.
    """
    for target, plane in zip(view_kv_cache(cache, kv.num_tokens).planes, kv.planes, strict=True):
        target.copy_(plane)
    set_length(cache, kv.num_tokens)


def planes_of_cache(cache: Any) -> KVCache:
    """Return the keys and values that any transformers cache holds, without copying.

    Args:
        cache: a cache of one sequence.

    Returns:
        Planes `[num_tokens, num_kv_heads, head_dim]`, views of the cache's tensors, on their devices.

    Raises:
        TypeError: it is no transformers cache.
        InputError: it is empty, holds a batch, or a layer does not hold keys and values of every token, as where a
            sliding window has dropped some.
        ValueError: as `KVCache`.
    """
    planes, num_missing = planes_and_missing(cache)
    for index, missing in enumerate(num_missing):
        if missing:
            raise _missing_error(index, cache.layers[index], planes.num_tokens - missing, planes.num_tokens)
    return planes


def _missing_error(index: int, layer: object, num_held: int, num_tokens: int) -> InputError:
    return InputError(
        f"the cache's layer {index} ({type(layer).__name__}) holds {num_held} of {num_tokens} tokens: call the model "
        "with past_key_values=DynamicCache(), which keeps them all"
    )


def planes_and_missing(cache: Any) -> tuple[KVCache, tuple[int, ...]]:
    """Return the keys and values that a transformers cache holds, zeros for what sliding windows have dropped.

    Args:
        cache: a cache of one sequence.

    Returns:
        As `planes_of_cache`, but that the planes of a layer that lacks tokens are copies; and per layer, how many of
        its first tokens it lacks.

    Raises:
        TypeError, InputError, ValueError: as `planes_of_cache`, but for dropped tokens.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"`cache` must be a transformers cache or a KVCache, got {type(cache).__name__}")
    keys, values = [], []
    num_missing: list[int] = []
    layers = list(getattr(cache, "layers", ()))
    for index, layer in enumerate(layers):
        if _keeps_no_planes(layer):
            continue
        if not hasattr(layer, "get_seq_length"):
            raise InputError(f"the cache's layer {index} ({type(layer).__name__}) holds no keys of every token")
        num_tokens = int(layer.get_seq_length())
        num_missing.append(getattr(layer, "num_missing", 0))
        for kind, planes in (("keys", keys), ("values", values)):
            states = getattr(layer, kind, None)
            if not isinstance(states, torch.Tensor) or states.ndim != 4:
                raise InputError(f"the cache's layer {index} ({type(layer).__name__}) holds no {kind} of every token")
            num_sequences, _, num_held, _ = states.shape
            if num_sequences != 1:
                raise InputError(f"the cache holds {num_sequences} sequences, one is needed")
            states = states.detach()
            if num_held < num_tokens and not isinstance(layer, (DynamicSlidingWindowLayer, WindowedLayer)):
                raise _missing_error(index, layer, num_held, num_tokens)
            if num_held < num_tokens:
                num_missing[-1] = num_tokens - num_held
                states = torch.nn.functional.pad(states, (0, 0, num_missing[-1], 0))
            # [1, heads, tokens, dim] -> [tokens, heads, dim]; a static cache has room for more
            planes.append(states[0, :, :num_tokens].permute(1, 0, 2))
    if not keys or keys[0].shape[0] == 0:
        raise InputError("the cache is empty")
    return KVCache(keys, values), tuple(num_missing)


def _keeps_no_planes(layer: object) -> bool:
    """Tell whether a layer holds states alone, or nothing, as where it uses what others keep."""
    is_of_states = isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, DynamicLayer)
    return is_of_states or type(layer).__name__ == "DummyLayer"


def to_dynamic_cache(cache: Cache) -> DynamicCache:
    """Return transformers' own kind of cache over the same memory: it grows without bound, at the price of copies.

    Args:
        cache: of preallocated layers; what it holds now is what the new one holds, as views of its buffers. All layers
            keep all tokens, whatever windows the model has: its mask does the rest. But where it must be used whole,
            the new one refuses to be cropped into it, and layers that lack tokens hold copies of what they have, as do
            those with recurrent states.
    """
    dynamic = DynamicCache()
    preallocated_layers(cache)  # refuses others
    for layer in cache.layers:
        if not isinstance(layer, PreallocatedLayer):
            is_state = isinstance(layer, StateLayer)
            plain = LinearAttentionLayer(number_of_states=layer.number_of_states) if is_state else _dummy_layer()
            dynamic.layers.append(copy_states(layer, plain) if is_state else plain)
            continue
        if layer.keys is None or layer.values is None:
            raise ValueError("`cache` must have buffers in every layer")
        dynamic.layers.append(_to_dynamic_layer(layer, layer.keys, layer.values))
    return dynamic


def _to_dynamic_layer(layer: PreallocatedLayer, keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    """Return transformers' own kind of layer, of views, or of copies of what a windowed layer has."""
    if isinstance(layer, PreallocatedStateLayer):
        grown = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
        copy_states(layer, grown)
    elif layer.num_missing:
        grown = WindowedLayer(layer.least_length, layer.num_missing)
        # Copies, so that the memory of what is missing is free; what is born in inference mode cannot be used outside.
        with torch.inference_mode(False):
            keys, values = (states[:, :, layer.num_missing :].clone() for states in (keys, values))
    else:
        grown = WholeLayer(layer.least_length) if layer.least_length else DynamicLayer()
    grown.lazy_initialization(keys, values)
    if layer.num_head_repeats > 1:
        keys, values = (repeat_heads(states, layer.num_head_repeats) for states in (keys, values))
    grown.keys, grown.values = keys, values
    return grown


def set_length(cache: Cache, num_tokens: int) -> None:
    """Let the cache hold the first `num_tokens` of its buffers, so that one decoded cache serves many questions.

    A question writes behind the context and leaves the context as it was.

    Raises:
        ValueError: a layer has no room for so many, or no buffer yet; or the recurrent states after them are not known.
    """
    layers, with_states = preallocated_layers(cache), state_layers(cache)
    num_held = layers[0].get_seq_length() if with_states else 0
    for layer in with_states:
        layer.return_to(num_tokens, num_held)
    for layer in layers:
        layer.set_length(num_tokens)
    if with_states and num_tokens == with_states[0].kept_tokens:
        for layer in layers:
            layer.least_length = num_tokens


def keep_whole(cache: Cache, num_tokens: int, num_missing: Sequence[int]) -> None:
    """Refuse, from now on, to let the cache hold fewer tokens than these, but none, where layers lack tokens.

    Args:
        cache: holds these tokens.
        num_missing: per layer, how many of its first tokens are not to be relied upon, the same in all layers with the
            same window, since the model has one mask for them; empty where none is in any.
    """
    for layer, missing in zip(preallocated_layers(cache), num_missing, strict=bool(num_missing)):
        layer.least_length, layer.num_missing = num_tokens, missing


def is_whole_only(cache: Cache) -> bool:
    """Tell whether `keep_whole` was asked of a cache, or it has recurrent states."""
    return bool(state_layers(cache)) or any(layer.least_length for layer in preallocated_layers(cache))


@contextmanager
def preserve_tokens(cache: Cache, start: int, num_tokens: int) -> Iterator[None]:
    """Let the block overwrite tokens from `start` on; afterwards the cache holds its `num_tokens` again, bit for bit.

    Costs a copy of tokens `start` to `num_tokens`.
    """
    start = min(start, num_tokens)
    if start == num_tokens:
        saved = []
    else:
        saved = [plane.clone() for plane in view_kv_cache(cache, num_tokens).slice(start, num_tokens).planes]
    try:
        yield
    finally:
        if saved:
            for plane, copy in zip(
                view_kv_cache(cache, num_tokens).slice(start, num_tokens).planes, saved, strict=True
            ):
                plane.copy_(copy)
        set_length(cache, num_tokens)


def get_capacity(cache: Cache) -> int:
    """Return the most tokens that every layer can hold."""
    return min(layer.capacity for layer in preallocated_layers(cache))


def preallocated_layers(cache: Cache) -> list[PreallocatedLayer]:
    """Return the layers with keys and values, all of them preallocated.

    Raises:
        TypeError: some layer is of another class.
    """
    layers = []
    for layer in cache.layers:
        if type(layer) is StateLayer or type(layer).__name__ == "DummyLayer":
            continue
        if not isinstance(layer, PreallocatedLayer):
            raise TypeError(f"`cache` must come from empty_cache or allocate_cache, got a layer {type(layer).__name__}")
        layers.append(layer)
    return layers
