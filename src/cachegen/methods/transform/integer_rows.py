"""A synthesis matrix as a profile has it: integers of 16 bits, times powers of two of its rows and of its channels.

Of a saved profile the integers stay compressed until they are wanted, which takes a fifth of their memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cachegen.errors import BitstreamError

MAX_INTEGER = (1 << 15) - 1
"""Of a synthesis matrix."""
MAX_ROW_EXPONENT, MAX_CHANNEL_EXPONENT = 80, 30
"""Of the powers of two that an integer is multiplied by: fp32 has all products exactly."""
_MAX_INFLATION = 1100  # zlib's is below 1033
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class IntegerRows:
    """Half the memory of the matrix in fp32.

    Attributes:
        integers: int16 `[num_components, num_channels]`.
        row_exponents, channel_exponents: int8, logarithms of the powers of two.
    """

    integers: torch.Tensor
    row_exponents: torch.Tensor
    channel_exponents: torch.Tensor

    @classmethod
    def of(cls, synthesis: torch.Tensor, channel_exponents: torch.Tensor | None = None) -> IntegerRows:
        """Round a matrix.

        Rows that are integers of 16 bits times a power of two already come out as they are.

        Args:
            synthesis: `[num_components, num_channels]`.
            channel_exponents: `[num_channels]`; None: all zero.
        """
        if channel_exponents is None:
            channel_exponents = torch.zeros(synthesis.shape[1], dtype=torch.int8)
        rows = synthesis.double() * torch.exp2(-channel_exponents.double())
        largest = rows.abs().amax(1).clamp_min(2.0 ** (15 - MAX_ROW_EXPONENT))
        exponents = (largest / MAX_INTEGER).log2().ceil().clamp(-MAX_ROW_EXPONENT, MAX_ROW_EXPONENT)
        integers = (rows * torch.exp2(-exponents)[:, None]).round().clamp(-MAX_INTEGER, MAX_INTEGER).to(torch.int16)
        for _ in range(15):
            # Halve rows of even integers: fewer digits say the same.
            is_even = ((integers & 1) == 0).all(1) & (integers != 0).any(1) & (exponents < MAX_ROW_EXPONENT)
            integers = torch.where(is_even[:, None], integers >> 1, integers)
            exponents = exponents + is_even
        return cls(integers, exponents.to(torch.int8), channel_exponents.to(torch.int8).contiguous())

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape

    @property
    def row_factors(self) -> torch.Tensor:
        """The powers of two of the rows, fp32."""
        return torch.exp2(self.row_exponents.float())

    @property
    def channel_factors(self) -> torch.Tensor:
        """The powers of two of the channels, fp32."""
        return torch.exp2(self.channel_exponents.float())

    def first(self, num_components: int | None) -> IntegerRows:
        """Return the first rows."""
        return IntegerRows(self.integers[:num_components], self.row_exponents[:num_components], self.channel_exponents)

    def multiply(self) -> torch.Tensor:
        """Return the matrix in fp32, which has it exactly."""
        made = self.integers.float()
        made *= self.row_factors[:, None]
        made *= self.channel_factors
        return made

    def deflate(self, compression: int) -> bytes:
        """Return the integers as a file has them: all high bytes, then all low ones, which compresses better.

        Args:
            compression: zlib's level.
        """
        low = self.integers.to(torch.int8)  # modulo 2^8
        high = ((self.integers.int() - low) >> 8).to(torch.int8)  # the same; zero for small integers of either sign
        return deflate(high.numpy().tobytes() + low.numpy().tobytes(), compression)


@dataclass(frozen=True)
class DeflatedRows:
    """The same, compressed.

    Attributes:
        stream: of `IntegerRows.deflate`.
        shape: `[num_components, num_channels]`.
        path: of the file, for errors.
        field: what errors call the matrix.
    """

    stream: memoryview
    shape: torch.Size
    row_exponents: torch.Tensor
    channel_exponents: torch.Tensor
    path: str
    field: str

    def inflate(self, num_components: int | None = None) -> IntegerRows:
        """Return the integers.

        Args:
            num_components: only of the first so many rows; then what is behind them is not looked at.

        Raises:
            BitstreamError: the stream holds something else.
        """
        total = self.shape.numel()
        if total > _MAX_INFLATION * len(self.stream):
            raise self._refuse("is too short for a matrix of its shape")
        integers = torch.empty((self.row_exponents[:num_components].numel(), self.shape[1]), dtype=torch.int16)
        flat, count = integers.view(-1), integers.numel()
        at = 0
        try:
            for piece in inflate_pieces(self.stream, 2 * total):
                part = torch.frombuffer(piece, dtype=torch.int8)
                high = part[: max(count - at, 0)]
                torch.bitwise_left_shift(high.to(torch.int16), 8, out=flat[at : at + len(high)])
                low = part[max(total - at, 0) : max(total + count - at, 0)]
                begin = max(at - total, 0)
                flat[begin : begin + len(low)] += low  # modulo 2^16
                at += len(part)
                if at >= total + count and num_components is not None:
                    break
        except BitstreamError as error:
            raise self._refuse(error.problem) from error
        if at < total + count:
            raise self._refuse(f"holds {at} bytes, a matrix {list(self.shape)} has {2 * total}")
        return IntegerRows(integers, self.row_exponents[:num_components], self.channel_exponents)

    def _refuse(self, problem: str) -> BitstreamError:
        return BitstreamError(problem, path=self.path, field=self.field)


def deflate(content: bytes, compression: int) -> bytes:
    """Compress: runs of zeros, and else a code for each byte, since nothing in a profile repeats."""
    compressor = zlib.compressobj(compression, strategy=zlib.Z_RLE)
    return compressor.compress(content) + compressor.flush()


def inflate_pieces(stream: memoryview, max_bytes: int) -> Iterator[bytearray]:
    """Yield what a zlib stream holds.

    Raises:
        BitstreamError: it is none, or truncated, holds more than `max_bytes`, or is followed by something.
    """
    inflater, total = zlib.decompressobj(), 0
    for begin in range(0, len(stream), _PIECE_BYTES):
        left, is_full = bytes(stream[begin : begin + _PIECE_BYTES]), False
        while left or is_full:
            try:
                piece = inflater.decompress(left, _PIECE_BYTES)
            except zlib.error as error:
                raise BitstreamError(f"is not compressed data ({error})") from None
            left, is_full = inflater.unconsumed_tail, len(piece) == _PIECE_BYTES
            total += len(piece)
            if total > max_bytes:
                raise BitstreamError(f"holds more than the {max_bytes} bytes that are announced")
            if piece:
                yield bytearray(piece)
        if inflater.unused_data or (inflater.eof and begin + _PIECE_BYTES < len(stream)):
            raise BitstreamError("is followed by other bytes")
    if not inflater.eof:
        raise BitstreamError("is truncated")
