"""Pages of engines: the order of their values is found, blocks are gathered and scattered by it."""

from __future__ import annotations

import pytest
import torch

from cachegen.errors import InputError
from cachegen.integrations.paged_caches import PagedCache, find_order
from tests.fixtures.pages import DIM, HEADS, PAGE_TOKENS, make_page, write_packed, write_rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("write", [write_rows, write_packed])
def test_blocks_are_gathered_and_scattered_in_the_order_of_tokens(write, dtype):
    generator = torch.Generator().manual_seed(0)
    order = find_order(write, make_page(dtype=dtype), HEADS, DIM)
    layers = [make_page(9, dtype) for _ in range(3)]
    caches = PagedCache(layers, order, 2 * PAGE_TOKENS)  # a block is two pages
    written = torch.randn(2, 3, 2, 2 * PAGE_TOKENS, HEADS, DIM, generator=generator).to(dtype)
    for layer, pages in enumerate(layers):
        for index, block in enumerate((3, 1)):
            for half in range(2):
                tokens = written[:, layer, index, half * PAGE_TOKENS : (half + 1) * PAGE_TOKENS]
                write(tokens[0], tokens[1], pages[: 2 * block + half + 1])
    planes = caches.gather([3, 1])
    assert torch.equal(planes, written.flatten(2, 3).flatten(3))
    before = [pages.clone() for pages in layers]
    for pages in layers:
        pages.zero_()
    caches.scatter([3, 1], planes)
    assert all(torch.equal(pages, earlier) for pages, earlier in zip(layers, before, strict=True))


@pytest.mark.parametrize("kept", ["half", "twice"])
def test_a_cache_that_does_not_keep_each_value_once_is_refused(kept):
    def write(keys, values, page):
        write_rows(keys, values if kept == "half" else keys, page)
        if kept == "half":
            page[-1, ..., DIM:] = 0

    with pytest.raises(InputError, match="in an unknown way"):
        find_order(write, make_page(), HEADS, DIM)


def test_blocks_that_are_no_whole_number_of_pages_are_refused():
    order = find_order(write_rows, make_page(), HEADS, DIM)
    with pytest.raises(InputError, match="24 tokens are not made of pages of 16"):
        PagedCache([make_page()], order, 24)
