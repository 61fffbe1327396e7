"""Counts of what a door did, safe to add to from several threads."""

from __future__ import annotations

import threading
from collections import Counter


class Counters:
    """Named counts that only grow.

    Names are `a` or `a:reason`, such as `decoded` and `missed:damaged`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, **amounts: int) -> None:
        """Add to several counts at once."""
        with self._lock:
            self._counts.update(amounts)

    def add_for(self, name: str, reason: str) -> None:
        """Add one to a count that has a reason."""
        with self._lock:
            self._counts[f"{name}:{reason}"] += 1

    def snapshot(self) -> dict[str, int]:
        """Return a copy of all counts, of one moment."""
        with self._lock:
            return dict(self._counts)
