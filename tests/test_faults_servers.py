"""Whatever a server does: the answer is that of the text, or there is one line; and neither takes long."""

from __future__ import annotations

import gzip
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fixtures.fault_documents import Documents, answer_of
from tests.fixtures.script_processes import Outcome

pytestmark = pytest.mark.faults

# A lookup and each file have deadlines; this is their sum with room for a busy machine.
SECONDS = 25
HTML = b"<!DOCTYPE html><html><body>Please log in to the network.</body></html>"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder as a store; `respond` is what a test makes of the answer to GET and HEAD."""

    protocol_version = "HTTP/1.1"
    folder: Path
    respond: Callable[[Handler, str, bytes | None], None]
    num_requests = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        type(self).num_requests += 1
        path = self.folder / self.path.lstrip("/")
        type(self).respond(self, self.path, path.read_bytes() if path.is_file() else None)

    do_HEAD = do_GET

    def answer(self, content: bytes | None, status: int = 200, **headers: str | int) -> None:
        """A right answer, but for the headers that are given; a header of "" is left out."""
        if content is None:
            content, status = b"", 404
        span = self.headers.get("Range")
        if span is not None and status == 200 and "Content-Encoding" not in {n.replace("_", "-") for n in headers}:
            start, last = (int(number) for number in span.removeprefix("bytes=").split("-"))
            headers = {"Content_Range": f"bytes {start}-{last}/{len(content)}", **headers}
            content, status = content[start : last + 1], 206
        self.send_response(status)
        for name, value in {"Content_Length": len(content), **headers}.items():
            if value != "":
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def reset(self) -> None:
        """Break the connection with RST, unlike one that ends."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


@contextmanager
def serve(folder: Path, respond: Callable[[Handler, str, bytes | None], None]) -> Iterator[str]:
    handler = type("Faulty", (Handler,), {"folder": folder, "respond": staticmethod(respond)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        server.handle_error = lambda *_: None
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def is_chunk(path: str) -> bool:
    return path.startswith("/chunks/")


def reset(handler: Handler, path: str, content: bytes | None) -> None:
    handler.reset()


def reset_in_chunks(handler: Handler, path: str, content: bytes | None) -> None:
    if content is None or not is_chunk(path):
        handler.answer(content)
        return
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.reset()


def stall(handler: Handler, path: str, content: bytes | None) -> None:
    time.sleep(60)


def stall_in_chunks(handler: Handler, path: str, content: bytes | None) -> None:
    if is_chunk(path):
        time.sleep(60)
    handler.answer(content)


def drip(handler: Handler, path: str, content: bytes | None) -> None:
    """A byte every 0.2 seconds: no timer for silence ever fires."""
    if content is None:
        handler.answer(None)
        return
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    for byte in content:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.2)


def announce_more(handler: Handler, path: str, content: bytes | None) -> None:
    handler.answer(content, Content_Length=len(content or b"") + 1000)
    handler.close_connection = True


def announce_less(handler: Handler, path: str, content: bytes | None) -> None:
    handler.answer(content, Content_Length=max(0, len(content or b"") - 10))
    handler.close_connection = True


def announce_a_terabyte(handler: Handler, path: str, content: bytes | None) -> None:
    handler.answer(content, Content_Length=1 << 40)
    handler.close_connection = True


def announce_nothing(handler: Handler, path: str, content: bytes | None) -> None:
    handler.answer(content, Content_Length="")
    handler.close_connection = True


def send_gzip(handler: Handler, path: str, content: bytes | None) -> None:
    handler.answer(None if content is None else gzip.compress(content), Content_Encoding="gzip")


def say_gzip(handler: Handler, path: str, content: bytes | None) -> None:
    handler.answer(content, Content_Encoding="gzip")


def send_html(handler: Handler, path: str, content: bytes | None) -> None:
    """What a network's login page does to every request."""
    handler.answer(HTML, Content_Type="text/html")


def fail(handler: Handler, path: str, content: bytes | None) -> None:
    handler.answer(b"sorry", status=503)


def forbid(handler: Handler, path: str, content: bytes | None) -> None:
    handler.answer(b"no", status=403)


def send_other_bytes(handler: Handler, path: str, content: bytes | None) -> None:
    handler.answer(content[::-1] if content is not None and is_chunk(path) else content)


def redirect(handler: Handler, path: str, content: bytes | None) -> None:
    """To another host: of this machine, where nothing listens."""
    handler.answer(b"", status=302, Location=f"http://127.0.0.2:9{path}")


FAULTS = {
    respond.__name__: respond
    for respond in (
        reset, reset_in_chunks, stall, stall_in_chunks, drip, announce_more, announce_less, announce_a_terabyte,
        announce_nothing, send_gzip, say_gzip, send_html, fail, forbid, send_other_bytes, redirect,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(documents: Documents) -> str:
    """The answer of the text, which is that of the undisturbed caches, too."""
    flags = [*documents.decode_flags(documents.encoded("transform")), "--json", "-", "--verify"]
    outcome = documents.server.run("run_decoding_disk", flags)
    assert outcome.exit_code == 0, outcome
    assert json.loads(outcome.out)["greedy_match"]
    return answer_of(outcome)


def check(outcome: Outcome, expected: str) -> None:
    assert outcome.seconds < SECONDS, outcome
    if outcome.exit_code == 0:
        assert answer_of(outcome) == expected
    else:
        assert outcome.exit_code in (3, 4, 5) and outcome.error_line and outcome.out == "", outcome


@pytest.mark.parametrize("name", FAULTS)
def test_a_server_that_misbehaves(documents, expected, name):
    with serve(documents.folder / "store", FAULTS[name]) as url:
        run = documents.server.start("run_decoding_remote", [*documents.remote_flags(url), "--json", "-"])
        check(run.wait(SECONDS + 20), expected)


def test_a_server_that_dies_for_good_after_any_number_of_requests(documents, expected):
    """After one, two, three ... until there is an answer without its death."""
    for num_alive in range(40):
        num_seen = 0

        def respond(handler: Handler, path: str, content: bytes | None, num_alive: int = num_alive) -> None:
            nonlocal num_seen
            num_seen += 1
            if num_seen > num_alive:
                handler.reset()
            else:
                handler.answer(content)

        with serve(documents.folder / "store", respond) as url:
            run = documents.server.start("run_decoding_remote", [*documents.remote_flags(url), "--json", "-"])
            check(run.wait(SECONDS + 20), expected)
        if num_seen <= num_alive:
            break
    else:
        raise AssertionError("never was there an undisturbed answer")


def test_a_port_at_which_no_one_listens(documents, expected):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        check(documents.server.run("run_decoding_remote", [*documents.remote_flags(url), "--json", "-"]), expected)


def test_a_host_that_does_not_exist(documents, expected):
    flags = [*documents.remote_flags("http://no-such-host.invalid"), "--json", "-"]
    check(documents.server.run("run_decoding_remote", flags), expected)


@pytest.mark.parametrize("broken", ["store.json", "prefixes", "documents", "tables", "chunks"])
@pytest.mark.parametrize("content", [b"", b"{}", HTML, b"[" * 100_000, b'{"version": true}', bytes(1 << 20)])
def test_an_object_that_holds_something_else(documents, expected, broken, content):
    def respond(handler: Handler, path: str, found: bytes | None) -> None:
        handler.answer(content if path.lstrip("/").startswith(broken) and found is not None else found)

    with serve(documents.folder / "store", respond) as url:
        check(documents.server.run("run_decoding_remote", [*documents.remote_flags(url), "--json", "-"]), expected)


def test_json_is_whole_whatever_the_server_did(documents, tmp_path, expected):
    with serve(documents.folder / "store", reset_in_chunks) as url:
        flags = [*documents.remote_flags(url), "--json", tmp_path / "x.json", "--quiet"]
        outcome = documents.server.run("run_decoding_remote", flags)
    if outcome.exit_code == 0:
        assert json.loads((tmp_path / "x.json").read_text())["text"].split()[0] == expected
    else:
        assert not (tmp_path / "x.json").exists()
