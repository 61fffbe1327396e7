"""A real network: nginx in a network namespace behind tc tbf. Whatever the link does, the cache is right.

These need root, iproute2 and nginx, and are skipped elsewhere with the reason. Delays, stalls, corruption and lies come
from the server of tests/fixtures/web_server.py, since the kernel's netem is not everywhere: see test_store.py,
test_catalog.py and test_run_decoding_remote.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cachegen.errors import StoreError
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods import load_config
from cachegen.methods.absmax.codec import AbsmaxEncoder
from cachegen.methods.absmax.quantization import dequantize, quantize
from cachegen.pipeline.model_cache import view_kv_cache
from cachegen.pipeline.prefill import prefill, prefill_context
from cachegen.store.catalog import EncodedLevel, publish_document
from cachegen.store.store import RetryRule, open_store
from cachegen.streaming.client import find_for_model, make_loader
from cachegen.streaming.load_report import LoadResult
from cachegen.streaming.loader import Loader
from cachegen.streaming.policies import POLICIES
from cachegen.streaming.policy import DecodeSpeed, Objective, Policy, PrefillSpeed, Speeds
from cachegen.streaming.policy_front_to_back import decide_fixed_level
from scripts.shaped_link import ShapedLink, find_missing
from tests.fixtures.absmax import write_config
from tests.fixtures.models import make_named, make_token_ids

WHY_NOT = find_missing()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no shaped link here: {WHY_NOT}"),
    pytest.mark.usefixtures("one_thread"),
]

NUM_TOKENS, CHUNK_TOKENS, BLOCK_TOKENS = 961, (240, 240, 240, 240), 64
BINS = (16, 64, 256)
QUICK = RetryRule(max_attempts=2, first_pause_seconds=0.01, stall_seconds=0.3)


class Context:
    """A text of a small random model, its exact cache, and the cache at each level."""

    def __init__(self, folder: Path) -> None:
        self.loaded = make_named("llama")
        self.token_ids = make_token_ids(NUM_TOKENS)
        self.exact, metadata = prefill_context(self.loaded, self.token_ids, BLOCK_TOKENS)
        self.exact = from_planes([plane.contiguous() for plane in self.exact.planes])
        levels, self.decoded = [], {}
        for level, bins in enumerate(BINS, 1):
            groups = {f"{kind}_{place}_bins": bins for kind in ("key", "value") for place in ("first", "second")}
            path = write_config(folder / f"{bins}.json", **groups, key_third_bins=bins, coder="packed")
            config = load_config(path)
            encoder = AbsmaxEncoder(self.exact, metadata, config, CHUNK_TOKENS, config.coder)
            files = [b"".join(encoder.encode_chunk(i)) for i in range(len(CHUNK_TOKENS))]
            levels.append(EncodedLevel(encoder.tables_file, [lambda file=file: file for file in files]))
            self.decoded[level] = from_planes(
                [dequantize(*quantize(plane, bins), bins).reshape(plane.shape) for plane in self.exact.planes]
            )
        self.store = folder / "store"
        self.manifest = publish_document(open_store(self.store, create=True), levels, metadata).manifest

    def check(self, cache: KVCache, result: LoadResult) -> None:
        """Loaded tokens are the quantized ones bit for bit, computed ones those of the model.

        A loaded chunk may be under way in the model at the end: its next block is then computed in the first layers.
        """
        broken_off = {span.chunk for span in result.spans if (span.worker, span.outcome) == ("compute", "cancelled")}
        for report in result.chunks:
            first, middle = report.first_token, report.first_token + report.num_exact_tokens
            end = report.first_token + report.num_tokens
            follows_text = all(other.source == "text" for other in result.chunks[: report.chunk])
            if middle < end:
                num_mixed = min(BLOCK_TOKENS, end - middle) if report.chunk in broken_off else 0
                for found, quantized, exact in zip(
                    cache.slice(middle, end).planes,
                    self.decoded[report.level].slice(middle, end).planes,
                    self.exact.slice(middle, end).planes,
                    strict=True,
                ):
                    mixed, loaded = found[:num_mixed], found[num_mixed:]
                    assert torch.equal(loaded, quantized[num_mixed:])
                    if not torch.equal(mixed, quantized[:num_mixed]):
                        assert mixed.isfinite().all()
                        assert not follows_text or is_computed(mixed, exact[:num_mixed])
            if follows_text:
                pairs = zip(cache.slice(first, middle).planes, self.exact.slice(first, middle).planes, strict=True)
                assert all(is_computed(found, expected) for found, expected in pairs)


def is_computed(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Tell whether values are the model's, whatever the order of its sums."""
    return torch.allclose(found, exact, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def context(tmp_path_factory, one_thread) -> Context:
    return Context(tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def shared_link(context) -> Iterator[ShapedLink]:
    with ShapedLink(context.store, 100) as link:
        yield link


@pytest.fixture
def link(shared_link) -> Iterator[ShapedLink]:
    """The link, whole again after each test."""
    yield shared_link
    shared_link.mend()
    shared_link.set_rate(100)
    shared_link.kill_server()
    shared_link.start_server()


def load(
    context: Context,
    link: ShapedLink,
    policy: Policy,
    *,
    slo: float = 1.0,
    when: Callable[[Loader], object] | None = None,
) -> LoadResult:
    """Load over the link and check the cache; `when` is called in a thread of its own with the running loader."""
    loaded, token_ids = context.loaded, context.token_ids
    document = find_for_model(open_store(link.url, retry=QUICK), loaded, token_ids, num_threads=1)
    cache = prefill(loaded, token_ids[:1], capacity=NUM_TOKENS)
    speeds = Speeds(PrefillSpeed(2000.0), DecodeSpeed(compute_slowdown=0.5))
    loader = make_loader(document, loaded, cache, token_ids, policy, Objective(slo), speeds, silence_seconds=0.8)
    for plane in view_kv_cache(cache, NUM_TOKENS - 1).planes:
        plane.fill_(torch.nan)
    thread = threading.Thread(target=when or (lambda _: None), args=(loader,))
    with loader:
        thread.start()
        result = loader.run()
    thread.join()
    context.check(view_kv_cache(cache, NUM_TOKENS - 1), result)
    return result


def wait_for_bytes(loader: Loader, num_bytes: int) -> None:
    """Return when so much has come, or the load is over."""
    while not loader.is_over and loader.received_bytes < num_bytes:
        threading.Event().wait(0.002)


def fixed(level: int) -> Policy:
    return lambda state: decide_fixed_level(state, level)


@pytest.mark.parametrize("policy", ["ours", "cachegen"])
@pytest.mark.parametrize("mbps", [0.2, 4, 100])
def test_a_constant_rate(context, link, policy, mbps):
    link.set_rate(mbps)
    load(context, link, POLICIES[policy])


def test_a_level_comes_whole_over_a_slow_link(context, link):
    link.set_rate(8)
    result = load(context, link, fixed(3))
    assert {report.level for report in result.chunks} == {3} and result.problems == []
    assert result.samples and result.received_bytes >= sum(chunk.files[2].bytes for chunk in context.manifest.chunks)


@pytest.mark.parametrize("policy", ["ours", "cachegen"])
def test_a_sudden_drop(context, link, policy):
    link.set_rate(20)

    def drop(loader: Loader) -> None:
        wait_for_bytes(loader, 60_000)
        link.set_rate(0.1)

    load(context, link, POLICIES[policy], when=drop)


def test_a_server_killed_in_mid_chunk(context, link):
    link.set_rate(2)

    def kill(loader: Loader) -> None:
        wait_for_bytes(loader, 65_536)
        link.kill_server()

    result = load(context, link, fixed(2), when=kill)
    assert result.problems and {report.source for report in result.chunks} <= {"text", "store"}


def test_a_link_that_falls_silent_in_mid_chunk(context, link):
    link.set_rate(2)

    def cut(loader: Loader) -> None:
        wait_for_bytes(loader, 65_536)
        link.cut()

    result = load(context, link, fixed(1), when=cut)
    assert result.problems and result.chunks[-1].source == "text"


def test_a_missing_level(context, link):
    lost = context.store / context.manifest.chunks[1].files[2].name
    content = lost.read_bytes()
    lost.unlink()
    try:
        result = load(context, link, fixed(3))
    finally:
        lost.write_bytes(content)
    assert [report.level for report in result.chunks] == [3, 2, 3, 3]
    assert len(result.problems) == 1 and "no such object" in result.problems[0]


def test_a_corrupt_file_on_the_server(context, link):
    path = context.store / context.manifest.chunks[2].files[1].name
    content = path.read_bytes()
    path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    try:
        result = load(context, link, fixed(2))
    finally:
        path.write_bytes(content)
    assert [report.level for report in result.chunks] == [2, 2, 1, 2] and "is corrupt" in result.problems[0]


def test_a_dead_server_is_said(context, link):
    link.kill_server()
    with pytest.raises(StoreError, match=r"store.json: "):
        find_for_model(open_store(link.url, retry=QUICK), context.loaded, context.token_ids, num_threads=1)


def test_nginx_serves_what_the_store_asks_for(context, link):
    store = open_store(link.url, retry=QUICK)
    stored = context.manifest.chunks[0].files[0]
    content = (context.store / stored.name).read_bytes()
    assert store.get_exactly(stored.name, stored.bytes, sha256=stored.sha256) == content
    assert store.get_range(stored.name, 100, 300) == content[100:300]
    assert store.exists(stored.name) and not store.exists("chunks/none")
