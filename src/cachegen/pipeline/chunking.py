"""Where a context is cut: into chunks, and into the steps of a prefill."""

from __future__ import annotations

from cachegen.errors import ConfigError

DEFAULT_CHUNK_SIZE = 1500  # tokens; the chunk length of the CacheGen paper
DEFAULT_BLOCK_SIZE = 512  # tokens that pass through the model in one step of a prefill


def plan_chunks(num_tokens: int, num_chunks: int | None, chunk_size: int | None) -> tuple[int, ...]:
    """Decide how many tokens each chunk has.

    Args:
        num_tokens: of the cache, at least 1.
        num_chunks: alone: so many chunks cover all tokens in equal parts, the first ones a token longer where the
            division leaves a rest.
        chunk_size: alone: chunks of so many tokens cover all, the last one takes the rest. With `num_chunks`: so many
            chunks of exactly this size, or fewer tokens where the cache ends; a tail may be left uncovered.

    Returns:
        Tokens per chunk, in order.

    Raises:
        ConfigError: there are fewer tokens than chunks.
    """
    if num_chunks is None:
        size = chunk_size or DEFAULT_CHUNK_SIZE
        starts = range(0, num_tokens, size)
    elif chunk_size is None:
        if num_chunks > num_tokens:
            raise ConfigError(f"`num_chunks` {num_chunks} is more than the cache has tokens ({num_tokens})")
        size, rest = divmod(num_tokens, num_chunks)
        return (size + 1,) * rest + (size,) * (num_chunks - rest)
    else:
        size = chunk_size
        starts = range(0, min(num_tokens, num_chunks * size), size)
        if len(starts) < num_chunks:
            raise ConfigError(
                f"`num_chunks` {num_chunks} of `chunk_size` {chunk_size} begin beyond the cache's {num_tokens} tokens: "
                f"there is room for {len(starts)}"
            )
    return tuple(min(size, num_tokens - start) for start in starts)
