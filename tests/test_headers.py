"""Headers of all methods: fields where docs/format.md says, round trips, and refusal of everything out of range."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.coder.component_tables import HALF_STEPS, component_frequencies
from cachegen.errors import BitstreamError, UnsupportedVersionError
from cachegen.format import NO_HASH, Coder, Dtype, PlaneLayout, StreamEntry, round_up
from cachegen.format.headers import ChunkHeader, DocumentHeader, PlaneShape
from cachegen.methods.absmax.headers import AbsmaxChunkHeader, AbsmaxDocumentHeader, PlaneRecord, count_streams
from cachegen.methods.lossless.headers import LosslessDocumentHeader
from cachegen.methods.transform.headers import (
    MAX_STEP_LOG,
    TransformChunkHeader,
    TransformDocumentHeader,
)
from tests.golden import make_golden
from tests.reference.planes import StreamCoding, crc32c, encode_stream

TABLES, CHUNK = "## Tables file, of every method", "## Chunk file, of every method"
ABSMAX, TRANSFORM = "## Methods `cachegen` and `uniform`", "## Method `transform`"
DOCS = Path(__file__).resolve().parents[1] / "docs"
DOCUMENT, LOSSLESS_DOCUMENT = ((DOCS / name).read_text("utf-8") for name in ("format.md", "lossless.md"))

COMMON_CHUNK: dict[str, Any] = {
    "first_token": 0x1122334455667788,
    "num_tokens": 70,
    "coder": Coder.RANS,
    "dtype": Dtype.FLOAT32,
    "model_fingerprint": bytes(range(32)),
    "token_hash": bytes(range(32, 64)),
    "rope_hash": bytes(range(64, 96)),
    "tables_hash": bytes(range(96, 128)),
    "profile_hash": bytes(range(128, 160)),
}
COMMON_DOCUMENT: dict[str, Any] = {
    "num_cache_tokens": 1 << 33,
    "dtype": Dtype.BFLOAT16,
    "prefill_block_size": 512,
    "model_fingerprint": bytes(range(32)),
    "token_hash": bytes(range(32, 64)),
    "rope_hash": bytes(range(64, 96)),
    "cache_hash": bytes(range(160, 192)),
    "chunk_tokens": (70, 1, 33),
}
ABSMAX_CHUNK = AbsmaxChunkHeader(
    **COMMON_CHUNK,
    num_layers=1,
    method=2,
    level=1,
    refines=0,
    scales_crc=0xAABBCCDD,
    planes=(PlaneLayout(2, 40, 16, 0, 64), PlaneLayout(1, 9, 256, 3, 32)),
    stream_index=struct.pack("<15I", 140, 6, 1, 16, 0, 2, 200, 30, 3, 1, 0, 4, 48, 8, 0xFFFFFFFF),
)
ABSMAX_TABLES = AbsmaxDocumentHeader(
    **COMMON_DOCUMENT,
    method=1,
    coder=Coder.AC,
    num_levels=1,
    profile_hash=NO_HASH,
    tables_crc=0x01020304,
    planes=(PlaneLayout(2, 40, 16, 0), PlaneLayout(1, 9, 256, 3)),
    plane_table_bytes=(500, 77),
)
TRANSFORM_CHUNK = TransformChunkHeader(
    **COMMON_CHUNK,
    num_layers=3,
    method=3,
    level=2,
    refines=0xA1B2C3D4,
    step_log=-77,
    tokens_per_stream=(64, 96),
    stream_index=struct.pack("<9I", 140, 6, 1, 16, 0, 2, 201, 30, 0xFFFFFFFF),
    max_error=1.5,
    mean_error=0.25,
    exact_bytes=21,
    exact_crc=0x01020304,
)
TRANSFORM_TABLES = TransformDocumentHeader(
    **COMMON_DOCUMENT,
    method=3,
    coder=Coder.RANS,
    num_levels=3,
    profile_hash=bytes(range(128, 160)),
    step_log=16,
    planes=(PlaneShape(2, 40), PlaneShape(1, 9)),
)
HEADERS = {
    "absmax chunk": ABSMAX_CHUNK,
    "absmax tables": ABSMAX_TABLES,
    "transform chunk": TRANSFORM_CHUNK,
    "transform tables": TRANSFORM_TABLES,
}


def whole(header: ChunkHeader | DocumentHeader) -> bytes:
    """The header's file, zeros in the place of its sections."""
    packed = header.pack()
    file_bytes = header.file_bytes if isinstance(header, ChunkHeader) else len(packed) + header.tables_bytes
    return packed.ljust(file_bytes, b"\0")


def put(content: bytes, offset: int, layout: str, *values: float) -> bytes:
    """Replace fields and make the header's checksum right again."""
    changed = bytearray(content)
    struct.pack_into("<" + layout, changed, offset, *values)
    end = int.from_bytes(content[12:16], "little") - 4
    struct.pack_into("<I", changed, end, crc32c(changed[:end]))
    return bytes(changed)


# --- docs/format.md ---------------------------------------------------------------------------------------------------


def documented_rows(section: str, table: int = 0, document: str = DOCUMENT) -> list[tuple[int, int, str, str]]:
    """The fields of a section's table: offset, bytes, name, meaning."""
    text = re.split(r"\n##+ ", document.split(f"\n{section}\n", 1)[1], maxsplit=1)[0]
    body = text.split("| offset | size | name | meaning |\n|---|---|---|---|\n")[1 + table].split("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \| (.*?) ?\|$", body, re.MULTILINE)
    return [(int(offset), int(size), name, meaning) for offset, size, name, meaning in rows]


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


@pytest.mark.parametrize(
    ("record", "documented"),
    [
        (
            AbsmaxDocumentHeader,
            documented_rows(TABLES) + documented_rows(ABSMAX),
        ),
        (
            AbsmaxChunkHeader,
            documented_rows(CHUNK) + documented_rows(ABSMAX, 1),
        ),
        (
            TransformDocumentHeader,
            documented_rows(TABLES) + documented_rows(TRANSFORM),
        ),
        (
            TransformChunkHeader,
            documented_rows(CHUNK) + documented_rows(TRANSFORM, 2),
        ),
        (
            LosslessDocumentHeader,
            documented_rows(TABLES) + documented_rows("## Files", document=LOSSLESS_DOCUMENT),
        ),
        (PlaneRecord, documented_rows("### Plane record")),
        (PlaneShape, documented_rows(TRANSFORM, 1)),
    ],
    ids=[
        "absmax tables",
        "absmax chunk",
        "transform tables",
        "transform chunk",
        "lossless tables",
        "plane record",
        "plane shape",
    ],
)
def test_the_document_describes_the_declared_fields(record, documented) -> None:
    assert record.describe() == documented


def field_value(header: ChunkHeader | DocumentHeader, name: str, content: bytes) -> object:
    derived: dict[str, object] = {
        "magic": b"\x89KVC\r\n\x1a\n" if isinstance(header, ChunkHeader) else b"\x89KVT\r\n\x1a\n",
        "version": 1,
        "flags": 0,
        "header_bytes": header.header_bytes,
        "file_bytes": len(content),
        "reserved": 0,
    }
    return derived[name] if name in derived else getattr(header, name)


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_fields_lie_where_the_document_says(header: ChunkHeader | DocumentHeader) -> None:
    content = whole(header)
    fields = [row[:3] for row in [*documented_rows("## What both files begin with"), *header.describe()]]
    assert [offset for offset, _, _ in fields] == [sum(row[1] for row in fields[:i]) for i in range(len(fields))]
    for offset, size, name in fields:
        found, expected = content[offset : offset + size], field_value(header, name, content)
        if isinstance(expected, float):
            assert struct.unpack("<f", found) == (expected,), name
        elif isinstance(expected, int):
            assert int.from_bytes(found, "little", signed=name == "step_log") == expected, name
        else:
            assert found == expected, name


def test_records_lie_where_the_document_says() -> None:
    content, record = whole(ABSMAX_CHUNK), ABSMAX_CHUNK.planes[1]
    for offset, size, name, _ in documented_rows("### Plane record"):
        expected = {"reserved": 0, "last": record.tokens_per_stream}.get(name)
        at = 212 + 12 + offset
        wanted = getattr(record, name) if expected is None else expected
        assert int.from_bytes(content[at : at + size], "little") == wanted, name
    for offset, size, name, _ in documented_rows("### Stream record"):
        at = 212 + 24 + 12 * 2 + offset
        assert int.from_bytes(content[at : at + size], "little") == getattr(ABSMAX_CHUNK.streams[2], name), name


@pytest.mark.parametrize("name", ["tables.cgt", "chunk_00000.L1.cgc"])
def test_worked_document_is_what_the_reference_writes(name: str) -> None:
    assert documented_bytes(f"worked/{name}") == make_golden.encode(make_golden.GOLDENS[0])[name]


def test_worked_stream_with_words_is_what_the_reference_writes() -> None:
    frequencies = [4094, 1, 1] + [0] * 29
    content, num_words = encode_stream([[2, 1], [1, 2]], StreamCoding([frequencies, frequencies]))
    assert (documented_bytes("stream with words"), 2) == (content, num_words)


def test_documented_constants_and_hash_are_those_of_the_tables() -> None:
    text = DOCUMENT.split("\n### Tables by scale index\n", 1)[1].split("\n### ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| ([\d, ]+) \|$", text, re.MULTILINE)
    assert [int(first) for first, _ in rows] == [1, 6, 11, 16, 21, 26]
    assert tuple(int(number) for _, numbers in rows for number in numbers.split(",")) == HALF_STEPS
    assert hashlib.sha256(component_frequencies().astype("<u2").tobytes()).hexdigest() in text


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_header_round_trip(header: ChunkHeader | DocumentHeader) -> None:
    content = whole(header)
    assert header.unpack(content) == header
    assert header.unpack(memoryview(content)) == header


def test_the_lengths_of_a_chunk_of_components() -> None:
    header = TRANSFORM_CHUNK
    assert header.streams_of_groups == [2, 1] and header.streams[1] == StreamEntry(16, 0, 2)
    assert header.header_bytes % 16 == 0
    assert header.file_bytes == header.header_bytes + 144 + 16 + 208 + 32


hashes = st.binary(min_size=32, max_size=32)
step_logs = st.integers(-MAX_STEP_LOG, MAX_STEP_LOG)
chunk_plans = st.lists(st.integers(1, 1 << 24), min_size=1, max_size=20)
words = st.integers(0, 2**32 - 1)


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


def stream_index(num_streams: int, word: int) -> bytes:
    return b"".join(struct.pack("<3I", i % 50, word, word ^ i) for i in range(num_streams))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(plane_layouts(), plane_layouts()), min_size=1, max_size=3),
    st.integers(1, 200),
    st.integers(0, 2**64 - 1),
    hashes,
    st.sampled_from((1, 2)),
    st.sampled_from(Dtype),
    words,
)
def test_any_absmax_chunk_header_round_trips(layers, num_tokens, first_token, some_hash, method, dtype, word) -> None:
    planes = tuple(plane for pair in layers for plane in pair)
    header = dataclasses.replace(
        ABSMAX_CHUNK,
        planes=planes,
        num_tokens=num_tokens,
        first_token=first_token,
        token_hash=some_hash,
        method=method,
        dtype=dtype,
        scales_crc=word,
        stream_index=stream_index(count_streams(planes, num_tokens), word),
    )
    content = whole(header)
    assert header.header_bytes % 16 == header.payload_offset % 16 == len(content) % 16 == 0
    assert AbsmaxChunkHeader.unpack(content) == header


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(plane_layouts(), plane_layouts()), min_size=1, max_size=3),
    chunk_plans,
    st.integers(0, 1000),
    st.integers(1, 2**32 - 1),
    hashes,
)
def test_any_absmax_document_header_round_trips(layers, chunk_tokens, spare, block_size, some_hash) -> None:
    planes = tuple(dataclasses.replace(plane, tokens_per_stream=0) for pair in layers for plane in pair)
    header = dataclasses.replace(
        ABSMAX_TABLES,
        planes=planes,
        plane_table_bytes=tuple(range(1, 1 + len(planes))),
        chunk_tokens=tuple(chunk_tokens),
        num_cache_tokens=sum(chunk_tokens) + spare,
        prefill_block_size=block_size,
        rope_hash=some_hash,
    )
    assert AbsmaxDocumentHeader.unpack(whole(header)) == header


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(1, 300),
    st.integers(0, 2**64 - 1),
    st.integers(1, 4),
    step_logs,
    hashes,
    st.sampled_from(Dtype),
    words,
)
def test_any_transform_chunk_header_round_trips(
    rows, num_tokens, first_token, level, step_log, some_hash, dtype, word
) -> None:
    lengths = tuple(32 * count for count in rows)
    header = dataclasses.replace(
        TRANSFORM_CHUNK,
        num_layers=len(rows) + level,
        num_tokens=num_tokens,
        first_token=first_token,
        level=level,
        step_log=step_log,
        profile_hash=some_hash,
        dtype=dtype,
        refines=word if level > 1 else 0,
        exact_bytes=word % 100,
        exact_crc=word,
        tokens_per_stream=lengths,
        stream_index=stream_index(sum(-(-num_tokens // length) for length in lengths), word),
    )
    assert TransformChunkHeader.unpack(whole(header)) == header


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(1, 256)] * 4), min_size=1, max_size=4),
    chunk_plans,
    st.integers(0, 1000),
    st.integers(1, 4),
    step_logs,
    hashes,
)
def test_any_transform_document_header_round_trips(
    layers, chunk_tokens, spare, num_levels, step_log, some_hash
) -> None:
    header = dataclasses.replace(
        TRANSFORM_TABLES,
        planes=tuple(PlaneShape(*shape) for layer in layers for shape in (layer[:2], layer[2:])),
        chunk_tokens=tuple(chunk_tokens),
        num_cache_tokens=sum(chunk_tokens) + spare,
        num_levels=num_levels,
        step_log=step_log,
        rope_hash=some_hash,
    )
    assert TransformDocumentHeader.unpack(whole(header)) == header


@pytest.mark.parametrize(("value", "multiple", "expected"), [(0, 16, 0), (1, 16, 16), (16, 16, 16), (17, 4, 20)])
def test_round_up(value: int, multiple: int, expected: int) -> None:
    assert round_up(value, multiple) == expected


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 2), (32, 2), (33, 3), (64, 3), (65, 5)])
def test_count_streams_counts_short_last_streams(num_tokens: int, expected: int) -> None:
    assert count_streams(ABSMAX_CHUNK.planes, num_tokens) == expected


# --- fields out of range ----------------------------------------------------------------------------------------------

ERROR, UNSUPPORTED = BitstreamError, UnsupportedVersionError

COMMON_CHUNK_FIELDS = [
    (10, "H", 1, UNSUPPORTED, 10, "flags"),
    (12, "I", 27, ERROR, 12, "header_bytes"),
    (16, "Q", 2**64 - 1, ERROR, 16, "file_bytes"),
    (32, "I", 0, ERROR, 32, "num_tokens"),
    (32, "I", 2**24 + 1, ERROR, 32, "num_tokens"),
    (32, "I", 200, ERROR, 12, "header_bytes"),
    (36, "H", 0, ERROR, 36, "num_layers"),
    (39, "B", 0, UNSUPPORTED, 39, "coder"),
    (39, "B", 4, UNSUPPORTED, 39, "coder"),
    (40, "B", 0, UNSUPPORTED, 40, "dtype"),
    (40, "B", 4, UNSUPPORTED, 40, "dtype"),
    (41, "B", 0, ERROR, 41, "level"),
    (41, "B", 5, ERROR, 41, "level"),
    (42, "H", 2, UNSUPPORTED, 42, "stored_tokens"),
]
COMMON_TABLES_FIELDS = [
    (10, "H", 1 << 15, UNSUPPORTED, 10, "flags"),
    (16, "Q", 1000, ERROR, 16, "file_bytes"),
    (32, "I", 0, ERROR, 32, "num_chunks"),
    (32, "I", 2**20 + 1, ERROR, 32, "num_chunks"),
    (32, "I", 4, ERROR, 12, "header_bytes"),
    (36, "H", 0, ERROR, 36, "num_layers"),
    (36, "H", 2, ERROR, 12, "header_bytes"),
    (36, "H", 65535, ERROR, 12, "header_bytes"),
    (40, "B", 7, UNSUPPORTED, 40, "dtype"),
    (41, "B", 0, ERROR, 41, "num_levels"),
    (41, "B", 5, ERROR, 41, "num_levels"),
    (42, "H", 2, UNSUPPORTED, 42, "stored_tokens"),
    (44, "I", 0, ERROR, 44, "prefill_block_size"),
]


@pytest.mark.parametrize(
    ("header", "offset", "layout", "value", "error", "at", "field"),
    [
        *((header, *case) for header in (ABSMAX_CHUNK, TRANSFORM_CHUNK) for case in COMMON_CHUNK_FIELDS),
        *((header, *case) for header in (ABSMAX_TABLES, TRANSFORM_TABLES) for case in COMMON_TABLES_FIELDS),
        (ABSMAX_CHUNK, 44, "I", 1, ERROR, 44, "refines"),
        (ABSMAX_CHUNK, 36, "H", 65535, ERROR, 236, "shape"),
        (ABSMAX_CHUNK, 39, "B", Coder.PACKED, ERROR, 218, "low_bits"),
        (ABSMAX_TABLES, 39, "B", Coder.PACKED, ERROR, 39, "coder"),
        (ABSMAX_TABLES, 41, "B", 2, ERROR, 41, "num_levels"),
        (ABSMAX_TABLES, 24, "Q", 103, ERROR, 244, "chunk_tokens"),
        (ABSMAX_TABLES, 244, "I", 0, ERROR, 244, "chunk_tokens"),
        (TRANSFORM_CHUNK, 36, "H", 1, ERROR, 212, "num_groups"),
        (TRANSFORM_CHUNK, 39, "B", Coder.AC, UNSUPPORTED, 39, "coder"),
        (TRANSFORM_CHUNK, 39, "B", Coder.PACKED, UNSUPPORTED, 39, "coder"),
        (TRANSFORM_CHUNK, 41, "B", 1, ERROR, 44, "refines"),
        (TRANSFORM_CHUNK, 208, "i", MAX_STEP_LOG + 1, ERROR, 208, "step_log"),
        (TRANSFORM_CHUNK, 208, "i", -MAX_STEP_LOG - 1, ERROR, 208, "step_log"),
        (TRANSFORM_CHUNK, 212, "H", 0, ERROR, 212, "num_groups"),
        (TRANSFORM_CHUNK, 212, "H", 4, ERROR, 212, "num_groups"),
        (TRANSFORM_CHUNK, 212, "H", 3, ERROR, 244, "tokens_per_stream"),
        (TRANSFORM_CHUNK, 214, "H", 1, UNSUPPORTED, 214, "reserved"),
        (TRANSFORM_CHUNK, 216, "f", math.nan, ERROR, 216, "max_error"),
        (TRANSFORM_CHUNK, 216, "f", math.inf, ERROR, 216, "max_error"),
        (TRANSFORM_CHUNK, 216, "f", 0.125, ERROR, 220, "mean_error"),
        (TRANSFORM_CHUNK, 220, "f", -1.0, ERROR, 220, "mean_error"),
        (TRANSFORM_CHUNK, 220, "f", math.nan, ERROR, 220, "mean_error"),
        (TRANSFORM_CHUNK, 224, "Q", 33, ERROR, 16, "file_bytes"),
        (TRANSFORM_CHUNK, 224, "Q", 2**64 - 1, ERROR, 16, "file_bytes"),
        (TRANSFORM_CHUNK, 236, "I", 0, ERROR, 236, "tokens_per_stream"),
        (TRANSFORM_CHUNK, 240, "I", 33, ERROR, 240, "tokens_per_stream"),
        (TRANSFORM_CHUNK, 240, "I", 2**24 + 32, ERROR, 240, "tokens_per_stream"),
        (TRANSFORM_CHUNK, 240, "I", 32, ERROR, 12, "header_bytes"),
        (TRANSFORM_CHUNK, 244, "I", 150, ERROR, 16, "file_bytes"),
        (TRANSFORM_CHUNK, 280, "B", 1, ERROR, 280, "padding"),
        (TRANSFORM_TABLES, 39, "B", Coder.AC, UNSUPPORTED, 39, "coder"),
        (TRANSFORM_TABLES, 24, "Q", 103, ERROR, 228, "chunk_tokens"),
        (TRANSFORM_TABLES, 216, "i", MAX_STEP_LOG + 1, ERROR, 216, "step_log"),
        (TRANSFORM_TABLES, 216, "i", -(2**31), ERROR, 216, "step_log"),
        (TRANSFORM_TABLES, 220, "H", 0, ERROR, 220, "shape"),
        (TRANSFORM_TABLES, 222, "H", 0, ERROR, 220, "shape"),
        (TRANSFORM_TABLES, 224, "HH", (257, 256), ERROR, 224, "shape"),
        (TRANSFORM_TABLES, 228, "I", 0, ERROR, 228, "chunk_tokens"),
        (TRANSFORM_TABLES, 236, "I", 2**24 + 1, ERROR, 228, "chunk_tokens"),
    ],
)
def test_fields_out_of_range_are_refused(header, offset, layout, value, error, at, field) -> None:
    content = put(whole(header), offset, layout, *(value if isinstance(value, tuple) else (value,)))
    with pytest.raises(error) as caught:
        header.unpack(content)
    assert type(caught.value) is error
    assert (caught.value.offset, caught.value.field) == (at, field)


# --- refusals (tests/golden/invalid/ has one file for each field) -----------------------------------------------------


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
class TestRefusals:
    def test_every_truncation_is_refused(self, header) -> None:
        content = whole(header)
        for length in range(len(content)):
            with pytest.raises(BitstreamError):
                header.unpack(content[:length])

    def test_every_flipped_bit_of_the_header_is_refused(self, header) -> None:
        content = whole(header)
        for bit in range(8 * header.header_bytes):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            with pytest.raises(BitstreamError):
                header.unpack(bytes(changed))

    def test_trailing_bytes_are_refused(self, header) -> None:
        with pytest.raises(BitstreamError, match="not whole") as caught:
            header.unpack(whole(header) + b"\0")
        assert caught.value.field == "file_bytes"

    @pytest.mark.parametrize("version", [0, 2, 3, 0x100, 0xFFFF])
    def test_other_versions_are_unsupported_and_say_which_is_read(self, header, version: int) -> None:
        content = whole(header)
        changed = content[:8] + version.to_bytes(2, "little") + content[10:]
        with pytest.raises(
            UnsupportedVersionError, match=f"{version} is not supported, this release reads 1"
        ) as caught:
            header.unpack(changed)
        assert (caught.value.offset, caught.value.field) == (8, "version")

    def test_the_other_kind_of_file_is_refused(self, header) -> None:
        other = ABSMAX_TABLES if isinstance(header, ChunkHeader) else ABSMAX_CHUNK
        with pytest.raises(BitstreamError) as caught:
            header.unpack(whole(other))
        assert caught.value.field == "magic"
