"""Layers of a document that hold the same tokens: what is given to kernels at a time, which know one number of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cachegen.errors import NotFiniteError
from cachegen.format.headers import DocumentHeader
from cachegen.kv_cache import KVCache

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class LayerClass:
    """Some layers of a document, and the first of its tokens that they hold.

    Attributes:
        layers: ascending.
        is_all: whether these are all layers of the document.
    """

    layers: tuple[int, ...]
    first_stored: int
    is_all: bool

    @property
    def planes(self) -> list[int]:
        """The numbers of the layers' planes."""
        return [plane for layer in self.layers for plane in (2 * layer, 2 * layer + 1)]

    def num_absent(self, first_token: int, num_tokens: int) -> int:
        """Return how many of a chunk's first tokens the layers do not hold."""
        return min(max(self.first_stored - first_token, 0), num_tokens)

    def part_of(self, cache: KVCache, first_token: int) -> KVCache:
        """Return what the layers hold of a chunk, or of all tokens, as views.

        Args:
            cache: all layers; its first token has the position `first_token`.
        """
        layers = cache if self.is_all else cache.select(self.layers)
        return layers.slice(self.num_absent(first_token, cache.num_tokens), cache.num_tokens)

    def pick(self, of_planes: Sequence[_Item]) -> list[_Item]:
        """Return what belongs to the layers, of a thing per plane."""
        return [of_planes[plane] for plane in self.planes]

    def name_in(self, error: NotFiniteError) -> NotFiniteError:
        """Return an error about a value of the layers' tokens as one about the whole cache."""
        return NotFiniteError(self.planes[error.plane], self.first_stored + error.token)


def layer_classes(header: DocumentHeader) -> list[LayerClass]:
    """Return the classes of a document's layers, ascending by their first tokens."""
    found = header.layers_by_first_stored
    return [LayerClass(tuple(layers), first, len(found) == 1) for first, layers in found.items()]


def share_first_stored(groups: Iterable[Sequence[int]], first_stored: Sequence[int]) -> tuple[int, ...]:
    """Return, per layer, the first token that any layer of its group must hold.

    Args:
        groups: of layers that are coded together; each layer is in one.
        first_stored: as in `DocumentHeader`.
    """
    shared = list(first_stored)
    for group in groups:
        earliest = min(first_stored[layer] for layer in group)
        for layer in group:
            shared[layer] = earliest
    return tuple(shared)
