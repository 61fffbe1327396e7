"""The store: the same interface over every backend, and the right bytes or one clear error from any server."""

from __future__ import annotations

import datetime
import hashlib
import ssl
import sys
import time

import pytest

from cachegen.errors import BackendUnavailableError, ConfigError, OutputError, StoreError
from cachegen.store.objects import MIN_BYTES_PER_SECOND, Pace
from cachegen.store.store import MAX_COMPARED_BYTES, Ensured, RetryRule, open_store
from tests.fixtures.web_server import QUICK, Misbehaviour, serve

CONTENT = bytes(range(256)) * 1024  # 256 KiB: several pieces
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(CONTENT)
    with serve(tmp_path) as running:
        yield running


class TestInterface:
    """What every place can do."""

    @pytest.fixture(params=["folder", "memory"])
    def store(self, request, tmp_path):
        return open_store("memory://" if request.param == "memory" else tmp_path / "new" / "store", create=True)

    def test_an_object_is_read_back_whole_and_in_part(self, store):
        assert store.put("a/b.bin", CONTENT)
        assert store.get("a/b.bin", len(CONTENT)) == CONTENT
        assert store.get_exactly("a/b.bin", len(CONTENT), sha256=SHA256) == CONTENT
        assert store.get_range("a/b.bin", 1000, 70_000) == CONTENT[1000:70_000]

    def test_what_is_there_stays_unless_overwritten(self, store):
        assert store.put("x", b"first") and not store.put("x", b"second")
        assert store.get("x", 100) == b"first"
        assert store.put("x", b"third", overwrite=True) and store.get("x", 100) == b"third"

    def test_an_object_is_ensured_whole_and_repaired_where_it_is_not(self, store):
        assert store.ensure("x", CONTENT) is Ensured.WRITTEN and store.ensure("x", CONTENT) is Ensured.THERE
        for damaged in (b"", CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"?"):
            store.put("x", damaged, overwrite=True)
            assert store.holds("x", CONTENT) is False
            assert store.ensure("x", CONTENT) is Ensured.REPAIRED and store.get("x", len(CONTENT)) == CONTENT
        assert store.holds("y", b"") is None

    def test_names_can_be_listed_and_asked_for(self, store):
        for name in ("a/1", "a/b/2", "c"):
            store.put(name, b"x")
        assert sorted(store.list()) == ["a/1", "a/b/2", "c"] and sorted(store.list("a")) == ["a/1", "a/b/2"]
        assert store.exists("a/1") and not store.exists("a/2")

    def test_what_is_not_there_is_said(self, store):
        for read in (
            lambda: store.get("q", 10),
            lambda: store.get_exactly("q", 10),
            lambda: store.get_range("q", 0, 1),
        ):
            with pytest.raises(StoreError, match="q: no such object") as caught:
                read()
            assert caught.value.is_missing and not caught.value.is_temporary

    def test_an_object_larger_than_allowed_is_not_read(self, store):
        store.put("x", CONTENT)
        with pytest.raises(StoreError, match="has 262144 bytes, more than the 1000 allowed"):
            store.get("x", 1000)

    def test_an_object_of_another_size_or_content_is_refused(self, store):
        store.put("x", CONTENT)
        with pytest.raises(StoreError, match="has 262144 bytes, 262143 are expected"):
            store.get_exactly("x", len(CONTENT) - 1)
        with pytest.raises(StoreError, match="x: is corrupt, its SHA-256 differs"):
            store.get_exactly("x", len(CONTENT), sha256="0" * 64)

    def test_a_name_cannot_leave_the_store(self, store):
        with pytest.raises((StoreError, OutputError)):
            store.put("a/../../x", b"x")


def test_a_folder_holds_whole_files_only(tmp_path, monkeypatch):
    store = open_store(tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        store.put("a/x", CONTENT)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("location", ["ftp://host/x", "nonsense://x", "://x"])
def test_an_unknown_kind_of_store_is_refused(location):
    with pytest.raises((ConfigError, StoreError), match=r"a store is a folder or a URL of http|no such folder"):
        open_store(location)


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: no folder can be made here"):
        open_store(tmp_path / "file", create=True)


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere: no such folder \(make one with run_publishing"):
        open_store(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "url", ["s3://bucket/path", "gs://bucket/path", "https://account.blob.core.windows.net/container"]
)
def test_the_clouds_stores_open_without_a_request(url):
    assert open_store(url).describe("x") == f"{url}/x"


def test_without_obstore_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(BackendUnavailableError, match=r'pip install "cachegen\[streaming\]"'):
        open_store("memory://")


def test_pauses_between_attempts_grow_and_differ():
    rule = RetryRule(first_pause_seconds=1.0)
    for num_failures, longest in ((1, 1.0), (2, 2.0), (3, 4.0)):
        pauses = {rule.pause_seconds(num_failures) for _ in range(20)}
        assert len(pauses) > 1 and all(longest / 2 <= pause <= longest for pause in pauses)


class TestWebServer:
    """Reading over HTTP from servers good and bad."""

    def test_whole_objects_need_no_ranges(self, server):
        assert server.open().get_exactly("a/b.bin", len(CONTENT), sha256=SHA256) == CONTENT
        assert server.requests == [("GET", "/a/b.bin", None)]

    def test_parts_are_asked_for_by_range(self, server):
        assert server.open().get_range("a/b.bin", 5, 10) == CONTENT[5:10]
        assert server.requests == [("GET", "/a/b.bin", "bytes=5-9")]

    def test_what_is_missing_is_not_asked_for_again(self, server):
        with pytest.raises(StoreError, match="no such object"):
            server.open().get("nope", 10)
        assert not server.open().exists("nope") and server.open().exists("a/b.bin")
        assert [method for method, _, _ in server.requests] == ["GET", "HEAD", "HEAD"]

    @pytest.mark.parametrize("how", ["hang up", "stall"])
    def test_a_broken_body_is_continued_where_it_broke(self, server, how):
        server.faults = [Misbehaviour("b.bin", how, times=1, position=150_000)]
        counted, retries = [], []
        content = server.open().get_exactly(
            "a/b.bin", len(CONTENT), sha256=SHA256, on_bytes=counted.append, on_retry=retries.append
        )
        assert content == CONTENT and sum(counted) == len(CONTENT) and len(retries) == 1
        (_, _, first), (_, _, second) = server.requests
        assert first is None and second is not None and 0 < int(second[6:].split("-")[0]) <= 150_000

    def test_a_server_that_ignores_ranges_is_asked_for_the_whole_again(self, server):
        server.faults = [
            Misbehaviour("b.bin", "hang up", times=1, position=150_000),
            Misbehaviour("b.bin", "ignore range", times=1),
        ]
        assert server.open().get_exactly("a/b.bin", len(CONTENT), sha256=SHA256) == CONTENT
        assert [span is None for _, _, span in server.requests] == [True, False, True]

    @pytest.mark.parametrize("status", [b"500", b"503", b"429", b"408"])
    def test_a_busy_server_is_asked_again(self, server, status):
        server.faults = [Misbehaviour("b.bin", "status", times=2, body=status)]
        assert server.open().get("a/b.bin", len(CONTENT)) == CONTENT and len(server.requests) == 3

    @pytest.mark.parametrize("status", [b"400", b"401", b"403", b"410"])
    def test_a_refusal_is_final(self, server, status):
        server.faults = [Misbehaviour("b.bin", "status", body=status)]
        with pytest.raises(StoreError, match=r"b.bin: .+"):
            server.open().get("a/b.bin", len(CONTENT))
        assert len(server.requests) == 1

    def test_a_flipped_bit_is_fetched_again(self, server):
        server.faults = [Misbehaviour("b.bin", "flip", times=1, position=77_777)]
        assert server.open().get_exactly("a/b.bin", len(CONTENT), sha256=SHA256) == CONTENT
        assert [span for _, _, span in server.requests] == [None, None]

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (Misbehaviour("b.bin", "flip", position=9), "is corrupt, its SHA-256 differs"),
            (Misbehaviour("b.bin", "other body", body=CONTENT[::-1]), "is corrupt, its SHA-256 differs"),
            (Misbehaviour("b.bin", "other body", body=b"<html>Welcome!</html>"), "has 21 bytes, 262144 are expected"),
            (Misbehaviour("b.bin", "short", position=1000), "has 1000 bytes, 262144 are expected"),
            (Misbehaviour("b.bin", "long"), "has 263144 bytes, 262144 are expected"),
            (Misbehaviour("b.bin", "huge length"), f"has {1 << 60} bytes, 262144 are expected"),
            (Misbehaviour("b.bin", "hang up", position=0), "ended after 0 of 262144 bytes"),
            (Misbehaviour("b.bin", "stall", position=0), "HTTP error"),
            (Misbehaviour("b.bin", "no length"), "Content-Length Header missing"),
            (Misbehaviour("b.bin", "garbage"), "HTTP error"),
            (Misbehaviour("b.bin", "status", body=b"503"), "503 Service Unavailable"),
        ],
    )
    def test_a_server_that_keeps_lying_ends_in_one_line(self, server, fault, message):
        server.faults = [fault]
        with pytest.raises(StoreError, match=message) as caught:
            server.open().get_exactly("a/b.bin", len(CONTENT), sha256=SHA256)
        assert "\n" not in str(caught.value) and f"{server.url}/a/b.bin: " in str(caught.value)
        assert len(server.requests) <= QUICK.max_attempts

    @pytest.mark.parametrize("how", ["wrong range", "ignore range"])
    def test_a_part_of_somewhere_else_is_refused(self, server, how):
        server.faults = [Misbehaviour("b.bin", how)]
        with pytest.raises(StoreError, match=r"Requested 0\.\.100, got 7\.\.107|Range request not supported"):
            server.open().get_range("a/b.bin", 0, 100)

    def test_an_endless_object_of_unknown_size_is_not_read(self, server):
        server.faults = [Misbehaviour("b.bin", "huge length")]
        with pytest.raises(StoreError, match="more than the 1000000 allowed"):
            server.open().get("a/b.bin", 1_000_000)

    def test_a_caller_can_stop_in_the_middle(self, server):
        class Enough(Exception):
            pass

        def stop(_):
            raise Enough

        with pytest.raises(Enough):
            server.open().get_exactly("a/b.bin", len(CONTENT), on_bytes=stop)

    def test_a_plain_server_lists_nothing_and_says_so(self, server):
        with pytest.raises(StoreError, match="PROPFIND"):
            list(server.open().list())

    def test_a_server_of_the_plainest_kind_takes_whole_objects_without_a_condition(self, server):
        server.takes_writes = True
        content = bytes(6 << 20)  # more than a part
        assert server.open().put("new/x", b"x") and server.open().put("new/large", content)
        assert not server.open().put("new/x", b"y")
        assert server.open().get("new/x", 1) == b"x" and server.open().get("new/large", len(content)) == content

    def test_a_large_object_is_compared_by_its_size_only(self, server, tmp_path):
        content = bytes(MAX_COMPARED_BYTES + 1)
        server.takes_writes = True
        (tmp_path / "x").write_bytes(b"?" * len(content))
        assert server.open().ensure("x", content) is Ensured.THERE
        (tmp_path / "x").write_bytes(b"?" * (len(content) - 1))
        assert server.open().ensure("x", content) is Ensured.REPAIRED
        assert (tmp_path / "x").read_bytes() == content

    def test_a_server_that_takes_nothing_is_an_output_error(self, server):
        with pytest.raises(OutputError, match=r"http://.*/new: cannot be written: .*405 Method Not Allowed"):
            server.open().put("new", b"x")
        assert [method for method, _, _ in server.requests] == ["HEAD", "PUT"]

    def test_a_bucket_elsewhere_says_what_to_set(self, server, tmp_path, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        server.faults = [Misbehaviour("bucket", "status", body=b"301")]
        (tmp_path / "bucket").mkdir()
        (tmp_path / "bucket" / "x").write_bytes(b"x")
        with pytest.raises(StoreError, match="the bucket is in another region: set AWS_REGION"):
            open_store("s3://bucket", retry=QUICK).get("x", 1)
        assert len(server.requests) == 1

    def test_no_server_at_all(self):
        with pytest.raises(StoreError, match=r"http://127.0.0.1:9/x: .*HTTP error"):
            open_store("http://127.0.0.1:9", retry=QUICK).get("x", 10)


class TestSlowness:
    """No wait is without an end, however little a server sends."""

    @pytest.mark.parametrize("how", ["drip for ever", "drip its headers"])
    def test_a_lookup_that_drips_ends_as_too_slow(self, server, how):
        server.faults = [Misbehaviour("b.bin", how, position=10)]
        with pytest.raises(StoreError, match=r"too slow|timed out") as caught:
            server.open().get("a/b.bin", 1 << 20)
        assert caught.value.is_too_slow

    def test_asking_for_a_name_ends_as_too_slow(self, server):
        server.faults = [Misbehaviour("b.bin", "drip its headers", methods=("HEAD",))]
        with pytest.raises(StoreError) as caught:
            server.open().exists("a/b.bin")
        assert caught.value.is_too_slow

    @pytest.mark.parametrize("how", ["drip for ever", "drip its headers"])
    def test_a_large_object_that_drips_ends_as_too_slow(self, server, how):
        server.faults = [Misbehaviour("b.bin", how, position=5_000)]
        with pytest.raises(StoreError) as caught:
            server.open().get_exactly("a/b.bin", len(CONTENT) + (1 << 14))
        assert caught.value.is_too_slow

    def test_a_server_that_takes_a_body_and_says_nothing_ends_as_too_slow(self, server):
        server.takes_writes = True
        server.faults = [Misbehaviour("b.bin", "drip its headers", methods=("PUT",))]
        with pytest.raises(OutputError, match=r"too slow|timed out"):
            server.open().put("a/b.bin", b"x", overwrite=True)

    def test_the_longest_lookup_follows_from_its_size(self):
        assert RetryRule(max_attempts=3, stall_seconds=2.0).lookup_seconds(1 << 16) == 10.0

    def test_what_has_come_buys_time_at_the_least_rate(self):
        pace = Pace(0.05)
        pace.count(10 * MIN_BYTES_PER_SECOND)
        time.sleep(0.06)
        assert 0 < pace.patience() <= 0.05
        slow = Pace(0.05)
        slow.count(10)
        time.sleep(0.06)
        with pytest.raises(TimeoutError, match="10 bytes in"):
            slow.patience()


class TestRedirects:
    """A store is where its address says."""

    @pytest.fixture
    def elsewhere(self, tmp_path):
        """Another server of the same files: of the same host, on another port."""
        with serve(tmp_path) as running:
            yield running

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_another_port_is_not_asked_unless_it_is_allowed(self, server, elsewhere, status):
        target = f"{elsewhere.url}/a/b.bin"
        server.faults = [Misbehaviour("b.bin", "redirect", body=f"{status} {target}".encode(), methods=("GET", "HEAD"))]
        for ask in (
            lambda store: store.get("a/b.bin", len(CONTENT)),
            lambda store: store.get_exactly("a/b.bin", len(CONTENT)),
            lambda store: store.get_range("a/b.bin", 0, 10),
            lambda store: store.exists("a/b.bin"),
        ):
            with pytest.raises(StoreError, match=r"another host, port or scheme \(`follow_redirects` allows it\)"):
                ask(server.open())
        assert elsewhere.requests == []
        store = open_store(server.url, retry=QUICK, follow_redirects=True)
        assert store.get("a/b.bin", len(CONTENT)) == CONTENT and store.exists("a/b.bin")

    def test_another_host_is_not_asked(self, server):
        port = server.url.rsplit(":", 1)[1]
        server.faults = [Misbehaviour("b.bin", "redirect", body=f"302 http://localhost:{port}/a/b.bin".encode())]
        with pytest.raises(StoreError, match="another host, port or scheme"):
            server.open().get("a/b.bin", len(CONTENT))
        assert len(server.requests) == 1

    def test_another_path_of_the_same_server_is_followed_but_not_for_ever(self, server, tmp_path):
        (tmp_path / "c.bin").write_bytes(CONTENT)
        server.faults = [Misbehaviour("b.bin", "redirect", body=b"302 /c.bin")]
        assert server.open().get("a/b.bin", len(CONTENT)) == CONTENT
        server.faults = [Misbehaviour(".bin", "redirect", body=b"302 /c.bin")]
        with pytest.raises(StoreError, match="redirected more than 5 times"):
            server.open().get("a/b.bin", len(CONTENT))

    @pytest.mark.parametrize(
        "target", ["file:///etc/passwd", "ftp://host/x", "data:,x", "http://:80/", "http://h:99999/"]
    )
    def test_nothing_but_http_is_ever_followed(self, server, target):
        server.faults = [Misbehaviour("b.bin", "redirect", body=f"302 {target}".encode())]
        store = open_store(server.url, retry=QUICK, follow_redirects=True)
        with pytest.raises(StoreError, match=r"which is no http\(s\) address"):
            store.get("a/b.bin", len(CONTENT))

    def test_what_is_written_goes_nowhere_else(self, server, elsewhere):
        server.takes_writes = elsewhere.takes_writes = True
        body = f"307 {elsewhere.url}/new".encode()
        server.faults = [Misbehaviour("new", "redirect", body=body, methods=("PUT",))]
        with pytest.raises(OutputError, match="is not sent elsewhere"):
            open_store(server.url, retry=QUICK, follow_redirects=True).put("new", b"x", overwrite=True)
        assert elsewhere.requests == []

    def test_connections_are_kept_between_requests_and_replaced_when_the_server_has_closed_them(self, server):
        store = server.open()
        for _ in range(3):
            assert store.get("a/b.bin", len(CONTENT)) == CONTENT
        assert server.num_connections == 1
        server.hang_up()
        assert store.get("a/b.bin", len(CONTENT)) == CONTENT
        assert server.num_connections == 2


class TestWays:
    """How a web server is reached."""

    @pytest.fixture
    def certificate(self, tmp_path):
        """A file with a key and a certificate for localhost that nobody has signed."""
        x509 = pytest.importorskip("cryptography.x509")
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        now = datetime.datetime.now(datetime.UTC)
        signed = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(key, hashes.SHA256())
        )
        plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        path = tmp_path / "localhost.pem"
        path.write_bytes(key.private_bytes(*plain) + signed.public_bytes(serialization.Encoding.PEM))
        return path

    @pytest.fixture
    def secure_server(self, tmp_path, certificate, server):
        """The same files over TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        with serve(tmp_path, "localhost", context) as running:
            yield running

    def test_a_certificate_that_is_not_trusted_is_final(self, secure_server):
        with pytest.raises(StoreError, match=r"HTTP error: .*certificate verify failed") as caught:
            secure_server.open().get("a/b.bin", len(CONTENT))
        assert not caught.value.is_temporary and secure_server.requests == []

    def test_a_trusted_one_is_read_and_a_redirect_to_http_never_followed(
        self, server, secure_server, certificate, monkeypatch
    ):
        make_context = ssl.create_default_context
        monkeypatch.setattr("ssl.create_default_context", lambda: make_context(cafile=certificate))
        assert secure_server.open().get_exactly("a/b.bin", len(CONTENT), sha256=SHA256) == CONTENT
        secure_server.faults = [Misbehaviour("b.bin", "redirect", body=f"302 {server.url}/a/b.bin".encode())]
        store = open_store(secure_server.url, retry=QUICK, follow_redirects=True)
        with pytest.raises(StoreError, match="from https to http, which is never followed"):
            store.get("a/b.bin", len(CONTENT))
        assert server.requests == []

    def test_the_systems_proxy_is_asked_for_the_whole_address(self, server, monkeypatch):
        monkeypatch.setenv("http_proxy", server.url.replace("://", "://name:secret@"))
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(StoreError, match="no such object"):
            open_store("http://store.example/s", retry=QUICK).get("x", 10)
        assert server.requests == [("GET", "http://store.example/s/x", None)]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert server.open().exists("a/b.bin")

    @pytest.mark.parametrize("url", ["http://", "http://host:port", "https://:1"])
    def test_an_address_that_is_none_is_refused(self, url):
        with pytest.raises(ConfigError, match="not the URL of a store"):
            open_store(url)
