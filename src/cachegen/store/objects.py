"""What a place of objects answers with, and how slow an answer may be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MIN_BYTES_PER_SECOND = 16_384
"""What an answer must bring on the whole, 131 kbit/s, apart from the silence that is allowed."""
PIECE_BYTES = 1 << 16
"""The most bytes that are read at once."""


@dataclass(frozen=True)
class Answer:
    """The beginning of an object, or of a part of one.

    Attributes:
        num_bytes: of the whole object; of the part, where one was asked for.
        span: (start, stop) of the part that comes, None for a whole object.
        pieces: the bytes, to be read once, as they come. May raise StoreError.
        close: to be called in the end, whether they were read or not.
    """

    num_bytes: int
    span: tuple[int, int] | None
    pieces: Iterator[bytes]
    close: Callable[[], object] = lambda: None


class Pace:
    """Tells when an answer is too slow: after a silence, below the least rate on the whole, or at a deadline.

    A server that sends a byte now and then is never silent; it is too slow `stall_seconds` after its request, and so is
    one that drips its headers. The longest that an answer of n bytes can take is stall_seconds + n / 16,384 seconds.
    """

    def __init__(self, stall_seconds: float, deadline: float | None = None) -> None:
        """Start the clock.

        Args:
            deadline: of time.monotonic(), whatever has come by then.
        """
        self._start, self._stall_seconds, self._deadline = time.monotonic(), stall_seconds, deadline
        self._num_bytes = 0

    def patience(self) -> float:
        """Return how many seconds the next bytes may take.

        Raises:
            TimeoutError: none.
        """
        now = time.monotonic()
        end = self._start + self._stall_seconds + self._num_bytes / MIN_BYTES_PER_SECOND
        if self._deadline is not None:
            end = min(end, self._deadline)
        if now >= end:
            raise TimeoutError(f"{self._num_bytes} bytes in {now - self._start:.1f} s: too slow")
        return min(end - now, self._stall_seconds)

    def count(self, num_bytes: int) -> None:
        """Take note of bytes that came or went."""
        self._num_bytes += num_bytes
