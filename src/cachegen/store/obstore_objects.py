"""Objects in a cloud's store or in memory, by obstore (bindings of Rust's object_store).

Its own retries are off: `store.Store` counts them, and goes on where a body broke off. It follows redirects when
reading and cannot be told not to: those of the cloud that was asked, and no signature goes with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cachegen.errors import BackendUnavailableError, StoreError
from cachegen.store.objects import Answer, Pace

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
_TOO_SLOW = re.compile(r"operation timed out|TimedOut|request timeout")
_PART_BYTES = 5 << 20  # of an upload in parts, the least that S3 takes
_PARTS_IN_FLIGHT = 2


class ObstoreObjects:
    """The objects below a place that obstore can open; methods may be called from several threads."""

    def __init__(self, url: str, backend: Any, stall_seconds: float) -> None:
        self._url, self._backend, self._stall_seconds = url.rstrip("/"), backend, stall_seconds

    def get(self, name: str, span: tuple[int, int] | None = None, *, deadline: float | None = None) -> Answer:
        """Ask for an object, or bytes `start` to `stop` of it.

        Raises:
            StoreError: there is none, or it cannot be had.
        """
        pace = Pace(self._stall_seconds, deadline)
        with self._translated(name):
            result = load_obstore().get(self._backend, name, options=None if span is None else {"range": span})
            part = None if span is None else tuple(result.range)
            num_bytes = result.meta["size"] if part is None else part[1] - part[0]
            return Answer(num_bytes, part, self._read(name, result, pace))

    def exists(self, name: str, *, deadline: float | None = None) -> bool:
        """Tell whether there is an object of that name; the answer is a head, which the client bounds by its silence.

        Raises:
            StoreError: the store does not say.
        """
        try:
            with self._translated(name):
                load_obstore().head(self._backend, name)
                return True
        except StoreError as error:
            if error.is_missing:
                return False
            raise

    def put(self, name: str, content: bytes, *, overwrite: bool) -> bool:
        """Write an object; returns False where another one was there first.

        Raises:
            StoreError: it cannot be written.
        """
        obstore = load_obstore()
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

    def sweep(self, name: str) -> None:
        """Do nothing: an upload that broke off leaves nothing that has a name."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the names below a folder, in no order.

        Raises:
            StoreError: the store cannot list.
        """
        with self._translated(prefix):
            for batch in load_obstore().list(self._backend, prefix or None):
                for entry in batch:
                    yield entry["path"]

    def _describe(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _read(self, name: str, result: Any, pace: Pace) -> Iterator[bytes]:
        """Yield the body as it comes: a larger piece would be waited for, however slowly it comes."""
        with self._translated(name):
            for piece in result.stream(min_chunk_size=1):
                pace.count(len(piece))
                pace.patience()
                yield piece

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turn obstore's exceptions into ours, in one line, and say which may pass."""
        place, exceptions = self._describe(name), load_obstore().exceptions
        try:
            yield
        except FileNotFoundError as error:
            if _NO_BUCKET.search(str(error)):
                raise StoreError(f"{place}: there is no such bucket: {reason_of(error)}") from None
            raise StoreError(f"{place}: no such object", is_missing=True) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StoreError(f"{place}: access is denied: {reason_of(error)}") from None
        except (exceptions.NotSupportedError, exceptions.InvalidPathError, ValueError) as error:
            is_range_ignored = "Range request not supported" in str(error)  # 200 where 206 was due
            raise StoreError(
                f"{place}: {reason_of(error)}", is_temporary=is_range_ignored, is_range_ignored=is_range_ignored
            ) from None
        except (exceptions.BaseError, OSError) as error:
            is_final = _FINAL_RESPONSE.search(str(error)) is not None
            is_too_slow = isinstance(error, TimeoutError) or _TOO_SLOW.search(str(error)) is not None
            raise StoreError(
                f"{place}: {reason_of(error)}", is_temporary=not is_final, is_too_slow=is_too_slow
            ) from None


def load_obstore() -> Any:
    """Import obstore.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise BackendUnavailableError('a store needs the package obstore: pip install "cachegen[streaming]"') from None
    return obstore


def reason_of(error: BaseException) -> str:
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
