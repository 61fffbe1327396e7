"""Loading and saving blocks beside an engine: what comes back, what is refused, what is counted."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cachegen.integrations.block_codec import BlockCodec, read_settings
from cachegen.integrations.block_store import BlockStore, Namespace
from cachegen.integrations.block_transfers import BlockToLoad, BlockTransfers, FinishedLoads, LoadTask, SaveTask
from tests.fixtures.pages import DIM, PAGE_TOKENS, make_caches
from tests.fixtures.web_server import Misbehaviour, serve

HASHES = [bytes([number]) * 32 for number in range(3)]
BLOCK_TOKENS = 2 * PAGE_TOKENS  # two blocks of the engine
NAMESPACE = Namespace(model="a")


def make_transfers(
    location: str, *, seed: int = 0, max_waiting_bytes: int = 1 << 30, processors: set[int] | None = None
) -> BlockTransfers:
    """A worker with a cache of random values, that keeps 12 blocks of an engine."""
    return BlockTransfers(
        "worker",
        make_caches(12, seed=seed),
        BLOCK_TOKENS,
        PAGE_TOKENS,
        BlockCodec(read_settings({"method": "lossless", "head_dim": DIM, "threads": 1})),
        BlockStore(location),
        NAMESPACE,
        max_waiting_bytes,
        processors,
    )


def save_all(transfers: BlockTransfers) -> None:
    """Save three blocks, from blocks 0 to 5 of the engine."""
    for index, block_hash in enumerate(HASHES):
        transfers.save(SaveTask(block_hash, [2 * index, 2 * index + 1], index * BLOCK_TOKENS))
    assert transfers.wait_for_saves(60)


def load_all(transfers: BlockTransfers, targets: Sequence[int] = (6, 7, 8, 9, 10, 11), **options) -> FinishedLoads:
    """Load three blocks into blocks of the engine."""
    pairs = [tuple(targets[2 * index : 2 * index + 2]) for index in range(3)]
    blocks = [BlockToLoad(block_hash, pair) for block_hash, pair in zip(HASHES, pairs, strict=True)]
    transfers.load(LoadTask("request", blocks, **options))
    return wait_for_load(transfers)


def wait_for_load(transfers: BlockTransfers) -> FinishedLoads:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        finished = transfers.take_finished(0.1)
        if finished.request_ids:
            return finished
    raise AssertionError("the load does not end")


def path_of(folder: Path, index: int) -> Path:
    return folder / NAMESPACE.block_name(HASHES[index])


@pytest.fixture
def filled(tmp_path: Path) -> BlockTransfers:
    transfers = make_transfers(str(tmp_path))
    save_all(transfers)
    return transfers


def test_blocks_come_back_in_another_workers_cache(filled, tmp_path):
    other = make_transfers(str(tmp_path), seed=1)
    assert load_all(other) == FinishedLoads({"request"}, set())
    assert torch.equal(other._caches.gather(range(6, 12)), filled._caches.gather(range(6)))
    counts = other.counters.snapshot()
    assert counts["decoded"] == 3 and counts["tokens:loaded"] == 3 * BLOCK_TOKENS and counts["seconds:fetch"] > 0
    assert counts["read_bytes"] == filled.counters.snapshot()["blob_bytes"] and other.rates.load


def test_of_a_block_only_the_tokens_that_are_missing_are_written(filled):
    before = filled._caches.gather([6])
    filled.load(LoadTask("request", [BlockToLoad(HASHES[0], [7])]))
    assert not wait_for_load(filled).invalid_blocks
    assert torch.equal(filled._caches.gather([7]), filled._caches.gather([1]))
    assert torch.equal(filled._caches.gather([6]), before)
    assert filled.counters.snapshot()["tokens:loaded"] == PAGE_TOKENS


@pytest.mark.parametrize(
    ("change", "reason"),
    [("bit", "damaged"), ("cut", "damaged"), ("foreign", "damaged"), ("renamed", "foreign"), ("gone", "absent")],
)
def test_what_is_not_whole_ends_a_load_and_is_stored_again(filled, tmp_path, change, reason, caplog):
    path = path_of(tmp_path, 1)
    content = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(
            {
                "bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
                "cut": content[:-1],
                "foreign": b"something else",
                "renamed": path_of(tmp_path, 0).read_bytes(),
            }[change]
        )
    with caplog.at_level(logging.WARNING):
        assert load_all(filled) == FinishedLoads({"request"}, {8, 9, 10, 11})
    assert torch.equal(filled._caches.gather([6, 7]), filled._caches.gather([0, 1]))
    counts = filled.counters.snapshot()
    assert counts[f"missed:{reason}"] == counts["missed:behind"] == 1 and counts["tokens:loaded"] == BLOCK_TOKENS
    (record,) = caplog.records
    assert f"block 2 of 3 was not loaded ({reason})" in record.getMessage() and "\n" not in record.getMessage()

    save_all(filled)  # the engine has computed it
    assert path.read_bytes() == content
    assert not load_all(filled).invalid_blocks


def test_a_block_that_is_there_is_not_encoded_again(filled):
    save_all(filled)
    counts = filled.counters.snapshot()
    assert counts["encoded"] == 3 and counts["unsaved:there"] == 3


def test_blocks_beyond_the_memory_for_waiting_ones_are_not_saved(tmp_path):
    transfers = make_transfers(str(tmp_path), max_waiting_bytes=1)
    save_all(transfers)
    assert transfers.counters.snapshot() == {"unsaved:full": 3}


def test_a_store_that_vanishes_ends_loads_and_saves_go_on(filled, tmp_path):
    shutil.rmtree(tmp_path)
    assert load_all(filled).invalid_blocks == set(range(6, 12))
    assert filled.counters.snapshot()["missed:absent"] == 1


def test_a_server_that_hangs_up_in_the_middle_of_a_load_is_an_outage(filled, tmp_path):
    with serve(tmp_path) as server:
        server.faults.append(Misbehaviour(HASHES[1].hex(), "hang up"))
        transfers = make_transfers(server.url)
        assert load_all(transfers).invalid_blocks == {8, 9, 10, 11}
    counts = transfers.counters.snapshot()
    assert counts["missed:outage"] == 1 and counts["tokens:loaded"] == BLOCK_TOKENS


def test_a_server_that_cannot_be_written_is_counted_and_logged(tmp_path, caplog):
    with serve(tmp_path) as server, caplog.at_level(logging.WARNING):
        transfers = make_transfers(server.url)
        save_all(transfers)
    assert transfers.counters.snapshot()["unsaved:outage"] == 3
    assert len([record for record in caplog.records if "not stored (outage)" in record.getMessage()]) == 1


def test_a_block_is_waited_for_no_longer_than_computing_takes(filled, tmp_path):
    with serve(tmp_path) as server:
        server.faults.append(Misbehaviour(HASHES[0].hex(), "stall"))
        transfers = make_transfers(server.url)
        assert load_all(transfers, compute_rate=1e-4).invalid_blocks == set(range(6, 12))
    assert transfers.counters.snapshot()["missed:late"] == 1 and transfers.rates.load is None


def test_threads_run_on_the_processors_that_they_are_given(tmp_path, monkeypatch):
    mine = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def record(store: BlockStore, name: str) -> bool:
        seen.append(os.sched_getaffinity(0))
        return False

    monkeypatch.setattr(BlockStore, "has", record)
    for given in ({min(mine)}, None):
        save_all(make_transfers(str(tmp_path), processors=given))
        assert seen.pop() == (given or mine)
    assert os.sched_getaffinity(0) == mine


@pytest.mark.parametrize("much_waits", [False, True])
def test_nothing_is_encoded_while_a_request_is_loaded_unless_much_waits(tmp_path, much_waits):
    save_all(make_transfers(str(tmp_path)))
    with serve(tmp_path) as server:
        server.faults.append(Misbehaviour(HASHES[0].hex(), "stall"))
        transfers = make_transfers(server.url, max_waiting_bytes=1 << 14 if much_waits else 1 << 30)
        transfers.load(LoadTask("request", [BlockToLoad(HASHES[0], (6, 7))]))
        transfers.save(SaveTask(bytes([9]) * 32, [0, 1], 0))
        transfers.wait_for_saves(60 if much_waits else 0.3)
        assert transfers.counters.snapshot().get("encoded", 0) == much_waits
        wait_for_load(transfers)
        assert transfers.wait_for_saves(60) and transfers.counters.snapshot()["encoded"] == 1
