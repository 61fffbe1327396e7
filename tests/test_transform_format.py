"""The byte layout of version 2: round trips, and refusal of everything out of range, by field and offset."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.coder.reference import crc32c
from cachegen.component_tables import HALF_STEPS, component_frequencies
from cachegen.errors import BitstreamError, UnsupportedVersionError
from cachegen.format import Coder, Dtype, Method, StreamEntry
from cachegen.transform_format import (
    MAX_STEP_LOG,
    ComponentChunkHeader,
    PlaneShape,
    TransformTablesHeader,
    pack_component_chunk_header,
    pack_transform_tables_header,
    unpack_component_chunk_header,
    unpack_transform_tables_header,
)

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "format.md").read_text("utf-8")

CHUNK = ComponentChunkHeader(
    first_token=0x1122334455667788,
    num_tokens=70,
    num_layers=3,
    coder=Coder.RANS,
    dtype=Dtype.FLOAT32,
    level=2,
    step_log=-77,
    model_fingerprint=bytes(range(32)),
    token_hash=bytes(range(32, 64)),
    rope_hash=bytes(range(64, 96)),
    tables_hash=bytes(range(96, 128)),
    profile_hash=bytes(range(128, 160)),
    tokens_per_stream=(64, 96),
    stream_index=struct.pack("<9I", 140, 6, 1, 16, 0, 2, 201, 30, 0xFFFFFFFF),
    refines=0xA1B2C3D4,
    max_error=1.5,
    mean_error=0.25,
    exact_bytes=21,
    exact_crc=0x01020304,
)
TABLES = TransformTablesHeader(
    num_cache_tokens=1 << 33,
    num_levels=3,
    dtype=Dtype.BFLOAT16,
    prefill_block_size=512,
    step_log=16,
    model_fingerprint=bytes(range(32)),
    token_hash=bytes(range(32, 64)),
    rope_hash=bytes(range(64, 96)),
    profile_hash=bytes(range(128, 160)),
    cache_hash=bytes(range(160, 192)),
    planes=(PlaneShape(2, 40), PlaneShape(1, 9)),
    chunk_tokens=(70, 1, 33),
)


def whole_chunk(header: ComponentChunkHeader) -> bytes:
    return pack_component_chunk_header(header, crc32c) + bytes(header.file_bytes - header.header_bytes)


def whole_tables(header: TransformTablesHeader) -> bytes:
    return pack_transform_tables_header(header, crc32c)


def put(content: bytes, offset: int, layout: str, *values: int) -> bytes:
    """Replace fields and make the header's checksum right again."""
    changed = bytearray(content)
    struct.pack_into("<" + layout, changed, offset, *values)
    end = int.from_bytes(content[12:16], "little") - 4
    struct.pack_into("<I", changed, end, crc32c(changed[:end]))
    return bytes(changed)


# --- docs/format.md ---------------------------------------------------------------------------------------------------


def documented_fields(section: str) -> dict[str, tuple[int, int]]:
    """Offset and size of every fixed field of the section's table."""
    text = DOCUMENT.split(f"\n{section}\n", 1)[1].split("\n### ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", text, re.MULTILINE)
    return {name: (int(offset), int(size)) for offset, size, name in rows if name != "reserved"}


@pytest.mark.parametrize(
    ("section", "header", "content"),
    [
        ("### Chunk file of version 2", CHUNK, whole_chunk(CHUNK)),
        ("### Tables file of version 2", TABLES, whole_tables(TABLES)),
    ],
    ids=["chunk", "tables"],
)
def test_fields_lie_where_the_document_says(section: str, header, content: bytes) -> None:
    fields = documented_fields(section)
    assert len(fields) >= 12
    derived = {"num_layers": content[36], "num_chunks": 3, "num_groups": 2}
    for name, (offset, size) in fields.items():
        found = content[offset : offset + size]
        expected = derived[name] if name in derived else getattr(header, name)
        if isinstance(expected, float):
            (found,) = struct.unpack("<f", found)
        elif not isinstance(expected, bytes):
            found = int.from_bytes(found, "little", signed=name == "step_log")
        assert found == expected, name
    assert content[8] == 2 and content[36] == (3 if header is CHUNK else 1)


def test_documented_constants_and_hash_are_those_of_the_tables() -> None:
    text = DOCUMENT.split("\n### Tables by scale index\n", 1)[1].split("\n### ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| ([\d, ]+) \|$", text, re.MULTILINE)
    assert [int(first) for first, _ in rows] == [1, 6, 11, 16, 21, 26]
    assert tuple(int(number) for _, numbers in rows for number in numbers.split(",")) == HALF_STEPS
    assert hashlib.sha256(component_frequencies().astype("<u2").tobytes()).hexdigest() in text


# --- round trips ------------------------------------------------------------------------------------------------------


def test_chunk_header_round_trip() -> None:
    content = whole_chunk(CHUNK)
    assert unpack_component_chunk_header(content, crc32c) == CHUNK
    assert CHUNK.streams_of_groups == [2, 1] and CHUNK.streams[1] == StreamEntry(16, 0, 2)
    assert CHUNK.header_bytes % 16 == 0 and len(content) == CHUNK.header_bytes + 144 + 16 + 208 + 32


def test_tables_header_round_trip() -> None:
    assert unpack_transform_tables_header(whole_tables(TABLES), crc32c) == TABLES


hashes = st.binary(min_size=32, max_size=32)
step_logs = st.integers(-MAX_STEP_LOG, MAX_STEP_LOG)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(1, 300),
    st.integers(0, 2**64 - 1),
    st.integers(1, 4),
    step_logs,
    hashes,
    st.sampled_from(Dtype),
    st.integers(0, 2**32 - 1),
)
def test_any_chunk_header_round_trips(rows, num_tokens, first_token, level, step_log, some_hash, dtype, word) -> None:
    lengths = tuple(32 * count for count in rows)
    num_streams = sum(-(-num_tokens // length) for length in lengths)
    header = dataclasses.replace(
        CHUNK,
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
        stream_index=b"".join(struct.pack("<3I", i % 50, word, word ^ i) for i in range(num_streams)),
    )
    assert unpack_component_chunk_header(whole_chunk(header), crc32c) == header


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(1, 256)] * 4), min_size=1, max_size=4),
    st.lists(st.integers(1, 1 << 24), min_size=1, max_size=20),
    st.integers(0, 1000),
    st.integers(1, 4),
    step_logs,
    hashes,
)
def test_any_tables_header_round_trips(layers, chunk_tokens, spare, num_levels, step_log, some_hash) -> None:
    header = dataclasses.replace(
        TABLES,
        planes=tuple(PlaneShape(*shape) for layer in layers for shape in (layer[:2], layer[2:])),
        chunk_tokens=tuple(chunk_tokens),
        num_cache_tokens=sum(chunk_tokens) + spare,
        num_levels=num_levels,
        step_log=step_log,
        rope_hash=some_hash,
    )
    assert unpack_transform_tables_header(whole_tables(header), crc32c) == header


# --- fields out of range ----------------------------------------------------------------------------------------------

ERROR, UNSUPPORTED = BitstreamError, UnsupportedVersionError


@pytest.mark.parametrize(
    ("offset", "layout", "value", "error", "at", "field"),
    [
        (10, "H", 1, UNSUPPORTED, 10, "flags"),
        (12, "I", 27, ERROR, 12, "header_bytes"),
        (16, "Q", 2**64 - 1, ERROR, 16, "file_bytes"),
        (32, "I", 0, ERROR, 32, "num_tokens"),
        (32, "I", 2**24 + 1, ERROR, 32, "num_tokens"),
        (32, "I", 200, ERROR, 12, "header_bytes"),
        (36, "H", 0, ERROR, 36, "num_layers"),
        (36, "H", 1, ERROR, 208, "num_groups"),
        (38, "B", Method.CACHEGEN, UNSUPPORTED, 38, "method"),
        (38, "B", Method.UNIFORM, UNSUPPORTED, 38, "method"),
        (38, "B", 9, UNSUPPORTED, 38, "method"),
        (39, "B", Coder.AC, UNSUPPORTED, 39, "coder"),
        (39, "B", Coder.PACKED, UNSUPPORTED, 39, "coder"),
        (39, "B", 0, UNSUPPORTED, 39, "coder"),
        (40, "B", 0, UNSUPPORTED, 40, "dtype"),
        (40, "B", 4, UNSUPPORTED, 40, "dtype"),
        (41, "B", 0, ERROR, 41, "level"),
        (41, "B", 5, ERROR, 41, "level"),
        (42, "H", 1, UNSUPPORTED, 42, "reserved"),
        (44, "i", MAX_STEP_LOG + 1, ERROR, 44, "step_log"),
        (44, "i", -MAX_STEP_LOG - 1, ERROR, 44, "step_log"),
        (208, "H", 0, ERROR, 208, "num_groups"),
        (208, "H", 4, ERROR, 208, "num_groups"),
        (208, "H", 3, ERROR, 244, "tokens_per_stream"),
        (210, "H", 1, UNSUPPORTED, 42, "reserved"),
        (41, "B", 1, ERROR, 212, "refines"),
        (216, "f", math.nan, ERROR, 216, "max_error"),
        (216, "f", math.inf, ERROR, 216, "max_error"),
        (216, "f", 0.125, ERROR, 216, "max_error"),
        (220, "f", -1.0, ERROR, 216, "max_error"),
        (220, "f", math.nan, ERROR, 216, "max_error"),
        (224, "Q", 33, ERROR, 16, "file_bytes"),
        (224, "Q", 2**64 - 1, ERROR, 16, "file_bytes"),
        (236, "I", 0, ERROR, 236, "tokens_per_stream"),
        (240, "I", 33, ERROR, 240, "tokens_per_stream"),
        (240, "I", 2**24 + 32, ERROR, 240, "tokens_per_stream"),
        (240, "I", 32, ERROR, 12, "header_bytes"),
        (244, "I", 150, ERROR, 16, "file_bytes"),
        (280, "B", 1, ERROR, 280, "padding"),
    ],
)
def test_chunk_fields_out_of_range_are_refused(offset, layout, value, error, at, field) -> None:
    content = put(whole_chunk(CHUNK), offset, layout, value)
    with pytest.raises(error) as caught:
        unpack_component_chunk_header(content, crc32c)
    assert type(caught.value) is error
    assert (caught.value.offset, caught.value.field) == (at, field)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "error", "at", "field"),
    [
        (10, "H", 1 << 15, UNSUPPORTED, 10, "flags"),
        (16, "Q", 1000, ERROR, 16, "file_bytes"),
        (24, "Q", 103, ERROR, 220, "chunk_tokens"),
        (32, "I", 0, ERROR, 32, "num_chunks"),
        (32, "I", 2**20 + 1, ERROR, 32, "num_chunks"),
        (32, "I", 4, ERROR, 12, "header_bytes"),
        (36, "H", 0, ERROR, 36, "num_layers"),
        (36, "H", 2, ERROR, 12, "header_bytes"),
        (36, "H", 65535, ERROR, 12, "header_bytes"),
        (38, "B", Method.CACHEGEN, UNSUPPORTED, 38, "method"),
        (38, "B", 0, UNSUPPORTED, 38, "method"),
        (39, "B", 0, ERROR, 39, "num_levels"),
        (39, "B", 5, ERROR, 39, "num_levels"),
        (40, "B", 7, UNSUPPORTED, 40, "dtype"),
        (41, "B", 1, UNSUPPORTED, 41, "reserved"),
        (42, "H", 1, UNSUPPORTED, 41, "reserved"),
        (44, "I", 0, ERROR, 44, "prefill_block_size"),
        (48, "i", MAX_STEP_LOG + 1, ERROR, 48, "step_log"),
        (48, "i", -(2**31), ERROR, 48, "step_log"),
        (212, "H", 0, ERROR, 212, "shape"),
        (214, "H", 0, ERROR, 212, "shape"),
        (216, "HH", (257, 256), ERROR, 216, "shape"),
        (220, "I", 0, ERROR, 220, "chunk_tokens"),
        (228, "I", 2**24 + 1, ERROR, 220, "chunk_tokens"),
    ],
)
def test_tables_fields_out_of_range_are_refused(offset, layout, value, error, at, field) -> None:
    values = value if isinstance(value, tuple) else (value,)
    content = put(whole_tables(TABLES), offset, layout, *values)
    with pytest.raises(error) as caught:
        unpack_transform_tables_header(content, crc32c)
    assert type(caught.value) is error
    assert (caught.value.offset, caught.value.field) == (at, field)


@pytest.mark.parametrize(
    ("unpack", "content"),
    [
        (unpack_component_chunk_header, whole_chunk(CHUNK)),
        (unpack_transform_tables_header, whole_tables(TABLES)),
    ],
    ids=["chunk", "tables"],
)
class TestRefusals:
    def test_every_truncation_is_refused(self, unpack, content: bytes) -> None:
        for length in range(len(content)):
            with pytest.raises(BitstreamError):
                unpack(content[:length], crc32c)

    def test_every_flipped_bit_of_the_header_is_refused(self, unpack, content: bytes) -> None:
        for bit in range(8 * int.from_bytes(content[12:16], "little")):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            with pytest.raises(BitstreamError):
                unpack(bytes(changed), crc32c)

    def test_trailing_bytes_are_refused(self, unpack, content: bytes) -> None:
        with pytest.raises(BitstreamError, match="not whole") as caught:
            unpack(content + b"\0", crc32c)
        assert caught.value.field == "file_bytes"

    @pytest.mark.parametrize("version", [0, 1, 3, 0xFFFF])
    def test_other_versions_are_unsupported_and_say_which_are_read(self, unpack, content: bytes, version: int) -> None:
        changed = content[:8] + version.to_bytes(2, "little") + content[10:]
        with pytest.raises(
            UnsupportedVersionError, match=f"{version} is not supported, this release reads 1 and 2"
        ) as caught:
            unpack(changed, crc32c)
        assert (caught.value.offset, caught.value.field) == (8, "version")

    def test_the_other_kind_of_file_is_refused(self, unpack, content: bytes) -> None:
        other = whole_tables(TABLES) if unpack is unpack_component_chunk_header else whole_chunk(CHUNK)
        with pytest.raises(BitstreamError) as caught:
            unpack(other, crc32c)
        assert caught.value.field == "magic"

    def test_memoryviews_are_read_like_bytes(self, unpack, content: bytes) -> None:
        assert unpack(memoryview(content), crc32c) == unpack(content, crc32c)
