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
from cachegen.format import NO_HASH, Coder, Dtype, PlaneLayout
from cachegen.format.files import read_whole
from cachegen.format.headers import DocumentHeader, PlaneShape
from cachegen.methods import parse_chunk
from cachegen.methods.absmax.headers import AbsmaxChunkHeader, AbsmaxDocumentHeader
from cachegen.methods.transform.exact_values import unpack_exact_values
from cachegen.methods.transform.headers import TransformChunkHeader, TransformDocumentHeader

REPOSITORY = Path(__file__).resolve().parents[1]
FILE_FACTOR = 16
BASE_BYTES = 24 << 20
"""What docs/reliability.md promises: beyond its output, a reader takes at most so many times the file, and so much."""


def write_tables(path: Path, header: DocumentHeader, tables: bytes = b"") -> Path:
    path.write_bytes(header.pack() + tables)
    return path


COMMON = dict.fromkeys(("model_fingerprint", "token_hash", "rope_hash", "profile_hash"), NO_HASH)
DOCUMENT = COMMON | {
    "num_cache_tokens": 1 << 40,
    "dtype": Dtype.FLOAT16,
    "num_levels": 1,
    "prefill_block_size": 512,
    "cache_hash": NO_HASH,
}
CHUNK = COMMON | {"first_token": 0, "dtype": Dtype.FLOAT16, "level": 1, "refines": 0, "tables_hash": NO_HASH}
SMALLEST = PlaneLayout(1, 1, 4, 2, 32)


def smallest_tables(folder: Path) -> Path:
    """65,536 channels twice, each with the shortest table there is: 13 bits, of which a decoder makes 1 KB."""
    bits = "00000" + "00000" + "1" + "0" + "10"  # symbol 0 alone, class 3: 14 bits with its Rice code
    plane = np.packbits(np.frombuffer((bits * 65536).encode(), np.uint8) - ord("0")).tobytes()
    header = AbsmaxDocumentHeader(
        **DOCUMENT,
        method=1,
        coder=Coder.RANS,
        chunk_tokens=(1,),
        tables_crc=_native.crc32c(2 * plane),
        planes=(PlaneLayout(256, 256, 4, 0),) * 2,
        plane_table_bytes=(len(plane),) * 2,
    )
    return write_tables(folder / "tables.cgt", header, 2 * plane)


def packed_document(num_layers: int, num_chunks: int) -> AbsmaxDocumentHeader:
    return AbsmaxDocumentHeader(
        **DOCUMENT,
        method=1,
        coder=Coder.PACKED,
        chunk_tokens=(1,) * num_chunks,
        tables_crc=0,
        planes=(SMALLEST,) * 2 * num_layers,
        plane_table_bytes=(0,) * 2 * num_layers,
    )


def most_chunks(folder: Path) -> Path:
    return write_tables(folder / "tables.cgt", packed_document(1, 1 << 20))


def most_layers(folder: Path) -> Path:
    return write_tables(folder / "tables.cgt", packed_document(65535, 1))


def most_shapes(folder: Path) -> Path:
    """Method `transform`: 4 bytes a plane."""
    planes = (PlaneShape(1, 1),) * 2 * 65535
    header = TransformDocumentHeader(
        **DOCUMENT, method=3, coder=Coder.RANS, chunk_tokens=(1,), step_log=0, planes=planes
    )
    return write_tables(folder / "tables.cgt", header)


def most_streams(folder: Path) -> Path:
    """2^20 tokens in streams of 32, and nothing in the streams."""
    path, num_tokens = folder / "chunk_00000.L1.cgc", 1 << 20
    scales = bytes(2 * 2 * num_tokens)
    header = AbsmaxChunkHeader(
        **CHUNK,
        num_tokens=num_tokens,
        num_layers=1,
        method=1,
        coder=Coder.PACKED,
        scales_crc=_native.crc32c(scales),
        planes=(SMALLEST,) * 2,
        stream_index=bytes(12 * 2 * num_tokens // 32),
    )
    path.write_bytes(header.pack() + scales)
    return path


def most_exact_values(folder: Path) -> Path:
    """Half a million runs of one value."""
    path, num_values = folder / "chunk_00000.L1.cgc", 1 << 19
    runs = np.stack([np.arange(num_values), np.zeros(num_values), np.ones(num_values)], axis=1).astype("<u4")
    exact = struct.pack("<I", num_values) + runs.tobytes() + bytes(2 * num_values)
    padded = exact + bytes(-len(exact) % 16)
    header = TransformChunkHeader(
        **CHUNK,
        num_tokens=num_values,
        num_layers=1,
        method=3,
        coder=Coder.RANS,
        step_log=0,
        exact_bytes=len(exact),
        exact_crc=_native.crc32c(padded),
        tokens_per_stream=(1 << 24,),
        stream_index=bytes(12),
    )
    path.write_bytes(header.pack() + padded)
    return path


def open_folder(path: Path) -> None:
    """As run_decoding_disk.py begins: the tables file, then the model, which is another one."""
    from cachegen.kv_cache import from_planes
    from cachegen.pipeline.decode import EncodedFolder

    folder = EncodedFolder(path.parent, 1)
    import torch

    output = from_planes([torch.zeros(1, 2, 64, dtype=torch.float16)] * 12)
    folder.decode_into(output, torch.zeros(2, dtype=torch.int32), (1,))


def look_at_chunk(path: Path) -> None:
    """As run_publishing.py and a resumed run_encoding.py look at a chunk."""
    parse_chunk(read_whole(path))


def unpack_exact(path: Path) -> None:
    chunk = parse_chunk(read_whole(path))
    assert len(unpack_exact_values(chunk.behind[: chunk.header.exact_bytes], Dtype.FLOAT16, 1 << 24, 1)) == 1 << 19


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
    Case("tables file of method transform, 65,535 layers", most_shapes, open_folder, True),
    Case("chunk file, 65,536 empty streams", most_streams, look_at_chunk, False),
    Case("chunk file, 524,288 exact values", most_exact_values, unpack_exact, False),
)

_CHILD = """
import json, re, sys
from pathlib import Path
from cachegen.errors import CacheGenError
from tests import test_hostile_memory as cases
import cachegen.pipeline.decode  # what every reader has imported

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
