"""The byte layout: fields where docs/format.md says, round trips, and refusal of everything out of range."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.coder.reference import StreamCoding, crc32c, encode_stream
from cachegen.errors import BitstreamError, UnsupportedVersionError
from cachegen.format import (
    NO_HASH,
    ChunkHeader,
    Coder,
    Dtype,
    Method,
    PlaneLayout,
    StreamEntry,
    TablesHeader,
    count_streams,
    pack_chunk_header,
    pack_tables_header,
    round_up,
    unpack_chunk_header,
    unpack_tables_header,
)
from tests.golden import make_golden

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "format.md").read_text("utf-8")

CHUNK = ChunkHeader(
    first_token=0x1122334455667788,
    num_tokens=70,
    method=Method.UNIFORM,
    coder=Coder.RANS,
    dtype=Dtype.FLOAT32,
    level=7,
    scales_crc=0xAABBCCDD,
    model_fingerprint=bytes(range(32)),
    token_hash=bytes(range(32, 64)),
    rope_hash=bytes(range(64, 96)),
    tables_hash=bytes(range(96, 128)),
    profile_hash=bytes(range(128, 160)),
    planes=(PlaneLayout(2, 40, 16, 0, 64), PlaneLayout(1, 9, 256, 3, 32)),
    stream_index=b"".join(
        length.to_bytes(4, "little") + words.to_bytes(4, "little") + crc.to_bytes(4, "little")
        for length, words, crc in ((140, 6, 1), (16, 0, 2), (200, 30, 3), (1, 0, 4), (48, 8, 0xFFFFFFFF))
    ),
)
TABLES = TablesHeader(
    num_cache_tokens=1 << 33,
    method=Method.CACHEGEN,
    coder=Coder.AC,
    dtype=Dtype.BFLOAT16,
    prefill_block_size=512,
    tables_crc=0x01020304,
    model_fingerprint=bytes(range(32)),
    token_hash=bytes(range(32, 64)),
    rope_hash=bytes(range(64, 96)),
    profile_hash=NO_HASH,
    cache_hash=bytes(range(160, 192)),
    planes=(PlaneLayout(2, 40, 16, 0), PlaneLayout(1, 9, 256, 3)),
    plane_table_bytes=(500, 77),
    chunk_tokens=(70, 1, 33),
)


def whole_chunk(header: ChunkHeader) -> bytes:
    packed = pack_chunk_header(header, crc32c)
    return packed + bytes(header.payload_offset - len(packed) + header.payload_bytes)


def whole_tables(header: TablesHeader) -> bytes:
    return pack_tables_header(header, crc32c) + bytes(header.tables_bytes)


# --- docs/format.md ---------------------------------------------------------------------------------------------------


def documented_fields(section: str) -> dict[str, tuple[int, int]]:
    """Offset and size of every fixed field of the section's first table."""
    text = DOCUMENT.split(f"\n{section}\n", 1)[1]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", text.split("\n## ", 1)[0].split("\n### ", 1)[0], re.MULTILINE)
    return {name: (int(offset), int(size)) for offset, size, name in rows if name != "reserved"}


def documented_bytes(name: str) -> bytes:
    """The bytes of an annotated listing, its offsets checked."""
    listing = re.search(rf"<!-- bytes of: {re.escape(name)} -->\n```\n(.*?)```", DOCUMENT, re.DOTALL)
    assert listing is not None
    content = b""
    for line in listing[1].splitlines():
        offset, text = re.match(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} )*[0-9a-f]{2})(?:  |$)", line).groups()
        assert int(offset, 16) == len(content)
        content += bytes.fromhex(text)
    return content


def field_value(header: ChunkHeader | TablesHeader, name: str, content: bytes) -> int | bytes:
    derived = {
        "magic": b"\x89KVC\r\n\x1a\n" if isinstance(header, ChunkHeader) else b"\x89KVT\r\n\x1a\n",
        "version": 1,
        "flags": 0,
        "header_bytes": header.header_bytes,
        "file_bytes": len(content),
        "num_layers": 1,
        "num_chunks": 3,
    }
    return derived[name] if name in derived else getattr(header, name)


@pytest.mark.parametrize(
    ("section", "header", "content"),
    [
        ("## What both files begin with", CHUNK, whole_chunk(CHUNK)),
        ("## Chunk file", CHUNK, whole_chunk(CHUNK)),
        ("## Tables file", TABLES, whole_tables(TABLES)),
    ],
    ids=["prefix", "chunk", "tables"],
)
def test_fields_lie_where_the_document_says(section: str, header: ChunkHeader | TablesHeader, content: bytes) -> None:
    fields = documented_fields(section)
    assert len(fields) >= 5
    for name, (offset, size) in fields.items():
        found = content[offset : offset + size]
        expected = field_value(header, name, content)
        assert (found if isinstance(expected, bytes) else int.from_bytes(found, "little")) == expected, name


def test_records_lie_where_the_document_says() -> None:
    plane, stream = documented_fields("### Plane record"), documented_fields("### Stream record")
    content, record = whole_chunk(CHUNK), CHUNK.planes[1]
    for name, (offset, size) in plane.items():
        if name != "table_bytes":
            at = 208 + 12 + offset
            assert int.from_bytes(content[at : at + size], "little") == getattr(record, name), name
    for name, (offset, size) in stream.items():
        at = 208 + 24 + 12 * 2 + offset
        assert int.from_bytes(content[at : at + size], "little") == getattr(CHUNK.streams[2], name), name


@pytest.mark.parametrize("name", ["tables.cgt", "chunk_00000.cgc"])
def test_worked_document_is_what_the_reference_writes(name: str) -> None:
    assert documented_bytes(f"worked/{name}") == make_golden.encode(make_golden.GOLDENS[0])[name]


def test_worked_stream_with_words_is_what_the_reference_writes() -> None:
    frequencies = [4094, 1, 1] + [0] * 29
    content, num_words = encode_stream([[2, 1], [1, 2]], StreamCoding([frequencies, frequencies]))
    assert (documented_bytes("stream with words"), 2) == (content, num_words)


# --- round trips ------------------------------------------------------------------------------------------------------


def test_chunk_header_round_trip() -> None:
    assert unpack_chunk_header(whole_chunk(CHUNK), crc32c) == CHUNK
    assert CHUNK.streams[3] == StreamEntry(1, 0, 4)


def test_tables_header_round_trip() -> None:
    assert unpack_tables_header(whole_tables(TABLES), crc32c) == TABLES


hashes = st.binary(min_size=32, max_size=32)


@st.composite
def plane_layouts(draw: st.DrawFn) -> PlaneLayout:
    num_bins = 2 * draw(st.integers(2, 128))
    fewest = next(bits for bits in range(9) if (num_bins - 2) >> bits < 32)
    return PlaneLayout(
        draw(st.integers(1, 256)),
        draw(st.integers(1, 256)),
        num_bins,
        draw(st.integers(fewest, 8)),
        32 * draw(st.integers(1, 4)),
    )


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(plane_layouts(), plane_layouts()), min_size=1, max_size=3),
    st.integers(1, 200),
    st.integers(0, 2**64 - 1),
    st.integers(0, 255),
    hashes,
    st.sampled_from((Method.CACHEGEN, Method.UNIFORM)),
    st.sampled_from(Dtype),
    st.integers(0, 2**32 - 1),
)
def test_any_chunk_header_round_trips(layers, num_tokens, first_token, level, some_hash, method, dtype, word) -> None:
    planes = tuple(plane for pair in layers for plane in pair)
    num_streams = count_streams(planes, num_tokens)
    index = b"".join(index_entry(i, word) for i in range(num_streams))
    header = dataclasses.replace(
        CHUNK,
        planes=planes,
        num_tokens=num_tokens,
        first_token=first_token,
        level=level,
        token_hash=some_hash,
        method=method,
        dtype=dtype,
        scales_crc=word,
        stream_index=index,
    )
    content = whole_chunk(header)
    assert header.header_bytes % 16 == header.payload_offset % 16 == len(content) % 16 == 0
    assert unpack_chunk_header(content, crc32c) == header


def index_entry(position: int, word: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in (position % 50, word, word ^ position))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(plane_layouts(), plane_layouts()), min_size=1, max_size=3),
    st.lists(st.integers(1, 1 << 24), min_size=1, max_size=20),
    st.integers(0, 1000),
    st.integers(1, 2**32 - 1),
    hashes,
)
def test_any_tables_header_round_trips(layers, chunk_tokens, spare, block_size, some_hash) -> None:
    planes = tuple(dataclasses.replace(plane, tokens_per_stream=0) for pair in layers for plane in pair)
    header = dataclasses.replace(
        TABLES,
        planes=planes,
        plane_table_bytes=tuple(range(1, 1 + len(planes))),
        chunk_tokens=tuple(chunk_tokens),
        num_cache_tokens=sum(chunk_tokens) + spare,
        prefill_block_size=block_size,
        rope_hash=some_hash,
    )
    assert unpack_tables_header(whole_tables(header), crc32c) == header


@pytest.mark.parametrize(("value", "multiple", "expected"), [(0, 16, 0), (1, 16, 16), (16, 16, 16), (17, 4, 20)])
def test_round_up(value: int, multiple: int, expected: int) -> None:
    assert round_up(value, multiple) == expected


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 2), (32, 2), (33, 3), (64, 3), (65, 5)])
def test_count_streams_counts_short_last_streams(num_tokens: int, expected: int) -> None:
    assert count_streams(CHUNK.planes, num_tokens) == expected


# --- refusals (tests/golden/invalid/ has one file for each field) -----------------------------------------------------


@pytest.mark.parametrize(
    ("unpack", "content"),
    [(unpack_chunk_header, whole_chunk(CHUNK)), (unpack_tables_header, whole_tables(TABLES))],
    ids=["chunk", "tables"],
)
class TestRefusals:
    def test_every_truncation_is_refused(self, unpack, content: bytes) -> None:
        for length in range(len(content)):
            with pytest.raises(BitstreamError):
                unpack(content[:length], crc32c)

    def test_every_flipped_bit_of_the_header_is_refused(self, unpack, content: bytes) -> None:
        header_bytes = int.from_bytes(content[12:16], "little")
        for bit in range(8 * header_bytes):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            with pytest.raises(BitstreamError):
                unpack(bytes(changed), crc32c)

    def test_trailing_bytes_are_refused(self, unpack, content: bytes) -> None:
        with pytest.raises(BitstreamError, match="not whole") as caught:
            unpack(content + b"\0", crc32c)
        assert caught.value.field == "file_bytes"

    @pytest.mark.parametrize("version", [0, 2, 3, 0x100, 0xFFFF])
    def test_other_versions_are_unsupported_and_say_which_are_read(self, unpack, content: bytes, version: int) -> None:
        changed = content[:8] + version.to_bytes(2, "little") + content[10:]
        with pytest.raises(
            UnsupportedVersionError, match=f"{version} is not supported, this release reads 1 and 2"
        ) as caught:
            unpack(changed, crc32c)
        assert (caught.value.offset, caught.value.field) == (8, "version")

    def test_memoryviews_are_read_like_bytes(self, unpack, content: bytes) -> None:
        assert unpack(memoryview(content), crc32c) == unpack(content, crc32c)
