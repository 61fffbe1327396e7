"""Two-ended loading: the model computes from the front while files arrive from the back, until they meet.

The three workers are decided for one after the other, each by its own function below; docs/streaming.md derives the
rules. In short:

- the model is never idle and waits for no estimate: it computes the first chunk that was not computed;
- the network loads the last chunk that nothing covers yet, base level first; when every chunk is covered, refinements
  by loss reduction per byte;
- it ends when every chunk is ready and the loss is good enough, or nothing can improve before the deadline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cachegen.streaming.estimator import recent_throughput
from cachegen.streaming.plan_levels import lowest_level, plan_levels
from cachegen.streaming.policy import Decision, Decode, Fetch, LoadState

GUARD_FRACTION = 0.02
"""Of the deadline: kept free for what the client itself needs between the last event and the first token."""

DECODE_MARGIN = 0.1
"""Of the time that decoding is expected to take: how much earlier it begins than it must."""

TEXT_GRACE = 0.01
"""Of the time that computing everything takes: what the two ends may come later than that."""


def decide_two_ended(state: LoadState) -> Decision:
    """Decide by the rules at the top of this module."""
    end_seconds = _end_of_refinement(state)
    decode_seconds = _latest_decode_start(state, end_seconds)
    fetch = tuple(_choose_fetches(state, decode_seconds))
    is_loading = bool(fetch or state.in_flight)
    decode = None
    if state.decoding is None:
        can_wait = _decoding_can_wait(state, decode_seconds, is_loading)
        decode = _choose_decode(state, end_seconds, fetch, only_sufficient=can_wait)
    compute = _choose_compute(state, end_seconds) if state.computing is None else None
    if state.is_complete and (
        state.loss <= state.objective.target_loss
        or not (compute is not None or decode or fetch or _something_running_improves(state, end_seconds))
    ):
        return Decision(is_finished=True)
    return Decision(
        fetch=fetch,
        cancel=tuple(_useless_requests(state)),
        compute=compute,
        decode=decode,
        wake_at_seconds=min((t for t in (decode_seconds, end_seconds) if t > state.elapsed_seconds), default=None),
    )


def _end_of_refinement(state: LoadState) -> float:
    """Return the time after which nothing is waited for once the cache is complete.

    The first token shall meet the deadline, and shall not come later than text alone would have given it: after that
    time, computing would have had no loss at all. It is earlier by what the model needs to stop, where it is in a
    chunk that it will not finish by then.
    """
    latest = min(state.objective.deadline_seconds * (1 - GUARD_FRACTION), _latest_end_against_text(state))
    end = latest - state.speeds.first_token_seconds
    is_in_vain = state.computing is not None and state.elapsed_seconds + state.compute_seconds_left() > end
    return end - state.speeds.stop_seconds if is_in_vain else end


def _latest_end_against_text(state: LoadState) -> float:
    """Return the latest time to first token that counts as not slower than computing everything."""
    return (1 + TEXT_GRACE) * sum(state.prefill_seconds(i) for i in range(len(state.chunks)))


def _shares_device(state: LoadState) -> bool:
    """Tell whether decoding displaces computing so much that early decoding is not free."""
    return state.speeds.decode.compute_slowdown >= 0.5


def _latest_decode_start(state: LoadState, end_seconds: float) -> float:
    """Return when decoding must begin for all that has arrived to be ready by `end_seconds`.

    A decoder on a device of its own begins with the first file and need not wait: `end_seconds` itself then.
    """
    if not _shares_device(state):
        return end_seconds
    seconds = state.decode_seconds_left()
    computed: list[int] = []
    for i, (chunk, progress) in enumerate(zip(state.chunks, state.progress, strict=True)):
        level = chunk.usable_level(progress.arrived)
        can_be_loaded = state.can_be_loaded(i)
        if not progress.is_computed and level > progress.decoded_level and (can_be_loaded or not state.is_whole_only):
            seconds += state.speeds.decode.seconds(chunk, level)
        elif not progress.is_ready and not can_be_loaded:
            computed.append(i)
    seconds += state.prefill_seconds_of(computed)
    return end_seconds - (1 + DECODE_MARGIN) * seconds


def _decoding_can_wait(state: LoadState, latest_start: float, is_loading: bool) -> bool:
    """Tell whether a decoder that shares the model's device should leave it to the model for now.

    Early decoding is then no gain: the device is never idle, and a chunk that is decoded early may still be
    computed, or refined and decoded again. It begins when nothing is left to cover and what has arrived is good
    enough, when nothing better comes, or when the time is there.
    """
    if not _shares_device(state) or _must_use_what_came(state):
        return False
    if state.speeds.decode.is_free:
        return False  # what nobody has timed yet counts as free; the first chunk tells
    if sum(_seconds_to_sufficient_levels(state)) < state.compute_seconds_left():
        return False  # all will be loaded before the model ends its chunk, which will not be needed
    loss = 0.0
    for i, (chunk, progress) in enumerate(zip(state.chunks, state.progress, strict=True)):
        is_computing = state.computing is not None and state.computing.chunk == i
        level = max(chunk.usable_level(progress.arrived), progress.decoded_level)
        if level and not progress.is_computed:
            loss += chunk.loss[level - 1]
        elif not progress.is_computed and not is_computing and state.can_be_loaded(i):
            return True
    if loss <= state.objective.target_loss or state.elapsed_seconds >= latest_start:
        return False
    is_improving = state.computing is not None and state.elapsed_seconds + state.compute_seconds_left() <= latest_start
    return is_loading or is_improving


def _choose_compute(state: LoadState, end_seconds: float) -> int | None:
    """Return the chunk that the idle model computes next.

    While a chunk is missing, the model is never idle: computing all chunks in order is what text alone would do. A
    chunk that no file can give any more is computed as soon as all before it are ready. When nothing is missing,
    only what is done in time makes the cache better.
    """
    missing = state.first_not_ready()
    if missing < len(state.chunks) and not state.can_be_loaded(missing):
        return state.chunk_to_compute(missing)
    front = state.first_not_computed()
    if front == len(state.chunks) or _must_use_what_came(state):
        return None
    if missing < len(state.chunks) or state.elapsed_seconds + state.prefill_seconds(front) <= end_seconds:
        return front
    return None


def _must_use_what_came(state: LoadState) -> bool:
    """Tell whether all that is not ready has arrived, and it is too late to compute it in order instead.

    It would be in order if the model now went over chunks that are decoded already to one that is not.
    """
    front, missing = state.first_not_computed(), state.first_not_ready()
    if state.computing is not None or not front < missing < len(state.chunks):
        return False
    not_ready = [i for i, progress in enumerate(state.progress) if not progress.is_ready]
    if not all(state.chunks[i].usable_level(state.progress[i].arrived) for i in not_ready):
        return False
    seconds = state.decode_seconds_left() + sum(state.prefill_seconds(i) for i in range(front, len(state.chunks)))
    return state.elapsed_seconds + seconds > _latest_end_against_text(state)


def _choose_decode(
    state: LoadState, end_seconds: float, fetches: Sequence[Fetch], *, only_sufficient: bool
) -> Decode | None:
    """Return what the idle decoder does next: chunks that are not ready, from the back; then the largest gain in loss.

    A chunk is decoded only where that costs the model no more time than computing the chunk would, or has left, and
    where the end that then comes is none that text alone would have come to before.
    """
    best: tuple[float, int, Decode] | None = None
    is_loading = bool(fetches or state.in_flight)
    speed = state.speeds.decode
    compute_seconds_left = state.compute_seconds_left()
    loading_pays = _loading_pays(state)
    for i, (chunk, progress) in enumerate(zip(state.chunks, state.progress, strict=True)):
        level = chunk.usable_level(progress.arrived)
        if progress.is_computed or level <= progress.decoded_level:
            continue
        if state.is_whole_only and not state.can_be_loaded(i):
            continue  # it will be computed
        if only_sufficient and level < _sufficient_level(state, i):
            continue
        seconds = speed.seconds(chunk, level)
        if state.computing is not None and state.computing.chunk == i:
            if seconds + _seconds_to_end(state) > compute_seconds_left:
                continue
        elif seconds * speed.compute_slowdown > state.prefill_seconds(i):
            continue
        if not progress.is_ready:
            is_premature = level < _sufficient_level(state, i) and (
                _refinement_is_near(state, end_seconds)
                or _own_refinement_is_near(state, i, fetches, seconds, end_seconds)
            )
            if not loading_pays or (is_loading and is_premature):
                continue
            gain = float("inf")
        else:
            if not state.is_complete or state.elapsed_seconds + seconds > end_seconds:
                continue
            # The model, once begun, is not delayed beyond the end.
            computed = state.elapsed_seconds + compute_seconds_left
            if computed <= end_seconds < computed + seconds * speed.compute_slowdown and state.computing is not None:
                continue
            gain = (chunk.loss[progress.decoded_level - 1] - chunk.loss[level - 1]) / max(seconds, 1e-9)
        if best is None or (gain, i) > best[:2]:
            best = (gain, i, Decode(i, level))
    return best[2] if best else None


def _seconds_to_end(state: LoadState) -> float:
    """Return the seconds from a complete cache to the first token, should the model be in the middle of something."""
    return state.speeds.first_token_seconds + state.speeds.stop_seconds


def _loading_pays(state: LoadState) -> bool:
    """Tell whether what has arrived, once decoded, leads to an end no later than computing everything would.

    All that has arrived is decoded, all that has not is computed, and the model then turns to the question.
    """
    seconds = (
        state.elapsed_seconds + state.compute_seconds_left() + state.decode_seconds_left() + _seconds_to_end(state)
    )
    computed: list[int] = []
    for i, (chunk, progress) in enumerate(zip(state.chunks, state.progress, strict=True)):
        level = chunk.usable_level(progress.arrived)
        if progress.is_ready or (state.computing is not None and state.computing.chunk == i):
            continue
        if state.decoding is not None and state.decoding.chunk == i:
            continue
        if level:
            seconds += state.speeds.decode.seconds(chunk, level) * state.speeds.decode.compute_slowdown
        else:
            computed.append(i)
    seconds += state.prefill_seconds_of(computed)
    return seconds <= _latest_end_against_text(state)


def _sufficient_level(state: LoadState, chunk: int) -> int:
    """Return the smallest level with which the chunk has no more than its part of the target loss; else its best."""
    levels = state.chunks[chunk]
    part = state.objective.target_loss * levels.num_tokens / state.chunks[-1].end_token
    return next((n for n, loss in enumerate(levels.loss, 1) if loss <= part), levels.num_levels)


def _refinement_is_near(state: LoadState, end_seconds: float) -> bool:
    """Tell whether what lacks of all sufficient levels comes in less time than decoding twice would cost.

    Decoding waits then. It does not while nothing comes, nothing is known or the deadline is too near.
    """
    seconds, decode_seconds = _seconds_to_sufficient_levels(state)
    return seconds < decode_seconds and state.elapsed_seconds + seconds + decode_seconds < end_seconds


def _own_refinement_is_near(
    state: LoadState, chunk: int, fetches: Sequence[Fetch], decode_seconds: float, end_seconds: float
) -> bool:
    """Tell whether a file of the chunk is in flight or requested now, and here before the chunk would be decoded.

    It may come late: then there must be time left to decode what is here.
    """
    num_bytes = sum(state.chunks[fetch.chunk].file_bytes[fetch.level - 1] for fetch in fetches)
    is_coming = any(coming.chunk == chunk for coming in (*state.in_flight, *fetches))
    seconds = _arrival_seconds(state, num_bytes)
    is_near = is_coming and bool(recent_throughput(state)) and seconds < decode_seconds
    return is_near and state.elapsed_seconds + seconds + 2 * decode_seconds < end_seconds


def _seconds_to_sufficient_levels(state: LoadState) -> tuple[float, float]:
    """Return how long it takes to load the sufficient levels of all that is not computed, and how long to decode them.

    The first is infinite where nothing comes or nothing is known.
    """
    num_bytes = _bytes_in_flight(state)
    decode_seconds = 0.0
    for i, (chunk, progress) in enumerate(zip(state.chunks, state.progress, strict=True)):
        if progress.is_computed or not chunk.num_levels:
            continue
        level = _sufficient_level(state, i)
        expected = state.expected_files(i)
        num_bytes += sum(chunk.file_bytes[n - 1] for n in chunk.files_of(level) if n not in expected)
        if progress.decoded_level < level:
            decode_seconds += state.speeds.decode.seconds(chunk, level)
    throughput = recent_throughput(state)
    return (num_bytes / throughput if throughput else float("inf")), decode_seconds


def _choose_fetches(state: LoadState, end_seconds: float) -> Iterator[Fetch]:
    """Yield as many requests as there are free connections: what covers chunks first, then what refines them."""
    num_free = state.num_free_connections
    if num_free == 0:
        return
    candidates = _covering_fetches(state, end_seconds)
    if not candidates:
        candidates = _refining_fetches(state, end_seconds) or _insuring_fetches(state)
    yield from candidates[:num_free]


def _covering_fetches(state: LoadState, end_seconds: float) -> list[Fetch]:
    """Return files of chunks that nothing covers, and of those that shall be complete before, from the back.

    None when every chunk is covered. With independent levels each chunk has one file; with embedded ones, the files
    of a chunk follow each other where the plan has more than the smallest for it.
    """
    waiting = [i for i in range(len(state.chunks)) if not state.progress[i].is_computed and _is_worth_loading(state, i)]
    uncovered = [i for i in waiting if not _is_covered(state, i)]
    computing = state.computing.chunk if state.computing is not None else None
    if computing in uncovered and not _wins_race(state):
        uncovered.remove(computing)
    if not uncovered:
        return []
    if all(state.chunks[i].is_embedded for i in waiting):
        waiting = [i for i in waiting if i != computing or i in uncovered]
    else:
        waiting = uncovered
    levels = plan_levels(state, waiting, end_seconds)
    found = []
    for i in reversed(waiting):
        expected = state.expected_files(i)
        files = [n for n in state.chunks[i].files_of(levels[i]) if n not in expected]
        if files and levels[i] > state.progress[i].decoded_level:
            found.append(Fetch(i, files[0]))
    return found


def _insuring_fetches(state: LoadState) -> list[Fetch]:
    """Return the file of the chunk that the model computes now: the link is idle, and the model may be late."""
    i = state.computing.chunk if state.computing is not None else None
    if i is None or _is_covered(state, i) or not _is_worth_loading(state, i):
        return []
    files = state.chunks[i].files_of(lowest_level(state, i))
    return [Fetch(i, next(n for n in files if n not in state.expected_files(i)))]


def _is_worth_loading(state: LoadState, chunk: int) -> bool:
    """Tell whether some level of the chunk can be had, and decoding it delays the model less than computing it."""
    speed = state.speeds.decode
    decode_seconds = speed.compute_slowdown * speed.seconds(state.chunks[chunk], 1) if state.chunks[chunk].loss else 0.0
    return state.can_be_loaded(chunk) and decode_seconds <= state.prefill_seconds(chunk)


def _is_covered(state: LoadState, chunk: int) -> bool:
    """Tell whether the files of some level of `chunk` are here or on their way."""
    return state.progress[chunk].is_ready or state.chunks[chunk].usable_level(state.expected_files(chunk)) > 0


def _wins_race(state: LoadState) -> bool:
    """Tell whether the chunk that the model computes now would be loaded sooner; yes while no throughput is known."""
    assert state.computing is not None
    chunk = state.chunks[state.computing.chunk]
    level = chunk.obtainable_levels(state.progress[state.computing.chunk].missing)[0]
    seconds = _arrival_seconds(state, chunk.bytes_of(level)) + state.speeds.decode.seconds(chunk, level)
    return seconds + _seconds_to_end(state) < state.compute_seconds_left()


def _arrival_seconds(state: LoadState, num_bytes: int) -> float:
    """Return in how many seconds `num_bytes` requested now are expected, after all that is in flight."""
    throughput = recent_throughput(state)
    if throughput is None:
        return 0.0
    return (_bytes_in_flight(state) + num_bytes) / throughput if throughput > 0 else float("inf")


def _bytes_in_flight(state: LoadState) -> int:
    return sum(state.chunks[t.chunk].file_bytes[t.level - 1] - t.num_bytes for t in state.in_flight)


def _refining_fetches(state: LoadState, end_seconds: float) -> list[Fetch]:
    """Return the files that lower the loss of covered chunks, by loss reduction per byte, ties from the back.

    Only those that can be here and decoded in time, and none once what is on its way is good enough. Where it is so
    only with the chunk that the model computes now, files count that come before that is done.
    """
    target = state.objective.target_loss
    if _loss_of_what_is_coming(state, with_computing=False) <= target:
        return []
    computing = state.computing.chunk if state.computing is not None else None
    if computing is not None and _loss_of_what_is_coming(state, with_computing=True) <= target:
        end_seconds = min(end_seconds, state.elapsed_seconds + state.compute_seconds_left())
        computing = None
    found: list[tuple[float, int, Fetch]] = []
    for i, (chunk, progress) in enumerate(zip(state.chunks, state.progress, strict=True)):
        if progress.is_computed or i == computing:
            continue
        expected = state.expected_files(i)
        current = max(chunk.usable_level(expected), progress.decoded_level)
        for level in chunk.obtainable_levels(progress.missing):
            if current == 0 or level <= current:
                continue
            files = [n for n in chunk.files_of(level) if n not in expected]
            num_bytes = sum(chunk.file_bytes[n - 1] for n in files)
            gain = chunk.loss[current - 1] - chunk.loss[level - 1]
            seconds = _arrival_seconds(state, num_bytes) + state.speeds.decode.seconds(chunk, level)
            if gain > 0 and state.elapsed_seconds + seconds <= end_seconds:
                found.append((gain / num_bytes, i, Fetch(i, files[0])))
    found.sort(key=lambda candidate: candidate[:2], reverse=True)
    best_of_chunk: dict[int, Fetch] = {}
    for _, i, fetch in found:
        best_of_chunk.setdefault(i, fetch)
    return list(best_of_chunk.values())


def _loss_of_what_is_coming(state: LoadState, *, with_computing: bool) -> float:
    """Return the expected loss when all that is here or in flight is decoded, and the chunk under way is computed."""
    total = 0.0
    for i, (chunk, progress) in enumerate(zip(state.chunks, state.progress, strict=True)):
        is_computing = with_computing and state.computing is not None and state.computing.chunk == i
        level = max(chunk.usable_level(state.expected_files(i)), progress.decoded_level)
        if not progress.is_computed and not is_computing and level:
            total += chunk.loss[level - 1]
    return total


def _something_running_improves(state: LoadState, end_seconds: float) -> bool:
    """Tell whether what is computed, decoded or in flight now makes a complete cache better before `end_seconds`."""
    now = state.elapsed_seconds
    if now >= end_seconds:
        return False
    if state.computing is not None and now + state.compute_seconds_left() <= end_seconds:
        return True
    if state.decoding is not None and now + state.decode_seconds_left() <= end_seconds:
        return True
    for transfer in state.in_flight:
        chunk = state.chunks[transfer.chunk]
        level = chunk.usable_level(state.expected_files(transfer.chunk))
        if level <= state.progress[transfer.chunk].decoded_level or state.progress[transfer.chunk].is_computed:
            continue
        if now + _arrival_seconds(state, 0) + state.speeds.decode.seconds(chunk, level) <= end_seconds:
            return True
    return False


def _useless_requests(state: LoadState) -> Iterator[Fetch]:
    """Yield the requests in flight for chunks that have been computed meanwhile, or will have to be."""
    for transfer in state.in_flight:
        will_be_computed = state.is_whole_only and not state.can_be_loaded(transfer.chunk)
        if state.progress[transfer.chunk].is_computed or will_be_computed:
            yield Fetch(transfer.chunk, transfer.level)
