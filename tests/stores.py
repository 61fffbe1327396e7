"""A published document for the tests of stores and streaming, a web server for a folder, and one that misbehaves."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from conftest import make_cache, make_encoder, make_metadata, write_config

from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.store.catalog import EncodedLevel, Published, publish_document
from cachegen.store.store import RetryRule, Store, open_store

CHUNK_TOKENS = (300, 200, 100, 40)
NUM_TOKENS = 640
QUICK = RetryRule(max_attempts=3, first_pause_seconds=0.001, stall_seconds=0.3)


@dataclass
class Document:
    """An encoded document, its cache and its levels: 8, 32 and 128 bins."""

    cache: KVCache
    metadata: ContextMetadata
    levels: list[EncodedLevel]


def make_document(
    folder: Path,
    *,
    seed: int = 0,
    chunk_tokens: Sequence[int] = CHUNK_TOKENS,
    metadata: ContextMetadata | None = None,
    num_tokens: int | None = None,
    **shape,
) -> Document:
    """Encode a random cache at three levels.

    Args:
        num_tokens: of the cache; None for as many as the chunks have.
    """
    folder.mkdir(exist_ok=True)
    cache = make_cache(num_tokens or sum(chunk_tokens), seed=seed, **shape)
    metadata = metadata or make_metadata(cache.num_tokens, seed=seed)
    levels = []
    for bins, kl in ((8, 0.1), (32, 0.01), (128, 0.001)):
        groups = {f"{kind}_{place}_bins": bins for kind in ("key", "value") for place in ("first", "second")}
        config = write_config(folder / f"{bins}.json", **groups, key_third_bins=bins)
        encoder = make_encoder(cache, metadata, config, chunk_tokens)
        files = [b"".join(encoder.encode_chunk(index)) for index in range(encoder.num_chunks)]
        levels.append(EncodedLevel(encoder.tables_file, [lambda file=file: file for file in files], kl=kl))
    return Document(cache, metadata, levels)


def publish(folder: Path, document: Document) -> Published:
    """Put a document into the store in `folder`."""
    return publish_document(open_store(folder, create=True), document.levels, document.metadata)


@dataclass
class Misbehaviour:
    """What a server does with the answers to requests whose path contains `path`.

    Attributes:
        how: see `_Handler.respond`.
        times: how often; the answers after that are right.
        position: in bytes, where it begins.
        methods: whose answers.
    """

    path: str
    how: str
    times: int = 1 << 30
    position: int = 0
    body: bytes = b""
    methods: tuple[str, ...] = ("GET",)


@dataclass
class HttpServer:
    """A running server of a folder's files.

    Attributes:
        faults: may be changed while it runs.
        requests: (method, path, Range header or None) of every request.
        bytes_per_second: of every body; None is as fast as it goes.
    """

    url: str
    faults: list[Misbehaviour] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    bytes_per_second: float | None = None
    takes_writes: bool = False
    connections: list[socket.socket] = field(default_factory=list)

    @property
    def num_connections(self) -> int:
        return len(self.connections)

    def hang_up(self) -> None:
        """End all connections, as a server does that has waited long enough."""
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        time.sleep(0.05)

    def open(self, retry: RetryRule = QUICK) -> Store:
        return open_store(self.url, retry=retry)


@contextmanager
def serve(folder: Path, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[HttpServer]:
    """Serve a folder over HTTP with byte ranges, and with whatever faults are asked for."""
    server = HttpServer("")
    handler = type("Handler", (_Handler,), {"folder": folder, "state": server})
    with http.server.ThreadingHTTPServer((host, 0), handler) as httpd:
        httpd.daemon_threads = True
        httpd.handle_error = lambda *_: None  # a client that hangs up is what many tests are about
        server.url = f"{'http' if tls is None else 'https'}://{host}:{httpd.server_port}"
        if tls is not None:
            httpd.socket = tls.wrap_socket(httpd.socket, server_side=True)
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            httpd.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    folder: Path
    state: HttpServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.state.connections.append(self.connection)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.state.requests.append((self.command, self.path, self.headers.get("Range")))
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send(404, b"no such file\n")
            return
        content = path.read_bytes()
        for fault in self.state.faults:
            if self.command in fault.methods and fault.times > 0 and fault.path in self.path:
                fault.times -= 1
                self.misbehave(fault, content)
                return
        self.respond(content)

    def do_PUT(self) -> None:
        self.state.requests.append((self.command, self.path, self.headers.get("If-None-Match")))
        content = self.rfile.read(int(self.headers["Content-Length"]))
        for fault in self.state.faults:
            if "PUT" in fault.methods and fault.path in self.path:
                self.misbehave(fault, content)
                return
        if not self.state.takes_writes:
            self.send(405, b"no\n")
            return
        path = self.folder / self.path.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.send(201, b"")

    def respond(self, content: bytes, tamper: Callable[[bytes], bytes] = lambda body: body) -> None:
        span = self.headers.get("Range")
        if span is None:
            self.send(200, tamper(content))
            return
        start, last = (int(number) for number in span.removeprefix("bytes=").split("-"))
        body = tamper(content[start : last + 1])
        self.send(206, body, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(content)}"})

    def misbehave(self, fault: Misbehaviour, content: bytes) -> None:
        at = fault.position
        if fault.how == "status":
            self.send(int(fault.body), b"sorry\n")
        elif fault.how == "flip":
            self.respond(content, lambda body: body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
        elif fault.how == "other body":
            self.respond(fault.body)
        elif fault.how == "huge length":
            self.send(200, content, {"Content-Length": str(1 << 60)}, hang_up=True)
        elif fault.how == "hang up":
            self.send(200, content, stop=at, hang_up=True)
        elif fault.how == "short":
            self.send(200, content[:at])
        elif fault.how == "long":
            self.send(200, content + b"x" * 1000)
        elif fault.how == "stall":
            self.send(200, content, stop=at)
            time.sleep(1.5)
        elif fault.how == "drip":
            self.send(200, content, stop=at)
            for byte in content[at : at + 30]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif fault.how == "drip for ever":
            self.send(200, content + b" " * (1 << 14), stop=at)
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif fault.how == "drip its headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif fault.how == "redirect":
            self.send(int(fault.body[:3]), b"", {"Location": fault.body[4:].decode()})
        elif fault.how == "ignore range":
            self.send(200, content)
        elif fault.how == "wrong range":
            self.send(206, content[:100], {"Content-Range": f"bytes 7-106/{len(content)}"})
        elif fault.how == "no length":
            self.send(200, content, {"Content-Length": None}, hang_up=True)
        elif fault.how == "garbage":
            self.wfile.write(b"\x00\xff this is not HTTP \r\n\r\n")
            self.close_connection = True
        else:
            raise ValueError(fault.how)

    def send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str | None] | None = None,
        *,
        stop: int | None = None,
        hang_up: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[:stop]
        rate = self.state.bytes_per_second
        if rate is None:
            self.wfile.write(body)
        else:
            for start in range(0, len(body), 1 << 14):
                self.wfile.write(body[start : start + (1 << 14)])
                time.sleep((1 << 14) / rate)
        if hang_up:
            self.close_connection = True
        if stop is not None:
            self.close_connection = True
