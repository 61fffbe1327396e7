"""The pseudo-random integers that golden inputs are made of: exact, and easily made again in any language."""

from __future__ import annotations


class Integers:
    """Knuth's MMIX generator: state = state * 6364136223846793005 + 1442695040888963407 modulo 2^64."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, limit: int) -> int:
        """Return the next integer from 0 to limit - 1: the state's upper 32 bits, times `limit`, shifted down by 32."""
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 32) * limit >> 32
