"""An engine's paged KV cache: blocks of all layers gathered as `[2, num_layers, num_tokens, num_channels]`, and back.

Where in a page which value lies is the engine's own affair (on CPUs, keys are packed for the processor's products). It
is found out by having the engine write a block of known values, so that what is stored is the same everywhere.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

import torch

from cachegen.errors import InputError

_DIGIT_BITS = 7
"""Integers below 128 are exact in every dtype of a cache that is not quantized."""


def find_order(
    write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object],
    page: torch.Tensor,
    num_heads: int,
    head_dim: int,
) -> torch.Tensor:
    """Find where an engine keeps the values of a block.

    Args:
        write: writes keys and values, `[num_tokens, num_heads, head_dim]` each, into the last of a tensor's pages.
        page: what it writes into, `[num_pages, num_heads, num_tokens, content]`; it is overwritten.

    Returns:
        Offsets into the flattened last page, int64, `[2, num_tokens, num_heads, head_dim]`.

    Raises:
        InputError: the page holds anything but these values, each once.
    """
    num_tokens = page.shape[2]
    shape = (2, num_tokens, num_heads, head_dim)
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = torch.zeros(page[-1].numel(), dtype=torch.int64)
    for shift in range(0, max(numbers.numel() - 1, 1).bit_length(), _DIGIT_BITS):
        digits = ((numbers >> shift) & ((1 << _DIGIT_BITS) - 1)).to(page.dtype).to(page.device)
        page.zero_()
        write(digits[0], digits[1], page)
        found += page[-1].reshape(-1).cpu().long() << shift
    if found.numel() != numbers.numel() or not torch.equal(found.sort().values, numbers.flatten()):
        raise InputError(f"the engine keeps blocks of {tuple(page.shape[1:])} in an unknown way")
    return found.argsort().view(shape)


class PagedCache:
    """The pages of all layers.

    Attributes:
        num_layers, num_channels: of the gathered planes; `num_channels` is heads times dims.
    """

    def __init__(self, layers: Sequence[torch.Tensor], order: torch.Tensor, block_tokens: int) -> None:
        """Take an engine's tensors.

        Args:
            layers: `[num_pages, num_heads, page_tokens, content]` each, of one shape and dtype, on one device.
            order: of a page, as `find_order` gives it.
            block_tokens: of the engine's blocks, each of which may be several pages.
        """
        page_tokens = order.shape[1]
        if block_tokens % page_tokens:
            raise InputError(f"blocks of {block_tokens} tokens are not made of pages of {page_tokens}")
        self._layers, self._pages_per_block = list(layers), block_tokens // page_tokens
        self._block_tokens = block_tokens
        device = layers[0].device
        self._order = order.reshape(-1).to(device)
        self._inverse = self._order.argsort()
        self._page_shape = (2, page_tokens, order.shape[2] * order.shape[3])
        self.num_layers, self.num_channels = len(layers), self._page_shape[2]
        self.dtype = layers[0].dtype

    def gather(self, blocks: Sequence[int]) -> torch.Tensor:
        """Return a copy of blocks, in their order, on the CPU: `[2, num_layers, num_tokens, num_channels]`."""
        pages = self._pages_of(blocks)
        gathered = self.allocate(len(blocks))
        for index, layer in enumerate(self._layers):
            values = layer[pages].reshape(len(pages), -1)[:, self._order].view(len(pages), *self._page_shape)
            gathered[:, index] = values.transpose(0, 1).reshape(2, -1, self.num_channels)
        return gathered

    def scatter(self, blocks: Sequence[int], planes: torch.Tensor) -> None:
        """Write `[2, num_layers, num_tokens, num_channels]` into blocks; done when this returns, on GPUs as well."""
        pages = self._pages_of(blocks)
        for index, layer in enumerate(self._layers):
            values = planes[:, index].to(layer.device).view(2, len(pages), *self._page_shape[1:])
            packed = values.transpose(0, 1).reshape(len(pages), -1)[:, self._inverse]
            layer[pages] = packed.view(len(pages), *layer.shape[1:])
        if self._order.is_cuda:
            torch.cuda.current_stream(self._order.device).synchronize()

    def allocate(self, num_blocks: int) -> torch.Tensor:
        """Return a tensor on the CPU for so many blocks, whose memory goes back to the system with it."""
        shape = (2, self.num_layers, num_blocks * self._block_tokens, self.num_channels)
        # Not the allocator's: that would keep what many blocks once took, as they wait to be stored.
        memory = mmap.mmap(-1, math.prod(shape) * self.dtype.itemsize)
        return torch.frombuffer(memory, dtype=self.dtype).view(shape)

    def _pages_of(self, blocks: Sequence[int]) -> torch.Tensor:
        first = torch.tensor(blocks, dtype=torch.int64)[:, None] * self._pages_per_block
        return (first + torch.arange(self._pages_per_block)).flatten().to(self._order.device)
