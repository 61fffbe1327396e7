"""Blocks of engines in a folder or on a web server: names, prefixes, two writers, damage, outage."""

from __future__ import annotations

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from cachegen.errors import OutputError, StoreError
from cachegen.integrations.block_store import BlockStore, Namespace, chain_hashes, count_prefix
from cachegen.store.store import RetryRule
from tests.fixtures.web_server import Misbehaviour, serve

NAMESPACE = Namespace(model="a", block_tokens=4)
QUICK = RetryRule(max_attempts=1, stall_seconds=0.5)
HASH = b"\x01" * 32


def test_the_hash_of_a_block_is_of_its_tokens_and_all_before_them():
    root = hashlib.sha256(b"cachegen blocks\0salt").digest()
    first = hashlib.sha256(root + struct.pack("<4i", 1, 2, 3, 4)).digest()
    second = hashlib.sha256(first + struct.pack("<4i", 5, 6, 7, 8)).digest()
    assert chain_hashes(range(1, 12), 4, "salt") == [first, second]


@pytest.mark.parametrize("other", [chain_hashes([9, 2, 3, 4, 5, 6, 7, 8], 4), chain_hashes(range(1, 9), 4, "other")])
def test_another_token_before_a_block_or_another_salt_gives_another_hash(other):
    assert set(chain_hashes(range(1, 9), 4)).isdisjoint(other)


@pytest.mark.parametrize("other", [{"model": "b"}, {"block_tokens": 8}, {"codec": "x"}])
def test_what_differs_in_anything_has_another_name(other):
    description = {"model": "a", "block_tokens": 4, **other}
    assert Namespace(**description).block_name(HASH) != NAMESPACE.block_name(HASH)


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 7, 8, 100])
def test_the_length_of_a_prefix_is_found_with_few_lookups(num_blocks):
    for there in range(num_blocks + 1):
        asked = []

        def has(index: int, there: int = there, asked: list[int] = asked) -> bool:
            asked.append(index)
            return index < there

        assert count_prefix(has, num_blocks) == there
        assert len(asked) <= 2 * num_blocks.bit_length() + 1


def test_a_block_comes_back_and_the_namespace_is_described(tmp_path):
    store = BlockStore(str(tmp_path / "store"), create=True)
    name = NAMESPACE.block_name(HASH)
    assert not store.has(name) and store.put(NAMESPACE, HASH, b"blob") and store.has(name)
    assert store.get(name, 100) == b"blob"
    assert json.loads((tmp_path / "store" / NAMESPACE.about_name).read_text())["model"] == "a"


def test_the_first_writer_stays_unless_its_block_is_damaged(tmp_path):
    stores = [BlockStore(str(tmp_path)) for _ in range(2)]
    assert stores[0].put(NAMESPACE, HASH, b"first") and not stores[1].put(NAMESPACE, HASH, b"second")
    assert stores[1].get(NAMESPACE.block_name(HASH), 100) == b"first"
    assert stores[1].put(NAMESPACE, HASH, b"second", replace=True)
    assert stores[0].get(NAMESPACE.block_name(HASH), 100) == b"second"


def test_of_many_writers_side_by_side_one_stays_whole(tmp_path):
    blobs = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        stores = [BlockStore(str(tmp_path)) for _ in blobs]
        written = list(pool.map(lambda store, blob: store.put(NAMESPACE, HASH, blob), stores, blobs))
    assert sum(written) == 1
    assert stores[0].get(NAMESPACE.block_name(HASH), 1 << 20) == blobs[written.index(True)]


def test_a_block_that_is_not_there_is_missing_and_one_too_large_is_refused(tmp_path):
    store = BlockStore(str(tmp_path))
    with pytest.raises(StoreError) as caught:
        store.get(NAMESPACE.block_name(HASH), 100)
    assert caught.value.is_missing
    store.put(NAMESPACE, HASH, b"x" * 101)
    with pytest.raises(StoreError, match="more than the 100 allowed"):
        store.get(NAMESPACE.block_name(HASH), 100)


def test_a_web_server_keeps_blocks_too(tmp_path):
    with serve(tmp_path) as server:
        server.takes_writes = True
        store = BlockStore(server.url, retry=QUICK)
        assert store.put(NAMESPACE, HASH, b"blob") and store.has(NAMESPACE.block_name(HASH))
        assert store.get(NAMESPACE.block_name(HASH), 100) == b"blob"


def test_a_store_that_has_failed_is_left_alone_for_a_while(tmp_path):
    with serve(tmp_path) as server:
        server.takes_writes = True
        store = BlockStore(server.url, retry=QUICK, pause_seconds=60)
        store.put(NAMESPACE, HASH, b"blob")
        server.faults.append(Misbehaviour("blocks", "hang up"))
        with pytest.raises(StoreError, match="ended after 0 of 4 bytes"):
            store.get(NAMESPACE.block_name(HASH), 100)
        num_requests = len(server.requests)
        with pytest.raises(StoreError, match="left alone"):
            store.get(NAMESPACE.block_name(HASH), 100)
        assert len(server.requests) == num_requests


def test_a_missing_block_is_no_failure_of_the_store(tmp_path):
    store = BlockStore(str(tmp_path), pause_seconds=60)
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            store.get(NAMESPACE.block_name(HASH), 100)
        assert caught.value.is_missing


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "blocks").write_text("a file")
    with pytest.raises(OutputError):
        BlockStore(str(tmp_path)).put(NAMESPACE, HASH, b"blob")
