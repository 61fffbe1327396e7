"""Chunk and tables files: joined and taken apart, every change of any byte noticed."""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import torch

from cachegen.coder.cpu import DTYPES
from cachegen.errors import BitstreamError, InputError
from cachegen.format.files import chunk_name, read_whole
from cachegen.methods import parse_chunk, parse_document
from cachegen.methods.absmax.codec import build_chunk, read_scales
from tests.fixtures.absmax import decode_tiny, encode_all, start_encoder, tiny_document
from tests.fixtures.caches import are_equal, make_shaped_cache
from tests.golden.make_golden import FOLDER
from tests.reference.planes import crc32c

_, TABLES_FILE, CHUNK_FILE = tiny_document()
FILES = {
    "chunk": (parse_chunk, CHUNK_FILE),
    "tables": (parse_document, TABLES_FILE),
    "packed chunk": (parse_chunk, (FOLDER / "uniform8_packed" / "chunk_00000.L1.cgc").read_bytes()),
}

both_files = pytest.mark.parametrize("name", ["chunk", "tables"])


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_refused(name: str) -> None:
    parse, content = FILES[name]
    for length in range(len(content)):
        with pytest.raises(BitstreamError):
            parse(content[:length])


@both_files
def test_every_flipped_bit_is_refused(name: str) -> None:
    parse, content = FILES[name]
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            parse(bytes(changed))


@both_files
def test_every_other_value_of_a_byte_is_refused(name: str) -> None:
    parse, content = FILES[name]
    generator = random.Random(0)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] = (changed[position] + generator.randrange(1, 256)) % 256
        with pytest.raises(BitstreamError):
            parse(bytes(changed))


@both_files
def test_trailing_bytes_are_refused(name: str) -> None:
    parse, content = FILES[name]
    for tail in (b"\0", b"\0" * 16, content):
        with pytest.raises(BitstreamError, match="the file is not whole"):
            parse(content + tail)


def test_chunk_round_trip() -> None:
    chunk = parse_chunk(CHUNK_FILE)
    parts = build_chunk(chunk.header, read_scales(chunk), chunk.header.streams, [chunk.payload])
    assert b"".join(parts) == CHUNK_FILE
    assert read_scales(chunk).dtype == torch.bfloat16 and read_scales(chunk).shape == (2, 34)
    assert chunk.payload.nbytes == chunk.header.payload_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, None])
def test_a_scale_that_is_not_finite_is_refused(dtype: torch.dtype, value: float | None) -> None:
    chunk = parse_chunk(CHUNK_FILE)
    header = dataclasses.replace(chunk.header, dtype=DTYPES[dtype])
    scales = torch.full_like(read_scales(chunk), torch.finfo(dtype).max, dtype=dtype)
    scales[0, 1], scales[1, 2] = torch.finfo(dtype).tiny / 2, -0.0
    if value is not None:
        scales[1, 33] = value
    content = b"".join(build_chunk(header, scales, chunk.header.streams, [chunk.payload]))
    if value is None:
        assert torch.equal(read_scales(parse_chunk(content)), scales)
        return
    with pytest.raises(BitstreamError, match="a scale is NaN or infinity"):
        parse_chunk(content)


def test_tables_round_trip() -> None:
    header = parse_document(TABLES_FILE)
    assert header.pack() + TABLES_FILE[header.header_bytes :] == TABLES_FILE


def test_build_chunk_fills_in_index_and_checksums() -> None:
    chunk = parse_chunk(CHUNK_FILE)
    assert chunk.header.scales_crc == crc32c(chunk.before) and len(chunk.before) % 16 == 0
    offset = 0
    for stream in chunk.header.streams:
        end = offset + stream.num_bytes + -stream.num_bytes % 16
        assert stream.crc == crc32c(chunk.payload[offset:end])
        offset = end
    assert offset == chunk.payload.nbytes


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_corrupt_stream_is_named_with_its_offset_on_any_number_of_threads(num_threads: int) -> None:
    cache = make_shaped_cache([(1, 4), (1, 4)], 40, torch.float16)
    encoder = start_encoder(cache, (16, 16), (40,))
    content = bytearray(encode_all(encoder)[1])
    header = parse_chunk(bytes(content)).header
    offset = header.payload_offset + header.streams[0].num_bytes + -header.streams[0].num_bytes % 16
    content[offset] ^= 1
    with pytest.raises(BitstreamError) as caught:
        parse_chunk(content, num_threads)
    assert (caught.value.field, caught.value.offset) == ("stream 1", offset)


def test_parsed_chunk_decodes_from_any_buffer() -> None:
    expected = decode_tiny(CHUNK_FILE, TABLES_FILE)
    for content in (bytearray(CHUNK_FILE), memoryview(CHUNK_FILE)):
        assert are_equal(decode_tiny(content, TABLES_FILE), expected)


@pytest.mark.parametrize(
    ("index", "name"), [(0, "chunk_00000.L1.cgc"), (12, "chunk_00012.L1.cgc"), (123456, "chunk_123456.L1.cgc")]
)
def test_chunk_name(index: int, name: str) -> None:
    assert chunk_name(index) == name


def test_read_whole_reads_bytes(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"\0\r\n")
    assert read_whole(tmp_path / "file") == b"\0\r\n"


def test_read_whole_names_a_missing_file(tmp_path) -> None:
    with pytest.raises(InputError, match=r"tables\.cgt: no such file"):
        read_whole(tmp_path / "tables.cgt")


def test_read_whole_says_why_a_file_cannot_be_read(tmp_path) -> None:
    with pytest.raises(InputError, match="cannot be read: is a folder, where a file is needed"):
        read_whole(tmp_path)


@pytest.mark.parametrize("content", [CHUNK_FILE, TABLES_FILE])
def test_read_whole_reads_no_more_than_the_header_announces(tmp_path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert read_whole(path) == content
    with open(path, "r+b") as stream:
        stream.truncate(3 << 30)
    found = read_whole(path)
    assert len(found) == len(content) + 1 and found.startswith(content)
    parse = parse_chunk if content is CHUNK_FILE else parse_document
    with pytest.raises(BitstreamError, match="the file is not whole"):
        parse(found)


def test_read_whole_reads_only_the_beginning_of_what_is_none_of_ours(tmp_path) -> None:
    with open(tmp_path / "file", "wb") as stream:
        stream.truncate(3 << 30)
    found = read_whole(tmp_path / "file")
    assert len(found) < 100
    with pytest.raises(BitstreamError, match="not a chunk file"):
        parse_chunk(found)


def test_read_whole_waits_at_no_pipe(tmp_path) -> None:
    os.mkfifo(tmp_path / "chunk_00000.L1.cgc")
    with pytest.raises(InputError, match=r"chunk_00000\.L1\.cgc: cannot be read: is a pipe, where a file is needed"):
        read_whole(tmp_path / "chunk_00000.L1.cgc")
