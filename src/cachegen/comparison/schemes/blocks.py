"""llama.cpp's cache types: blocks of 32 values of a token, an fp16 scale each, 8.5 or 4.5 bits per value.

`q8_0` divides by the largest magnitude over 127; `q4_0` by the value of the largest magnitude over -8, with its sign,
so that this value's code is -8 and the others reach to 7. "K8V4" is q8_0 for keys and q4_0 for values. A token's row is
cut into blocks along its channels, which are those of a head where head_dim is a multiple of 32. The bytes are
llama.cpp's; its cache is fp16 before, this one bf16.

Source: llama.cpp, `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref`, read as a description of the format.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.comparison.schemes.base import ByteCount, Recoded, SavedCache
from cachegen.errors import ConfigError
from cachegen.kv_cache import from_planes

BLOCK_SIZE = 32


class BlockScheme:
    """See the module; a setting names the types of keys and values."""

    name = "llama.cpp"
    settings: tuple[str, ...] = ("q4_0", "K8V4", "q8_0")

    @property
    def identity(self) -> str:
        return f"{self.name} {BLOCK_SIZE}"

    def fit(self, calibration: Sequence[SavedCache]) -> None:
        """Do nothing: there is nothing to fit."""

    def recode(self, saved: SavedCache, setting: str) -> Recoded:
        planes, num_bytes = [], 0
        for index, plane in enumerate(saved.cache.planes):
            is_eight_bit = setting == "q8_0" or (setting == "K8V4" and index % 2 == 0)
            pack, unpack = (pack_q8_0, unpack_q8_0) if is_eight_bit else (pack_q4_0, unpack_q4_0)
            rows = plane.float().flatten(1).numpy()
            if rows.shape[1] % BLOCK_SIZE:
                raise ConfigError(f"scheme {self.name} needs a multiple of {BLOCK_SIZE} channels, got {rows.shape[1]}")
            blocks = pack(rows.reshape(-1, BLOCK_SIZE))
            planes.append(torch.from_numpy(unpack(blocks)).reshape(plane.shape).to(plane.dtype))
            num_bytes += blocks.nbytes
        return Recoded(from_planes(planes), {self.name: ByteCount(num_bytes)})


def pack_q8_0(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return blocks of 34 bytes for fp32 values `[num_blocks, 32]`."""
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = values * _invert(scales)
    codes = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled).astype(np.int8)
    return np.concatenate([scales.astype(np.float16).view(np.uint8), codes.view(np.uint8)], axis=1)


def unpack_q8_0(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the fp32 values `[num_blocks, 32]` of blocks."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _scales_of(blocks)


def pack_q4_0(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return blocks of 18 bytes for fp32 values `[num_blocks, 32]`."""
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)
    scales = largest / np.float32(-8)
    codes = np.minimum(15, (values * _invert(scales) + np.float32(8.5)).astype(np.int8)).astype(np.uint8)
    pairs = (codes[:, :16] + 16 * codes[:, 16:]).astype(np.uint8)
    return np.concatenate([scales.astype(np.float16).view(np.uint8), pairs], axis=1)


def unpack_q4_0(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the fp32 values `[num_blocks, 32]` of blocks."""
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return (codes.astype(np.float32) - 8) * _scales_of(blocks)


def _invert(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def _scales_of(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
