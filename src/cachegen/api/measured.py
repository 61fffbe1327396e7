"""How large a compressed cache is, whatever it lies in."""

from __future__ import annotations

from cachegen.format.headers import DocumentHeader


class Measured:
    """What the files of a document are compared with.

    Attributes:
        num_tokens: of the cache.
        num_values: numbers in the cache: keys and values of all layers.
        num_bytes: of the files.
    """

    def __init__(self, header: DocumentHeader, num_bytes: int) -> None:
        self.num_tokens: int = sum(header.chunk_tokens)
        self.num_values: int = self.num_tokens * header.values_per_token
        self.num_bytes: int = num_bytes

    @property
    def bits_per_value(self) -> float:
        """Bits of the files per number of the cache, everything counted; the cache itself has 16 or 32."""
        return 8 * self.num_bytes / self.num_values

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}: {self.num_tokens:,} tokens, {self.num_bytes:,} bytes, "
            f"{self.bits_per_value:.3f} bits per value>"
        )
