"""What it costs to store a context's cache for a month, against computing it again at each use."""

from __future__ import annotations

from cachegen.experiments.bench import Bench
from cachegen.experiments.encodings import choose_encodings, encode
from cachegen.experiments.outcome import Column, Figure, Outcome, Table, Value
from cachegen.experiments.timings import CHUNK_TOKENS
from cachegen.simulation.scenario import load_machine

NAME = "storage-cost"
NUM_TOKENS = 9491


def run(bench: Bench) -> Outcome:
    """Encode the first context, and compute costs at the shape of Mistral-7B with the same bits per value."""
    machine, prices = load_machine(bench.config / "models.json", "mistral-7b", "a40"), bench.prices
    seconds = machine.speeds.prefill.seconds(0, NUM_TOKENS)
    computing = seconds / 3600 * prices.gpu_hour
    saved = bench.load_first_cache()
    bits_of = {"cache, fp16": 16.0}
    for encoding in choose_encodings(bench):
        bits_of[encoding.name] = encode(bench, saved, encoding, CHUNK_TOKENS).bits_per_value
        bench.say(f"{encoding.name}: {bits_of[encoding.name]:.3f} bits per value")
    rows: list[dict[str, Value]] = []
    for method, bits in bits_of.items():
        gigabytes = bits * machine.values_per_token * NUM_TOKENS / 8e9
        month = gigabytes * prices.storage
        rows.append(
            {"method": method, "bits": bits, "megabytes": 1000 * gigabytes, "month": month, "uses": month / computing}
        )
    return Outcome(
        name=NAME,
        title="Cost of storage",
        paper="appendix on the cost of storage",
        question="How often must a context be used in a month before storing its cache is cheaper than computing it?",
        tables=(
            Table(
                "costs",
                f"One context of {NUM_TOKENS:,} tokens of Mistral-7B",
                (
                    Column("method", "method"),
                    Column("bits", "bits per value", 3),
                    Column("megabytes", "MB", 3),
                    Column("month", "storage, USD per month", 2),
                    Column("uses", "cheaper from so many uses a month", 2),
                ),
                tuple(rows),
            ),
        ),
        figures=(Figure("Uses a month that pay for storage", "costs", "method", "uses", kind="bar", log_y=True),),
        notes=(
            f"Arithmetic: storage at {prices.storage:g} USD per GB and month, computing at {prices.gpu_hour:g} USD per "
            f"GPU hour, {seconds:.2f} s for the context, {computing:.2g} USD each time. Requests and traffic are not "
            "counted.",
            machine.source,
            "Bits per value are those of the model and the context that are measured here, not of a 7B model.",
        ),
        setting={"model": machine.name, "storage_price": prices.storage, "gpu_price": prices.gpu_hour},
    )
