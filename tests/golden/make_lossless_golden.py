"""The golden document of method lossless: contexts of no, one and two layers, rotated planes, values of every kind.

Its model is drawn as integers and its values as bits, so that files match byte for byte on every machine. The model is
stored without compression, whose bytes depend on the library. make_golden.py writes the files.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen import _native
from cachegen.format import ALIGNMENT, NO_HASH, Coder, Dtype, StreamEntry, round_up
from cachegen.format.files import TABLES_NAME, chunk_name, join_chunk
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import hash_token_prefixes
from cachegen.methods.lossless.codec import METHOD_NUMBER
from cachegen.methods.lossless.headers import LosslessChunkHeader, LosslessDocumentHeader
from cachegen.methods.lossless.model import NO_WEIGHTS, Model, TurningPairs

NAME = "lossless"
VALUES_NAME = "values.u16"
SHAPES = ((2, 6), (1, 5), (1, 4), (1, 4), (1, 6), (1, 3))
LAYERS_BEFORE = (NO_WEIGHTS, 1, 2)
PLANE_ROTATIONS = (1, 0, 2, 0, 0, 2)
CHUNK_TOKENS = (261, 30)
NUM_CACHE_TOKENS = 300


def make_model() -> Model:
    """Return a model of no cache in particular; its predictions need not be good."""
    generator = np.random.default_rng(1)
    widths = [SHAPES[i][0] * SHAPES[i][1] + SHAPES[i + 1][0] * SHAPES[i + 1][1] for i in (0, 2, 4)]
    count = sum(widths)
    channels = np.stack(
        [
            generator.integers(-4000, 4000, count),
            generator.integers(1 << 12, 1 << 14, count),
            np.full(count, 19),
            np.repeat([11, 9, 12], widths),
            np.full(count, 3),
            generator.integers(500, 1024, count),
        ],
        axis=1,
    ).astype(np.int32)
    num_weights = sum(widths[layer] * sum(widths[: layer + 1]) for layer in (1, 2))
    weights = generator.integers(-40, 41, num_weights).astype(np.int8).view(np.uint8)
    frequencies = np.full((len(SHAPES), 64), 40, np.uint16)
    frequencies[:, 31] += 4096 - 64 * 40
    rotations = (
        TurningPairs((0x28BE60DB12345678, 0x0050 << 32 | 7)),
        TurningPairs((0xFFFFFFFFFFFFFFFF - 0x0123456789,), "interleaved", 1),
    )
    return Model(channels, LAYERS_BEFORE, weights, frequencies, rotations, PLANE_ROTATIONS)


def make_bits() -> NDArray[np.uint16]:
    """Return the values of all tokens, bits of bfloat16: most of them small, some of every kind there is."""
    generator = np.random.default_rng(2)
    count = sum(heads * dims for heads, dims in SHAPES)
    values = torch.from_numpy(generator.integers(-8000, 8000, (NUM_CACHE_TOKENS, count)).astype(np.float32) / 1024)
    bits = values.to(torch.bfloat16).view(torch.uint16).numpy().copy()
    special = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x807F, 0x0080, 0x7F7F, 0xFF7F, 0x3A01, 0xBA01]
    for place, number in enumerate(special * 3):
        bits[7 * place % NUM_CACHE_TOKENS, 5 * place % count] = number
    return bits


def make_files() -> dict[str, bytes]:
    """Return the golden document's files, and its values."""
    bits, model = make_bits(), make_model()
    planes = tuple(PlaneShape(*shape) for shape in SHAPES)
    content = model.pack(compression=0)
    token_ids = torch.arange(NUM_CACHE_TOKENS, dtype=torch.int32)
    common = {
        "method": METHOD_NUMBER,
        "coder": Coder.RANS,
        "dtype": Dtype.BFLOAT16,
        "model_fingerprint": hashlib.sha256(b"golden model").digest(),
        "rope_hash": hashlib.sha256(b"golden rope").digest(),
        "profile_hash": NO_HASH,
    }
    header = LosslessDocumentHeader(
        **common,
        num_cache_tokens=NUM_CACHE_TOKENS,
        prefill_block_size=512,
        token_hash=bytes.fromhex(hash_token_prefixes(token_ids, [NUM_CACHE_TOKENS])[0]),
        cache_hash=hashlib.sha256(b"golden cache").digest(),
        chunk_tokens=CHUNK_TOKENS,
        num_levels=1,
        model_bytes=len(content),
        model_crc=_native.crc32c(content),
        planes=planes,
    )
    files = {TABLES_NAME: header.pack() + content, VALUES_NAME: bits[: sum(CHUNK_TOKENS)].astype("<u2").tobytes()}
    coding = model.for_native(planes, is_float16=False)
    first = 0
    for index, num_tokens in enumerate(CHUNK_TOKENS):
        stop = first + num_tokens
        encoded = _native.lossless_encode(bits[first:stop], first, coding, 1)
        payloads = [stream.ljust(round_up(len(stream), ALIGNMENT), b"\0") for stream in encoded]
        streams = [
            StreamEntry(len(stream), 0, _native.crc32c(padded))
            for stream, padded in zip(encoded, payloads, strict=True)
        ]
        chunk = LosslessChunkHeader(
            **common,
            first_token=first,
            num_tokens=num_tokens,
            num_layers=len(SHAPES) // 2,
            level=1,
            refines=0,
            token_hash=bytes.fromhex(hash_token_prefixes(token_ids, [stop])[0]),
            tables_hash=hashlib.sha256(files[TABLES_NAME]).digest(),
        )
        files[chunk_name(index)] = b"".join(join_chunk(chunk, streams, payloads))
        first = stop
    return files
