"""What encoding, decoding, prefilling and the first token take here: the times that several experiments compute with.

Bytes are those of files in a folder, decoded as the scripts decode them.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cachegen.experiments.bench import Bench
from cachegen.experiments.encodings import choose_encodings, encode, open_encoding
from cachegen.format.files import chunk_name
from cachegen.kv_cache import from_planes
from cachegen.pipeline.model_cache import set_length
from cachegen.pipeline.prefill import prefill, run_model

CHUNK_TOKENS = 1500  # the paper's
ROUNDS = 3


@dataclass(frozen=True)
class EncodingTimes:
    """One method on one context.

    Attributes:
        chunk_bytes: of each chunk, all that is shared counted with the first.
        encode_seconds: once, into memory.
        decode_seconds: from files in the page cache, the median.
    """

    name: str
    chunk_bytes: tuple[int, ...]
    encode_seconds: float
    decode_seconds: float

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(self.chunk_bytes)

    def seconds_over(self, bits_per_second: float) -> float:
        """Return when the last chunk is decoded, if each is decoded while those behind it arrive."""
        arrived = done = 0.0
        share = self.decode_seconds / len(self.chunk_bytes)
        for size in self.chunk_bytes:
            arrived += 8 * size / bits_per_second
            done = max(arrived, done) + share
        return done


@dataclass(frozen=True)
class Times:
    """One context of one model on this machine.

    Attributes:
        raw_bytes: of the cache, in its own dtype.
        text_bytes: of the context.
        prefill_seconds: of the context, in blocks, the median.
        first_token_seconds: once a cache is there: one pass over the last token.
    """

    num_tokens: int
    num_values: int
    raw_bytes: int
    text_bytes: int
    prefill_seconds: float
    first_token_seconds: float
    encodings: tuple[EncodingTimes, ...]


@functools.cache
def measure_times(bench: Bench) -> Times:
    """Measure the first context, once; prefills and decodings alternate."""
    saved, loaded = bench.load_first_cache(), bench.load_for_prefill()
    token_ids = saved.metadata.token_ids
    output = from_planes([torch.empty_like(plane) for plane in saved.cache.planes])
    with tempfile.TemporaryDirectory(dir=bench.work) as place:
        folders, sizes, encode_seconds = {}, {}, {}
        encodings = choose_encodings(bench)
        for number, encoding in enumerate(encodings):
            folder = Path(place, str(number))
            begin = time.perf_counter()
            compressed = encode(bench, saved, encoding, CHUNK_TOKENS)
            encode_seconds[encoding.name] = time.perf_counter() - begin
            compressed.save(folder)
            header = compressed.encoding.document.header
            chunks = [(folder / chunk_name(index)).stat().st_size for index in range(header.num_chunks)]
            shared = compressed.num_bytes - sum(chunks)
            sizes[encoding.name] = (chunks[0] + shared, *chunks[1:])
            folders[encoding.name] = folder
        decoding: dict[str, list[float]] = {encoding.name: [] for encoding in encodings}
        prefilling: list[float] = []
        first: list[float] = []
        for _ in range(ROUNDS):
            for encoding in encodings:
                begin = time.perf_counter()
                opened = open_encoding(bench, folders[encoding.name])
                opened.decode_into(output, token_ids, opened.select_chunks(None))
                decoding[encoding.name].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            cache = prefill(loaded, token_ids, bench.block_size, capacity=len(token_ids) + 1)
            prefilling.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            run_model(loaded, cache, token_ids[-1:], 1)
            first.append(time.perf_counter() - begin)
            set_length(cache, len(token_ids))
            bench.say(f"prefill {prefilling[-1]:.2f} s")
    return Times(
        num_tokens=len(token_ids),
        num_values=saved.cache.num_values,
        raw_bytes=sum(plane.numel() * plane.element_size() for plane in saved.cache.planes),
        text_bytes=len(loaded.tokenizer.decode(token_ids).encode()),
        prefill_seconds=statistics.median(prefilling),
        first_token_seconds=statistics.median(first),
        encodings=tuple(
            EncodingTimes(
                encoding.name,
                sizes[encoding.name],
                encode_seconds[encoding.name],
                statistics.median(decoding[encoding.name]),
            )
            for encoding in encodings
        ),
    )
