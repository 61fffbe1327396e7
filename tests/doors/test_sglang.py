"""The backend under SGLang's own base class and factory; `make test-door-sglang` runs this.

Without a GPU, SGLang's package and its host pools cannot be imported. So its modules of storage are imported past the
package's `__init__`, and the pool here has the layouts and the two methods of `MHATokenToKVPoolHost`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from cachegen.errors import ConfigError
from tests.fixtures.web_server import Misbehaviour, serve

pytestmark = [pytest.mark.doors, pytest.mark.filterwarnings("default")]

LAYERS, HEADS, DIM = 3, 2, 32
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


@pytest.fixture(scope="module", autouse=True)
def package():
    """SGLang's package, without what its `__init__` imports."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations is not None
    module = types.ModuleType("sglang")
    module.__path__ = list(spec.submodule_search_locations)
    sys.modules["sglang"] = module


class Pool:
    """Pages on the host, as `sglang.srt.mem_cache.pool_host.mha` keeps them (0.5.23)."""

    def __init__(self, layout: str = "layer_first", page_size: int = 64, num_pages: int = 6, seed: int | None = 0):
        self.layout, self.page_size, self.layer_num, self.head_num, self.head_dim = (
            layout,
            page_size,
            LAYERS,
            HEADS,
            DIM,
        )
        self.v_head_dim, self.dtype = DIM, torch.bfloat16
        size = num_pages * page_size
        shape = {
            "layer_first": (2, LAYERS, size, HEADS, DIM),
            "page_first": (2, size, LAYERS, HEADS, DIM),
            "page_first_direct": (2, num_pages, LAYERS, page_size, HEADS, DIM),
            "page_head": (2, num_pages, HEADS, page_size, LAYERS, DIM),
        }[layout]
        self.kv_buffer = torch.zeros(shape, dtype=self.dtype)
        if seed is not None:
            self.kv_buffer.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))

    def _part(self, index: int) -> torch.Tensor:
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, index : index + self.page_size]
        if self.layout == "page_first":
            return self.kv_buffer[:, index : index + self.page_size]
        page = index // self.page_size
        return self.kv_buffer[:, page : page + 1]

    def get_data_page(self, index: int) -> torch.Tensor:
        return self._part(index).flatten()

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(2 * LAYERS * self.page_size * HEADS * DIM, dtype=self.dtype)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        part = self._part(index)
        part.copy_(data_page.reshape(part.shape))


def make_backend(store: object, pool: Pool, **fields):
    """A backend as the cache controller makes one."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    extra = {
        "backend_name": "cachegen",
        "module_path": "cachegen.integrations.sglang",
        "class_name": "CacheGenStorage",
        "cachegen": {"store": str(store), "model_fingerprint": "m", **fields},
    }
    config = HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        is_page_first_layout=False,
        model_name="model",
        extra_config=extra,
    )
    backend = StorageBackendFactory.create_backend("dynamic", config, pool)
    backend.register_mem_pool_host(pool)
    return backend


def back_up(backend, pool: Pool, keys: list[str]) -> bool:
    """What `_generic_page_set` of the controller does."""
    return backend.batch_set(keys, [pool.get_data_page(i * pool.page_size) for i in range(len(keys))])


def prefetch(backend, pool: Pool, keys: list[str]) -> int:
    """What `_generic_page_get` does; returns the pages that came."""
    pages = backend.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
    for index, page in enumerate(pages):
        if page is None:
            return index
        pool.set_from_flat_data_page(index * pool.page_size, page)
    return len(keys)


KEYS = [f"{number:064x}" for number in range(6)]


def blocks_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kvb"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("page_size", [64, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_come_back_bit_for_bit_in_every_layout(tmp_path, layout, page_size):
    pool = Pool(layout, page_size)
    assert back_up(make_backend(tmp_path, pool), pool, KEYS)
    other = Pool(layout, page_size, seed=None)
    backend = make_backend(tmp_path, other)
    assert backend.batch_exists(KEYS) == 6
    assert prefetch(backend, other, KEYS) == 6
    assert torch.equal(other.kv_buffer, pool.kv_buffer)
    assert backend.counters.snapshot()["decoded"] == 6


def test_a_page_is_the_same_block_whatever_the_layout(tmp_path):
    rows = Pool("layer_first")
    turned = Pool("page_first")
    turned.kv_buffer.copy_(rows.kv_buffer.transpose(1, 2))
    assert back_up(make_backend(tmp_path, rows), rows, KEYS[:2])
    backend = make_backend(tmp_path, turned)
    found = Pool("page_first", seed=None)
    assert prefetch(backend, found, KEYS[:2]) == 2
    assert torch.equal(found.kv_buffer[:, :128], turned.kv_buffer[:, :128])


def test_only_the_first_pages_that_are_there_are_found_and_loaded(tmp_path):
    pool = Pool()
    backend = make_backend(tmp_path, pool)
    assert backend.batch_exists(KEYS) == 0 and not backend.exists(KEYS[0])
    assert back_up(backend, pool, KEYS[:4])
    assert backend.batch_exists(KEYS) == 4 and backend.exists(KEYS[3])
    assert prefetch(backend, Pool(seed=None), KEYS) == 4
    assert backend.get(KEYS[5], pool.get_dummy_flat_data_page()) is None
    assert backend.counters.snapshot()["missed:absent"] == 3
    assert back_up(backend, pool, KEYS[:4]) and backend.counters.snapshot()["unsaved:there"] == 4


@pytest.mark.parametrize("change", ["damaged", "foreign"])
def test_a_page_that_is_not_the_right_one_ends_the_load_and_is_stored_again(tmp_path, change, caplog):
    pool = Pool()
    backend = make_backend(tmp_path, pool)
    assert back_up(backend, pool, KEYS)
    paths = blocks_of(tmp_path)
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[:-5] + b"wrong" if change == "damaged" else paths[0].read_bytes())
    with caplog.at_level(logging.WARNING):
        assert prefetch(backend, Pool(seed=None), KEYS) == 2
    assert backend.counters.snapshot()[f"missed:{change}"] == 4
    (record,) = caplog.records
    assert f"4 pages were not loaded ({change})" in record.getMessage()
    assert back_up(backend, pool, KEYS) and paths[2].read_bytes() == whole


def test_another_model_rank_or_codec_has_other_pages(tmp_path):
    pool = Pool()
    assert back_up(make_backend(tmp_path, pool), pool, KEYS)
    for fields in ({"model_fingerprint": "other"}, {"method": "uniform", "bits": 8}):
        assert make_backend(tmp_path, pool, **fields).batch_exists(KEYS) == 0
    assert make_backend(tmp_path, Pool(page_size=128, num_pages=3)).batch_exists(KEYS) == 0


def test_a_store_that_fails_is_a_miss_that_is_counted(tmp_path, caplog):
    pool = Pool()
    assert back_up(make_backend(tmp_path, pool), pool, KEYS)
    with serve(tmp_path) as server:
        backend = make_backend(server.url, pool)
        server.faults.append(Misbehaviour("", "garbage", methods=("GET", "HEAD")))
        with caplog.at_level(logging.WARNING):
            assert backend.batch_exists(KEYS) == 0 and prefetch(backend, Pool(seed=None), KEYS) == 0
        counts = backend.counters.snapshot()
        assert counts["missed:outage"] == 12
        assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [({"method": "gzip"}, "backend cachegen: .*gzip"), ({"blok": 1}, "blok"), ({"threads": 0}, "threads")],
)
def test_a_wrong_config_is_refused_by_the_name_of_its_field(tmp_path, fields, problem):
    with pytest.raises(ConfigError, match=problem):
        make_backend(tmp_path, Pool(), **fields)


@pytest.mark.parametrize(("name", "value"), [("layout", "token_first"), ("v_head_dim", 16)])
def test_a_pool_of_another_kind_is_refused(tmp_path, name, value):
    pool = Pool()
    setattr(pool, name, value)
    with pytest.raises(ConfigError, match="backend cachegen: "):
        make_backend(tmp_path, pool)
