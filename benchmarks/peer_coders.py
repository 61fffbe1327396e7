"""Other people's entropy coders, each in a process of its own; run by coder_throughput.py in the peers' environment.

Usage: peer_coders.py CODER SYMBOLS.npy FREQUENCIES.npy, where symbols are uint8 [planes, channels, tokens] and
frequencies uint16 [planes, channels, 32] that sum to 4096. The process checks a round trip, prints its compressed size
in bytes, then answers every line `encode` or `decode` with the seconds that took.

torchac is GPL-3.0: it is installed from PyPI and called through its documented functions, nothing else.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import numpy as np


class Torchac:
    """All symbols in one stream; torchac wants the table of each symbol anew, as 16-bit integers."""

    def __init__(self, symbols: np.ndarray, frequencies: np.ndarray) -> None:
        import torch
        import torchac

        torch.set_num_threads(1)
        self._torchac = torchac
        # Every symbol needs a width, 1 of 65536 where it never occurs; the last bound, 65536, is spelled 0.
        bounds = np.cumsum(frequencies.astype(np.int64), axis=2) * (65536 - 32) // 4096 + np.arange(1, 33)
        cdf = np.concatenate([np.zeros_like(bounds[:, :, :1]), bounds], axis=2).astype(np.uint16).view(np.int16)
        self._cdf = torch.from_numpy(cdf)[:, :, None, :].expand(-1, -1, symbols.shape[2], -1).contiguous()
        self._symbols = torch.from_numpy(symbols.astype(np.int16))

    def encode(self) -> object:
        return self._torchac.encode_int16_normalized_cdf(self._cdf, self._symbols)

    def decode(self, encoded) -> object:
        return self._torchac.decode_int16_normalized_cdf(self._cdf, encoded)

    def is_right(self, decoded) -> bool:
        return bool((decoded == self._symbols).all())

    def num_bytes(self, encoded) -> int:
        return len(encoded)


class Constriction:
    """One ANS coder per plane, one categorical model per channel; the models are made beforehand."""

    def __init__(self, symbols: np.ndarray, frequencies: np.ndarray) -> None:
        import constriction

        self._coder = constriction.stream.stack.AnsCoder
        model = constriction.stream.model.Categorical
        self._symbols = symbols.astype(np.int32)
        self._models = [
            [model((channel / 4096).astype(np.float32), perfect=False) for channel in plane] for plane in frequencies
        ]

    def encode(self) -> object:
        encoded = []
        for plane, models in zip(self._symbols, self._models, strict=True):
            coder = self._coder()
            for channel in range(len(models) - 1, -1, -1):
                coder.encode_reverse(plane[channel], models[channel])
            encoded.append(coder.get_compressed())
        return encoded

    def decode(self, encoded) -> object:
        num_tokens = self._symbols.shape[2]
        decoded = []
        for content, models in zip(encoded, self._models, strict=True):
            coder = self._coder(content)
            decoded.append([coder.decode(model, num_tokens) for model in models])
        return decoded

    def is_right(self, decoded) -> bool:
        return bool((np.array(decoded) == self._symbols).all())

    def num_bytes(self, encoded) -> int:
        return sum(content.nbytes for content in encoded)


class Zstandard:
    """zstd at level 1 over bytes, channel after channel."""

    def __init__(self, symbols: np.ndarray, frequencies: np.ndarray) -> None:
        del frequencies
        import zstandard

        self._content = symbols.tobytes()
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self) -> object:
        return self._compressor.compress(self._content)

    def decode(self, encoded) -> object:
        return self._decompressor.decompress(encoded)

    def is_right(self, decoded) -> bool:
        return decoded == self._content

    def num_bytes(self, encoded) -> int:
        return len(encoded)


CODERS = {"torchac": Torchac, "torchac-O3": Torchac, "constriction": Constriction, "zstd-1": Zstandard}


def seconds_of(call: Callable[[], object]) -> float:
    """Processor seconds per call once it is warm: after one that does not count, the mean of at least ten ms."""
    call()
    num_calls, start = 0, time.process_time()
    while True:
        call()
        num_calls += 1
        elapsed = time.process_time() - start
        if elapsed > 0.01:
            return elapsed / num_calls


def main() -> None:
    name, symbols, frequencies = sys.argv[1:]
    # What a library and its compiler print must not mix with our answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    coder = CODERS[name](np.load(symbols), np.load(frequencies))
    encoded = coder.encode()
    if not coder.is_right(coder.decode(encoded)):
        raise SystemExit(f"{name}: the round trip is wrong")
    print(coder.num_bytes(encoded), file=answers, flush=True)
    calls = {"encode": coder.encode, "decode": lambda: coder.decode(encoded)}
    for line in sys.stdin:
        print(seconds_of(calls[line.strip()]), file=answers, flush=True)


if __name__ == "__main__":
    main()
