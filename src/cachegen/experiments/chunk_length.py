"""Bytes over the length of chunks: what independent chunks cost."""

from __future__ import annotations

from cachegen.experiments.bench import Bench
from cachegen.experiments.encodings import choose_encodings, encode
from cachegen.experiments.outcome import Column, Figure, Outcome, Table, Value

NAME = "chunk-length"
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 9000)


def run(bench: Bench) -> Outcome:
    """Encode the first context in chunks of each length."""
    saved = bench.load_first_cache()
    num_tokens = saved.cache.num_tokens
    lengths = [*(length for length in LENGTHS if length < num_tokens), num_tokens]
    rows: list[dict[str, Value]] = []
    for encoding in choose_encodings(bench):
        sizes = {}
        for length in lengths:
            compressed = encode(bench, saved, encoding, length)
            sizes[length] = compressed.num_bytes
            bench.say(f"{encoding.name} in chunks of {length} tokens: {compressed.bits_per_value:.3f} bits per value")
        for length in lengths:
            rows.append(
                {
                    "method": encoding.name,
                    "chunk_tokens": length,
                    "chunks": -(-num_tokens // length),
                    "bits_per_value": 8 * sizes[length] / saved.cache.num_values,
                    "over_one_chunk": sizes[length] / sizes[num_tokens],
                }
            )
    columns = (
        Column("method", "method"),
        Column("chunk_tokens", "tokens per chunk"),
        Column("chunks", "chunks"),
        Column("bits_per_value", "bits per value", 4),
        Column("over_one_chunk", "over a single chunk", 4),
    )
    return Outcome(
        name=NAME,
        title="Length of chunks",
        paper="section 5.3",
        question="What do chunks cost that can be decoded one by one?",
        tables=(Table("lengths", "Bytes of the whole document", columns, tuple(rows)),),
        figures=(
            Figure("Over a single chunk", "lengths", "chunk_tokens", "over_one_chunk", "method", log_x=True),
            Figure("Bits per value", "lengths", "chunk_tokens", "bits_per_value", "method", log_x=True, log_y=True),
        ),
        notes=("All bytes of the document are counted: what its chunks share, and the headers of each.",),
    )
