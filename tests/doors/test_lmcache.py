"""The serde in LMCache itself: its adapters, its memory objects, its server process; `make test-doors` runs this."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures import REPOSITORY
from tests.fixtures.blocks import BUNDLED_PROFILE, read_bundled_cache, stack_planes

# Warnings of another package are its own.
pytestmark = [pytest.mark.doors, pytest.mark.filterwarnings("default")]

NUM_TOKENS = 1024
SHAPE = (2, 6, 256, 128)
TIMEOUT_SECONDS = 60
METHODS = {
    "lossless": {"method": "lossless", "head_dim": 64},
    "cachegen": {"method": "cachegen", "head_dim": 64},
    "uniform": {"method": "uniform", "bits": 8, "head_dim": 64},
    "transform": {"method": "transform", "profile": BUNDLED_PROFILE, "target_bits": 1.0},
}
MOST_OF_RAW = {"lossless": 0.8, "cachegen": 0.3, "uniform": 0.53, "transform": 0.12}


def wait_for(found: Callable[[], Any], what: str) -> Any:
    """Ask until the answer is neither None nor empty."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        if answer := found():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {TIMEOUT_SECONDS} s")


class Tier:
    """LMCache's memory and an adapter of files behind its wrapper for serdes, as its server puts them together."""

    def __init__(self, folder: Path, options: dict, adapter: str = "FileAdapter") -> None:
        from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
        from lmcache.v1.distributed.config import L1ManagerConfig, L1MemoryManagerConfig
        from lmcache.v1.distributed.l1_manager import L1Manager
        from lmcache.v1.distributed.l2_adapters import fs_l2_adapter
        from lmcache.v1.distributed.l2_adapters.serde_wrapper import SerdeL2AdapterWrapper
        from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor

        from cachegen.integrations import lmcache as door

        memory = L1MemoryManagerConfig(1 << 28, use_lazy=False, shm_name="")
        self.memory = L1Manager(L1ManagerConfig(memory))
        self.layout = MemoryLayoutDesc([torch.Size(SHAPE)], [torch.bfloat16])
        adapter_class = getattr(door if adapter == "FileAdapter" else fs_l2_adapter, adapter)
        self.folder = folder
        self.adapter = SerdeL2AdapterWrapper(
            inner=adapter_class(fs_l2_adapter.FSL2AdapterConfig(str(folder))),
            serde=create_serde_processor(SerdeConfig("cachegen", {"threads": 1, "max_workers": 2, **options})),
            l1_manager=self.memory,
        )
        self.make_key = lambda number: ObjectKey(bytes([number]) * 32, "a/model", 0)

    def reserve(self, numbers: range, tag: str) -> list[Any]:
        keys = [self.make_key(number) for number in numbers]
        found = self.memory.reserve_write(keys, [True] * len(keys), self.layout, tag=tag)
        objects = [found[key][1] for key in keys]
        assert None not in objects
        return objects

    def store(self, blocks: list[torch.Tensor]) -> bool:
        objects = self.reserve(range(len(blocks)), "store")
        for memory, block in zip(objects, blocks, strict=True):
            memory.tensor.copy_(block)
        self.adapter.submit_store_task([self.make_key(number) for number in range(len(blocks))], objects)
        (result,) = wait_for(self.adapter.pop_completed_store_tasks, "storing").values()
        return result.is_successful()

    def load(self, number: int) -> torch.Tensor | None:
        """Return a block; None where it is a miss."""
        (memory,) = self.reserve(range(number, number + 1), f"load {time.monotonic()}")
        memory.tensor.fill_(torch.nan)
        task = self.adapter.submit_load_task([self.make_key(number)], [memory])
        loaded = wait_for(lambda: self.adapter.query_load_result(task), "loading")
        return memory.tensor.clone() if loaded.test(0) else None

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.data"))

    def close(self) -> None:
        self.adapter.close()
        self.memory.close()


@pytest.fixture
def make_tier(tmp_path) -> Iterator[Callable[..., Tier]]:
    with contextlib.ExitStack() as stack:

        def make(options: dict, adapter: str = "FileAdapter") -> Tier:
            tier = Tier(tmp_path / "files", options, adapter)
            stack.callback(tier.close)
            return tier

        yield make


@pytest.fixture(scope="module")
def blocks() -> list[torch.Tensor]:
    cache = read_bundled_cache(NUM_TOKENS)
    return [stack_planes(cache.slice(start, start + 256)) for start in range(0, NUM_TOKENS, 256)]


def count(name: str) -> int:
    from cachegen.integrations import lmcache as door

    return door.COUNTERS.snapshot().get(name, 0)


def relative_error(decoded: torch.Tensor, exact: torch.Tensor) -> float:
    return ((decoded.float() - exact.float()).norm() / exact.float().norm()).item()


def test_what_is_registered_is_what_a_config_names():
    from lmcache.v1.distributed.serde import get_registered_serde_types

    from cachegen.integrations import lmcache as door

    assert door.SERDE_NAME in get_registered_serde_types()


@pytest.mark.parametrize("method", METHODS)
def test_blocks_come_back_from_files_that_are_as_small_as_the_method_makes_them(make_tier, blocks, method):
    tier = make_tier(METHODS[method])
    assert tier.store(blocks)
    sizes = [path.stat().st_size for path in tier.files()]
    assert len(sizes) == len(blocks) and sum(sizes) < MOST_OF_RAW[method] * sum(block.nbytes for block in blocks)
    for number, block in enumerate(blocks):
        loaded = tier.load(number)
        assert loaded is not None
        error = relative_error(loaded, block)
        assert error == 0 if method == "lossless" else error < 0.25


def test_the_adapter_of_lmcache_loads_nothing_that_a_serde_has_made_shorter(make_tier, blocks):
    """Why there is `FileAdapter`; where this fails, LMCache has learnt it and the class may go."""
    tier = make_tier(METHODS["lossless"], "FSL2Adapter")
    assert tier.store(blocks) and len(tier.files()) == len(blocks)
    assert tier.load(0) is None


@pytest.mark.parametrize("method", ["lossless", "transform"])
@pytest.mark.parametrize("change", ["cut off", "one bit", "foreign", "empty", "renamed"])
def test_a_file_that_is_not_the_right_one_whole_is_a_miss_and_is_counted(make_tier, blocks, method, change, caplog):
    tier = make_tier(METHODS[method])
    assert tier.store(blocks)
    path, other = tier.files()[0], tier.files()[1]
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut off": content[:-1],
            "one bit": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
            "foreign": b"something else".ljust(len(content)),
            "empty": b"",
            "renamed": other.read_bytes(),
        }[change]
    )
    counter = "missed:foreign" if change == "renamed" else "missed:damaged"
    before = count(counter)
    assert tier.load(0) is None and count(counter) == before + 1
    assert tier.load(1) is not None
    assert not any(record.exc_info for record in caplog.records)


def test_a_missing_file_is_a_miss(make_tier):
    assert make_tier(METHODS["lossless"]).load(0) is None


@pytest.mark.parametrize(
    "options", [{"method": "gzip"}, {"max_workers": 0}, {"method": "transform", "step_log": 0}, {"levels": 2}]
)
def test_a_wrong_config_is_refused_when_the_serde_is_made(options):
    from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor

    from cachegen.errors import ConfigError

    with pytest.raises(ConfigError, match="serde cachegen: "):
        create_serde_processor(SerdeConfig("cachegen", options))


# --- the server process -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
    """A process of `lmcache server`."""

    port: int
    http_port: int

    def clear_memory(self) -> None:
        """Leave only what is on disk."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}/cache/clear",
            data=json.dumps({"tier": "l1", "force": False}).encode(),
            headers={"content-type": "application/json"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            assert json.load(answer)["status"] == "ok"

    def counters(self) -> dict[str, int]:
        """What the serde has counted, as the server tells it."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/status", timeout=TIMEOUT_SECONDS) as answer:
            (adapter,) = json.load(answer)["storage_manager"]["l2_adapters"]
        return adapter["cachegen"]

    def metrics(self) -> list[str]:
        """Its samples for Prometheus, a line each."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/metrics", timeout=TIMEOUT_SECONDS) as answer:
            return answer.read().decode().splitlines()

    @contextlib.contextmanager
    def connect(self) -> Iterator[Any]:
        """The client that LMCache tries its server with, its caches those of an engine without a GPU."""
        from lmcache.cli.commands.bench.server_bench.client import ServerBenchClient
        from lmcache.cli.commands.bench.server_bench.config import BenchConfig

        config = BenchConfig(
            rpc_url=f"tcp://127.0.0.1:{self.port}",
            http_url=f"http://127.0.0.1:{self.http_port}",
            mode="cpu",
            transfer_mode="engine_driven",
            tp_size=1,
            use_mla=False,
            num_tokens=NUM_TOKENS,
            kvcache_shape_spec="(2,128,16,2,64):bfloat16:6",
            num_blocks=128,
            block_size=16,
        )
        client = ServerBenchClient(config, lambda line: None)
        client.start()
        try:
            yield client
        finally:
            client.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start_server(tmp_path) -> Iterator[Callable[[dict], Server]]:
    """Start LMCache's server with one line of config; its folder is tmp_path / "files"."""
    processes: list[subprocess.Popen] = []

    def start(options: dict) -> Server:
        server = Server(free_port(), free_port())
        adapter = {
            "type": "plugin",
            "module_path": "cachegen.integrations.lmcache",
            "class_name": "FileAdapter",
            "adapter_params": {"base_path": str(tmp_path / "files")},
            "serde": {"type": "cachegen", "threads": 1, **options},
        }
        flags = {
            "--host": "127.0.0.1",
            "--port": server.port,
            "--http-port": server.http_port,
            "--l1-size-gb": 0.2,
            "--eviction-policy": "LRU",
            "--chunk-size": 256,
            "--supported-transfer-mode": "engine_driven",
            "--l2-adapter": json.dumps(adapter),
        }
        program = str(Path(sys.executable).parent / "lmcache")
        command = [program, "server", *(str(word) for pair in flags.items() for word in pair)]
        path = os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "LMCACHE_TRACK_USAGE": "false"}
        log = tmp_path / "server.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        processes.append(process)

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text("utf-8")
            return "Application startup complete" in log.read_text("utf-8")

        wait_for(is_ready, "the server's start")
        return server

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_wrong_config_ends_the_servers_start_and_its_last_line_says_why(start_server):
    with pytest.raises(AssertionError, match="serde cachegen: bits must be 2 to 8, got 99\n"):
        start_server({"method": "uniform", "bits": 99})


def fill_caches(client: Any, request: Any) -> dict[str, torch.Tensor]:
    """Write the bundled model's cache into the blocks of a request; returns a copy of all."""
    cache = read_bundled_cache(NUM_TOKENS)
    (worker,) = client._workers
    place = slice(request.block_offset, request.block_offset + request.num_blocks)
    for layer, tensor in enumerate(worker.kv_caches.values()):
        planes = torch.stack([cache.keys[layer], cache.values[layer]])[:, : request.num_full_tokens]
        tensor[:, place] = planes.unflatten(1, (request.num_blocks, 16))
    return {name: tensor.clone() for name, tensor in worker.kv_caches.items()}


@pytest.mark.parametrize("method", ["lossless", "transform"])
def test_the_server_stores_evicts_finds_and_loads(start_server, tmp_path, method):
    server = start_server(METHODS[method])
    with server.connect() as client:
        first = client.create_request(0, "first", "cold")
        num_tokens, num_chunks = first.num_full_tokens, first.total_chunks
        before = fill_caches(client, first)
        assert client.lookup(first).is_full_miss
        assert client.store(first, 0, num_tokens).succeeded

        def stored() -> bool:
            return len(list((tmp_path / "files").glob("*.data"))) == num_chunks

        wait_for(stored, "storing")
        size = sum(path.stat().st_size for path in (tmp_path / "files").glob("*.data"))
        assert size < MOST_OF_RAW[method] * num_chunks * torch.Size(SHAPE).numel() * 2

        counts = server.counters()
        assert counts["encoded"] == counts["coded"] == num_chunks and counts["blob_bytes"] == size

        server.clear_memory()
        second = client.create_request(0, "second", "warm")
        assert client.lookup(second).hit_chunks == num_chunks
        client.zero_destination(second, 0, num_tokens)
        assert client.retrieve(second, 0, num_tokens).succeeded
        for name, tensor in client._workers[0].kv_caches.items():
            assert (
                torch.equal(tensor, before[name])
                if method == "lossless"
                else relative_error(tensor, before[name]) < 0.25
            )

        assert server.counters()["decoded"] == num_chunks
        assert f'cachegen_loaded_blocks_total{{door="lmcache"}} {float(num_chunks)}' in server.metrics()

        # What is not whole is not found: nobody is served a wrong cache.
        server.clear_memory()
        for path in (tmp_path / "files").glob("*.data"):
            path.write_bytes(path.read_bytes()[:-7])
        assert client.lookup(client.create_request(0, "third", "damaged")).is_full_miss
        counts = server.counters()
        assert counts["missed:damaged"] >= 1 and counts["decoded"] == num_chunks
    log = (tmp_path / "server.log").read_text("utf-8")
    assert log.count("a miss (damaged)") >= 1 and "Traceback" not in log
