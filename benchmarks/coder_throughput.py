"""Measure the coders: bytes first, then times. `make bench` runs this; it prints one table and writes results.json.

Every round times each entry of a case once, so that all share whatever else the machine does, which only ever takes
time: the fastest round of each counts. One thread is timed in processor time, the peers' too, several by the clock. Our
decoding goes to the cache's dtype in token order and our encoding comes from there; the peers go to and from symbols.
Peers are installed into benchmarks/.peers from PyPI, versions pinned.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from components import ComponentCase, iterate_component_cases
from cuda_throughput import describe_gpu, run_on_gpu
from documents import Document, iterate_documents, run_pipeline
from goals import print_goals
from peers import VERSIONS, Peer, save_inputs

from cachegen import __version__
from cachegen.coder import cpu

HERE = Path(__file__).resolve().parent
PEERS = ("torchac", "torchac-O3", "constriction", "zstd-1")


@dataclass
class Row:
    """One line of the table; rates are millions of values per second, in the fastest round."""

    case: str
    coder: str
    path: str | None
    threads: int
    encode_msym_s: float | None
    decode_msym_s: float | None
    bits_over_table_ideal: float | None
    decode_over_torchac_o3: float | None = None
    encode_over_torchac_o3: float | None = None
    decode_over_constriction: float | None = None
    encode_over_constriction: float | None = None
    decode_over_zstd1: float | None = None
    decode_over_portable: float | None = None
    encode_over_portable: float | None = None


@dataclass
class Entry:
    """What a case times: calls that return the seconds they took."""

    coder: str
    path: str | None
    threads: int
    overhead: float | None
    calls: dict[str, Callable[[], float]]


def seconds_of(call: Callable[[], object], threads: int) -> float:
    """Seconds per call once it is warm: after one that does not count, the mean of at least ten milliseconds.

    One thread's are those that the processor gave it, which other programs take nothing of; those of several threads
    are the clock's.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    call()
    num_calls, start = 0, clock()
    while True:
        call()
        num_calls += 1
        elapsed = clock() - start
        if elapsed > 0.01:
            return elapsed / num_calls


def our_entries(document: Document, paths: tuple[str, ...], thread_counts: tuple[int, ...]) -> list[Entry]:
    """Check that all paths give the same bytes and values, then offer each as an entry."""
    expected_payload, expected_values = None, None
    entries = []
    for path in paths:
        payload, index = document.encode(path, 1)
        document.decode(payload, index, path, 1)
        values = document.digest_output()
        if expected_payload is None:
            expected_payload, expected_values = bytes(payload), values
        if bytes(payload) != expected_payload or values != expected_values:
            raise SystemExit(f"{document.name}: path {path} gives other bytes or values than {paths[0]}")
        for threads in thread_counts:
            calls = {
                "encode": lambda path=path, threads=threads: seconds_of(
                    lambda: document.encode(path, threads), threads
                ),
                "decode": lambda path=path, threads=threads, payload=payload, index=index: seconds_of(
                    lambda: document.decode(payload, index, path, threads), threads
                ),
                "measure": lambda path=path, threads=threads: seconds_of(
                    lambda: document.measure(path, threads), threads
                ),
            }
            overhead = document.bits_over_ideal(document.file_bytes(payload, index))
            entries.append(Entry("rans" if document.tables else "packed", path, threads, overhead, calls))
    return entries


def component_entries(case: ComponentCase, paths: tuple[str, ...]) -> list[Entry]:
    """Check that all paths give the same bytes and components, then offer each as an entry."""
    payload, streams = case.check(paths)
    return [
        Entry(
            "components",
            path,
            1,
            None,
            {name: lambda call=call: seconds_of(call, 1) for name, call in case.calls(payload, streams, path).items()},
        )
        for path in paths
    ]


def time_entries(entries: list[Entry], rounds: int) -> list[dict[str, float]]:
    """Run all entries round by round; returns each one's fewest seconds per operation."""
    seconds: list[dict[str, list[float]]] = [{name: [] for name in entry.calls} for entry in entries]
    for _ in range(rounds):
        for entry, lists in zip(entries, seconds, strict=True):
            for name, call in entry.calls.items():
                lists[name].append(call())
    return [{name: min(values) for name, values in lists.items()} for lists in seconds]


def run_case(document: Document | ComponentCase, entries: list[Entry], rounds: int) -> list[Row]:
    times = time_entries(entries, rounds)

    def rate(seconds: float | None) -> float | None:
        return document.num_values / seconds / 1e6 if seconds else None

    of_coder = {entry.coder: found for entry, found in zip(entries, times, strict=True)}

    def ratio(found: dict[str, float], operation: str, peer: str) -> float | None:
        return of_coder[peer][operation] / found[operation] if peer in of_coder and operation in found else None

    of_portable = {
        (entry.coder, entry.threads): found
        for entry, found in zip(entries, times, strict=True)
        if entry.path == "portable"
    }

    def over_portable(entry: Entry, found: dict[str, float], operation: str) -> float | None:
        base = of_portable.get((entry.coder, entry.threads))
        return base[operation] / found[operation] if base else None

    rows = []
    for entry, found in zip(entries, times, strict=True):
        rows.append(
            Row(
                case=document.name,
                coder=entry.coder,
                path=entry.path,
                threads=entry.threads,
                encode_msym_s=rate(found.get("encode")),
                decode_msym_s=rate(found.get("decode")),
                bits_over_table_ideal=entry.overhead,
                decode_over_torchac_o3=ratio(found, "decode", "torchac-O3"),
                encode_over_torchac_o3=ratio(found, "encode", "torchac-O3"),
                decode_over_constriction=ratio(found, "decode", "constriction"),
                encode_over_constriction=ratio(found, "encode", "constriction"),
                decode_over_zstd1=ratio(found, "decode", "zstd-1"),
                decode_over_portable=over_portable(entry, found, "decode"),
                encode_over_portable=over_portable(entry, found, "encode"),
            )
        )
        if "measure" in found:
            rows.append(Row(document.name, "measure", entry.path, entry.threads, rate(found["measure"]), None, None))
    return rows


def run_with_peers(document: Document, entries: list[Entry], rounds: int, processor: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        inputs = save_inputs(Path(folder), *document.symbols_and_frequencies())
        peers = [Peer(name, HERE / ".peers", *inputs, processor) for name in PEERS]
        try:
            for peer in peers:
                calls = {
                    "encode": lambda peer=peer: peer.seconds("encode"),
                    "decode": lambda peer=peer: peer.seconds("decode"),
                }
                entries.append(Entry(peer.name, None, 1, document.bits_over_ideal(peer.num_bytes), calls))
            return run_case(document, entries, rounds)
        finally:
            for peer in peers:
                peer.close()


def print_table(rows: list[Row]) -> None:
    names = ["case", "coder", "path", "threads", "enc Msym/s", "dec Msym/s", "bits over", "dec/tac", "enc/tac"]
    names += ["dec/con", "enc/con", "dec/zstd", "dec/port", "enc/port"]
    table = [names]
    for row in rows:
        cells = list(asdict(row).values())
        shown = [str(cell) if cell is not None else "-" for cell in cells[:4]]
        shown += ["-" if cell is None else f"{cell:.0f}" for cell in cells[4:6]]
        shown += ["-" if cells[6] is None else f"{100 * cells[6]:.2f} %"]
        shown += ["-" if cell is None else f"{cell:.1f}x" for cell in cells[7:]]
        table.append(shown)
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    for line in table:
        print(
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )


def describe_device() -> str:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        fields = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines}
        model = " ".join(fields.get(key, "") for key in ("model name", "cpu family", "model"))
    processors = f"{model}, {len(os.sched_getaffinity(0))} processors, paths {', '.join(cpu.supported_paths())}"
    return "; ".join(filter(None, [processors, describe_gpu()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the small cases; the large ones take a third")
    parser.add_argument("--without_peers", action="store_true", help="install and run no other coder")
    parser.add_argument("--only_components", action="store_true", help="measure the coder of components alone")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results.json", help="where the results go (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    processors = sorted(os.sched_getaffinity(0))
    paths = cpu.supported_paths()
    rows = []
    for document in () if args.only_components else iterate_documents(HERE.parent):
        # One thread stays on one processor, with the peers; then all threads on all.
        os.sched_setaffinity(0, {processors[-1]})
        is_small = document.num_values <= 1 << 21
        rounds = args.rounds if is_small else max(3, args.rounds // 3)
        entries = our_entries(document, paths if is_small else paths[::-1][:1], (1,))
        if document.has_peers and not args.without_peers:
            rows += run_with_peers(document, entries, rounds, processors[-1])
        else:
            rows += run_case(document, entries, rounds)
        if len(processors) > 1:
            os.sched_setaffinity(0, processors)
            rows += run_case(document, our_entries(document, paths[-1:], (len(processors),)), rounds)
        if document.metadata is not None or document.is_large:
            rows += [Row(document.name, *numbers) for numbers in run_pipeline(document, len(processors), rounds)]
        if document.is_large:
            rows += [Row(document.name, *numbers) for numbers in run_on_gpu(document, args.rounds, len(processors))]
    os.sched_setaffinity(0, {processors[-1]})
    for case in iterate_component_cases():
        rows += run_case(case, component_entries(case, paths), args.rounds)
    os.sched_setaffinity(0, processors)
    versions = {"cachegen": __version__, "python": platform.python_version(), **VERSIONS, "torch": torch.__version__}
    versions["numpy"] = np.__version__
    print(describe_device())
    print_table(rows)
    print_goals([asdict(row) for row in rows])
    record = {"device": describe_device(), "versions": versions, "rows": [asdict(row) for row in rows]}
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
