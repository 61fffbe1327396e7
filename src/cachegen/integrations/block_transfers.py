"""What a worker does with a store of blocks: load a request's blocks into its cache, save those that it computed.

All of it is done by threads: fetching ahead, decoding in order, encoding and storing behind the engine's back.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import torch

from cachegen.errors import CacheGenError, StoreError
from cachegen.integrations.block_codec import BlockCodec, miss_reason
from cachegen.integrations.block_store import BlockStore, Namespace
from cachegen.integrations.counters import Counters
from cachegen.integrations.load_policy import Rates
from cachegen.integrations.paged_caches import PagedCache

logger = logging.getLogger(__name__)

_FETCHED_AHEAD = 4
_FETCH_THREADS = 4
_SAVING_WAITS_SECONDS = 10.0


@dataclass(frozen=True)
class BlockToLoad:
    """One block of the store.

    Attributes:
        block_hash: of `block_store.chain_hashes`.
        engine_blocks: the engine's blocks, in order, that take the last of its tokens; the first are there already.
    """

    block_hash: bytes
    engine_blocks: Sequence[int]


@dataclass(frozen=True)
class LoadTask:
    """The blocks of one request, in the order of its tokens.

    Attributes:
        compute_rate: seconds per token of prefill: no block is waited for longer than computing it and all behind it
            takes. None waits as long as the store may take.
    """

    request_id: str
    blocks: Sequence[BlockToLoad]
    compute_rate: float | None = None


@dataclass(frozen=True)
class SaveTask:
    """One block that the engine has computed.

    Attributes:
        position: of its first token in the context.
    """

    block_hash: bytes
    engine_blocks: Sequence[int]
    position: int


@dataclass(frozen=True)
class FinishedLoads:
    """What has come to an end: requests, and those engine blocks of them that hold nothing."""

    request_ids: set[str]
    invalid_blocks: set[int]


class BlockTransfers:
    """Loads and saves blocks of one worker.

    Attributes:
        rates: `Rates.load` is kept up to date.
        counters: beside those of the codec: `read_bytes`; `tokens:loaded`; `missed:reason` of blocks that were to be
            loaded, with the reasons of `miss_reason` and `behind` one of these; `unsaved:reason`: `there`, `full` (too
            many were waiting), `outage`, `failed`; `seconds:fetch`, `seconds:store`.
    """

    def __init__(
        self,
        name: str,
        caches: PagedCache,
        block_tokens: int,
        engine_block_tokens: int,
        codec: BlockCodec,
        store: BlockStore,
        namespace: Namespace,
        max_waiting_bytes: int,
        processors: Collection[int] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            caches, store: where blocks come from and go to.
            block_tokens, engine_block_tokens: of a block of the store, and of one of the engine.
            max_waiting_bytes: of blocks that wait to be stored.
            processors: that the threads may run on; None those of the threads that start them.
        """
        self._name, self._caches, self._codec, self._store = name, caches, codec, store
        self._namespace, self._engine_block_tokens = namespace, engine_block_tokens
        self._blocks_per_block = block_tokens // engine_block_tokens
        self._max_waiting_bytes = max_waiting_bytes
        block = caches.allocate(self._blocks_per_block)
        self._block_bytes = block.nbytes
        self._max_blob_bytes = codec.max_blob_bytes([block.shape], [block.dtype])
        self._fetchers, self._loader, self._saver = (
            ThreadPoolExecutor(number, f"cachegen-{name}", _run_on, (processors,))
            for name, number in (("fetch", _FETCH_THREADS), ("load", 1), ("save", 1))
        )
        self._changed = threading.Condition()
        self._num_loading, self._is_closing = 0, False
        self._finished: list[tuple[str, set[int]]] = []
        self._waiting_bytes = 0
        self._damaged: set[bytes] = set()
        self.counters: Counters = codec.counters
        self.rates = Rates()

    # --- loading ------------------------------------------------------------------------------------------------------

    def load(self, task: LoadTask) -> None:
        """Start to load; `take_finished` says when it has ended."""
        with self._changed:
            self._num_loading += 1
        self._loader.submit(self._load, task)

    def take_finished(self, wait_seconds: float = 0) -> FinishedLoads:
        """Return the loads that have ended since the last call; waits for one that is going on if there is none."""
        with self._changed:
            if self._num_loading and not self._finished and wait_seconds:
                self._changed.wait(wait_seconds)
            finished, self._finished = self._finished, []
        return FinishedLoads({request for request, _ in finished}, set().union(*(blocks for _, blocks in finished)))

    def _load(self, task: LoadTask) -> None:
        start, num_loaded = time.perf_counter(), 0
        fetches: list[Future[bytes]] = []
        try:
            for index, block in enumerate(task.blocks):
                for ahead in task.blocks[len(fetches) : index + _FETCHED_AHEAD]:
                    fetches.append(self._fetchers.submit(self._fetch, ahead.block_hash))
                self._load_block(block, fetches[index], self._patience(task, index))
                num_loaded += 1
        except Exception as error:
            self._report(task, num_loaded, error)
        finally:
            for fetch in fetches:
                fetch.cancel()
            num_tokens = self._engine_block_tokens * sum(len(b.engine_blocks) for b in task.blocks[:num_loaded])
            self.counters.add_for("tokens", "loaded", num_tokens)
            if num_tokens and num_loaded == len(task.blocks):
                self.rates.add_load(time.perf_counter() - start, num_tokens)
            with self._changed:
                invalid = {engine_block for block in task.blocks[num_loaded:] for engine_block in block.engine_blocks}
                self._finished.append((task.request_id, invalid))
                self._num_loading -= 1
                self._changed.notify_all()

    def _patience(self, task: LoadTask, index: int) -> float | None:
        if task.compute_rate is None:
            return None
        num_left = sum(len(block.engine_blocks) for block in task.blocks[index:])
        return task.compute_rate * num_left * self._engine_block_tokens

    def _fetch(self, block_hash: bytes) -> bytes:
        start = time.perf_counter()
        try:
            blob = self._store.get(self._namespace.block_name(block_hash), self._max_blob_bytes)
        finally:
            self.counters.add_for("seconds", "fetch", time.perf_counter() - start)
        self.counters.add(read_bytes=len(blob))
        return blob

    def _load_block(self, block: BlockToLoad, fetch: Future[bytes], patience: float | None) -> None:
        try:
            blob = fetch.result(patience)
        except FutureTimeoutError:
            raise StoreError(f"did not come within {patience:.2f} s", is_too_slow=True) from None
        planes = self._caches.allocate(self._blocks_per_block)
        try:
            self._codec.decode(block.block_hash, blob, [planes])
        except Exception:
            self._damaged.add(block.block_hash)
            raise
        first = planes.shape[2] - len(block.engine_blocks) * self._engine_block_tokens
        self._caches.scatter(block.engine_blocks, planes[:, :, first:])

    def _report(self, task: LoadTask, num_loaded: int, error: Exception) -> None:
        """Count and log, on one line, what was not loaded."""
        reason = miss_reason(error)
        num_behind = len(task.blocks) - num_loaded - 1
        self.counters.add_for("missed", reason)
        if num_behind:
            self.counters.add_for("missed", "behind", num_behind)
        logger.warning(
            "%s: request %s: block %d of %d was not loaded (%s) and is computed, as are those behind it: %s: %s",
            self._name,
            task.request_id,
            num_loaded + 1,
            len(task.blocks),
            reason,
            task.blocks[num_loaded].block_hash.hex()[:12],
            " ".join(str(error).split()) or type(error).__name__,
        )

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, task: SaveTask) -> None:
        """Copy a block out of the engine's cache, and encode and store it later; skipped where too many are waiting."""
        size = self._block_bytes
        with self._changed:
            if self._waiting_bytes + size > self._max_waiting_bytes:
                self.counters.add_for("unsaved", "full")
                return
            self._waiting_bytes += size
            self._changed.notify_all()
        self._saver.submit(self._save, task, self._caches.gather(task.engine_blocks))

    def wait_for_saves(self, seconds: float) -> bool:
        """Wait until nothing is to be stored any more; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting_bytes, seconds)

    def _save(self, task: SaveTask, planes: torch.Tensor) -> None:
        try:
            is_damaged = task.block_hash in self._damaged
            if not is_damaged and self._store.has(self._namespace.block_name(task.block_hash)):
                self.counters.add_for("unsaved", "there")
                return
            self._let_loads_go_first()
            blob = self._codec.encode(task.block_hash, [planes], task.position)
            start = time.perf_counter()
            self._store.put(self._namespace, task.block_hash, blob, replace=is_damaged)
            self.counters.add_for("seconds", "store", time.perf_counter() - start)
            self._damaged.discard(task.block_hash)
        except Exception as error:
            reason = "outage" if isinstance(error, CacheGenError) else "failed"
            self.counters.add_for("unsaved", reason)
            level = logging.WARNING if reason == "failed" or "left alone" not in str(error) else logging.DEBUG
            logger.log(level, "%s: a block was not stored (%s): %s", self._name, reason, " ".join(str(error).split()))
        finally:
            with self._changed:
                self._waiting_bytes -= planes.nbytes
                self._changed.notify_all()

    def _let_loads_go_first(self) -> None:
        """Wait while requests are loaded, since encoding would take a processor from them; not where much waits."""

        def may_go_on() -> bool:
            return not self._num_loading or self._is_closing or 2 * self._waiting_bytes > self._max_waiting_bytes

        with self._changed:
            self._changed.wait_for(may_go_on, _SAVING_WAITS_SECONDS)

    def close(self, seconds: float) -> None:
        """Store what is waiting, for so many seconds at most, and end the threads."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self.wait_for_saves(seconds)
        for pool in (self._loader, self._fetchers, self._saver):
            pool.shutdown(wait=False, cancel_futures=True)


def _run_on(processors: Collection[int] | None) -> None:
    """Let this thread run on some processors, and those that it starts."""
    if processors:
        os.sched_setaffinity(0, processors)
