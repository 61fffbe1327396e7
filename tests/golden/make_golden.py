"""Make the golden files: small documents whose every byte, and every decoded bit, the tests hold the coders to.

    python -m tests.golden.make_golden [--overwrite]        (in the repository's root)

The files are made by the reference coder (plain Python). Inputs are not stored: they come from `Integers`, a linear
congruential generator, through exact arithmetic, so that any language can make them again. Next to the documents,
`invalid/` holds files that every reader must refuse, with the reason in `invalid/invalid.json`.

Golden files change only together with the format's version or with a writer's free choice (docs/format.md names them),
never to make a test pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cachegen.format import (
    Coder,
)
from cachegen.format.files import TABLES_NAME, chunk_name
from cachegen.kv_cache import ContextMetadata, KVCache, from_planes, hash_token_prefixes
from cachegen.methods import open_document
from cachegen.methods.absmax.codec import AbsmaxEncoder, build_chunk
from cachegen.methods.absmax.config import AbsmaxConfig, LayerGroup
from tests.golden import make_lossless_golden, make_transform_golden
from tests.golden.integers import Integers
from tests.golden.invalid_files import list_invalid
from tests.reference.kernels import REFERENCE

FOLDER = Path(__file__).resolve().parent
MODEL_FINGERPRINT = hashlib.sha256(b"golden model").hexdigest()
BLOCK_SIZE = 512


@dataclass(frozen=True)
class Golden:
    """A document to be made.

    Attributes:
        shapes: (num_kv_heads, head_dim) per plane: keys and values of layer 0, of layer 1, ...
        num_bins: per plane.
        num_cache_tokens: tokens of the cache; those beyond the chunks are not encoded.
        values: plane, token, channel -> value, exact in the dtype; None: `bell_values`.
        tokens_per_stream: None: what the encoder chooses.
        first_stored: per layer, the first token that is stored; empty for all tokens.
    """

    name: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    num_bins: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    num_cache_tokens: int
    method: str = "cachegen"
    coder: Coder = Coder.RANS
    values: Callable[[int, int, int], float] | None = None
    tokens_per_stream: int | None = None
    first_stored: tuple[int, ...] = ()


# --- inputs -----------------------------------------------------------------------------------------------------------

WORKED_KEYS = ((1.0, -3.0), (0.0, 0.0), (6.0, 1.0))
WORKED_VALUES = ((0.5, 0.25), (-1.0, 1.0), (0.25, 0.75))


def worked_value(plane: int, token: int, channel: int) -> float:
    """The example that docs/format.md works by hand."""
    return (WORKED_VALUES if plane else WORKED_KEYS)[token][channel]


def bell_values(golden: Golden) -> Iterator[float]:
    """Values in the order plane, token, channel: a bell shape, a factor per channel, and the special cases.

    A value is the sum of four draws below 64, less 126, times 2^-(channel modulo 4). Channel 1 is zero everywhere, so
    that it has a single symbol. Of every 16 tokens, number 3 is all zero and number 7 so small that its scale is
    subnormal in the dtype (fp32: its inverse overflows); in fp32, 17 more bits follow the value's leading ones.
    """
    integers = Integers(seed=len(golden.name))
    unit = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}[golden.dtype]
    for heads, dim in golden.shapes:
        for token in range(golden.num_cache_tokens):
            for channel in range(heads * dim):
                value = sum(integers.below(64) for _ in range(4)) - 126
                if channel == 1 or token % 16 == 3:
                    yield 0.0
                elif token % 16 == 7:
                    yield value * unit
                elif golden.dtype == torch.float32:
                    yield (value * 2**17 + integers.below(2**17)) * 2.0 ** -(17 + channel % 4)
                else:
                    yield value * 2.0 ** -(channel % 4)


def make_cache(golden: Golden) -> KVCache:
    """Make a golden document's input."""
    stream = bell_values(golden)
    planes = []
    for plane, (heads, dim) in enumerate(golden.shapes):
        rows = [
            [golden.values(plane, token, i) if golden.values else next(stream) for i in range(heads * dim)]
            for token in range(golden.num_cache_tokens)
        ]
        exact = torch.tensor(rows, dtype=torch.float64)
        tensor = exact.to(golden.dtype)
        if not torch.equal(tensor.double(), exact):
            raise ValueError(f"{golden.name}: a value is not exact in {golden.dtype}")
        planes.append(tensor.reshape(golden.num_cache_tokens, heads, dim))
    return from_planes(planes)


def make_metadata(golden: Golden) -> ContextMetadata:
    """Token ids 1, 2, 3, ..., no rotary embeddings, a made-up model."""
    token_ids = torch.arange(1, golden.num_cache_tokens + 1, dtype=torch.int32)
    return ContextMetadata("golden", MODEL_FINGERPRINT, token_ids, (), BLOCK_SIZE)


def make_config(golden: Golden) -> AbsmaxConfig:
    """One layer group per layer."""
    groups = [LayerGroup(index // 2 + 1, num_bins, "bins") for index, num_bins in enumerate(golden.num_bins)]
    return AbsmaxConfig(golden.method, tuple(groups[0::2]), tuple(groups[1::2]), golden.coder)


GOLDENS = (
    Golden("worked", torch.float16, ((1, 2), (1, 2)), (8, 4), (3,), 3, values=worked_value),
    Golden(
        "cachegen_bf16",
        torch.bfloat16,
        ((1, 80), (2, 24)) * 3,
        (32, 32, 16, 16, 16, 16),
        (40, 5),
        47,
    ),
    Golden("many_streams", torch.bfloat16, ((1, 5), (3, 11)), (16, 16), (100, 1), 101, tokens_per_stream=32),
    Golden(
        "arithmetic", torch.bfloat16, ((1, 5), (3, 11)), (64, 16), (100, 1), 101, coder=Coder.AC, tokens_per_stream=64
    ),
    Golden("wide_bins_fp16", torch.float16, ((1, 31),) * 4, (64, 128, 256, 34), (33,), 33),
    Golden("float32", torch.float32, ((2, 16), (1, 33)), (32, 8), (20, 12), 32),
    Golden("uniform8_packed", torch.bfloat16, ((1, 12), (2, 8)), (256, 256), (35,), 35, "uniform", Coder.PACKED),
    Golden("uniform8_rans", torch.bfloat16, ((1, 12), (2, 8)), (256, 256), (35,), 35, "uniform"),
    # A layer with all its tokens, one that begins within the first chunk, and one that has none.
    Golden(
        "windowed",
        torch.bfloat16,
        ((1, 12), (2, 8)) * 3,
        (64, 64, 16, 16, 8, 8),
        (40, 5),
        50,
        first_stored=(0, 20, 45),
    ),
)


# --- documents --------------------------------------------------------------------------------------------------------


def start_encoder(golden: Golden, kernels=REFERENCE, num_threads: int = 1) -> AbsmaxEncoder:
    """Measure a golden document's cache and make its tables file."""
    return AbsmaxEncoder(
        make_cache(golden),
        make_metadata(golden),
        make_config(golden),
        golden.chunk_tokens,
        golden.coder,
        num_threads=num_threads,
        kernels=kernels,
        first_stored=golden.first_stored,
    )


def encode(golden: Golden, kernels=REFERENCE, num_threads: int = 1) -> dict[str, bytes]:
    """Encode a golden document; returns its files by name."""
    encoder = start_encoder(golden, kernels, num_threads)
    files = {TABLES_NAME: encoder.tables_file}
    for index in range(encoder.num_chunks):
        if golden.tokens_per_stream is None:
            parts = encoder.encode_chunk(index)
        else:
            parts = encode_chunk_in_streams(golden, encoder, index, kernels, num_threads)
        files[chunk_name(index)] = b"".join(parts)
    return files


def encode_chunk_in_streams(
    golden: Golden, encoder: AbsmaxEncoder, index: int, kernels, num_threads: int
) -> list[bytes | memoryview]:
    """Encode a chunk as `AbsmaxEncoder.encode_chunk` does, but with the document's own `tokens_per_stream`."""
    header = encoder.expected_header(index)
    planes = tuple(dataclasses.replace(p, tokens_per_stream=golden.tokens_per_stream) for p in header.planes)
    header = dataclasses.replace(header, planes=planes)
    start, stop = header.first_token, header.first_token + header.num_tokens
    cache = make_cache(golden).slice(start, stop)
    scales, _ = kernels.measure(cache, planes, num_threads)
    tables = encoder.document.classes[0][1]
    payload, streams = kernels.encode(cache, scales, planes, tables, num_threads, coder=golden.coder)
    return build_chunk(header, scales, streams, [payload])


def allocate(golden: Golden, num_tokens: int) -> KVCache:
    """A cache for decoded tokens, full of NaN so that what is not written shows."""
    return from_planes(
        [torch.full((num_tokens, heads, dim), torch.nan, dtype=golden.dtype) for heads, dim in golden.shapes]
    )


def decode(golden: Golden, files: dict[str, bytes], kernels=REFERENCE, num_threads: int = 1) -> KVCache:
    """Decode all chunks of a golden document."""
    document = open_document(files[TABLES_NAME], num_threads=num_threads, kernels=kernels)
    output = allocate(golden, sum(golden.chunk_tokens))
    stops = [sum(golden.chunk_tokens[: i + 1]) for i in range(len(golden.chunk_tokens))]
    hashes = hash_token_prefixes(make_metadata(golden).token_ids, stops)
    for index, (stop, token_hash) in enumerate(zip(stops, hashes, strict=True)):
        start = stop - golden.chunk_tokens[index]
        document.decode(
            [files[chunk_name(index)]],
            output.slice(start, stop),
            first_token=start,
            token_hash=bytes.fromhex(token_hash),
            num_threads=num_threads,
            kernels=kernels,
        )
    return output


def hash_cache(cache: KVCache) -> str:
    """SHA-256 in hex of all planes' little-endian bytes, plane after plane, each [token, head, dim]."""
    digest = hashlib.sha256()
    for plane in cache.planes:
        digest.update(plane.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- writing ----------------------------------------------------------------------------------------------------------


def to_json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def make_all() -> dict[str, bytes]:
    """All files, by their path below the folder."""
    files = {golden.name: encode(golden) for golden in GOLDENS}
    decoded = {golden.name: hash_cache(decode(golden, files[golden.name])) for golden in GOLDENS}
    invalid = list_invalid(files)
    output = {f"{name}/{file}": content for name, of_name in files.items() for file, content in of_name.items()}
    output["decoded_sha256.json"] = to_json(decoded)
    output |= {f"invalid/{file}": case.content for file, case in invalid}
    reasons = {file: {"base": case.base, "error": case.error, "field": case.field} for file, case in invalid}
    output["invalid/invalid.json"] = to_json(reasons)
    output |= {
        f"{make_transform_golden.NAME}/{name}": content for name, content in make_transform_golden.make_files().items()
    }
    reasons = {}
    for name, content, error, field in make_transform_golden.list_invalid():
        output[f"invalid_transform/{name}"] = content
        reasons[name] = {"error": error, "field": field}
    output["invalid_transform/invalid.json"] = to_json(reasons)
    output |= {
        f"{make_lossless_golden.NAME}/{name}": content for name, content in make_lossless_golden.make_files().items()
    }
    return output


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the golden files of the format's tests.")
    parser.add_argument("--overwrite", action="store_true", help="replace golden files that differ")
    arguments = parser.parse_args(argv)
    files = make_all()
    changed = [name for name, content in files.items() if not same(FOLDER / name, content)]
    existing = [name for name in changed if (FOLDER / name).exists()]
    if existing and not arguments.overwrite:
        print(f"make_golden.py: {existing[0]} differs ({len(existing)} in all); --overwrite replaces", file=sys.stderr)
        return 1
    for name in changed:
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_bytes(files[name])
    print(f"make_golden.py: {len(changed)} of {len(files)} files written, {sum(map(len, files.values()))} bytes in all")
    return 0


def same(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


if __name__ == "__main__":
    sys.exit(main())
