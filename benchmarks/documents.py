"""What the benchmark encodes: synthetic caches of known shape, and real ones where the bundled model is there."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from cachegen.coder import cpu
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.symbol_model import choose_weight_classes, pack_tables
from cachegen.format import Coder, PlaneLayout
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods.absmax.codec import AbsmaxEncoder, choose_tokens_per_stream
from cachegen.methods.absmax.config import AbsmaxConfig, LayerGroup
from cachegen.methods.absmax.quantization import low_bits_for, quantize


class Document:
    """A cache, its tables, and memory for its decoding, all allocated and touched beforehand.

    Attributes:
        metadata: of a real cache; None for a synthetic one.
        repeats: how often encoding and decoding go over the cache, to stand for a longer one in bounded memory.
    """

    def __init__(
        self, name: str, cache: KVCache, num_bins: int, *, has_peers: bool = False, repeats: int = 1, metadata=None
    ) -> None:
        self.name, self.cache, self.has_peers, self.repeats, self.metadata = name, cache, has_peers, repeats, metadata
        self.planes = tuple(
            PlaneLayout(
                plane.shape[1],
                plane.shape[2],
                num_bins,
                low_bits_for(num_bins, 32),
                tokens_per_stream=choose_tokens_per_stream(plane[0].numel(), cache.num_tokens),
            )
            for plane in cache.planes
        )
        self.scales, counts = cpu.measure(cache, self.planes)
        classes, parts, first = choose_weight_classes(counts), [], 0
        for plane in self.planes:
            parts.append(pack_tables(classes[first : first + plane.num_channels]))
            first += plane.num_channels
        self.tables = cpu.load_tables(b"".join(parts), self.planes, [len(part) for part in parts])
        frequencies = self.tables.frequencies().astype(np.float64)
        with np.errstate(divide="ignore"):
            bits = np.where(counts > 0, -np.log2(frequencies / 4096), 0.0)
        low_bits = sum(plane.low_bits * values.numel() for plane, values in zip(self.planes, cache.planes, strict=True))
        self.ideal_bits = float((counts * bits).sum()) + low_bits
        self.output = KVCache([torch.zeros_like(k) for k in cache.keys], [torch.zeros_like(v) for v in cache.values])

    @property
    def num_values(self) -> int:
        return self.cache.num_values * self.repeats

    @property
    def is_large(self) -> bool:
        return self.repeats > 1

    def measure(self, path: str, threads: int) -> None:
        for _ in range(self.repeats):
            cpu.measure(self.cache, self.planes, threads, path=path)

    def encode(self, path: str, threads: int):
        """Returns the payload and the index of the streams."""
        for _ in range(self.repeats):
            encoded = cpu.encode(self.cache, self.scales, self.planes, self.tables, threads, path=path)
        return encoded

    def decode(self, payload, index, path: str, threads: int) -> None:
        for _ in range(self.repeats):
            cpu.decode(payload, index, self.scales, self.planes, self.tables, self.output, threads, path=path)

    def digest_output(self) -> str:
        digest = hashlib.sha256()
        for plane in self.output.planes:
            digest.update(plane.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def file_bytes(self, payload, index) -> int:
        """Length of the chunk file without its scales: states, words, padding, index and checksums."""
        del index
        return len(payload) + 12 * sum(-(-self.cache.num_tokens // plane.tokens_per_stream) for plane in self.planes)

    def bits_over_ideal(self, num_bytes: int) -> float:
        """How much longer than what the 12-bit tables say, as a fraction."""
        return 8 * num_bytes / self.ideal_bits - 1

    def symbols_and_frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 `[planes, channels, tokens]` and uint16 `[planes, channels, 32]`."""
        symbols = [
            quantize(values, plane.num_bins)[0].T for values, plane in zip(self.cache.planes, self.planes, strict=True)
        ]
        frequencies = self.tables.frequencies().reshape(len(self.planes), -1, 32)
        return np.stack([plane.numpy().astype(np.uint8) for plane in symbols]), frequencies


def synthetic_cache(num_planes: int, num_tokens: int, num_kv_heads: int, head_dim: int, seed: int = 0) -> KVCache:
    """fp16 planes whose channels are normal or Laplacian with log-normal deviations."""
    generator = torch.Generator().manual_seed(seed)
    num_channels = num_kv_heads * head_dim

    def make_plane() -> torch.Tensor:
        deviation = torch.exp(0.35 * torch.randn(num_channels, generator=generator))
        values = torch.randn(num_tokens, num_channels, generator=generator)
        is_laplacian = torch.rand(num_channels, generator=generator) < 0.5
        laplacian = torch.empty(values.shape).exponential_(generator=generator) * values.sign() / 2**0.5
        values = torch.where(is_laplacian, laplacian, values) * deviation
        return values.half().reshape(num_tokens, num_kv_heads, head_dim)

    planes = [make_plane() for _ in range(num_planes)]
    return KVCache(planes[0::2], planes[1::2])


def real_cache(repository: Path) -> tuple[KVCache, ContextMetadata] | None:
    """Prefill a bundled context with the bundled model; None where they are not there."""
    model, context = repository / "models" / "tiny-mistral", repository / "9k_prompts" / "0.txt"
    if not (model / "config.json").exists() or not context.exists():
        return None
    from cachegen.pipeline.model import load_model
    from cachegen.pipeline.prefill import prefill_context, tokenize

    loaded = load_model(str(model), device=torch.device("cpu"))
    token_ids = tokenize(loaded, context.read_text(encoding="utf-8"))[:3073]
    return prefill_context(loaded, token_ids)


def iterate_documents(repository: Path) -> Iterator[Document]:
    """Make the cases one after the other, so that only one is in memory."""
    for num_bins in (32, 16):
        cache = synthetic_cache(4, 256, 8, 128)
        yield Document(f"4 planes x 256 tokens, {num_bins} bins", cache, num_bins, has_peers=True)
    for num_bins in (64, 256):
        yield Document(f"4 planes x 256 tokens, {num_bins} bins", synthetic_cache(4, 256, 8, 128), num_bins)
    yield Document("64 planes x 256 tokens, 32 bins", synthetic_cache(64, 256, 8, 128), 32)
    found = real_cache(repository)
    if found is not None:
        yield Document("tiny-mistral, 3072 tokens, 32 bins", found[0], 32, metadata=found[1])
    # 9,000 tokens as six times 1,500, so that 1.2 GB need not be held twice.
    yield Document("Mistral-7B, 9000 tokens, 32 bins", synthetic_cache(64, 1500, 8, 128), 32, repeats=6)


def run_pipeline(
    document: Document,
    threads: int,
    rounds: int,
    *,
    kernels=CPU,
    output: KVCache | None = None,
    chunk_tokens: int | None = None,
    path: str | None = None,
    wait: Callable[[], object] = lambda: None,
) -> list[tuple]:
    """Time whole documents, files included, into a warm cache; returns the rest of a row each.

    Encoding has a document's tables to make as often as it goes over the cache, decoding reads them once.

    Args:
        output: where to decode to; None is the document's, on the CPU.
        chunk_tokens: tokens of a chunk file; None is all of the cache in one.
        path: of the rows. The time is the clock's where there is one.
        wait: for all that the kernels have been asked for.
    """
    from cachegen.pipeline.chunking import plan_chunks
    from cachegen.pipeline.decode import EncodedFolder
    from cachegen.pipeline.encode import encode_document

    cache, target = document.cache, output or document.output
    lengths = plan_chunks(cache.num_tokens, None, chunk_tokens or cache.num_tokens)
    metadata = document.metadata or ContextMetadata(
        "synthetic", "00" * 32, torch.zeros(cache.num_tokens, dtype=torch.int32), (), 512
    )
    group = (LayerGroup(None, document.planes[0].num_bins, "bins"),)
    config = AbsmaxConfig("cachegen", group, group, Coder.RANS)
    rows = []
    for num_threads in dict.fromkeys((1, threads)):
        clock = time.process_time if num_threads == 1 and path is None else time.perf_counter
        encode_seconds, decode_seconds = [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                start = clock()
                encoder = AbsmaxEncoder(
                    cache, metadata, config, lengths, Coder.RANS, num_threads=num_threads, kernels=kernels
                )
                encode_document(encoder, folder)
                encode_seconds.append(clock() - start)
                start = clock()
                encoded = EncodedFolder(folder, num_threads, kernels)
                # One tables file, and a longer cache as chunks of the same length.
                for _ in range(document.repeats):
                    encoded.decode_into(target, metadata.token_ids, encoded.select_chunks(None))
                wait()
                decode_seconds.append(clock() - start)
        rates = [
            cache.num_values / min(encode_seconds) / 1e6,
            document.num_values / min(decode_seconds) / 1e6,
        ]
        rows.append(("documents", path, num_threads, *rates, None))
    return rows
