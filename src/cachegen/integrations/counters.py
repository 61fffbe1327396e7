"""Counts of what a door did, safe to add to from several threads."""

from __future__ import annotations

import threading
from collections import defaultdict


class Counters:
    """Named counts that only grow.

    Names are `a` or `a:reason`, such as `decoded` and `missed:damaged`; seconds are fractions, all others whole.
    `metrics` has what each of them is called outside.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[str, float] = defaultdict(int)
        self._taken: dict[str, float] = {}

    def add(self, **amounts: int) -> None:
        """Add to several counts at once."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def add_for(self, name: str, reason: str, amount: float = 1) -> None:
        """Add to a count that has a reason."""
        with self._lock:
            self._counts[f"{name}:{reason}"] += amount

    def snapshot(self) -> dict[str, float]:
        """Return a copy of all counts, of one moment."""
        with self._lock:
            return dict(self._counts)

    def take(self) -> dict[str, float]:
        """Return by how much each count has grown since the last call, without those that have not."""
        with self._lock:
            grown = {name: count - self._taken.get(name, 0) for name, count in self._counts.items()}
            self._taken = dict(self._counts)
        return {name: amount for name, amount in grown.items() if amount}
