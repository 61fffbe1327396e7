"""The peers' side of interop.py, run by the Python of the peers' environment: torchac and LMCache's CPU kernels.

    python interop_peers.py REQUEST.npz ANSWER.npz CACHEGEN_KERNELS.py

Both peers are used through their documented functions only. A request holds batches of codes of one length over one
number of symbols; `N_` begins the names of batch N:

    symbols  uint8 [num_codes, num_tokens]
    cdf      uint16 [num_codes, num_symbols + 1], 0 to 0x10000 with the last wrapped to 0; without it, the answer is
             LMCache's `cdf` for these symbols, of `num_symbols`
    lengths, codes  uint32 [num_codes] and uint8, our codes one after the other

The answer holds per batch and peer its own `lengths` and `codes` and, per decoder, the `decoded` symbols of ours.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torchac

MAX_CODE_BYTES = 1 << 16


def load_kernels(path: str):
    """Load LMCache's kernels by path: importing the package would need all of its dependencies."""
    spec = importlib.util.spec_from_file_location("cachegen_kernels", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"interop_peers.py: {path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_batches(request) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield the batches by their number."""
    for index in range(int(request["num_batches"])):
        prefix = f"{index}_"
        yield prefix, {name.removeprefix(prefix): request[name] for name in request.files if name.startswith(prefix)}


def split(lengths: np.ndarray, codes: np.ndarray) -> list[bytes]:
    """Take joined codes apart."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return [codes[end - length : end].tobytes() for end, length in zip(ends, lengths.astype(np.int64), strict=True)]


def as_int16(cdf: np.ndarray) -> torch.Tensor:
    """Both peers take unsigned 16-bit tables as the int16 of the same bits."""
    return torch.from_numpy(cdf.view(np.int16).copy())


def exchange_with_torchac(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Encode with torchac, and decode our codes with it. It takes one table per symbol: the channel's, repeated."""
    num_tokens = batch["symbols"].shape[1]
    codes, decoded = [], []
    ours = split(batch["lengths"], batch["codes"])
    for symbols, cdf, code in zip(batch["symbols"], as_int16(batch["cdf"]), ours, strict=True):
        tables = cdf.expand(num_tokens, -1).contiguous()
        codes.append(torchac.encode_int16_normalized_cdf(tables, torch.from_numpy(symbols.astype(np.int16))))
        decoded.append(torchac.decode_int16_normalized_cdf(tables, code).numpy())
    return {
        "torchac_lengths": np.array([len(code) for code in codes], dtype=np.uint32),
        "torchac_codes": np.frombuffer(b"".join(codes), np.uint8),
        "torchac_decoded": np.stack(decoded).astype(np.uint8),
    }


def exchange_with_lmcache(kernels, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Encode with LMCache's kernels, and decode our codes with both of its decoders. Tensors are of one layer."""
    num_codes, num_tokens = batch["symbols"].shape
    cdf = as_int16(batch["cdf"])[None]
    symbols = torch.from_numpy(batch["symbols"].T.astype(np.int8).copy())[None]
    buffer = torch.zeros(1, num_codes, MAX_CODE_BYTES, dtype=torch.uint8)
    lengths = torch.zeros(1, num_codes, dtype=torch.int32)
    kernels.encode_fast_new(cdf, symbols, buffer, lengths)
    codes = [row[:length].numpy().tobytes() for row, length in zip(buffer[0], lengths[0].tolist(), strict=True)]

    ours = torch.zeros(1, num_codes, MAX_CODE_BYTES, dtype=torch.uint8)
    for row, code in zip(ours[0], split(batch["lengths"], batch["codes"]), strict=True):
        row[: len(code)] = torch.from_numpy(np.frombuffer(code, np.uint8).copy())
    our_lengths = torch.from_numpy(batch["lengths"].astype(np.int32))[None]
    decoded = torch.zeros(1, num_tokens, num_codes, dtype=torch.uint8)
    kernels.decode_fast_new(cdf, ours, our_lengths, decoded)
    decoded_joined = torch.zeros_like(decoded)
    joined = torch.from_numpy(batch["codes"].copy())
    kernels.decode_fast_prefsum(cdf, joined, our_lengths.long().cumsum(1), decoded_joined)
    return {
        "lmcache_lengths": lengths[0].numpy().astype(np.uint32),
        "lmcache_codes": np.frombuffer(b"".join(codes), np.uint8),
        "lmcache_decoded": decoded[0].numpy().T,
        "lmcache_prefsum_decoded": decoded_joined[0].numpy().T,
    }


def main(argv: list[str]) -> int:
    request_path, answer_path, kernels_path = argv
    kernels = load_kernels(kernels_path)
    answer: dict[str, np.ndarray] = {}
    with np.load(request_path) as request:
        for prefix, batch in read_batches(request):
            if "cdf" in batch:
                found = exchange_with_torchac(batch) | exchange_with_lmcache(kernels, batch)
            else:
                symbols = torch.from_numpy(batch["symbols"].T.astype(np.int64).copy())[None]
                cdf = kernels.calculate_cdf(symbols, int(batch["num_symbols"]))[0].numpy()
                found = {"cdf": cdf.view(np.uint16)}
            answer |= {prefix + name: array for name, array in found.items()}
    np.savez(answer_path, **answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
