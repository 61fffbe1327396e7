"""S3: the real scripts against a server that is not ours (moto's, in a process of its own) on loopback.

The server checks signatures and policies where a test asks for it, and its log says what it was asked.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import run_decoding_remote
import run_publishing
from cachegen.errors import OutputError, StoreError
from cachegen.pipeline import model
from cachegen.store.catalog import find_document, publish_document
from cachegen.store.store import WRITING, Store, open_store
from tests.fixtures import BUNDLED_MODEL
from tests.fixtures.script_runs import (
    FIRST,
    FIRST_ANSWER,
    LEVEL_CONFIGS,
    LEVEL_KL,
    NUM_CHUNKS,
    Published,
    answer_of,
    load_model_once,
    publish_text,
    run_to_json,
    to_argv,
)
from tests.fixtures.stores import CHUNK_TOKENS, make_document
from tests.fixtures.web_server import QUICK

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class S3Server:
    """A server and its log."""

    url: str
    log_path: Path

    def post(
        self, path: str, body: bytes, method: str = "POST", service: str = "s3", kind: str = "text/plain"
    ) -> bytes:
        """Ask as an administrator would; moto finds the service in the signature, which it need not check."""
        scope = f"AWS4-HMAC-SHA256 Credential=admin/20260101/us-east-1/{service}/aws4_request, SignedHeaders=host, "
        headers = {"Content-Type": kind, "Authorization": scope + "Signature=none"}
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read()

    def make_bucket(self, name: str) -> str:
        is_checked = self.check_access(False)
        self.post(f"/{name}", b"", "PUT")
        self.check_access(is_checked)
        return f"s3://{name}"

    def call_iam(self, **parameters: str) -> str:
        form = urllib.parse.urlencode({"Version": "2010-05-08", **parameters}).encode()
        return self.post("/", form, service="iam", kind="application/x-www-form-urlencoded").decode()

    def requests(self) -> list[str]:
        """The request lines so far: method and path."""
        log = re.sub(r"\x1b\[\d+m", "", self.log_path.read_text())
        return re.findall(r'"([A-Z]+ \S+) HTTP', log)

    def check_access(self, is_checked: bool) -> bool:
        """Let the server believe anyone, or check signatures and policies; returns what it did before."""
        before = json.loads(self.post("/moto-api/reset-auth", b"0" if is_checked else b"inf"))
        return before["PREVIOUS_INITIAL_NO_AUTH_ACTION_COUNT"] == "0.0"


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[S3Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = S3Server(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("s3") / "log")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(server.log_path, "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            for _ in range(600):
                if process.poll() is not None:
                    pytest.fail(f"moto's server ended:\n{server.log_path.read_text()}")
                try:
                    server.post("/moto-api/reset", b"")
                    break
                except OSError:
                    time.sleep(0.1)
            yield server
        finally:
            process.terminate()


@pytest.fixture(autouse=True)
def environment(s3, monkeypatch) -> None:
    """What a user sets; nothing else of the machine's, and no request leaves it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def allowed(s3, monkeypatch) -> Iterator[None]:
    """Signatures are checked, and the environment has the keys of a user who may do everything with S3."""
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    s3.call_iam(Action="CreateUser", UserName="reader")
    s3.call_iam(
        Action="PutUserPolicy", UserName="reader", PolicyName="everything", PolicyDocument=json.dumps(everything)
    )
    keys = s3.call_iam(Action="CreateAccessKey", UserName="reader")
    for name, tag in (("AWS_ACCESS_KEY_ID", "AccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SecretAccessKey")):
        monkeypatch.setenv(name, keys.split(f"<{tag}>")[1].split("<")[0])
    s3.check_access(True)
    yield
    s3.check_access(False)
    s3.post("/moto-api/reset", b"")


@pytest.fixture(scope="module")
def published(tmp_path_factory, one_thread) -> Published:
    return publish_text(tmp_path_factory.mktemp("published"))


@pytest.fixture(autouse=True)
def load_once(monkeypatch):
    monkeypatch.setattr(model, "load_model", load_model_once)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    return make_document(tmp_path_factory.mktemp("document"))


def publishing_argv(published, url: str) -> list[str]:
    folders = [str(published.folder / config) for config in LEVEL_CONFIGS]
    flags = {"--path_to_kv": published.kv_path, "--path_to_store": url}
    return ["--path_to_encoded_kv", *folders, "--kl", *LEVEL_KL, *to_argv(flags)]


def loading_argv(published, url: str) -> list[str]:
    flags = {
        "--path_to_encoded_kv": url,
        "--path_to_context": published.context,
        "--model_id": BUNDLED_MODEL,
        "--stall_seconds": 5,
        "--max_new_tokens": 8,
    }
    return to_argv(flags)


class TestScripts:
    """run_publishing.py and run_decoding_remote.py."""

    @pytest.mark.parametrize("folder", ["", "/a folder/ü"])
    def test_what_is_published_is_loaded_and_answers(self, s3, published, capsys, folder):
        url = s3.make_bucket("contexts" if folder else "whole-bucket") + folder
        assert run_publishing.main([*publishing_argv(published, url), "--quiet"]) == 0
        record = run_to_json(loading_argv(published, url), capsys, "--level", 2, "--question", FIRST)
        assert answer_of(record) == FIRST_ANSWER and record["problems"] == []
        assert {chunk["level"] for chunk in record["chunks"]} == {2} and record["num_chunks"] == NUM_CHUNKS
        assert record["manifest"].startswith(f"{url}/documents/")

    def test_publishing_again_writes_nothing_and_nothing_is_listed(self, s3, published, capsys):
        url = s3.make_bucket("twice")
        for _ in range(2):
            capsys.readouterr()
            assert run_publishing.main([*publishing_argv(published, url), "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)["num_written"] == 0
        run_to_json(loading_argv(published, url), capsys, "--level", 1)
        assert [line for line in s3.requests() if "list-type" in line or line.endswith("/twice")] == ["PUT /twice"]

    def test_signed_requests_are_accepted(self, s3, allowed, published, capsys):
        url = s3.make_bucket("signed")
        assert run_publishing.main([*publishing_argv(published, url), "--quiet"]) == 0
        assert answer_of(run_to_json(loading_argv(published, url), capsys, "--question", FIRST)) == FIRST_ANSWER


class TestRefusals:
    """One line on stderr and its exit code."""

    def test_no_such_bucket(self, published, refuse):
        error = refuse(run_decoding_remote.main, loading_argv(published, "s3://nowhere"), 3)
        assert "s3://nowhere/store.json: there is no such bucket: 404 Not Found: NoSuchBucket" in error
        error = refuse(run_publishing.main, publishing_argv(published, "s3://nowhere"), 7)
        assert "s3://nowhere/store.json: cannot be written: there is no such bucket" in error

    def test_nothing_in_the_bucket(self, s3, published, refuse):
        error = refuse(run_decoding_remote.main, loading_argv(published, s3.make_bucket("empty")), 3)
        assert "not a store of cachegen (fill one with run_publishing.py)" in error

    def test_a_manifest_that_is_gone(self, s3, published, refuse):
        url = s3.make_bucket("no-manifest")
        assert run_publishing.main([*publishing_argv(published, url), "--quiet"]) == 0
        (name,) = open_store(url).list("documents")
        s3.post(f"/no-manifest/{name}", b"", "DELETE")
        assert f"{url}/{name}: no such object" in refuse(run_decoding_remote.main, loading_argv(published, url), 3)
        s3.post(f"/no-manifest/{name}", b"{}", "PUT")
        assert f"{url}/{name}" in refuse(run_decoding_remote.main, loading_argv(published, url), 4)

    @pytest.mark.parametrize(
        ("variable", "value", "reason"),
        [
            ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
            ("AWS_ACCESS_KEY_ID", "nobody", "InvalidAccessKeyId"),
        ],
    )
    def test_wrong_credentials(self, s3, allowed, published, refuse, monkeypatch, variable, value, reason):
        url = s3.make_bucket("guarded")
        monkeypatch.setenv(variable, value)
        error = refuse(run_decoding_remote.main, loading_argv(published, url), 3)
        assert f"s3://guarded/store.json: access is denied: 403 Forbidden: {reason}: " in error
        error = refuse(run_publishing.main, publishing_argv(published, url), 7)
        assert "s3://guarded/store.json: cannot be written: access is denied: " in error

    def test_no_credentials(self, s3, published, refuse, monkeypatch):
        url = s3.make_bucket("anonymous")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        assert "no credentials are set" in refuse(run_decoding_remote.main, loading_argv(published, url), 3)
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        assert "not a store of cachegen" in refuse(run_decoding_remote.main, loading_argv(published, url), 3)

    def test_no_server(self, published, refuse, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        error = refuse(run_decoding_remote.main, loading_argv(published, "s3://bucket"), 3)
        assert "s3://bucket/store.json: " in error and "HTTP error" in error


class TestWriting:
    """Objects as the catalogue writes them."""

    @pytest.fixture
    def store(self, s3, request) -> Store:
        return open_store(s3.make_bucket(re.sub(r"[^a-z]+", "-", request.node.name)[:60].strip("-")), retry=WRITING)

    def test_the_first_writer_wins_even_where_both_saw_nothing(self, store, monkeypatch):
        monkeypatch.setattr(Store, "exists", lambda self, name: False)
        assert store.put("pointer", b"first") and not store.put("pointer", b"second")
        assert store.get("pointer", 100) == b"first"
        assert store.put("pointer", b"third", overwrite=True) and store.get("pointer", 100) == b"third"

    def test_a_large_object_goes_up_in_parts_and_comes_back_in_ranges(self, s3, store):
        content = os.urandom(1 << 20) * 12
        assert store.put("large", content) and not store.put("large", content)
        assert sum("partNumber=" in line for line in s3.requests()) == 3
        assert store.get_exactly("large", len(content)) == content
        assert store.get_range("large", 5_000_000, 6_000_000) == content[5_000_000:6_000_000]

    def test_an_interrupted_publishing_shows_nothing_and_resumes(self, store, document, monkeypatch):
        tokens, metadata = document.metadata.token_ids, document.metadata
        hashes = {"model_fingerprint": metadata.model_fingerprint, "rope_hash": metadata.rope_hash}
        write, num_left = Store._write, 8

        def break_off(self, name, content, overwrite):
            nonlocal num_left
            num_left -= 1
            if num_left < 0:
                raise KeyboardInterrupt
            return write(self, name, content, overwrite)

        monkeypatch.setattr(Store, "_write", break_off)
        with pytest.raises(KeyboardInterrupt):
            publish_document(store, document.levels, metadata)
        assert find_document(store, tokens, **hashes) is None
        monkeypatch.setattr(Store, "_write", write)
        resumed = publish_document(store, document.levels, metadata)
        found = find_document(store, tokens, **hashes)
        total = len(list(store.list()))
        assert found is not None and found.num_chunks == len(CHUNK_TOKENS) - 1
        assert resumed.num_written == total - 8

    def test_nothing_is_written_over_another_store(self, store, document):
        store.put("store.json", b"hello")
        with pytest.raises(Exception, match="not JSON"):
            publish_document(store, document.levels, document.metadata)
        assert list(store.list()) == ["store.json"]

    def test_a_server_that_is_gone_is_an_output_error(self, store, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        lost = open_store("s3://bucket", retry=QUICK)
        with pytest.raises(OutputError, match="s3://bucket/x: cannot be written: "):
            lost.put("x", b"x")
        with pytest.raises(StoreError, match="s3://bucket/x: "):
            lost.exists("x")
