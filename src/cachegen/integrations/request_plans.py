"""What an engine's scheduler asks of a store of blocks: how much of a prompt is there, what to load, what to save.

A prompt is looked up by a thread; until the answer is there the request is not scheduled, at most `lookup_seconds`.
A request is loaded once at most: what could not be loaded is computed, whatever else happens to it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

from cachegen.errors import StoreError
from cachegen.integrations.block_codec import miss_reason
from cachegen.integrations.block_store import BlockStore, Namespace, chain_hashes, count_prefix
from cachegen.integrations.block_transfers import BlockToLoad, LoadTask, SaveTask
from cachegen.integrations.counters import Counters
from cachegen.integrations.load_policy import LoadPolicy

logger = logging.getLogger(__name__)

_LOOKUP_THREADS = 4
_POLL_SECONDS = 0.005


@dataclass
class StepPlan:
    """What the workers are to do beside one step of the engine.

    Attributes:
        loads, saves: to be started before and after the step.
        num_tokens: that the step computes, for prompts and answers.
        num_prompt_tokens: for prompts.
    """

    loads: list[LoadTask] = field(default_factory=list)
    saves: list[SaveTask] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0


@dataclass
class _Plan:
    """Of one request.

    Attributes:
        num_tokens: of the prompt.
        hashes: of the prompt's whole blocks; none where it is neither looked up nor saved.
        lookup: how many of them are there.
        decision: None until it is made.
        num_computed: tokens that the engine had when it was asked; those to be loaded come behind.
        engine_blocks: that the engine has given the request.
        loading: those of them that are or were to be loaded.
        num_loading: tokens that are being loaded.
        num_to_compute: tokens that the engine has taken on to compute.
        next_save: the first block that is not known to be in the store.
    """

    num_tokens: int
    hashes: list[bytes]
    give_up: float
    lookup: Future[int] | None = None
    decision: str | None = None
    num_computed: int = 0
    engine_blocks: list[int] = field(default_factory=list)
    loading: set[int] = field(default_factory=set)
    num_loading: int = 0
    num_to_compute: int = 0
    next_save: int = 0


class RequestPlans:
    """The requests of one scheduler; called by its thread alone.

    Attributes:
        counters: `tokens:computed` (of prompts); `found` blocks; `missed:absent`, `missed:late`, `missed:outage` of
            lookups; `decided:load`, `decided:compute` (it is predicted to be sooner), `decided:nothing` (no more is in
            the store than in the engine), `decided:skip` (a kind of request that is left alone); `seconds:lookup`.
    """

    def __init__(
        self,
        name: str,
        store: BlockStore,
        namespace: Namespace,
        block_tokens: int,
        engine_block_tokens: int,
        policy: LoadPolicy,
        counters: Counters,
        *,
        loads: bool = True,
        saves: bool = True,
        lookup_seconds: float = 1.0,
    ) -> None:
        self._name, self._store, self._namespace = name, store, namespace
        self._block_tokens, self._engine_block_tokens = block_tokens, engine_block_tokens
        self._policy, self._loads, self._saves, self._lookup_seconds = policy, loads, saves, lookup_seconds
        self._plans: dict[str, _Plan] = {}
        self._pending: list[LoadTask] = []
        self._lookups = ThreadPoolExecutor(_LOOKUP_THREADS, "cachegen-lookup")
        self.counters = counters

    def begin(self, request_id: str, token_ids: Sequence[int] | None, num_tokens: int, salt: str = "") -> None:
        """Take note of a request and start to look it up.

        Args:
            token_ids: of the prompt; None for a request that must be left alone, since more than its tokens says what
                its keys and values are.
        """
        if request_id in self._plans:
            return
        hashes = [] if token_ids is None else chain_hashes(token_ids, self._block_tokens, salt)
        plan = _Plan(num_tokens, hashes, time.monotonic() + self._lookup_seconds)
        self._plans[request_id] = plan
        if token_ids is None:
            plan.decision = "skip"
            self.counters.add_for("decided", "skip")
        elif not hashes or not self._loads:
            plan.decision = "nothing"
        else:
            plan.lookup = self._lookups.submit(self._look_up, hashes)

    def match(self, request_id: str, num_computed: int) -> int | None:
        """Return how many tokens behind the first `num_computed` are to be loaded; None where that is not known yet."""
        plan = self._plans.get(request_id)
        if plan is None or plan.decision not in (None, "load") or plan.loading:
            return 0
        if plan.lookup is not None:
            try:
                num_found = plan.lookup.result(_POLL_SECONDS)
            except (FutureTimeoutError, TimeoutError):
                if time.monotonic() < plan.give_up:
                    return None
                num_found = self._miss(plan, StoreError(f"no answer in {self._lookup_seconds} s", is_too_slow=True))
            except Exception as error:
                num_found = self._miss(plan, error)
            else:
                if num_found < len(plan.hashes):
                    self.counters.add_for("missed", "absent", len(plan.hashes) - num_found)
            self.counters.add(found=num_found)
            plan.next_save, plan.lookup = num_found, None
        num_new = plan.next_save * self._block_tokens - num_computed
        if num_new <= 0:
            return 0
        if plan.decision is None:
            others = [one for one in self._plans.values() if one is not plan]
            num_loading, num_computing = sum(o.num_loading for o in others), sum(o.num_to_compute for o in others)
            plan.decision = "load" if self._policy.loads(num_new, num_loading, num_computing) else "compute"
            if plan.decision == "compute":
                self.counters.add_for("decided", "compute")
                return 0
        plan.num_computed = num_computed
        return num_new

    def allocate(self, request_id: str, engine_blocks: Sequence[int], num_external: int) -> None:
        """Take note of a request's blocks, of which those behind the first `num_computed` are to be loaded.

        Args:
            num_external: tokens to be loaded, as `match` said; 0 where the engine computes them.
        """
        plan = self._plans.get(request_id)
        if plan is None:
            return
        plan.engine_blocks = list(engine_blocks)
        plan.num_to_compute = plan.num_tokens - plan.num_computed - num_external
        if num_external <= 0:
            if plan.decision is None:
                plan.decision = "nothing"
                self.counters.add_for("decided", "nothing")
            return
        per_block = self._block_tokens // self._engine_block_tokens
        start = plan.num_computed // self._engine_block_tokens
        stop = start + num_external // self._engine_block_tokens
        blocks: list[BlockToLoad] = []
        for index in range(start // per_block, -(-stop // per_block)):
            first = max(index * per_block, start)
            blocks.append(BlockToLoad(plan.hashes[index], plan.engine_blocks[first : (index + 1) * per_block]))
        plan.loading = {block for load in blocks for block in load.engine_blocks}
        plan.num_loading = num_external
        rate = self._policy.patience(1)
        self._pending.append(LoadTask(request_id, blocks, rate))
        self.counters.add_for("decided", "load")

    def step(
        self, computed: Mapping[str, tuple[int, int]], new_blocks: Mapping[str, tuple[list[int], bool]]
    ) -> StepPlan:
        """Return what goes with the next step.

        Args:
            computed: per scheduled request, the tokens it has and those that the step computes.
            new_blocks: per scheduled request, engine blocks, and whether they are all it has or come behind the others.
        """
        plan = StepPlan(self._pending)
        self._pending = []
        for request_id, (blocks, are_all) in new_blocks.items():
            if request := self._plans.get(request_id):
                request.engine_blocks = list(blocks) if are_all else request.engine_blocks + list(blocks)
        for request_id, (num_before, num_new) in computed.items():
            plan.num_tokens += num_new
            if request := self._plans.get(request_id):
                plan.num_prompt_tokens += max(0, min(num_new, request.num_tokens - num_before))
                request.num_to_compute = max(0, request.num_tokens - num_before - num_new)
                if self._saves:
                    plan.saves += self._list_saves(request, num_before + num_new)
        self.counters.add_for("tokens", "computed", plan.num_prompt_tokens)
        return plan

    def end_loads(self, request_ids: Collection[str]) -> None:
        """Take note of loads that have come to an end."""
        for request_id in request_ids:
            if plan := self._plans.get(request_id):
                plan.num_loading = 0

    def take_invalid(self, engine_blocks: Collection[int]) -> None:
        """Take note of engine blocks that were not loaded: they will be computed, and then saved."""
        for plan in self._plans.values():
            if not plan.loading.isdisjoint(engine_blocks):
                plan.next_save = 0  # those that are there are left there

    def finish(self, request_id: str) -> None:
        """Forget a request."""
        plan = self._plans.pop(request_id, None)
        if plan is not None and plan.lookup is not None:
            plan.lookup.cancel()

    def close(self) -> None:
        """End the threads."""
        self._lookups.shutdown(wait=False, cancel_futures=True)

    def _look_up(self, hashes: Sequence[bytes]) -> int:
        start = time.perf_counter()
        try:
            names = [self._namespace.block_name(block_hash) for block_hash in hashes]
            return count_prefix(lambda index: self._store.has(names[index]), len(names))
        finally:
            self.counters.add_for("seconds", "lookup", time.perf_counter() - start)

    def _miss(self, plan: _Plan, error: Exception) -> int:
        """Count and log a lookup without an answer."""
        reason = miss_reason(error)
        self.counters.add_for("missed", reason, len(plan.hashes))
        problem = " ".join(str(error).split()) or type(error).__name__
        logger.warning("%s: a prompt was not looked up (%s) and is computed: %s", self._name, reason, problem)
        return 0

    def _list_saves(self, plan: _Plan, num_computed: int) -> list[SaveTask]:
        per_block = self._block_tokens // self._engine_block_tokens
        stop = min(min(num_computed, plan.num_tokens) // self._block_tokens, len(plan.hashes))
        saves = [
            SaveTask(
                plan.hashes[index],
                plan.engine_blocks[index * per_block : (index + 1) * per_block],
                index * self._block_tokens,
            )
            for index in range(plan.next_save, stop)
        ]
        plan.next_save = max(plan.next_save, stop)
        return saves
