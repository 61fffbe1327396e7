"""Choose the levels of all chunks that are still to be loaded, to be asked again before each request.

With independent levels, a better level fetched later repeats all bits, so the level is chosen before. With embedded
levels nothing is lost by loading the smallest level of every chunk first, which a link that fails calls for. Where
all that the objective asks for is expected in time, it is loaded chunk by chunk all the same: what is complete can be
decoded while the rest comes, and the model may meet the network before the front chunks' smallest files are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.streaming.estimator import conservative_throughput
from cachegen.streaming.policy import LoadState

IN_ORDER_SHARE = 0.33
"""Of the time that is left, what loading chunk by chunk may take: the rest is for a link that fails meanwhile. All of
it where computing everything would meet the deadline, too."""


def plan_levels(state: LoadState, waiting: Sequence[int], end_seconds: float) -> dict[int, int]:
    """Return the level at which each chunk that is not loaded well enough shall be loaded.

    From the smallest levels, chunks are raised along the lower convex hull of (bytes, loss), the largest loss
    reduction per byte first, ties from the back, as long as the model from the front and the network from the back
    still meet in time at a conservative throughput, and no further than the objective's loss. Embedded levels are
    raised to that loss or not at all.

    Args:
        state: what is known.
        waiting: indices of the chunks, ascending, each with at least one level that can be had: those that nothing
            covers, and with embedded levels those that could be refined.
        end_seconds: when all must be ready.

    Source: the greedy solution of the multiple-choice knapsack problem (Sinha and Zoltners, Operations Research 27,
    1979), whose items are the levels of a chunk.
    """
    lowest = {i: lowest_level(state, i) for i in waiting}
    throughput = conservative_throughput(state)
    if throughput is None or throughput <= 0:
        return lowest
    raises = sorted(
        (step for i in waiting for step in _raises(state, i, lowest[i])),
        key=lambda step: (step[0], step[1]),
        reverse=True,
    )

    def raised(count: int) -> dict[int, int]:
        return lowest | {i: level for _, i, level in raises[:count]}

    def is_in_time(count: int, share: float = 1.0) -> bool:
        seconds = _plan(state, waiting, raised(count), throughput)[0]
        return seconds <= share * (end_seconds - state.elapsed_seconds)

    # What is covered badly already may be loaded again later; it takes nothing from the part of those that wait.
    num_tokens = sum(state.chunks[i].num_tokens for i in waiting)
    target = state.objective.target_loss
    allowed_loss = max(target - _loss_of_others(state, waiting), target * num_tokens / state.chunks[-1].end_token)

    # Both the time and (downwards) the loss grow with the number of raises: two bisections.
    low, high = 0, len(raises)
    while low < high:
        middle = (low + high) // 2
        if _plan(state, waiting, raised(middle), throughput)[1] <= allowed_loss:
            high = middle
        else:
            low = middle + 1
    enough = low
    if all(state.chunks[i].is_embedded for i in waiting):
        text_seconds = sum(state.prefill_seconds(i) for i in range(len(state.chunks)))
        is_safe = text_seconds <= state.objective.deadline_seconds
        return raised(enough) if is_in_time(enough, 1.0 if is_safe else IN_ORDER_SHARE) else lowest
    low, high = 0, enough
    while low < high:
        middle = (low + high + 1) // 2
        if is_in_time(middle):
            low = middle
        else:
            high = middle - 1
    return raised(low)


def lowest_level(state: LoadState, index: int) -> int:
    """Return the level that `index` has with what is here or in flight; the smallest that can be had without one."""
    chunk, progress = state.chunks[index], state.progress[index]
    covered = max(chunk.usable_level(state.expected_files(index)), progress.decoded_level)
    return covered or chunk.obtainable_levels(progress.missing)[0]


def bytes_to_request(state: LoadState, index: int, level: int) -> int:
    """Return the bytes of the files of `level` that are neither here nor in flight."""
    chunk, expected = state.chunks[index], state.expected_files(index)
    return sum(chunk.file_bytes[n - 1] for n in chunk.files_of(level) if n not in expected)


def _raises(state: LoadState, index: int, lowest: int) -> list[tuple[float, int, int]]:
    """Return the steps up the chunk's hull: (loss reduction per byte, chunk, level), the first steps the best."""
    chunk = state.chunks[index]
    levels = chunk.obtainable_levels(state.progress[index].missing)
    steps = []
    current = lowest
    while True:
        options = [
            ((chunk.loss[current - 1] - chunk.loss[n - 1]) / (chunk.bytes_of(n) - chunk.bytes_of(current)), index, n)
            for n in levels
            if chunk.bytes_of(n) > chunk.bytes_of(current) and chunk.loss[n - 1] < chunk.loss[current - 1]
        ]
        if not options:
            return steps
        steps.append(max(options))
        current = steps[-1][2]


def _plan(state: LoadState, waiting: Sequence[int], levels: dict[int, int], throughput: float) -> tuple[float, float]:
    """Return in how many seconds all chunks are ready, and what those that wait then add to the loss."""
    in_flight = sum(state.chunks[t.chunk].file_bytes[t.level - 1] - t.num_bytes for t in state.in_flight)
    loaded_seconds = in_flight / throughput
    waiting = list(waiting)
    computing = state.computing.chunk if state.computing is not None else None
    computed_seconds = 0.0 if computing in waiting else state.compute_seconds_left()
    loss = 0.0
    last_decode_seconds = 0.0
    while waiting:
        # Whichever would end its next chunk earlier takes it; the other may have begun the same one in vain.
        front, back = waiting[0], waiting[-1]
        seconds = state.compute_seconds_left() if front == computing else state.prefill_seconds(front)
        arrival = loaded_seconds + bytes_to_request(state, back, levels[back]) / throughput
        if computed_seconds + seconds <= arrival:
            computed_seconds += seconds
            waiting.pop(0)
        else:
            loaded_seconds = arrival
            last_decode_seconds = state.speeds.decode.seconds(state.chunks[back], levels[back])
            loss += state.chunks[back].loss[levels[back] - 1]
            waiting.pop()
    return max(computed_seconds, loaded_seconds + last_decode_seconds), loss


def _loss_of_others(state: LoadState, waiting: Sequence[int]) -> float:
    """Return the loss of the chunks that are loaded and do not wait for more."""
    loss = 0.0
    for i, (chunk, progress) in enumerate(zip(state.chunks, state.progress, strict=True)):
        level = max(progress.decoded_level, chunk.usable_level(state.expected_files(i)))
        if level and not progress.is_computed and i not in waiting:
            loss += chunk.loss[level - 1]
    return loss
