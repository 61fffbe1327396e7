"""Where the bytes of encoded contexts live: one small interface over a folder, memory, a web server or a cloud's store.

The work is obstore's (bindings of Rust's object_store: HTTP, S3, GCS, Azure, local, memory). Its own retries are off:
here they go on where a body broke off, they are counted, and whoever waits for a deadline can give up in between.
Nothing of what a server says is believed: bodies are read in pieces into memory of a size that the reader chose.

docs/store.md specifies the names and the manifests that are kept here.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from cachegen.errors import BackendUnavailableError, ConfigError, InputError, OutputError, OutputExistsError, StoreError
from cachegen.files import is_temporary, open_file, remove_stale_temporaries, write_file
from cachegen.manifest import is_object_name

URL_SCHEMES = ("http", "https", "s3", "gs", "az", "memory")

# obstore has one exception for all of these; 408 and 429 ask to come back later.
_FINAL_RESPONSE = re.compile(
    r"status code: 4(?!08|29)|Content-Length Header missing|Requested \d+\.\.\d+, got|redirect without LOCATION"
)
# The clouds answer in XML, after the status in obstore's message.
_CLOUD_ANSWER = re.compile(r"status code: ([^:\n]+): .*?<Code>([^<]+)</Code>\s*<Message>([^<\n]*)", re.DOTALL)
_NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")
# The last place where obstore looks is a server that only machines of the cloud have.
_NO_CREDENTIALS = "no credentials are set (docs/store.md says where they are looked for)"
# What obstore's messages mean to whoever has to do something about them.
_REMEDIES = (
    ("redirect without LOCATION", "the bucket is in another region: set AWS_REGION"),
    ("/latest/api/token", "no credentials are set, and there is no instance metadata to give some (docs/store.md)"),
    (
        "metadata.google.internal",
        "no credentials are set, and there is no metadata server to give some (docs/store.md)",
    ),
    ("/metadata/identity", "no credentials are set, and there is no managed identity to give some (docs/store.md)"),
)
_PIECE_BYTES = 1 << 16  # what a read waits for at least: 1 ms at 0.5 Gbps
_PART_BYTES = 5 << 20  # of an upload in parts, the least that S3 takes
_PARTS_IN_FLIGHT = 2
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class RetryRule:
    """When to try again, and when to call a connection dead.

    Attributes:
        max_attempts: requests for one object, the first included.
        first_pause_seconds: before the second attempt; each later pause is twice as long, all less up to a half at
            random, so that clients do not come back together.
        stall_seconds: without a single byte, on connecting as on reading.
    """

    max_attempts: int = 3
    first_pause_seconds: float = 0.05
    stall_seconds: float = 2.0

    def pause_seconds(self, num_failures: int) -> float:
        """Return how long to wait after so many failures in a row."""
        return self.first_pause_seconds * 2 ** (num_failures - 1) * (1 - random.random() / 2)


# A whole part goes up in silence before the answer comes: in 60 s, two parts at 1.4 Mbit/s.
WRITING = RetryRule(max_attempts=4, first_pause_seconds=0.5, stall_seconds=60.0)


class Store:
    """Objects by name in one place; made by `open_store`.

    Attributes:
        url: of the place, for messages.
        retry: the rule for all requests.
    """

    def __init__(self, url: str, backend: Any, retry: RetryRule, folder: Path | None = None) -> None:
        self.url, self.retry = url.rstrip("/"), retry
        self._backend, self._folder = backend, folder
        self._swept: set[Path] = set()  # folders that hold no file of a killed writer any more

    def describe(self, name: str) -> str:
        """Return the full address of an object, for messages."""
        return f"{self.url}/{name}"

    def get(self, name: str, max_bytes: int) -> bytes:
        """Return a whole object whose size is not known.

        Raises:
            StoreError: it is not there (`is_missing`), larger than `max_bytes`, or cannot be read after all attempts.
        """

        def attempt() -> bytes:
            if self._folder is not None:
                with self._open_file(name) as stream:
                    size = os.fstat(stream.fileno()).st_size
                    if size > max_bytes:
                        raise StoreError(f"{self.describe(name)}: has {size} bytes, more than the {max_bytes} allowed")
                    return stream.read(size)
            with self._translated(name):
                result = _obstore().get(self._backend, name)
                size = result.meta["size"]
                if size > max_bytes:
                    raise StoreError(f"{self.describe(name)}: has {size} bytes, more than the {max_bytes} allowed")
                content = bytearray(size)
                self._read_body(name, result, content, 0, None)
                return bytes(content)

        return self._try_again(attempt)

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
            overwrite: replace what is there; otherwise it stays, since names of objects say their content. Where two
                write a small object at once, the first one's stays if the store has conditional writes.

        Returns:
            Whether it was written.

        Raises:
            OutputError: it cannot be written, after all attempts.
        """
        try:
            is_there = not overwrite and self.exists(name)
            if self._folder is not None:
                self._sweep((self._folder / name).parent)
            if is_there:
                return False
            if self._folder is not None:  # ours is on disk before it has its name; obstore's is renamed only
                try:
                    write_file(self._folder / name, bytes(content), replace=overwrite)
                except OutputExistsError:  # by another process, just now
                    return False
                return True
            return self._try_again(lambda: self._upload(name, bytes(content), overwrite))
        except StoreError as error:
            place = self.describe(name)
            raise OutputError(f"{place}: cannot be written: {str(error).removeprefix(place + ': ')}") from error

    def _sweep(self, folder: Path) -> None:
        """Remove what killed writers left in a folder, once."""
        if folder not in self._swept:
            with suppress(OSError):  # there is no such folder yet, or what is wrong with it will show
                remove_stale_temporaries(folder)
            self._swept.add(folder)

    def _upload(self, name: str, content: bytes, overwrite: bool) -> bool:
        """Send an object; returns False where another one was there first."""
        obstore = _obstore()
        with self._translated(name):
            try:
                if len(content) > _PART_BYTES:  # conditions are for whole objects only; its name says its content
                    parts = {"use_multipart": True, "chunk_size": _PART_BYTES, "max_concurrency": _PARTS_IN_FLIGHT}
                    obstore.put(self._backend, name, content, **parts)
                else:
                    mode = "overwrite" if overwrite else "create"
                    obstore.put(self._backend, name, content, mode=mode, use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
            except (obstore.exceptions.BaseError, NotImplementedError) as error:
                if not isinstance(error, NotImplementedError) and "501 Not Implemented" not in str(error):
                    raise
                obstore.put(self._backend, name, content, use_multipart=False)  # a server of the plainest kind
        return True

    def exists(self, name: str) -> bool:
        """Tell whether there is an object of that name.

        Raises:
            StoreError: the store does not say, after all attempts.
        """

        def attempt() -> bool:
            try:
                if self._folder is not None:
                    self._open_file(name).close()
                    return True
                with self._translated(name):
                    _obstore().head(self._backend, name)
                    return True
            except StoreError as error:
                if error.is_missing:
                    return False
                raise

        return self._try_again(attempt)

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the names below a folder, in no order. A plain web server has no such list: nothing here needs one.

        Raises:
            StoreError: the store cannot list.
        """
        with self._translated(prefix):
            for batch in _obstore().list(self._backend, prefix or None):
                for entry in batch:
                    if not is_temporary(Path(entry["path"])):
                        yield entry["path"]

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
        if self._folder is not None:
            self._read_file(name, span, size, target, position, on_bytes)
            return
        with self._translated(name):
            result = _obstore().get(self._backend, name, options=None if span is None else {"range": span})
            if size is not None and result.meta["size"] != size:
                raise StoreError(f"{self.describe(name)}: has {result.meta['size']} bytes, {size} are expected")
            if span is not None and tuple(result.range) != span:
                raise StoreError(f"{self.describe(name)}: bytes {result.range} came, {span} were asked for")
            self._read_body(name, result, target, position, on_bytes)

    def _open_file(self, name: str) -> BufferedReader:
        """Open an object of a folder, with files' own means: obstore waits at pipes, and for threads it cannot have."""
        place, path = self.describe(name), (self._folder or Path()) / name
        if not is_object_name(name):
            raise StoreError(f"{place}: not a name that an object can have")
        try:
            return open_file(path)
        except InputError as error:
            if not path.exists():
                raise StoreError(f"{place}: no such object", is_missing=True) from None
            raise StoreError(f"{place}: {str(error).removeprefix(f'{path}: ')}") from None

    def _read_file(
        self,
        name: str,
        span: tuple[int, int] | None,
        size: int | None,
        target: bytearray,
        position: int,
        on_bytes: Callable[[int], object] | None,
    ) -> None:
        """`_read`, of a folder."""
        place = self.describe(name)
        with self._open_file(name) as stream:
            found = os.fstat(stream.fileno()).st_size
            start, stop = span or (0, found)
            if size is not None and found != size:
                raise StoreError(f"{place}: has {found} bytes, {size} are expected")
            if stop > found:
                raise StoreError(f"{place}: bytes {(start, found)} are there, {span} were asked for")
            if position + stop - start != len(target):
                raise StoreError(f"{place}: has {stop - start} bytes, {len(target) - position} are expected")
            try:
                stream.seek(start)
                view = memoryview(target)[position:]
                while view and (num_read := stream.readinto(view[:_PIECE_BYTES])):
                    view = view[num_read:]
                    if on_bytes is not None:
                        on_bytes(num_read)
            except OSError as error:
                raise StoreError(f"{place}: cannot be read: {error.strerror}") from error
            if view:
                raise StoreError(f"{place}: ended after {stop - start - len(view)} of {stop - start} bytes")

    def _read_body(
        self, name: str, result: Any, target: bytearray, position: int, on_bytes: Callable[[int], object] | None
    ) -> None:
        """Fill `target` from `position` to its end, refusing a body that is shorter or longer."""
        for piece in result.stream(min_chunk_size=_PIECE_BYTES):
            if position + len(piece) > len(target):
                raise StoreError(f"{self.describe(name)}: sent more than the {len(target)} bytes it announced")
            target[position : position + len(piece)] = piece
            position += len(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
        if position < len(target):
            message = f"{self.describe(name)}: ended after {position} of {len(target)} bytes"
            raise StoreError(message, is_temporary=True)

    def _try_again(self, attempt: Callable[[], Any], on_retry: Callable[[StoreError], object] | None = None) -> Any:
        """Return what `attempt` returns, pausing between attempts that may yet succeed."""
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
            time.sleep(self.retry.pause_seconds(num_failures))

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turn obstore's exceptions into ours, in one line, and say which may pass."""
        place, exceptions = self.describe(name), _obstore().exceptions
        try:
            yield
        except FileNotFoundError as error:
            if _NO_BUCKET.search(str(error)):
                raise StoreError(f"{place}: there is no such bucket: {_reason(error)}") from None
            raise StoreError(f"{place}: no such object", is_missing=True) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StoreError(f"{place}: access is denied: {_reason(error)}") from None
        except (exceptions.NotSupportedError, exceptions.InvalidPathError, ValueError) as error:
            is_range_ignored = "Range request not supported" in str(error)  # 200 where 206 was due
            raise StoreError(
                f"{place}: {_reason(error)}", is_temporary=is_range_ignored, is_range_ignored=is_range_ignored
            ) from None
        except (exceptions.BaseError, OSError) as error:
            is_final = _FINAL_RESPONSE.search(str(error)) is not None
            raise StoreError(f"{place}: {_reason(error)}", is_temporary=not is_final) from None


def open_store(location: str | os.PathLike[str], *, retry: RetryRule | None = None, create: bool = False) -> Store:
    """Open a store.

    Args:
        location: a folder, or a URL: `http(s)://host:port/path`, `s3://bucket/path`, `gs://...`, `az://...`,
            `memory://` (a new, empty one). Clouds find their credentials where their own tools do.
        retry: for all requests; None takes the defaults, which are for reading: to write, give `WRITING`.
        create: make a folder that is not there.

    Raises:
        BackendUnavailableError: obstore is not installed.
        ConfigError: the URL is not one of these.
        StoreError: there is no such folder.
        OutputError: the folder cannot be made.
    """
    obstore_store, rule = _obstore().store, retry or RetryRule()
    text = os.fspath(location)
    scheme = text.split("://", 1)[0].lower() if "://" in text else ""
    if scheme and scheme not in URL_SCHEMES:
        raise ConfigError(f"{text}: a store is a folder or a URL of {', '.join(URL_SCHEMES)}")
    if scheme == "memory":
        return Store(text, obstore_store.MemoryStore(), rule)
    if not scheme:
        folder = Path(text).absolute()
        if create:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{text}: no folder can be made here: {error.strerror}") from error
        if not folder.is_dir():
            raise StoreError(f"{text}: no such folder (make one with run_publishing.py)", is_missing=True)
        return Store(text, obstore_store.LocalStore(folder), rule, folder)
    silence = f"{max(1, round(1000 * rule.stall_seconds))}ms"
    connecting = f"{max(1, round(1000 * min(rule.stall_seconds, _CONNECT_SECONDS)))}ms"
    client = {"connect_timeout": connecting, "read_timeout": silence, "timeout": "1day", "allow_http": True}
    try:
        backend = obstore_store.from_url(text, client_options=client, retry_config={"max_retries": 0})
    except (_obstore().exceptions.BaseError, ValueError) as error:
        raise ConfigError(f"{text}: not the URL of a store: {_reason(error)}") from None
    return Store(text, backend, rule)


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise BackendUnavailableError('a store needs the package obstore: pip install "cachegen[streaming]"') from None
    return obstore


def _reason(error: BaseException) -> str:
    """Return what obstore's message says in one line, without the XML and the Rust structure in and below it."""
    text = str(error).strip()
    remedies = [remedy for sign, remedy in _REMEDIES if sign in text]
    answer = _CLOUD_ANSWER.search(text)
    lines = text.splitlines()
    if answer is not None:
        reason = f"{answer[1]}: {answer[2]}: {answer[3]}"
    else:
        reason = (lines[0] if lines else type(error).__name__).removesuffix(': <?xml version="1.0" encoding="utf-8"?>')
    return "; ".join([reason[:300], *remedies])
