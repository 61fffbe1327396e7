"""Layers of a transformers cache with recurrent states, which can be read, put, and set back to a context's end."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from cachegen.errors import InputError
from cachegen.states import States, name_state, split_name


class StateLayer(LinearAttentionLayer):
    """A layer's recurrent states, and a copy of them as they were at the end of a context.

    States are overwritten by each token that passes, so that only a copy leads back.

    Attributes:
        place: the device they are on.
        kept: the copy.
        kept_tokens: of the context; None before `keep`.
    """

    def __init__(self, num_states: int, device: torch.device) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=num_states)
        self.place = device
        self.kept_tokens: int | None = None
        self.kept: States = {}

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make states of zeros, which may be written outside of inference mode, too."""
        with torch.inference_mode(False):
            LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def keep(self, states: States, num_tokens: int) -> None:
        """Take states by their names within a layer, such as `conv.0`, as those at the end of a context."""
        with torch.inference_mode(False):
            self.kept = {name: state.to(self.place, copy=True) for name, state in states.items()}
        self.kept_tokens = num_tokens
        put_states(self, self.kept)

    def return_to(self, num_tokens: int, num_held: int) -> None:
        """Set the states to those after so many tokens.

        Args:
            num_held: tokens whose states are there now.

        Raises:
            ValueError: the states after these tokens are not known.
        """
        if num_tokens == 0:
            LinearAttentionLayer.reset(self)
        elif num_tokens == self.kept_tokens:
            put_states(self, self.kept)
        elif num_tokens != num_held:
            raise ValueError(
                f"`num_tokens` must be 0, {self.kept_tokens} or what is held, {num_held}, got {num_tokens}: the "
                "recurrent states after other tokens are not known"
            )


def put_states(layer: LinearAttentionLayer, states: States) -> None:
    """Overwrite a layer's states by those of the same names; it has none before its first use, and then has these."""
    for name, state in states.items():
        kind, index = name.split(".")
        held: dict[int, Any] = getattr(layer, f"{kind}_states")
        if held[int(index)] is None:
            arguments: dict[str, Any] = {f"{kind}_states": state}
            layer.lazy_initialization(**arguments, state_idx=int(index))
        held[int(index)].copy_(state)
        if kind == "conv":
            layer.has_previous_state[int(index)] = True


def state_layers(cache: Cache) -> list[StateLayer]:
    """Return the layers of a cache that have recurrent states, all made here."""
    return [layer for layer in cache.layers if isinstance(layer, StateLayer)]


def keep_states(cache: Cache, states: States, num_tokens: int) -> None:
    """Let the layers of a cache have states, as those after its first `num_tokens` tokens.

    From then on it is to be used whole: the states after fewer tokens are not known. `set_length` leads back to these.

    Args:
        states: all that the cache's model has; nothing for a model without.

    Raises:
        ValueError: they are of other layers.
    """
    by_layer: dict[int, dict[str, torch.Tensor]] = {
        index: {} for index, layer in enumerate(cache.layers) if isinstance(layer, StateLayer)
    }
    for name, state in states.items():
        layer, kind, index = split_name(name)
        if layer not in by_layer:
            raise ValueError(f"`states` has {name}, but the cache's layer {layer} has no states")
        by_layer[layer][f"{kind}.{index}"] = state
    for index, of_layer in by_layer.items():
        if not of_layer:
            raise ValueError(f"`states` has none of layer {index}")
        layer = cache.layers[index]
        assert isinstance(layer, StateLayer)
        layer.keep(of_layer, num_tokens)


def forget_states(cache: Cache) -> None:
    """Let a cache have no states, nor a place that they lead back to."""
    for layer in state_layers(cache):
        layer.kept, layer.kept_tokens = {}, None
        layer.return_to(0, 0)


def states_of_cache(cache: Any) -> dict[str, torch.Tensor]:
    """Return the recurrent states that any transformers cache holds, copied to the CPU; nothing where it has none.

    Raises:
        InputError: a layer was never given any, or one holds a batch.
    """
    found: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            continue
        of_layer = _states_of_layer(number, layer)
        if not of_layer:
            raise InputError(f"the cache's layer {number} ({type(layer).__name__}) has no states yet")
        found |= of_layer
    return found


def _states_of_layer(number: int, layer: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for kind, held in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
        for index, state in held.items():
            if state is None:
                continue
            if state.shape[0] != 1:
                raise InputError(f"the cache holds {state.shape[0]} sequences, one is needed")
            if kind == "conv":  # a layer that records its past holds more
                state = state[..., -layer.conv_kernel_size[index] :]
            with torch.inference_mode(False):
                found[name_state(number, kind, index)] = state.detach().to("cpu", copy=True).contiguous()
    return found


def copy_states(source: StateLayer, target: LinearAttentionLayer) -> LinearAttentionLayer:
    """Give a layer of transformers' own kind, and as many states, copies of another's; returns the layer."""
    with torch.inference_mode(False):
        for name, state in _states_of_layer(0, source).items():
            put_states(target, {name.removeprefix("0."): state.to(source.place)})
    return target
