"""Small caches and documents for the codec's tests, from fixed seeds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import torch

from cachegen.coder.cpu_kernels import CPU
from cachegen.format import Coder
from cachegen.kv_cache import ContextMetadata, KVCache, RotaryEmbedding, from_planes, hash_token_prefixes
from cachegen.methods import open_document
from cachegen.methods.absmax.codec import AbsmaxEncoder
from cachegen.methods.absmax.config import AbsmaxConfig, LayerGroup
from cachegen.methods.absmax.quantization import dequantize, quantize
from cachegen.methods.transform.codec import TransformDocument, TransformEncoder
from cachegen.methods.transform.profile import CurvePoint, Profile, TransformGroup
from cachegen.methods.transform.transform import GroupTransform

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


def make_config(num_bins: Sequence[int], method: str = "cachegen") -> AbsmaxConfig:
    """A config with one group per layer; `num_bins` is per plane."""
    groups = [LayerGroup(index // 2 + 1, bins, "bins") for index, bins in enumerate(num_bins)]
    return AbsmaxConfig(method, tuple(groups[0::2]), tuple(groups[1::2]), Coder.RANS, "test.json")


def start_encoder(
    cache: KVCache,
    num_bins: Sequence[int],
    chunk_tokens: Sequence[int],
    coder: Coder = Coder.RANS,
    *,
    num_threads: int = 1,
    kernels=CPU,
) -> AbsmaxEncoder:
    return AbsmaxEncoder(
        cache,
        make_metadata(cache.num_tokens),
        make_config(num_bins),
        chunk_tokens,
        coder,
        num_threads=num_threads,
        kernels=kernels,
    )


def encode_all(encoder: AbsmaxEncoder) -> list[bytes]:
    """The tables file and the chunk files."""
    return [encoder.tables_file] + [b"".join(encoder.encode_chunk(index)) for index in range(encoder.num_chunks)]


def decode_all(files: Sequence[bytes], output: KVCache, *, num_threads: int = 1, kernels=CPU) -> None:
    """Decode a document of `make_metadata`'s tokens into `output`."""
    document = open_document(files[0], num_threads=num_threads, kernels=kernels)
    start = 0
    token_ids = make_metadata(document.header.num_cache_tokens).token_ids
    for content, num_tokens in zip(files[1:], document.header.chunk_tokens, strict=True):
        stop = start + num_tokens
        document.decode(
            [content],
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
def tiny_document() -> tuple[AbsmaxEncoder, bytes, bytes]:
    """An encoder of one small chunk with low bits and a tail row, its tables file and its chunk file."""
    cache = make_cache([(1, 3), (1, 2)], 34, torch.bfloat16)
    encoder = start_encoder(cache, (64, 8), (34,))
    return encoder, encoder.tables_file, b"".join(encoder.encode_chunk(0))


def decode_tiny(content: bytes, tables_file: bytes, kernels=CPU) -> KVCache:
    """Decode the chunk of `tiny_document`."""
    encoder = tiny_document()[0]
    output = allocate_like(make_cache([(1, 3), (1, 2)], 34, torch.bfloat16), 34)
    expected = encoder.expected_header(0)
    document = open_document(tables_file, kernels=kernels)
    document.decode([content], output, first_token=0, token_hash=expected.token_hash, kernels=kernels)
    return output


# --- method transform -------------------------------------------------------------------------------------------------

ROTARY = RotaryEmbedding("rotary_emb", "default", (1.0, 0.25, 0.0625), 1.0)


def make_profile(
    shapes: Shapes,
    group_layers: Sequence[int],
    *,
    rotary: RotaryEmbedding | None = ROTARY,
    largest_scale: float = 4.0,
    scale_fall: int = 4,
    model_fingerprint: str | None = None,
    curve: Sequence[CurvePoint] = (),
    seed: int = 0,
) -> Profile:
    """A small profile whose bases are random and orthogonal, its scales falling by a factor of 2 every 4 components.

    Args:
        shapes: (num_kv_heads, head_dim) per plane.
        group_layers: layers of each group.
        rotary: None for a model without rotary embeddings.
        largest_scale: standard deviation of the first component.
        scale_fall: 16 log2 of a component's scale over the next one's.

    Returns:
        The profile with a made-up hash; `save_profile` gives it its own.
    """
    generator = torch.Generator().manual_seed(seed)
    groups, first_layer = [], 0
    for num_layers in group_layers:
        num_channels = sum(h * d for h, d in shapes[2 * first_layer : 2 * (first_layer + num_layers)])
        basis, _ = torch.linalg.qr(torch.randn(num_channels, num_channels, dtype=torch.float64, generator=generator))
        logs = torch.tensor([round(16 * math.log2(largest_scale)) - scale_fall * i for i in range(num_channels)])
        groups.append(
            TransformGroup(
                first_layer,
                num_layers,
                torch.randn(num_channels, generator=generator),
                basis.T.half().contiguous(),
                logs.to(torch.int16),
                basis.half().contiguous(),
            )
        )
        first_layer += num_layers
    return Profile(
        model_fingerprint or make_metadata(1).model_fingerprint,
        (rotary,) if rotary else (),
        tuple(shapes),
        tuple(groups),
        tuple(curve),
        {"text": "none"},
        profile_hash=hashlib.sha256(f"profile {seed}".encode()).hexdigest(),
    )


def make_components(profile: Profile, num_tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """Components of each group, fp32 `[num_tokens, num_components]`, as wide as the profile says."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_tokens, group.num_components, generator=generator) * 2 ** (group.scale_logs.float() / 16)
        for group in profile.groups
    ]


def allocate_for(profile: Profile, num_tokens: int, dtype: torch.dtype) -> KVCache:
    """A cache of a profile's shapes, full of NaN so that what is not written shows."""
    return from_planes([torch.full((num_tokens, *shape), torch.nan, dtype=dtype) for shape in profile.plane_shapes])


def make_transformed_cache(
    profile: Profile, num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> KVCache:
    """A cache whose components are those of `make_components`, but for the dtype's rounding."""
    cache = allocate_for(profile, num_tokens, torch.float32)
    for group, components in zip(profile.groups, make_components(profile, num_tokens, seed), strict=True):
        GroupTransform(profile, group, torch.device("cpu")).synthesize(components, 1.0, cache, 0)
    return from_planes([plane.to(dtype) for plane in cache.planes])


def start_transform_encoder(
    cache: KVCache, profile: Profile, chunk_tokens: Sequence[int], *, seed: int = 0, **arguments
) -> TransformEncoder:
    """An encoder of `make_metadata`'s tokens with the profile's rotary embeddings; 16 log2 of the step is 0."""
    metadata = dataclasses.replace(make_metadata(cache.num_tokens, seed), rotary_embeddings=profile.rotary_embeddings)
    return TransformEncoder(cache, metadata, profile, chunk_tokens, **({"step_log": 0} | arguments))


def encode_levels(encoder: TransformEncoder) -> list[list[bytes]]:
    """Per chunk the files of its levels."""
    return [
        [b"".join(encoder.encode_chunk(index, level)) for level in encoder.levels]
        for index in range(encoder.num_chunks)
    ]


def decode_transformed(
    tables_file: bytes,
    chunks: Sequence[Sequence[bytes]],
    profile: Profile,
    output: KVCache,
    *,
    first_chunk: int = 0,
    seed: int = 0,
    num_threads: int = 1,
) -> None:
    """Decode consecutive chunks, each from the files given, into `output`, which begins with the first of them."""
    document = open_document(tables_file, find_profile=lambda _: profile)
    assert isinstance(document, TransformDocument)
    tokens = document.header.chunk_tokens
    token_ids = make_metadata(document.header.num_cache_tokens, seed).token_ids
    origin = start = sum(tokens[:first_chunk])
    for contents, num_tokens in zip(chunks, tokens[first_chunk:], strict=False):
        stop = start + num_tokens
        document.decode(
            contents,
            output.slice(start - origin, stop - origin),
            first_token=start,
            token_hash=bytes.fromhex(hash_token_prefixes(token_ids, [stop])[0]),
            num_threads=num_threads,
        )
        start = stop
