"""Where the bytes of encoded contexts live: one small interface over a folder, memory, a web server or a cloud's store.

Web servers are spoken to by `http_objects`, everything else by obstore (`obstore_objects`). Retries are here: they go
on where a body broke off, they are counted, and whoever waits for a deadline can give up in between. Nothing of what a
server says is believed: bodies are read in pieces into memory of a size that the reader chose, and no wait is without
an end.

docs/store.md specifies the names and the manifests that are kept here.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from cachegen.errors import ConfigError, OutputError, StoreError
from cachegen.store.folder_objects import FolderObjects
from cachegen.store.http_objects import HttpObjects
from cachegen.store.objects import MIN_BYTES_PER_SECOND, Answer
from cachegen.store.obstore_objects import ObstoreObjects, load_obstore, reason_of

URL_SCHEMES = ("http", "https", "s3", "gs", "az", "memory")
MAX_COMPARED_BYTES = 4 << 20
"""An object that is there is read back and compared up to this size, beyond it by its size; in folders always."""

_CONNECT_SECONDS = 5.0


class Ensured(Enum):
    """What `Store.ensure` found and did."""

    THERE = "it was there, whole"
    WRITTEN = "it was not there"
    REPAIRED = "what was there was damaged"


class Objects(Protocol):
    """What a store needs of the place that holds its objects; all methods raise StoreError."""

    def get(self, name: str, span: tuple[int, int] | None = None, *, deadline: float | None = None) -> Answer:
        """Ask for an object, or bytes `start` to `stop` of it."""
        ...

    def exists(self, name: str, *, deadline: float | None = None) -> bool:
        """Tell whether there is an object of that name."""
        ...

    def put(self, name: str, content: bytes, *, overwrite: bool) -> bool:
        """Write an object, whole or not at all; returns False where another one was there first and stays."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names below a folder."""
        ...

    def sweep(self, name: str) -> None:
        """Remove what a killed writer left beside an object, if the place keeps such things."""
        ...


@dataclass(frozen=True)
class RetryRule:
    """When to try again, and when to call a connection dead.

    Attributes:
        max_attempts: requests for one object, the first included.
        first_pause_seconds: before the second attempt; each later pause is twice as long, all less up to a half at
            random, so that clients do not come back together.
        stall_seconds: without a single byte, on connecting as on reading; `objects.Pace` has the rule.
    """

    max_attempts: int = 3
    first_pause_seconds: float = 0.05
    stall_seconds: float = 2.0

    def pause_seconds(self, num_failures: int) -> float:
        """Return how long to wait after so many failures in a row."""
        return self.first_pause_seconds * 2 ** (num_failures - 1) * (1 - random.random() / 2)

    def lookup_seconds(self, max_bytes: int) -> float:
        """Return how long a lookup of at most so many bytes may take, all its attempts together."""
        return self.max_attempts * self.stall_seconds + max_bytes / MIN_BYTES_PER_SECOND


# A whole part goes up in silence before the answer comes: in 60 s, two parts at 1.4 Mbit/s.
WRITING = RetryRule(max_attempts=4, first_pause_seconds=0.5, stall_seconds=60.0)


class Store:
    """Objects by name in one place; made by `open_store`.

    Attributes:
        url: of the place, for messages.
        retry: the rule for all requests.
    """

    def __init__(self, url: str, objects: Objects, retry: RetryRule, *, is_local: bool = False) -> None:
        self.url, self.retry = url.rstrip("/"), retry
        self._objects, self._is_local = objects, is_local

    def describe(self, name: str) -> str:
        """Return the full address of an object, for messages."""
        return f"{self.url}/{name}"

    def get(self, name: str, max_bytes: int) -> bytes:
        """Look up a whole object whose size is not known, within `RetryRule.lookup_seconds`.

        Raises:
            StoreError: it is not there (`is_missing`), larger than `max_bytes`, cannot be read after all attempts, or
                not in time (`is_too_slow`).
        """
        deadline = time.monotonic() + self.retry.lookup_seconds(max_bytes)

        def attempt() -> bytes:
            with closing(self._objects.get(name, deadline=deadline)) as answer:
                if answer.num_bytes > max_bytes:
                    raise StoreError(
                        f"{self.describe(name)}: has {answer.num_bytes} bytes, more than the {max_bytes} allowed"
                    )
                content = bytearray(answer.num_bytes)
                self._read_body(name, answer, content, 0, None)
                return bytes(content)

        return self._try_again(attempt, deadline=deadline)

    def get_exactly(
        self,
        name: str,
        num_bytes: int,
        *,
        sha256: str | None = None,
        on_bytes: Callable[[int], object] | None = None,
        on_retry: Callable[[StoreError], object] | None = None,
    ) -> bytearray:
        """Return a whole object whose size is known, going on where an attempt broke off.

        Args:
            sha256: in hex, of the object; one that differs is asked for again from its beginning.
            on_bytes: called with the number of bytes that came, after each piece; may raise to stop.
            on_retry: called with the error that leads to another attempt; may raise to stop.

        Raises:
            StoreError: it is not there (`is_missing`), has another size or content, or cannot be read after all
                attempts.
        """
        received, num_received, ranges_work = bytearray(num_bytes), 0, True

        def count(num_new: int) -> None:
            nonlocal num_received
            num_received += num_new
            if on_bytes is not None:
                on_bytes(num_new)

        def attempt() -> bytearray:
            nonlocal num_received, ranges_work
            try:
                # Every server can serve a whole object; only what is left of one is asked for by range.
                span = (num_received, num_bytes) if num_received else None
                self._read(name, span, num_bytes, received, num_received, count)
            except StoreError as error:
                if error.is_range_ignored:
                    num_received = 0
                raise
            if sha256 is not None and hashlib.sha256(received).hexdigest() != sha256:
                num_received = 0
                raise StoreError(f"{self.describe(name)}: is corrupt, its SHA-256 differs", is_temporary=True)
            return received

        return self._try_again(attempt, on_retry)

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` of an object.

        Raises:
            StoreError: as `get_exactly`, or the server does not serve ranges.
        """
        part = bytearray(stop - start)
        self._try_again(lambda: self._read(name, (start, stop), None, part, 0, None))
        return bytes(part)

    def put(self, name: str, content: bytes | memoryview, *, overwrite: bool = False) -> bool:
        """Write an object, whole or not at all.

        Args:
            overwrite: replace what is there; otherwise it stays, whatever it is. Where two write a small object at
                once, the first one's stays if the store has conditional writes.

        Returns:
            Whether it was written.

        Raises:
            OutputError: it cannot be written, after all attempts.
        """
        try:
            self._objects.sweep(name)
            is_there = self.exists(name)
        except StoreError as error:
            raise self._unwritten(name, error) from error
        return not (is_there and not overwrite) and self._write(name, content, overwrite)

    def sweep(self, name: str) -> None:
        """Remove what killed writers left beside an object; once for each folder, and nothing in other stores."""
        self._objects.sweep(name)

    def ensure(self, name: str, content: bytes) -> Ensured:
        """Write an object whose name says its content, unless it is there and whole.

        What is there is compared as `holds` does; what differs is damaged, since nothing else may have this name.

        Raises:
            OutputError: it cannot be written, or what is there cannot be read, after all attempts.
        """
        self._objects.sweep(name)
        try:
            found = self.holds(name, content)
            if found is None and self._write(name, content, overwrite=False):
                return Ensured.WRITTEN
            if found is None:  # another publisher was quicker
                found = self.holds(name, content)
        except StoreError as error:
            raise self._unwritten(name, error) from error
        if found:
            return Ensured.THERE
        self._write(name, content, overwrite=True)
        return Ensured.REPAIRED

    def holds(self, name: str, content: bytes) -> bool | None:
        """Tell whether an object is there with this content; None where there is none.

        Over a network, objects of more than `MAX_COMPARED_BYTES` are compared by their size.

        Raises:
            StoreError: the store does not say, after all attempts.
        """
        is_compared = self._is_local or len(content) <= MAX_COMPARED_BYTES

        def attempt() -> bool | None:
            try:
                answer = self._objects.get(name)
            except StoreError as error:
                if error.is_missing:
                    return None
                raise
            with closing(answer):
                if answer.num_bytes != len(content) or not is_compared:
                    return answer.num_bytes == len(content)
                found = bytearray(len(content))
                self._read_body(name, answer, found, 0, None)
                return found == content

        return self._try_again(attempt)

    def exists(self, name: str) -> bool:
        """Tell whether there is an object of that name, within `RetryRule.lookup_seconds` of no bytes.

        Raises:
            StoreError: the store does not say, after all attempts or in time (`is_too_slow`).
        """
        deadline = time.monotonic() + self.retry.lookup_seconds(0)
        return self._try_again(lambda: self._objects.exists(name, deadline=deadline), deadline=deadline)

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the names below a folder, in no order. A plain web server has no such list: nothing here needs one.

        Raises:
            StoreError: the store cannot list.
        """
        yield from self._objects.list(prefix)

    def _write(self, name: str, content: bytes | memoryview, overwrite: bool) -> bool:
        """Write an object without asking what is there; returns False where the store says that another one stays."""
        try:
            return self._try_again(lambda: self._objects.put(name, bytes(content), overwrite=overwrite))
        except StoreError as error:
            raise self._unwritten(name, error) from error

    def _unwritten(self, name: str, error: StoreError) -> OutputError:
        place = self.describe(name)
        return OutputError(f"{place}: cannot be written: {str(error).removeprefix(place + ': ')}")

    def _read(
        self,
        name: str,
        span: tuple[int, int] | None,
        size: int | None,
        target: bytearray,
        position: int,
        on_bytes: Callable[[int], object] | None,
    ) -> None:
        """Ask for an object, or a span of one, and fill `target` from `position` on.

        Args:
            size: of the object, where it is known.
        """
        with closing(self._objects.get(name, span)) as answer:
            if size is not None and span is None and answer.num_bytes != size:
                raise StoreError(f"{self.describe(name)}: has {answer.num_bytes} bytes, {size} are expected")
            if answer.span != span:
                raise StoreError(f"{self.describe(name)}: bytes {answer.span} came, {span} were asked for")
            self._read_body(name, answer, target, position, on_bytes)

    def _read_body(
        self, name: str, answer: Answer, target: bytearray, position: int, on_bytes: Callable[[int], object] | None
    ) -> None:
        """Fill `target` from `position` to its end, refusing a body that is shorter or longer."""
        for piece in answer.pieces:
            if position + len(piece) > len(target):
                raise StoreError(f"{self.describe(name)}: sent more than the {len(target)} bytes it announced")
            target[position : position + len(piece)] = piece
            position += len(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
        if position < len(target):
            message = f"{self.describe(name)}: ended after {position} of {len(target)} bytes"
            raise StoreError(message, is_temporary=True)

    def _try_again(
        self,
        attempt: Callable[[], Any],
        on_retry: Callable[[StoreError], object] | None = None,
        *,
        deadline: float = math.inf,
    ) -> Any:
        """Return what `attempt` returns, pausing between attempts that may yet succeed before the deadline."""
        num_failures = 0
        while True:
            try:
                return attempt()
            except StoreError as error:
                num_failures += 1
                if not error.is_temporary or num_failures >= self.retry.max_attempts:
                    raise
                if on_retry is not None:
                    on_retry(error)
                pause_seconds = self.retry.pause_seconds(num_failures)
                if time.monotonic() + pause_seconds >= deadline:
                    raise
            time.sleep(pause_seconds)


def open_store(
    location: str | os.PathLike[str],
    *,
    retry: RetryRule | None = None,
    create: bool = False,
    follow_redirects: bool = False,
) -> Store:
    """Open a store.

    Args:
        location: a folder, or a URL: `http(s)://host:port/path`, `s3://bucket/path`, `gs://...`, `az://...`,
            `memory://` (a new, empty one). Clouds find their credentials where their own tools do.
        retry: for all requests; None takes the defaults, which are for reading: to write, give `WRITING`.
        create: make a folder that is not there.
        follow_redirects: let a web server send readers to other hosts, ports or from http to https.

    Raises:
        BackendUnavailableError: obstore, which all but folders need, is not installed.
        ConfigError: the URL is not one of these.
        StoreError: there is no such folder.
        OutputError: the folder cannot be made.
    """
    rule = retry or RetryRule()
    text = os.fspath(location)
    scheme = text.split("://", 1)[0].lower() if "://" in text else ""
    if scheme and scheme not in URL_SCHEMES:
        raise ConfigError(f"{text}: a store is a folder or a URL of {', '.join(URL_SCHEMES)}")
    if scheme == "memory":
        obstore = load_obstore()
        return Store(text, ObstoreObjects(text, obstore.store.MemoryStore(), rule.stall_seconds), rule)
    if not scheme:
        folder = Path(text).absolute()
        if create:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{text}: no folder can be made here: {error.strerror}") from error
        if not folder.is_dir():
            raise StoreError(f"{text}: no such folder (make one with run_publishing.py)", is_missing=True)
        return Store(text, FolderObjects(text, folder), rule, is_local=True)
    obstore = load_obstore()
    connect_seconds = min(rule.stall_seconds, _CONNECT_SECONDS)
    client = {
        "connect_timeout": _milliseconds(connect_seconds),
        "read_timeout": _milliseconds(rule.stall_seconds),
        "timeout": "1day",
        "allow_http": True,
    }
    try:
        backend = obstore.store.from_url(text, client_options=client, retry_config={"max_retries": 0})
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise ConfigError(f"{text}: not the URL of a store: {reason_of(error)}") from None
    if isinstance(backend, obstore.store.HTTPStore):
        objects = HttpObjects(
            text,
            connect_seconds=connect_seconds,
            stall_seconds=rule.stall_seconds,
            follow_redirects=follow_redirects,
        )
        return Store(text, objects, rule)
    return Store(text, ObstoreObjects(text, backend, rule.stall_seconds), rule)


def _milliseconds(seconds: float) -> str:
    return f"{max(1, round(1000 * seconds))}ms"
