"""The connector of vLLM: prefixes of prompts from a store of blocks, and into it; see docs/vllm.md.

Source: vllm 0.32.0, `vllm.distributed.kv_transfer.kv_connector.v1.base`.
"""

# The package is in no environment but its own: see `make test-doors`.
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from cachegen.errors import ConfigError, InputError
from cachegen.fields import Fields, refuse_config
from cachegen.integrations.block_codec import BlockCodec, BlockSettings, read_settings
from cachegen.integrations.block_store import BlockStore, Namespace
from cachegen.integrations.block_transfers import BlockTransfers
from cachegen.integrations.counters import Counters
from cachegen.integrations.load_policy import MODES, LoadPolicy, Rates
from cachegen.integrations.metrics import METRICS, split_counts
from cachegen.integrations.paged_caches import PagedCache, find_order
from cachegen.integrations.request_plans import RequestPlans, StepPlan
from cachegen.pipeline.fingerprint import compute_fingerprint

logger = logging.getLogger("vllm.cachegen")

NAME = "connector cachegen"
"""Names the configuration in messages."""
BLOCK_TOKENS = 256
"""The default for `block_tokens`, or the least multiple of the engine's blocks above it."""
DEFAULT_METHOD = "lossless"
"""The default for `method`: the same keys and values with the connector as without."""
MIN_STEP_TOKENS = 64
"""Steps that compute fewer tokens of prompts say nothing about the speed of prefill."""
_IDLE_SECONDS = 0.005
_CLOSE_SECONDS = 30.0
_OWN_FIELDS = ("store", "block_tokens", "policy", "lookup_seconds", "max_waiting_mb", "model_fingerprint")


@dataclass(frozen=True)
class ConnectorOptions:
    """What `kv_connector_extra_config` says, checked.

    Attributes:
        store: a folder or a URL.
        block_tokens: of the store's blocks.
        policy: of `load_policy.MODES`.
        lookup_seconds: that a request waits at most to learn what the store has of it.
        max_waiting_bytes: of computed blocks that wait to be stored.
        model_fingerprint: None computes it from the checkpoint.
        codec: how blocks are coded.
    """

    store: str
    block_tokens: int
    policy: str
    lookup_seconds: float
    max_waiting_bytes: int
    model_fingerprint: str | None
    codec: BlockSettings


def read_options(given: Mapping[str, Any], engine_block_tokens: int, head_dim: int) -> ConnectorOptions:
    """Read the object `kv_connector_extra_config`.

    Args:
        given: the fields of `ConnectorOptions` (`max_waiting_mb` for the bytes), and those of `read_settings`.
        engine_block_tokens: tokens of an engine's block.
        head_dim: of the model, for methods without a profile.

    Raises:
        ConfigError: naming the field that is wrong.
        InputError, BitstreamError: as `read_settings`.
    """
    fields = Fields(dict(given), refuse_config(NAME), reads_digits=True)
    block_tokens = -(-BLOCK_TOKENS // engine_block_tokens) * engine_block_tokens
    if "block_tokens" in fields:
        block_tokens = fields.integer("block_tokens", 1, 1 << 16)
    if block_tokens % engine_block_tokens:
        raise ConfigError(f"{NAME}: block_tokens must be a multiple of {engine_block_tokens}, got {block_tokens}")
    policy = fields.text("policy") if "policy" in fields else MODES[0]
    if policy not in MODES:
        raise ConfigError(f"{NAME}: policy must be one of {', '.join(MODES)}, got {policy}")
    codec = {name: value for name, value in given.items() if name not in _OWN_FIELDS}
    if "config" not in codec:
        codec.setdefault("method", DEFAULT_METHOD)
    if "profile" not in codec:
        codec.setdefault("head_dim", head_dim)
    return ConnectorOptions(
        store=fields.text("store"),
        block_tokens=block_tokens,
        policy=policy,
        lookup_seconds=fields.number("lookup_seconds", 0, 3600) if "lookup_seconds" in fields else 1.0,
        max_waiting_bytes=(fields.integer("max_waiting_mb", 1, 1 << 20) if "max_waiting_mb" in fields else 1024) << 20,
        model_fingerprint=fields.text("model_fingerprint") if "model_fingerprint" in fields else None,
        codec=read_settings({"threads": 1, **codec}, NAME),
    )


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler tells the workers beside a step."""

    plan: StepPlan = field(default_factory=StepPlan)


@dataclass
class WorkerRates(KVConnectorWorkerMetadata):
    """What the workers tell the scheduler: the slowest of them counts."""

    rates: Rates = field(default_factory=Rates)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerRates:
        """Return the larger of each rate."""
        assert isinstance(other, WorkerRates)
        pairs = ((self.rates.load, other.rates.load), (self.rates.compute, other.rates.compute))
        return WorkerRates(Rates(*(max((rate for rate in pair if rate is not None), default=None) for pair in pairs)))


class ConnectorStats(KVConnectorStats):
    """By how much counts have grown, by the names of `Counters`."""

    def reset(self) -> None:
        """Forget all."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """Add another's."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return them for a line of the log."""
        return {name: round(amount, 3) for name, amount in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Tell whether nothing has grown."""
        return not self.data


class ConnectorMetrics(KVConnectorPromMetrics):
    """The counts at the engine's `/metrics`, under its prefix, by which it also takes them away again."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            metric.name: self._counter_cls(
                name=f"vllm:{metric.name}",
                documentation=metric.help,
                labelnames=[*labelnames, *([metric.label] if metric.label else [])],
            )
            for metric in METRICS.values()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what has grown."""
        values = self.per_engine_labelvalues[engine_idx]
        for metric, reason, amount in split_counts(transfer_stats_data):
            self._counters[metric.name].labels(*values, *([reason] if metric.label else [])).inc(amount)


class CacheGenConnector(KVConnectorBase_V1):
    """One half in the scheduler, one in each worker; they talk by what vLLM carries between them."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Read the configuration and open the store.

        Raises:
            ConfigError: a field is wrong, or the engine keeps its cache in a way that is not supported.
            InputError: the model has no fingerprint.
            StoreError, OutputError: the store cannot be opened.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            raise ConfigError(f'{NAME}: kv_load_failure_policy must be "recompute": a block may always be missing')
        self._spec = _single_spec(kv_cache_config)
        self._options = read_options(transfer.kv_connector_extra_config, self._spec.block_size, self._spec.head_size)
        self._counters = Counters()
        self._store = BlockStore(self._options.store, create="://" not in self._options.store)
        self._fingerprint = self._options.model_fingerprint or _fingerprint_of(vllm_config)
        self._plans: RequestPlans | None = None
        self._transfers: BlockTransfers | None = None
        self._rates = Rates()
        self._step_start = 0.0
        self._saves, self._loads = transfer.is_kv_producer, transfer.is_kv_consumer
        self._policy = LoadPolicy(self._options.policy)
        if role == KVConnectorRole.SCHEDULER:
            self._plans = RequestPlans(
                NAME,
                self._store,
                self._namespace(0, 0),
                self._options.block_tokens,
                self._spec.block_size,
                self._policy,
                self._counters,
                loads=self._loads,
                saves=self._saves,
                lookup_seconds=self._options.lookup_seconds,
            )
            logger.info("%s: %s, %s", NAME, self._store.url, self._namespace(0, 0).description)

    def _namespace(self, tp_rank: int, pp_rank: int) -> Namespace:
        parallel, model = self._vllm_config.parallel_config, self._vllm_config.model_config
        return Namespace(
            model=self._fingerprint,
            # What may change keys and values without changing the checkpoint.
            quantization=str(model.quantization),
            overrides=repr(model.hf_overrides),
            revision=str(model.revision),
            weights_dtype=str(model.dtype),
            dtype=str(self._spec.dtype),
            num_heads=self._spec.num_kv_heads,
            head_dim=self._spec.head_size,
            block_tokens=self._options.block_tokens,
            tensor_parallel=[tp_rank, parallel.tensor_parallel_size],
            pipeline_parallel=[pp_rank, parallel.pipeline_parallel_size],
            codec=self._options.codec.codec_hash.hex(),
            method=self._options.codec.method,
        )

    # --- in the worker ------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find out how the engine keeps its cache, and get ready to load and save.

        Raises:
            ConfigError: it is kept in an unknown way.
        """
        names = sorted(self._kv_cache_config.kv_cache_groups[0].layer_names, key=_layer_number)
        layers = [kv_caches[name] for name in names]
        attention = self._vllm_config.compilation_config.static_forward_context[names[0]]
        order = _probe(attention, layers[0], self._spec)
        caches = PagedCache(layers, order, self._spec.block_size)
        parallel = self._vllm_config.parallel_config
        rank = parallel.rank % (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
        self._transfers = BlockTransfers(
            NAME,
            caches,
            self._options.block_tokens,
            self._spec.block_size,
            BlockCodec(self._options.codec, self._counters),
            self._store,
            self._namespace(rank % parallel.tensor_parallel_size, rank // parallel.tensor_parallel_size),
            self._options.max_waiting_bytes,
            _processors_of_engine(),
        )

    @property
    def transfers(self) -> BlockTransfers:
        """The worker's half."""
        if self._transfers is None:
            raise RuntimeError(f"{NAME}: the engine has not registered its caches")
        return self._transfers

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take what the scheduler says, before the step."""
        super().bind_connector_metadata(connector_metadata)
        self._step_start = time.perf_counter()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start to load; requests are not in a step before `get_transfer_results` has named them."""
        for task in self._step_plan().loads:
            self.transfers.load(task)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: what a step needs was loaded before it."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: a block is saved with all its layers."""

    def wait_for_save(self) -> None:
        """Copy the blocks that this step has completed; they are encoded and stored later."""
        plan = self._step_plan()
        if plan.num_prompt_tokens >= MIN_STEP_TOKENS:
            seconds = time.perf_counter() - self._step_start
            self.transfers.rates.add_compute(seconds, plan.num_prompt_tokens)
        for task in plan.saves:
            self.transfers.save(task)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return the requests whose loads have ended, well or not."""
        # Nothing else to do: this thread need not take a processor from those that load.
        is_idle = self._step_plan().num_tokens == 0
        finished = self.transfers.take_finished(_IDLE_SECONDS if is_idle else 0)
        self._invalid_blocks = finished.invalid_blocks
        return KVConnectorTransferResults(finished_recving=finished.request_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the engine's blocks that hold nothing, of the requests that `get_transfer_results` has just named."""
        return self._invalid_blocks

    def build_connector_worker_meta(self) -> WorkerRates:
        """Return what was measured."""
        return WorkerRates(self.transfers.rates)

    def _step_plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.plan

    # --- in the scheduler ---------------------------------------------------------------------------------------------

    @property
    def plans(self) -> RequestPlans:
        """The scheduler's half."""
        if self._plans is None:
            raise RuntimeError(f"{NAME}: this is not the scheduler's half")
        return self._plans

    def on_new_request(self, request: Any) -> None:
        """Start to look a request up."""
        has_more = request.mm_features or request.lora_request or request.prompt_embeds is not None or request.resumable
        tokens = None if has_more or request.prompt_token_ids is None else list(request.prompt_token_ids)
        self.plans.begin(request.request_id, tokens, request.num_prompt_tokens, request.cache_salt or "")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens are to be loaded, and that they come between steps."""
        self.on_new_request(request)
        num_matched = self.plans.match(request.request_id, num_computed_tokens)
        return num_matched, bool(num_matched)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Take note of a request's blocks."""
        self.plans.allocate(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Return what the workers are to do beside the step."""
        scheduled: dict[str, int] = scheduler_output.num_scheduled_tokens
        computed: dict[str, tuple[int, int]] = {}
        blocks: dict[str, tuple[list[int], bool]] = {}
        for request in scheduler_output.scheduled_new_reqs:
            computed[request.req_id] = request.num_computed_tokens, scheduled[request.req_id]
            blocks[request.req_id] = request.block_ids[0], True
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, num_before, new in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            computed[request_id] = num_before, scheduled[request_id]
            if new is not None:
                blocks[request_id] = new[0], request_id in cached.resumed_req_ids
        return StepMetadata(self.plans.step(computed, blocks))

    def update_connector_output(self, connector_output: Any) -> None:
        """Take note of what was loaded and what was not, and of what the workers have measured."""
        self.plans.end_loads(connector_output.finished_recving or ())
        if connector_output.invalid_block_ids:
            self.plans.take_invalid(connector_output.invalid_block_ids)
        measured = connector_output.kv_connector_worker_meta
        if isinstance(measured, WorkerRates):
            self._policy.rates = measured.rates

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; its blocks were copied when they were computed."""
        self.plans.finish(request.request_id)
        return False, None

    # --- in both ------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """Return by how much the counts have grown."""
        grown = self._counters.take()
        return ConnectorStats(data=grown) if grown else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        """Return counts that came from another process."""
        return ConnectorStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ConnectorMetrics:
        """Return what puts them at `/metrics`."""
        return ConnectorMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Store what is waiting, and end."""
        if self._transfers is not None:
            self._transfers.close(_CLOSE_SECONDS)
        if self._plans is not None:
            self._plans.close()


def _single_spec(kv_cache_config: Any) -> Any:
    """Return the specification of all layers' caches.

    Raises:
        ConfigError: they are not all of plain attention, or not of one kind, or quantized.
    """
    groups = kv_cache_config.kv_cache_groups
    specs = {type(group.kv_cache_spec).__name__ for group in groups}
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        raise ConfigError(
            f"{NAME}: all layers must have plain attention of one kind, this model's have {sorted(specs)}"
        )
    spec = groups[0].kv_cache_spec
    if spec.sliding_window or spec.attention_chunk_size:
        raise ConfigError(f"{NAME}: layers with windows of attention are not supported")
    if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
        raise ConfigError(f"{NAME}: kv_cache_dtype must be auto, {spec.dtype} is not supported")
    if spec.head_size_v != spec.head_size:
        raise ConfigError(f"{NAME}: keys of {spec.head_size} and values of {spec.head_size_v} dims are not supported")
    return spec


def _probe(attention: Any, layer: torch.Tensor, spec: Any) -> torch.Tensor:
    """Have the engine's attention write a block, and return where it put what.

    Raises:
        ConfigError: it does not write as it is expected to.
    """
    page = torch.empty_like(layer[:2])

    def write(keys: torch.Tensor, values: torch.Tensor, page: torch.Tensor) -> None:
        num_tokens = page.shape[2]
        slots = torch.arange(num_tokens, 2 * num_tokens, device=page.device)
        attention.impl.do_kv_cache_update(attention, keys, values, page, slots)

    try:
        return find_order(write, page, spec.num_kv_heads, spec.head_size)
    except (InputError, AttributeError, RuntimeError, NotImplementedError, TypeError) as error:
        problem = f"the cache of {type(attention.impl).__name__} is kept in an unknown way"
        raise ConfigError(f"{NAME}: {problem}: {' '.join(str(error).split())[:200]}") from error


def _processors_of_engine() -> set[int] | None:
    """Return where threads beside the model may run; None for where this one may.

    On CPUs vLLM ties this worker to the processors that compute, and leaves others free for its own threads, which are
    in the engine's process.
    """
    if not current_platform.is_cpu() or not hasattr(os, "sched_getaffinity"):
        return None
    return os.sched_getaffinity(os.getppid())


def _layer_number(name: str) -> tuple[int, str]:
    """Return the first number in a layer's name, by which layers follow each other."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0), name


def _fingerprint_of(vllm_config: Any) -> str:
    model = vllm_config.model_config.model
    try:
        return compute_fingerprint(model, local_files_only=not os.path.isdir(model))
    except InputError as error:
        raise InputError(f"{NAME}: give model_fingerprint, any text that names the weights: {error}") from None
