"""What a scheme is: calibration caches in, then caches to bytes and back, with every byte counted.

A scheme decodes what it encodes, from the bytes that it counts. Where one quantization can be written by several
coders, it reports a count for each under a name of its own, so that quality is measured once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.coder.symbol_model import choose_weight_classes, normalize, pack_tables
from cachegen.format import MAX_LOW_BITS, TABLE_SIZE
from cachegen.kv_cache import ContextMetadata, KVCache, from_planes
from cachegen.methods.base import Encoder

_WHOLE = np.float32(1)
_ESCAPE_BYTES = 6  # position in the plane (u32) and the value's distance from the alphabet's edge (i16)


@dataclass(frozen=True)
class SavedCache:
    """A cache and what it was computed from, as `load_kv_cache` returns them."""

    cache: KVCache
    metadata: ContextMetadata

    def slice(self, stop: int) -> SavedCache:
        """Return the first `stop` tokens, as views."""
        metadata = self.metadata
        kept = ContextMetadata(
            metadata.model_id,
            metadata.model_fingerprint,
            metadata.token_ids[:stop],
            metadata.rotary_embeddings,
            metadata.block_size,
            plane_rotations=metadata.plane_rotations,
        )
        return SavedCache(self.cache.slice(0, stop), kept)


@dataclass(frozen=True)
class ByteCount:
    """The bytes of one encoded document.

    Attributes:
        encoded: all that the document needs, tables and exempt tokens included, the profile not.
        tables: how many of them are probability tables.
        profile: what the model's profile holds for it: tables, steps, bases. Once per model.
    """

    encoded: int
    tables: int = 0
    profile: int = 0


@dataclass(frozen=True)
class Recoded:
    """A decoded cache and the bytes it was decoded from, by method name: several if several coders write them."""

    cache: KVCache
    bytes_of: Mapping[str, ByteCount]


class Scheme(Protocol):
    """A family of methods with one reconstruction per setting."""

    @property
    def name(self) -> str:
        """The family's name; names of methods begin with it."""
        ...

    settings: tuple[str, ...]
    """The settings' names, from coarse to fine; may be set to some of them before `fit`."""

    @property
    def identity(self) -> str:
        """All parameters as text: a result is measured anew when it changes."""
        ...

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Make the profile: whatever is known before a document comes. Called once, before `recode`."""
        ...

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        """Encode a cache and decode it again."""
        ...


@dataclass(frozen=True)
class SymbolCoder:
    """Codes integers of one plane with tables that are known beforehand: a table per channel, low bits, escapes.

    An integer x becomes the symbol x - low of an alphabet of 32 << low_bits; those outside take its edge and stand in
    an escape list.

    Attributes:
        low: the smallest integer of the alphabet.
        low_bits: bits of a symbol stored raw below the table-coded high part.
        tables: one per channel.
        tables_bytes: their length in the compact form of the tables file.
    """

    low: int
    low_bits: int
    tables: _native.TableSet
    tables_bytes: int

    @classmethod
    def fit(cls, samples: NDArray[np.int64]) -> SymbolCoder:
        """Choose the alphabet and make the tables from calibration integers `[num_channels, num_samples]`.

        The alphabet is the smallest that leaves one integer in 10,000 outside; every symbol of it keeps a frequency.
        """
        start = int(samples.min())
        shares = np.cumsum(np.bincount((samples - start).reshape(-1))) / samples.size
        low, high = (start + int(np.searchsorted(shares, share)) for share in (0.00005, 0.99995))
        low_bits = 0
        while TABLE_SIZE << low_bits <= high - low:
            low_bits += 1
        if low_bits > MAX_LOW_BITS:
            raise ValueError(f"integers from {low} to {high} need more than {MAX_LOW_BITS} low bits")
        top = ((high - low) >> low_bits) + 1
        low -= ((top << low_bits) - 1 - (high - low)) // 2
        parts = np.clip(samples - low, 0, (top << low_bits) - 1) >> low_bits
        counts = np.zeros((len(samples), TABLE_SIZE), dtype=np.int64)
        for channel, row in enumerate(parts):
            counts[channel] = np.bincount(row, minlength=TABLE_SIZE)
        return cls._from_counts(int(low), low_bits, counts, int(top))

    @classmethod
    def _from_counts(cls, low: int, low_bits: int, counts: NDArray[np.int64], alphabet_size: int) -> SymbolCoder:
        tables, tables_bytes = tables_of_counts(counts, np.full(len(counts), alphabet_size))
        return cls(low, low_bits, tables, tables_bytes)

    @property
    def num_symbols(self) -> int:
        alphabet_size = int((self.tables.frequencies() > 0).any(axis=0).sum())
        return alphabet_size << self.low_bits

    def recode(self, integers: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Write integers `[num_channels, num_tokens]` and read them again; returns them and the bytes."""
        shifted = integers - self.low
        clipped = np.clip(shifted, 0, self.num_symbols - 1)
        symbols = np.ascontiguousarray(clipped, np.uint16)
        content, num_words, status = _native.encode_symbols(symbols, self.tables, self.low_bits)
        if status != _native.Status.OK.value:
            raise ValueError(f"symbols cannot be encoded: {_native.Status(status).name}")
        symbols, status = _native.decode_symbols(
            np.frombuffer(content, np.uint8),
            num_words,
            integers.shape[1],
            integers.shape[0],
            self.tables,
            self.low_bits,
        )
        if status != _native.Status.OK.value:
            raise ValueError(f"symbols cannot be decoded: {_native.Status(status).name}")
        escaped = np.flatnonzero(clipped != shifted)
        decoded = symbols.astype(np.int64).reshape(-1)
        decoded[escaped] = shifted.reshape(-1)[escaped]
        num_bytes = len(content) + 4 + _ESCAPE_BYTES * len(escaped)  # 4: the stream's length
        return decoded.reshape(integers.shape) + self.low, num_bytes


def tables_of_counts(counts: NDArray[np.int64], alphabet_sizes: NDArray[np.int64]) -> tuple[_native.TableSet, int]:
    """Make tables for documents that are not known yet.

    Args:
        counts: `[num_tables, 32]` from calibration caches.
        alphabet_sizes: `[num_tables]`; each symbol of an alphabet gets a frequency, whether it has occurred or not.

    Returns:
        The tables and their length in bytes in the compact form.
    """
    is_possible = np.arange(TABLE_SIZE) < alphabet_sizes[:, None]
    # A thousandth of an occurrence is enough for the smallest frequency there is.
    smoothed = np.where(is_possible, 1000 * counts.astype(np.int64) + 1, 0)
    classes = choose_weight_classes(smoothed)  # pyright: ignore[reportArgumentType]  (any integers do)
    return _native.TableSet.from_frequencies(normalize(classes)), len(pack_tables(classes))


def quantize_range(
    values: NDArray[np.float32], num_bits: int, shrink: NDArray[np.float32] | np.float32 = _WHOLE
) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.float16]]:
    """Quantize rows, the last axis, between their smallest and largest value, each times `shrink`.

    Returns:
        Codes, shifts and scales; the latter two have one value per row.
    """
    largest_code = (1 << num_bits) - 1
    shifts = (values.min(axis=-1, keepdims=True) * shrink).astype(np.float16)
    spans = values.max(axis=-1, keepdims=True) * shrink - shifts.astype(np.float32)
    scales = np.maximum(spans / largest_code, np.finfo(np.float16).tiny).astype(np.float16)
    codes = np.rint((values - shifts.astype(np.float32)) / scales.astype(np.float32)).clip(0, largest_code)
    return codes.astype(np.int64), shifts, scales


def decode_files(encoder: Encoder, like: KVCache, level: int = 1) -> tuple[KVCache, int]:
    """Encode a document and decode it from its files of levels 1 to `level`.

    Args:
        like: the cache that is encoded, on the CPU.

    Returns:
        The decoded cache, and the bytes of these files and of the tables file.
    """
    output = from_planes([torch.empty(plane.shape, dtype=plane.dtype) for plane in like.planes])
    num_bytes, start = len(encoder.tables_file), 0
    for index, count in enumerate(encoder.document.header.chunk_tokens):
        contents = [b"".join(encoder.encode_chunk(index, number)) for number in range(1, level + 1)]
        encoder.document.decode(
            contents,
            output.slice(start, start + count),
            first_token=start,
            token_hash=encoder.expected_header(index, 1).token_hash,
        )
        num_bytes += sum(map(len, contents))
        start += count
    return output, num_bytes


def pack_bits(codes: NDArray[np.int64], num_bits: int) -> bytes:
    """Write integers below 1 << num_bits one after the other, without padding between them."""
    bits = codes.reshape(-1, 1) >> np.arange(num_bits) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def unpack_bits(content: bytes, num_bits: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Read what `pack_bits` wrote."""
    count = math.prod(shape) * num_bits
    bits = np.unpackbits(np.frombuffer(content, np.uint8), count=count).reshape(-1, num_bits)
    return (bits.astype(np.int64) << np.arange(num_bits)).sum(axis=1).reshape(shape)


def channels_first(plane: torch.Tensor) -> NDArray[np.float32]:
    """Return a plane as fp32 `[num_channels, num_tokens]`."""
    return np.ascontiguousarray(plane.flatten(1).float().numpy().T)


def to_plane(values: NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    """Return `[num_channels, num_tokens]` as a plane of the shape and dtype of `like`."""
    return torch.from_numpy(np.ascontiguousarray(values.T)).reshape(like.shape).to(like.dtype)
