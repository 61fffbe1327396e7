"""The policies that load chunks in order: one level for all, and Algorithm 1 of the CacheGen paper."""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.streaming.policy import TEXT, Choice, Decision, Decode, Fetch, LoadState


def decide_text(state: LoadState) -> Decision:
    """Compute every chunk from text: what a server without a cache does."""
    choices: list[Choice] = [TEXT] * len(state.chunks)
    return _serve(state, choices, {})


def decide_fixed_level(state: LoadState, level: int) -> Decision:
    """Load every chunk at `level`, or the nearest below that can be had, or from text where there is none.

    With one level of 8 bits per value, this is the 8-bit quantization that the paper compares with.
    """
    choices: list[Choice] = [
        max(levels) if (levels := [n for n in chunk.obtainable_levels(progress.missing) if n <= level]) else TEXT
        for chunk, progress in zip(state.chunks, state.progress, strict=True)
    ]
    return _serve(state, choices, {})


def decide_cachegen(state: LoadState) -> Decision:
    """Choose each chunk's level, or text, by the throughput of the chunk before it.

    A choice falls when the chunk before it has arrived. Text is chosen when computing all remaining chunks meets the
    deadline. Otherwise the best level does at which all remaining chunks would arrive in time at the last chunk's
    throughput; where none would, the smallest. Before any throughput is known, the middle level. The paper leaves out
    what the model has not yet finished; here it counts into the time that computing takes.

    Source: Liu et al., "CacheGen", SIGCOMM 2024, section 5.3 and Algorithm 1.
    """
    choices: list[Choice | None] = [progress.choice for progress in state.progress]
    new: dict[int, Choice] = {}
    for i, (chunk, progress) in enumerate(zip(state.chunks, state.progress, strict=True)):
        obtainable = chunk.obtainable_levels(progress.missing)
        if choices[i] is None or (choices[i] != TEXT and choices[i] not in obtainable):
            if not all(_has_arrived(state, before, choices[before]) for before in range(i)):
                break
            new[i] = choices[i] = _choose(state, i, choices, obtainable)
    return _serve(state, choices, new)


def _choose(state: LoadState, first: int, choices: Sequence[Choice | None], obtainable: Sequence[int]) -> Choice:
    """Choose for chunk `first`, the chunks before it being chosen and sent."""
    remaining = range(first, len(state.chunks))
    seconds_left = state.objective.deadline_seconds - state.elapsed_seconds
    queued = [i for i in range(first) if choices[i] == TEXT and not state.progress[i].is_computed]
    compute_seconds = state.compute_seconds_left() + state.prefill_seconds_of([*queued, *remaining])
    if not obtainable or compute_seconds <= seconds_left:
        return TEXT
    throughput = _last_chunk_throughput(state)
    if throughput is None:
        return obtainable[(len(obtainable) - 1) // 2]
    for level in reversed(obtainable):
        chunks = (state.chunks[i] for i in remaining)
        num_bytes = sum(chunk.bytes_of(min(level, chunk.num_levels)) for chunk in chunks if chunk.num_levels)
        if num_bytes <= throughput * seconds_left:
            return level
    return obtainable[0]


def _last_chunk_throughput(state: LoadState) -> float | None:
    """Return the bytes per second at which the last complete chunk came; the prior before the first."""
    if not state.finished:
        return state.speeds.prior_bytes_per_second
    files = [transfer for transfer in state.finished if transfer.chunk == state.finished[-1].chunk]
    seconds = max(t.ended_seconds or 0.0 for t in files) - min(t.started_seconds for t in files)
    return sum(transfer.num_bytes for transfer in files) / max(seconds, 1e-9)


def _has_arrived(state: LoadState, chunk: int, choice: Choice | None) -> bool:
    return choice == TEXT or (
        choice is not None and all(n in state.progress[chunk].arrived for n in state.chunks[chunk].files_of(choice))
    )


def _serve(state: LoadState, choices: Sequence[Choice | None], new: dict[int, Choice]) -> Decision:
    """Fetch, decode and compute in order what was chosen; chunks without a choice wait."""
    if state.is_complete:
        return Decision(is_finished=True)
    fetch = [
        Fetch(i, level)
        for i, choice in enumerate(choices)
        if choice is not None and choice != TEXT
        for level in state.chunks[i].files_of(choice)
        if level not in state.expected_files(i)
    ]
    decode = None
    if state.decoding is None:
        decode = next(
            (
                Decode(i, choice)
                for i, choice in enumerate(choices)
                if choice is not None
                and choice != TEXT
                and not state.progress[i].is_ready
                and _has_arrived(state, i, choice)
            ),
            None,
        )
    next_chunk = state.first_not_ready()
    compute = next_chunk if state.computing is None and choices[next_chunk] == TEXT else None
    return Decision(
        fetch=tuple(fetch[: state.num_free_connections]),
        decode=decode,
        compute=compute,
        choices=tuple(new.items()),
    )
