"""Load a prefix or compute it: whichever is predicted to be sooner."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("always", "faster")
_WEIGHT = 0.25
_RETRY_EVERY = 16


@dataclass
class Rates:
    """Seconds per token, as measured lately; None where nothing was.

    Attributes:
        load: from asking for the first block of a request to having the last one in the engine's cache.
        compute: of prefill, by the engine's steps.
    """

    load: float | None = None
    compute: float | None = None

    def add_load(self, seconds: float, num_tokens: int) -> None:
        """Take note of a load that was not broken off."""
        self.load = _smooth(self.load, seconds / num_tokens)

    def add_compute(self, seconds: float, num_tokens: int) -> None:
        """Take note of a step."""
        self.compute = _smooth(self.compute, seconds / num_tokens)


class LoadPolicy:
    """Decides for each request.

    Attributes:
        rates: to be set to what the workers have measured.
    """

    def __init__(self, mode: str) -> None:
        """`always` loads what is there; `faster` only where that is predicted to be sooner than to compute it."""
        self._mode = mode
        self._num_refused = 0
        self.rates = Rates()

    def loads(self, num_tokens: int = 1, num_loading: int = 0, num_computing: int = 0) -> bool:
        """Tell whether a prefix is to be loaded.

        Loading goes on beside computing: where many prompts wait to be computed, a slow load may still end sooner, and
        where many wait to be loaded, computing may. What was not measured yet is tried, and one in 16 requests is
        loaded against the prediction, since nothing else would tell that a store has recovered.

        Args:
            num_tokens: of the prefix.
            num_loading, num_computing: tokens of other requests that will be loaded and computed first.
        """
        load, compute = self.rates.load, self.rates.compute
        if self._mode == "always" or load is None or compute is None:
            return True
        if load * (num_loading + num_tokens) < compute * (num_computing + num_tokens):
            return True
        if load < compute:
            return False  # others load, and tell
        self._num_refused += 1
        return self._num_refused % _RETRY_EVERY == 0

    def patience(self, num_tokens: int) -> float | None:
        """Return how many seconds to wait for the next block before so many tokens are computed instead.

        As long as it takes to compute them: so that a load that comes to nothing costs at most as much again. None
        where there is no such limit.
        """
        if self._mode == "always" or self.rates.compute is None:
            return None
        return self.rates.compute * num_tokens


def _smooth(before: float | None, value: float) -> float:
    return value if before is None else before + _WEIGHT * (value - before)
