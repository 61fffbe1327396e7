"""Small caches and documents for the codec's tests, from fixed seeds."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch

from cachegen.codec import DocumentEncoder, decode_chunk, load_document
from cachegen.coder import cpu
from cachegen.config import LayerGroup, QuantizationConfig
from cachegen.format import Coder, Method
from cachegen.kv_cache import ContextMetadata, KVCache, from_planes, hash_token_prefixes
from cachegen.quantization import dequantize, quantize

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Shapes = Sequence[tuple[int, int]]


def make_cache(
    shapes: Shapes, num_tokens: int, dtype: torch.dtype, seed: int = 0, *, head_major: bool = False
) -> KVCache:
    """Random planes of bell shape whose width differs from channel to channel.

    Args:
        shapes: (num_kv_heads, head_dim) of keys and values of layer 0, of layer 1, ...
        head_major: strides as transformers has them: memory in the order [heads, tokens, dims], with spare room.
    """
    generator = torch.Generator().manual_seed(seed)
    planes = []
    for heads, dim in shapes:
        values = torch.randn(num_tokens, heads, dim, generator=generator) * torch.rand(heads, dim, generator=generator)
        if head_major:
            storage = torch.zeros(heads, num_tokens + 3, dim, dtype=dtype)
            plane = storage[:, :num_tokens].permute(1, 0, 2)
            plane.copy_(values)
        else:
            plane = values.to(dtype)
        planes.append(plane)
    return from_planes(planes)


def allocate_like(cache: KVCache, num_tokens: int, *, head_major: bool = False) -> KVCache:
    """A cache for decoded tokens, full of NaN so that what is not written shows."""
    planes = []
    for plane in cache.planes:
        _, heads, dim = plane.shape
        if head_major:
            planes.append(
                torch.full((heads, num_tokens + 5, dim), torch.nan, dtype=plane.dtype)[:, 2:-3].permute(1, 0, 2)
            )
        else:
            planes.append(torch.full((num_tokens, heads, dim), torch.nan, dtype=plane.dtype))
    return from_planes(planes)


def make_metadata(num_tokens: int, seed: int = 0) -> ContextMetadata:
    token_ids = (torch.arange(num_tokens, dtype=torch.int32) * 7919 + seed) % 32000
    return ContextMetadata("some/model", hashlib.sha256(b"some model").hexdigest(), token_ids, (), 512)


def make_config(num_bins: Sequence[int], method: Method = Method.CACHEGEN) -> QuantizationConfig:
    """A config with one group per layer; `num_bins` is per plane."""
    groups = [LayerGroup(index // 2 + 1, bins, "bins") for index, bins in enumerate(num_bins)]
    return QuantizationConfig(method, tuple(groups[0::2]), tuple(groups[1::2]), Coder.RANS, "test.json")


def start_encoder(
    cache: KVCache,
    num_bins: Sequence[int],
    chunk_tokens: Sequence[int],
    coder: Coder = Coder.RANS,
    *,
    num_threads: int = 1,
    kernels=cpu,
) -> DocumentEncoder:
    return DocumentEncoder(
        cache,
        make_metadata(cache.num_tokens),
        make_config(num_bins),
        chunk_tokens,
        coder,
        num_threads=num_threads,
        kernels=kernels,
    )


def encode_all(encoder: DocumentEncoder) -> list[bytes]:
    """The tables file and the chunk files."""
    return [encoder.tables_file] + [b"".join(encoder.encode_chunk(index)) for index in range(encoder.num_chunks)]


def decode_all(files: Sequence[bytes], output: KVCache, *, num_threads: int = 1, kernels=cpu) -> None:
    """Decode a document of `make_metadata`'s tokens into `output`."""
    document = load_document(files[0], num_threads=num_threads, kernels=kernels)
    start = 0
    token_ids = make_metadata(document.header.num_cache_tokens).token_ids
    for content, num_tokens in zip(files[1:], document.header.chunk_tokens, strict=True):
        stop = start + num_tokens
        decode_chunk(
            content,
            document,
            output.slice(start, stop),
            first_token=start,
            token_hash=bytes.fromhex(hash_token_prefixes(token_ids, [stop])[0]),
            num_threads=num_threads,
            kernels=kernels,
        )
        start = stop


def quantize_and_back(cache: KVCache, num_bins: Sequence[int]) -> KVCache:
    """What decoding must give, straight from the quantizer."""
    return from_planes(
        [
            dequantize(*quantize(plane, bins), bins).reshape(plane.shape)
            for plane, bins in zip(cache.planes, num_bins, strict=True)
        ]
    )


def same_bits(found: KVCache, expected: KVCache) -> bool:
    """Tell whether two caches are equal bit for bit, the sign of zero included."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(found.planes, expected.planes, strict=True)
    )


@functools.cache
def tiny_document() -> tuple[DocumentEncoder, bytes, bytes]:
    """An encoder of one small chunk with low bits and a tail row, its tables file and its chunk file."""
    cache = make_cache([(1, 3), (1, 2)], 34, torch.bfloat16)
    encoder = start_encoder(cache, (64, 8), (34,))
    return encoder, encoder.tables_file, b"".join(encoder.encode_chunk(0))


def decode_tiny(content: bytes, tables_file: bytes, kernels=cpu) -> KVCache:
    """Decode the chunk of `tiny_document`."""
    encoder = tiny_document()[0]
    output = allocate_like(make_cache([(1, 3), (1, 2)], 34, torch.bfloat16), 34)
    expected = encoder.expected_header(0)
    document = load_document(tables_file, kernels=kernels)
    decode_chunk(content, document, output, first_token=0, token_hash=expected.token_hash, kernels=kernels)
    return output
