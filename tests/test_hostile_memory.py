"""No file makes its reader take memory out of proportion: each hostile one is read in a process of its own.

python -m tests.test_hostile_memory        (in the repository's root: prints the table of docs/reliability.md)
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cachegen import _native
from cachegen.format import CHUNK_MAGIC, NO_HASH, TABLES_MAGIC
from cachegen.framing import seal_header

REPOSITORY = Path(__file__).resolve().parents[1]
FILE_FACTOR = 16
BASE_BYTES = 24 << 20
"""What docs/reliability.md promises: beyond its output, a reader takes at most so many times the file, and so much."""


def write_tables(path: Path, fields: bytes, body: bytes, tables: bytes = b"", version: int = 1) -> None:
    """Write a tables file whose checksum is right."""
    header_bytes = 24 + len(fields) + len(body) + 4
    header = seal_header(TABLES_MAGIC, header_bytes, header_bytes + len(tables), fields + body, _native.crc32c, version)
    path.write_bytes(header + tables)


def tables_fields(num_chunks: int, num_layers: int, tables: bytes = b"", *, coder: int = 1, num_cache_tokens=1 << 40):
    layout = "<QIHBBBBHII32s32s32s32s32s"
    hashes = (NO_HASH,) * 5
    return struct.pack(
        layout, num_cache_tokens, num_chunks, num_layers, 1, coder, 1, 0, 0, 512, _native.crc32c(tables), *hashes
    )


def smallest_tables(folder: Path) -> Path:
    """65,536 channels twice, each with the shortest table there is: 13 bits, of which a decoder makes 1 KB."""
    path = folder / "tables.cgt"
    bits = "00000" + "00000" + "1" + "0" + "10"  # symbol 0 alone, class 3: 14 bits with its Rice code
    plane = np.packbits(np.frombuffer((bits * 65536).encode(), np.uint8) - ord("0")).tobytes()
    record = struct.pack("<HHHBBI", 256, 256, 4, 0, 0, len(plane))
    write_tables(path, tables_fields(1, 1, 2 * plane), 2 * record + struct.pack("<I", 1), 2 * plane)
    return path


def most_chunks(folder: Path) -> Path:
    path = folder / "tables.cgt"
    record = struct.pack("<HHHBBI", 1, 1, 4, 2, 0, 0)
    write_tables(path, tables_fields(1 << 20, 1, coder=3), 2 * record + struct.pack("<I", 1) * (1 << 20))
    return path


def most_layers(folder: Path) -> Path:
    path = folder / "tables.cgt"
    record = struct.pack("<HHHBBI", 1, 1, 4, 2, 0, 0)
    write_tables(path, tables_fields(1, 65535, coder=3), 2 * 65535 * record + struct.pack("<I", 1))
    return path


def most_shapes(folder: Path) -> Path:
    """Version 2: 4 bytes a plane."""
    path = folder / "tables.cgt"
    fields = struct.pack("<QIHBBBBHIi32s32s32s32s32s", 9, 1, 65535, 3, 1, 1, 0, 0, 512, 0, *(NO_HASH,) * 5)
    write_tables(path, fields, struct.pack("<HH", 1, 1) * 2 * 65535 + struct.pack("<I", 1), version=2)
    return path


def most_streams(folder: Path) -> Path:
    """2^20 tokens in streams of 32, and nothing in the streams."""
    path = folder / "chunk_00000.cgc"
    num_tokens = 1 << 20
    scales = bytes(2 * 2 * num_tokens)
    fields = struct.pack(
        "<QIHBBBBHI32s32s32s32s32s", 0, num_tokens, 1, 1, 3, 1, 0, 0, _native.crc32c(scales), *(NO_HASH,) * 5
    )
    records = 2 * struct.pack("<HHHBBI", 1, 1, 4, 2, 0, 32)
    index = bytes(12 * 2 * num_tokens // 32)
    header_bytes = -(-(24 + len(fields) + len(records) + len(index) + 4) // 16) * 16
    header = seal_header(
        CHUNK_MAGIC, header_bytes, header_bytes + len(scales), fields + records + index, _native.crc32c, 1
    )
    path.write_bytes(header + scales)
    return path


def most_exact_values(folder: Path) -> Path:
    """Version 2: half a million runs of one value."""
    path = folder / "chunk_00000.L1.cgc"
    num_values = 1 << 19
    runs = np.stack([np.arange(num_values), np.zeros(num_values), np.ones(num_values)], axis=1).astype("<u4")
    exact = struct.pack("<I", num_values) + runs.tobytes() + bytes(2 * num_values)
    padded = exact + bytes(-len(exact) % 16)
    fields = struct.pack("<QIHBBBBHi32s32s32s32s32s", 0, num_values, 1, 3, 1, 1, 1, 0, 0, *(NO_HASH,) * 5)
    fields += struct.pack("<HHIffQII", 1, 0, 0, 0.0, 0.0, len(exact), _native.crc32c(padded), 1 << 24)
    index = bytes(12)
    header_bytes = -(-(24 + len(fields) + len(index) + 4) // 16) * 16
    header = seal_header(CHUNK_MAGIC, header_bytes, header_bytes + len(padded), fields + index, _native.crc32c, 2)
    path.write_bytes(header + padded)
    return path


def open_folder(path: Path) -> None:
    """As run_decoding_disk.py begins: the tables file, then the model, which is another one."""
    from cachegen.kv_cache import from_planes
    from cachegen.pipeline.decode import EncodedFolder

    folder = EncodedFolder(path.parent, 1)
    import torch

    output = from_planes([torch.zeros(1, 2, 64, dtype=torch.float16)] * 12)
    folder.decode_into(output, torch.zeros(2, dtype=torch.int32), (1,))


def parse_chunk(path: Path) -> None:
    """As run_publishing.py and a resumed run_encoding.py look at a chunk."""
    from cachegen import container

    container.parse_chunk(container.read_whole(path))


def unpack_exact(path: Path) -> None:
    from cachegen import container
    from cachegen.exact_values import unpack_exact_values
    from cachegen.format import Dtype

    chunk = container.parse_chunk(container.read_whole(path))
    assert len(unpack_exact_values(chunk.exact, Dtype.FLOAT16, 1 << 24, 1)) == 1 << 19


@dataclass(frozen=True)
class Case:
    """A hostile file, and who reads it.

    Attributes:
        is_refused: the reader ends in one of our errors; otherwise it accepts the file.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], None]
    is_refused: bool


CASES = (
    Case("tables file, 131,072 shortest tables", smallest_tables, open_folder, True),
    Case("tables file, 2^20 chunks", most_chunks, open_folder, True),
    Case("tables file, 65,535 layers", most_layers, open_folder, True),
    Case("tables file of version 2, 65,535 layers", most_shapes, open_folder, True),
    Case("chunk file, 65,536 empty streams", most_streams, parse_chunk, False),
    Case("chunk file, 524,288 exact values", most_exact_values, unpack_exact, False),
)

_CHILD = """
import json, re, sys
from pathlib import Path
from cachegen.errors import CacheGenError
from tests import test_hostile_memory as cases
import cachegen.pipeline.decode, cachegen.exact_values  # what every reader has imported

def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

case, path = cases.CASES[int(sys.argv[1])], Path(sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
before = memory("VmRSS")
try:
    case.read(path)
    error = None
except CacheGenError as refusal:
    error = str(refusal)
print(json.dumps([memory("VmHWM") - before, error]))
"""


def measure(number: int, folder: Path) -> tuple[int, int, str | None]:
    """Return a file's bytes, the bytes that its reader took at the most, and how it refused the file."""
    path = CASES[number].make(folder)
    found = subprocess.run(
        [sys.executable, "-c", _CHILD, str(number), str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, error = json.loads(found.stdout)
    return path.stat().st_size, taken, error


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_memory_stays_in_proportion_to_the_file(number: int, tmp_path: Path) -> None:
    num_bytes, taken, error = measure(number, tmp_path)
    assert (error is not None) == CASES[number].is_refused
    assert taken <= FILE_FACTOR * num_bytes + BASE_BYTES


def print_table() -> None:
    print("| file | bytes | memory taken | times | outcome |\n|---|---:|---:|---:|---|")
    for number, case in enumerate(CASES):
        with tempfile.TemporaryDirectory() as folder:
            num_bytes, taken, error = measure(number, Path(folder))
        outcome = "read" if error is None else "refused"
        print(f"| {case.name} | {num_bytes:,} | {taken:,} | {taken / num_bytes:.1f} | {outcome} |")


if __name__ == "__main__":
    print_table()
