"""Objects on a web server, over http.client: a client that knows where its answers come from and when to give up.

obstore speaks HTTP, too, but follows every redirect, and calls a server alive that sends a byte now and then. Here a
redirect to another host, port or scheme is an error unless it is allowed, and no wait is without an end.

Source: RFC 9110 (ranges, redirects) and 9112 (persistent connections).
"""

from __future__ import annotations

import base64
import http.client
import io
import re
import ssl
import threading
import urllib.parse
import urllib.request
import weakref
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult

from cachegen.errors import ConfigError, StoreError
from cachegen.store.objects import PIECE_BYTES, Answer, Pace

MAX_REDIRECTS = 5

_MAX_IDLE_CONNECTIONS = 16
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(?:\d{1,18}|\*)")
_REDIRECTS = (301, 302, 303, 307, 308)
_TRY_LATER = (408, 425, 429)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_ERRORS = (http.client.HTTPException, OSError, ValueError)

Origin = tuple[str, str, int]


class HttpObjects:
    """The objects below a URL; methods may be called from several threads."""

    def __init__(
        self, url: str, *, connect_seconds: float, stall_seconds: float, follow_redirects: bool = False
    ) -> None:
        """Prepare; no request is made.

        Raises:
            ConfigError: the URL has no host, or a wrong port.
        """
        try:
            self._root = urllib.parse.urlsplit(url.rstrip("/"))
            _origin(self._root)
        except ValueError as error:
            raise ConfigError(f"{url}: not the URL of a store: {error}") from None
        self._url, self._connect_seconds, self._stall_seconds = url.rstrip("/"), connect_seconds, stall_seconds
        self._follow_redirects = follow_redirects
        self._idle: dict[Origin, list[_Connection]] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._idle)

    def get(self, name: str, span: tuple[int, int] | None = None, *, deadline: float | None = None) -> Answer:
        """Ask for an object, or bytes `start` to `stop` of it.

        Raises:
            StoreError: there is none, or the server does not answer as it must.
        """
        headers = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        connection, response = self._request("GET", name, headers, None, Pace(self._stall_seconds, deadline))
        try:
            if response.length is None:
                raise StoreError(f"{self._describe(name)}: HTTP error: Content-Length Header missing")
            if span is not None:
                self._check_range(name, response, span)
        except StoreError:
            connection.close()
            raise
        body = _Body(self, name, connection, response)
        return Answer(response.length, span, body.read(), body.close)

    def exists(self, name: str, *, deadline: float | None = None) -> bool:
        """Tell whether there is an object of that name.

        Raises:
            StoreError: the server does not say.
        """
        try:
            connection, response = self._request("HEAD", name, {}, None, Pace(self._stall_seconds, deadline))
        except StoreError as error:
            if error.is_missing:
                return False
            raise
        self.keep(connection, response)
        return True

    def put(self, name: str, content: bytes, *, overwrite: bool) -> bool:
        """Write an object in one piece; web servers have no condition to be asked for, so it replaces what is there.

        Raises:
            StoreError: the server does not take it.
        """
        connection, response = self._request("PUT", name, {}, content, Pace(self._stall_seconds))
        body = _Body(self, name, connection, response)
        try:
            for _ in body.read():
                pass
        finally:
            body.close()
        return True

    def sweep(self, name: str) -> None:
        """Do nothing: an upload that broke off leaves nothing that has a name."""

    def list(self, prefix: str) -> Iterator[str]:
        """Refuse: a plain web server has no list.

        Raises:
            StoreError: always.
        """
        raise StoreError(f"{self._describe(prefix)}: a web server cannot list its objects (PROPFIND is not tried)")

    def _describe(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _request(
        self, method: str, name: str, headers: dict[str, str], body: bytes | None, pace: Pace
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        """Return the answer to a request: its status is good, and redirects are behind it."""
        path = urllib.parse.quote(f"{self._root.path}/{name}", safe="/%:@!$&'()*+,;=~")
        target = self._root._replace(path=path, fragment="")
        for _ in range(MAX_REDIRECTS + 1):
            connection, response = self._send(method, name, target, headers, body, pace)
            location = response.headers.get("Location") if response.status in _REDIRECTS else None
            if location is None:
                self._check_status(name, connection, response)
                return connection, response
            connection.close()
            target = self._follow(name, method, target, location)
        raise StoreError(f"{self._describe(name)}: redirected more than {MAX_REDIRECTS} times")

    def _follow(self, name: str, method: str, target: SplitResult, location: str) -> SplitResult:
        """Return where a redirect leads.

        Raises:
            StoreError: it may not be followed.
        """
        shown = f"{self._describe(name)}: redirected to {location[:200]!r}"
        try:
            following = urllib.parse.urlsplit(urllib.parse.urljoin(target.geturl(), location))
            is_elsewhere = _origin(following) != _origin(target)
        except ValueError:
            raise StoreError(f"{shown}, which is no http(s) address") from None
        if method == "PUT":
            raise StoreError(f"{shown}: what is written is not sent elsewhere")
        if target.scheme == "https" and following.scheme != "https":
            raise StoreError(f"{shown}, from https to http, which is never followed")
        if is_elsewhere and not self._follow_redirects:
            raise StoreError(f"{shown}, another host, port or scheme (`follow_redirects` allows it)")
        return following

    def _send(
        self, method: str, name: str, target: SplitResult, headers: dict[str, str], body: bytes | None, pace: Pace
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        """Send one request, on an idle connection if there is one, and read the head of the answer."""
        while True:
            try:
                connection = self._take(_origin(target)) or _Connection(target, self._connect_seconds, pace)
            except _ERRORS as error:
                raise self.translate(name, error) from None
            connection.pace(pace)
            try:
                return connection, connection.ask(method, target, headers, body)
            except _ERRORS as error:
                connection.close()
                # The server may have closed an idle connection meanwhile, which says nothing about this request.
                if not (connection.num_requests > 1 and isinstance(error, ConnectionError)):
                    raise self.translate(name, error) from None

    def _take(self, origin: Origin) -> _Connection | None:
        with self._lock:
            idle = self._idle.get(origin)
            return idle.pop() if idle else None

    def keep(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        """Take back a connection for the next request, its answer being read whole."""
        response.close()
        with self._lock:
            idle = self._idle.setdefault(connection.origin, [])
            if not response.will_close and len(idle) < _MAX_IDLE_CONNECTIONS:
                idle.append(connection)
                return
        connection.close()

    def _check_status(self, name: str, connection: _Connection, response: http.client.HTTPResponse) -> None:
        if 200 <= response.status < 300:
            return
        connection.close()
        place, status = self._describe(name), f"{response.status} {response.reason}"[:100]
        if response.status == 404:
            raise StoreError(f"{place}: no such object", is_missing=True)
        if response.status in (401, 403, 407):
            raise StoreError(f"{place}: access is denied: {status}")
        is_temporary = response.status >= 500 or response.status in _TRY_LATER
        raise StoreError(f"{place}: HTTP error: {status}", is_temporary=is_temporary)

    def _check_range(self, name: str, response: http.client.HTTPResponse, span: tuple[int, int]) -> None:
        place = self._describe(name)
        if response.status != 206:
            message = f"{place}: Range request not supported: the server sends the whole object"
            raise StoreError(message, is_temporary=True, is_range_ignored=True)
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        found = (int(match[1]), int(match[2]) + 1) if match is not None else None
        if found != span:
            got = "an unnamed part" if found is None else f"{found[0]}..{found[1]}"
            raise StoreError(f"{place}: Requested {span[0]}..{span[1]}, got {got}")

    def translate(self, name: str, error: BaseException) -> StoreError:
        """Return what an exception of sockets or http.client means."""
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return StoreError(
            f"{self._describe(name)}: HTTP error: {reason}",
            is_temporary=not isinstance(error, ssl.SSLCertVerificationError),
            is_too_slow=isinstance(error, TimeoutError),
        )


class _Body:
    """The body of an answer; its connection is kept for the next request if all of it was read."""

    def __init__(
        self, objects: HttpObjects, name: str, connection: _Connection, response: http.client.HTTPResponse
    ) -> None:
        self._objects, self._name, self._connection, self._response = objects, name, connection, response
        self._is_whole = False

    def read(self) -> Iterator[bytes]:
        """Yield the bytes as they come."""
        while True:
            try:
                piece = self._response.read1(PIECE_BYTES)
            except _ERRORS as error:
                raise self._objects.translate(self._name, error) from None
            if not piece:
                break
            yield piece
        self._is_whole = not self._response.length

    def close(self) -> None:
        """Keep the connection or close it."""
        if self._is_whole:
            self._objects.keep(self._connection, self._response)
        else:
            self._response.close()
            self._connection.close()


class _Connection:
    """A connection to an origin, perhaps through a proxy, for one request after the other."""

    def __init__(self, target: SplitResult, connect_seconds: float, pace: Pace) -> None:
        """Connect.

        Raises:
            OSError, http.client.HTTPException: there is no connection to be had.
        """
        self.origin = _origin(target)
        self.num_requests = 0
        scheme, host, port = self.origin
        proxy = _find_proxy(scheme, host)
        address = (host, port) if proxy is None else _origin(proxy)[1:]
        timeout = min(connect_seconds, pace.patience())
        self._is_forwarded = proxy is not None and scheme == "http"
        self._proxy_headers = {} if proxy is None else _authorization(proxy, "Proxy-Authorization")
        if scheme == "https":
            client = http.client.HTTPSConnection(*address, timeout=timeout, context=ssl.create_default_context())
            if proxy is not None:
                client.set_tunnel(host, port, headers=self._proxy_headers)
        else:
            client = http.client.HTTPConnection(*address, timeout=timeout)
        client.connect()
        self._client, self._socket = client, _PacedSocket(client.sock, pace)
        client.sock = self._socket

    def pace(self, pace: Pace) -> None:
        """Read and write at another pace from now on."""
        self._socket.pace = pace

    def ask(
        self, method: str, target: SplitResult, headers: dict[str, str], body: bytes | None
    ) -> http.client.HTTPResponse:
        """Send a request and read the head of the answer.

        Raises:
            OSError, http.client.HTTPException, ValueError: there is none, or not of HTTP.
        """
        self.num_requests += 1
        address = target.path + (f"?{target.query}" if target.query else "")
        scheme, host, port = self.origin
        netloc = f"[{host}]" if ":" in host else host
        netloc += "" if port == _DEFAULT_PORTS[scheme] else f":{port}"
        all_headers = {"Host": netloc, **_authorization(target), **headers}
        if self._is_forwarded:
            address, all_headers = f"http://{netloc}{address}", all_headers | self._proxy_headers
        self._client.request(method, address, body=body, headers=all_headers)
        return self._client.getresponse()

    def close(self) -> None:
        """Close it, whether its answer was read or not."""
        self._client.close()
        self._socket.end()


class _PacedSocket:
    """What http.client needs of a socket, each wait of which ends as its pace says."""

    def __init__(self, sock: Any, pace: Pace) -> None:
        self.pace = pace
        self._socket, self._num_users = sock, 1

    def sendall(self, content: bytes) -> None:
        """Send, in pieces, since a timeout is for a whole call."""
        view = memoryview(content)
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._socket.settimeout(self.pace.patience())
            self._socket.sendall(piece)
            self.pace.count(len(piece))

    def recv_into(self, buffer: Any) -> int:
        """Receive what there is, at least a byte unless it is the end."""
        self._socket.settimeout(self.pace.patience())
        num_bytes = self._socket.recv_into(buffer)
        self.pace.count(num_bytes)
        return num_bytes

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return a reader; the socket stays open until it is closed, too."""
        self._num_users += 1
        return io.BufferedReader(_PacedReader(self), PIECE_BYTES)

    def close(self) -> None:
        """Close the socket once nothing uses it any more."""
        self._num_users -= 1
        if self._num_users == 0:
            self._socket.close()

    def end(self) -> None:
        """Close the socket at once."""
        self._socket.close()


class _PacedReader(io.RawIOBase):
    def __init__(self, sock: _PacedSocket) -> None:
        self._socket = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._socket.close()


def _close_all(idle: dict[Origin, list[_Connection]]) -> None:
    for connections in idle.values():
        for connection in connections:
            connection.close()


def _origin(url: SplitResult) -> Origin:
    """Return scheme, host and port.

    Raises:
        ValueError: it is no address of http(s).
    """
    if url.scheme not in _DEFAULT_PORTS or not url.hostname:
        raise ValueError("it must be http(s)://host")
    return url.scheme, url.hostname, url.port or _DEFAULT_PORTS[url.scheme]


def _authorization(url: SplitResult, header: str = "Authorization") -> dict[str, str]:
    """Return the header for the name and password in a URL."""
    if url.username is None:
        return {}
    pair = f"{urllib.parse.unquote(url.username)}:{urllib.parse.unquote(url.password or '')}"
    return {header: f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _find_proxy(scheme: str, host: str) -> SplitResult | None:
    """Return the system's proxy for a host."""
    proxy = urllib.request.getproxies().get(scheme)
    if not proxy or urllib.request.proxy_bypass(host):
        return None
    return urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
