#!/usr/bin/env python3
"""Any bytes as a chunk file or a tables file: reading ends in values or in one of our errors, whatever the bytes.

    python tests/fuzz/fuzz_chunks.py [CORPUS_FOLDER] [-runs=N and other flags of libFuzzer]

Checksums and lengths are made right first where they can be, so that mutations reach the fields, the tables and the
coders behind them. Needs atheris. The golden files are the first inputs; the first byte of an input names one of the
golden documents, the second byte which kind of file follows.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import atheris
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

with atheris.instrument_imports(include=["cachegen.format", "cachegen.container", "cachegen.codec"]):
    from cachegen import codec, container
    from cachegen import format as layout
from cachegen.coder import cpu
from cachegen.errors import CacheGenError
from cachegen.kv_cache import from_planes

GOLDEN = ROOT / "tests" / "golden"
MAX_VALUES = 20_000
CRC_AT, SCALES_CRC_AT, FILE_BYTES_AT, TABLES_CRC_AT = -4, 44, 16, 48
NAMES = sorted(path.name for path in GOLDEN.iterdir() if (path / container.TABLES_NAME).exists())
DOCUMENTS = [codec.load_document((GOLDEN / name / container.TABLES_NAME).read_bytes()) for name in NAMES]


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    folder = Path(arguments[0]) if arguments else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_seeds(folder)
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


def write_seeds(folder: Path) -> None:
    """Write the golden files, and those that must be refused, as inputs."""
    for index, name in enumerate(NAMES):
        for path in sorted((GOLDEN / name).iterdir()):
            is_chunk = path.suffix == container.CHUNK_SUFFIX
            (folder / f"{name}_{path.name}").write_bytes(bytes([index, is_chunk]) + path.read_bytes())
    for path in sorted((GOLDEN / "invalid").glob("*.cg?")):
        is_chunk = path.suffix == container.CHUNK_SUFFIX
        (folder / f"invalid_{path.name}").write_bytes(bytes([NAMES.index("worked"), is_chunk]) + path.read_bytes())


def run(data: bytes) -> None:
    """Read one input."""
    if len(data) < 2:
        return
    document, is_chunk, content = DOCUMENTS[data[0] % len(DOCUMENTS)], data[1] % 2, bytearray(data[2:])
    try:
        if is_chunk:
            read_chunk(content, document)
        else:
            read_tables(content)
    except CacheGenError:
        pass


def put(content: bytearray, offset: int, record: str, value: int) -> None:
    if offset + struct.calcsize(record) <= len(content):
        struct.pack_into(record, content, offset, value)


def seal(content: bytearray, end: int) -> None:
    """Make the file's length and its header's checksum right, where there is such a header."""
    put(content, FILE_BYTES_AT, "<Q", len(content))
    if 28 <= end <= len(content):
        put(content, end + CRC_AT, "<I", cpu.crc32c(content[: end + CRC_AT]))


def header_bytes_of(content: bytearray) -> int:
    return struct.unpack_from("<I", content, 12)[0] if len(content) >= 16 else 0


def read_tables(content: bytearray) -> None:
    end = header_bytes_of(content)
    put(content, TABLES_CRC_AT, "<I", cpu.crc32c(content[end:]))
    seal(content, end)
    document = codec.load_document(bytes(content))
    if document.tables is not None and (document.tables.frequencies().sum(axis=1) != 4096).any():
        raise AssertionError("the frequencies of a table do not sum to 4096")


def read_chunk(content: bytearray, document: codec.Document) -> None:
    """Parse a chunk; decode it where its planes are those of the document, or as many channels."""
    end = header_bytes_of(content)
    seal(content, end)
    # The checksums of scales and streams stand in the header, and the header must be whole to say where those are.
    header = layout.unpack_chunk_header(content, cpu.crc32c)
    put(content, SCALES_CRC_AT, "<I", cpu.crc32c(content[end : header.payload_offset]))
    index_at, offset = 208 + 12 * len(header.planes), header.payload_offset
    for index, stream in enumerate(header.streams):
        num_bytes = layout.round_up(stream.num_bytes, layout.ALIGNMENT)
        put(content, index_at + 12 * index + 8, "<I", cpu.crc32c(content[offset : offset + num_bytes]))
        offset += num_bytes
    seal(content, end)
    chunk = container.parse_chunk(content)
    header = chunk.header
    tables = None if header.coder is layout.Coder.PACKED else document.tables
    num_channels = sum(plane.num_channels for plane in header.planes)
    if header.num_tokens * num_channels > MAX_VALUES:
        return
    if tables is not None and tables.num_tables != num_channels:
        return
    if tables is None and header.coder is not layout.Coder.PACKED:
        return
    dtype = next(dtype for dtype, number in cpu.DTYPES.items() if number == header.dtype)
    output = from_planes(
        [torch.zeros(header.num_tokens, p.num_kv_heads, p.head_dim, dtype=dtype) for p in header.planes]
    )
    cpu.decode(chunk.payload, header.streams, chunk.scales, header.planes, tables, output, coder=header.coder)


if __name__ == "__main__":
    main()
