"""What decoding costs a request that is being answered at the same time."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cachegen.experiments.bench import Bench
from cachegen.experiments.encodings import choose_encodings, encode, open_encoding
from cachegen.experiments.outcome import Column, Figure, Outcome, Table, Value
from cachegen.experiments.timings import CHUNK_TOKENS
from cachegen.kv_cache import KVCache, from_planes
from cachegen.pipeline.model_cache import set_length
from cachegen.pipeline.prefill import prefill, run_model

NAME = "interference"
NUM_STEPS = 24
ROUNDS = 3
_ALONE = "nothing"
_PREFILL = "prefill of the same context"


def run(bench: Bench) -> Outcome:
    """Write tokens while another thread decodes documents, or prefills them, without a pause."""
    saved, loaded = bench.load_first_cache(), bench.load_for_prefill()
    token_ids = saved.metadata.token_ids
    cache = prefill(loaded, token_ids, bench.block_size, capacity=len(token_ids) + NUM_STEPS)

    def write_tokens() -> list[float]:
        seconds, token = [], token_ids[-1:]
        for _ in range(NUM_STEPS):
            begin = time.perf_counter()
            token = run_model(loaded, cache, token, 1).argmax(-1).cpu()
            seconds.append(time.perf_counter() - begin)
        set_length(cache, len(token_ids))
        return seconds

    with tempfile.TemporaryDirectory(dir=bench.work) as place:
        work: dict[str, Callable[[], object] | None] = {_ALONE: None}
        for number, encoding in enumerate(choose_encodings(bench)):
            folder = Path(place, str(number))
            encode(bench, saved, encoding, CHUNK_TOKENS).save(folder)
            work[f"decoding of {encoding.name}"] = _decoder(bench, folder, saved.cache)
        work[_PREFILL] = lambda: prefill(loaded, token_ids, bench.block_size)
        steps: dict[str, list[float]] = {name: [] for name in work}
        done: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(ROUNDS):
            for name, beside in work.items():
                with _Repeating(beside) as repeating:
                    steps[name] += write_tokens()
                done[name] += repeating.seconds
                bench.say(f"beside {name}: {1000 * statistics.median(steps[name]):.1f} ms per token")
    alone = statistics.median(steps[_ALONE])
    rows: list[dict[str, Value]] = [
        {
            "beside": name,
            "milliseconds": 1000 * statistics.median(found),
            "slower": statistics.median(found) / alone,
            "slowest": 1000 * max(found),
            "beside_seconds": statistics.median(done[name]) if done[name] else None,
            "lost": (statistics.median(found) / alone - 1) * alone * _steps_during(done[name], found),
        }
        for name, found in steps.items()
    ]
    return Outcome(
        name=NAME,
        title="Decoding beside a running request",
        paper="Figure 14",
        question="How much slower does another request write while a context is decoded, or prefilled?",
        tables=(
            Table(
                "steps",
                "One token of a running request",
                (
                    Column("beside", "beside"),
                    Column("milliseconds", "ms per token, median", 3),
                    Column("slower", "over alone", 3),
                    Column("slowest", "ms, slowest", 3),
                    Column("beside_seconds", "what runs beside takes, s", 3),
                    Column("lost", "lost by the running request per context, s", 2),
                ),
                tuple(rows),
            ),
        ),
        figures=(Figure("Lost by the running request for each context loaded", "steps", "beside", "lost", kind="bar"),),
        notes=(
            f"A thread decodes, or prefills, the same context of {len(token_ids):,} tokens again and again, while "
            f"the main thread writes {NUM_STEPS} tokens; {ROUNDS} rounds alternate. On a CPU both share its cores: "
            f"{bench.num_threads} threads decode.",
        ),
        setting={"num_tokens": len(token_ids)},
    )


def _steps_during(seconds: list[float], steps: list[float]) -> float:
    """Return how many tokens are written while a context is loaded."""
    return statistics.median(seconds) / statistics.median(steps) if seconds else 0.0


def _decoder(bench: Bench, folder: Path, like: KVCache) -> Callable[[], object]:
    opened = open_encoding(bench, folder)
    output = from_planes([torch.empty_like(plane) for plane in like.planes])
    return lambda: opened.decode_into(output, None, opened.select_chunks(None))


class _Repeating:
    """Repeats a piece of work on a thread of its own until the block ends; None does nothing.

    Attributes:
        seconds: of each repetition that was whole.
    """

    def __init__(self, work: Callable[[], object] | None) -> None:
        self._work = work
        self._must_stop = threading.Event()
        self._failed: list[BaseException] = []
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._repeat)

    def __enter__(self) -> _Repeating:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._must_stop.set()
        self._thread.join()
        if self._failed:
            raise self._failed[0]

    def _repeat(self) -> None:
        while self._work is not None and not self._must_stop.is_set():
            begin = time.perf_counter()
            try:
                self._work()
            except Exception as error:
                self._failed.append(error)
                return
            self.seconds.append(time.perf_counter() - begin)
