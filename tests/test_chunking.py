"""Where contexts are cut: equal parts, fixed sizes, tails."""

from __future__ import annotations

import pytest

from cachegen.errors import ConfigError
from cachegen.pipeline.chunking import DEFAULT_CHUNK_SIZE, plan_chunks


@pytest.mark.parametrize(
    ("num_tokens", "num_chunks", "chunk_size", "expected"),
    [
        (10, 1, None, (10,)),
        (10, 3, None, (4, 3, 3)),
        (10, 4, None, (3, 3, 2, 2)),
        (10, 10, None, (1,) * 10),
        (10, None, 4, (4, 4, 2)),
        (10, None, 5, (5, 5)),
        (10, None, 11, (10,)),
        (10, 2, 4, (4, 4)),
        (10, 3, 4, (4, 4, 2)),
        (10, 1, 99, (10,)),
        (1, None, None, (1,)),
        (3001, None, None, (1500, 1500, 1)),
    ],
)
def test_chunks_follow_the_flags(num_tokens, num_chunks, chunk_size, expected):
    assert plan_chunks(num_tokens, num_chunks, chunk_size) == expected


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 8944])
def test_number_alone_covers_all_tokens_in_parts_that_differ_by_one_at_most(num_tokens):
    for num_chunks in range(1, min(num_tokens, 70) + 1):
        chunks = plan_chunks(num_tokens, num_chunks, None)
        assert len(chunks) == num_chunks and sum(chunks) == num_tokens
        assert max(chunks) - min(chunks) <= 1 and list(chunks) == sorted(chunks, reverse=True)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 8944])
@pytest.mark.parametrize("chunk_size", [1, 2, 32, 64, 1000])
def test_size_alone_covers_all_tokens(num_tokens, chunk_size):
    chunks = plan_chunks(num_tokens, None, chunk_size)
    assert sum(chunks) == num_tokens
    assert all(size == chunk_size for size in chunks[:-1]) and 0 < chunks[-1] <= chunk_size


def test_default_is_the_papers_chunk_length():
    assert plan_chunks(8944, None, None) == plan_chunks(8944, None, DEFAULT_CHUNK_SIZE)


@pytest.mark.parametrize(
    ("num_chunks", "chunk_size", "message"),
    [
        (11, None, r"`num_chunks` 11 is more than the cache has tokens \(10\)"),
        (4, 4, r"`num_chunks` 4 of `chunk_size` 4 begin beyond the cache's 10 tokens: there is room for 3"),
        (2, 10, "there is room for 1"),
    ],
)
def test_more_chunks_than_the_cache_has_room_for_are_refused(num_chunks, chunk_size, message):
    with pytest.raises(ConfigError, match=message):
        plan_chunks(10, num_chunks, chunk_size)
