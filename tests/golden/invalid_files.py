"""The files that must be refused, made from the golden documents; make_golden.py writes them.

Each is wrong in one way, and right in all others: where a checksum is not the point, it is made to match.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cachegen.format import ALIGNMENT, StreamEntry, round_up
from cachegen.format.files import CHUNK_SUFFIX, TABLES_NAME, chunk_name
from cachegen.methods import parse_chunk, parse_document
from tests.reference.planes import crc32c


@dataclass(frozen=True)
class Invalid:
    """A file that must be refused.

    Attributes:
        base: the golden document it is made from, and whose other files it is read with.
        error: the class of the error.
        field: the field that the error names.
    """

    name: str
    base: str
    content: bytes
    error: str
    field: str


_CHUNK_PLANES_AT, _TABLES_PLANES_AT, _PLANE_BYTES = 212, 220, 12


def put(content: bytes, offset: int, layout: str, *values: int) -> bytes:
    """Replace fields, little-endian."""
    changed = bytearray(content)
    struct.pack_into("<" + layout, changed, offset, *values)
    return bytes(changed)


def seal(content: bytes) -> bytes:
    """Make the header's checksum right again."""
    end = struct.unpack_from("<I", content, 12)[0] - 4
    return put(content, end, "I", crc32c(content[:end]))


def reseal(content: bytes, offset: int, layout: str, *values: int) -> bytes:
    """Replace fields of the header and make its checksum right again."""
    return seal(put(content, offset, layout, *values))


def flip(content: bytes, offset: int) -> bytes:
    return put(content, offset, "B", content[offset] ^ 1)


def replace_stream(content: bytes, index: int, stream: bytes, num_words: int) -> bytes:
    """Replace a chunk's stream, and make index, lengths and checksums right again."""
    header = parse_chunk(content).header
    offset = header.payload_offset
    payload, entries = b"", []
    for i, entry in enumerate(header.streams):
        old = content[offset : offset + entry.num_bytes]
        new = stream if i == index else old
        padded = new.ljust(round_up(len(new), ALIGNMENT), b"\0")
        entries.append(StreamEntry(len(new), num_words if i == index else entry.num_words, crc32c(padded)))
        payload += padded
        offset += round_up(entry.num_bytes, ALIGNMENT)
    index_at = _CHUNK_PLANES_AT + len(header.planes) * _PLANE_BYTES
    head = bytearray(content[: header.payload_offset])
    for i, entry in enumerate(entries):
        struct.pack_into("<III", head, index_at + 12 * i, *entry)
    return seal(put(bytes(head) + payload, 16, "Q", len(head) + len(payload)))


def replace_tables(content: bytes, tables: bytes) -> bytes:
    """Replace all tables of the first plane, and make lengths and checksums right again."""
    header = parse_document(content)
    old = content[header.header_bytes :]
    tables += old[header.plane_table_bytes[0] :]
    num_bytes = len(tables) - header.plane_table_bytes[1]
    head = put(content[: header.header_bytes], _TABLES_PLANES_AT + 8, "I", num_bytes)
    head = put(head, 16, "Q", len(head) + len(tables))
    return seal(put(head, 216, "I", crc32c(tables))) + tables


def pack_bits(bits: str) -> bytes:
    """Bytes from a string of 0, 1 and spaces, the most significant bit first, filled up with zeros."""
    bits = bits.replace(" ", "")
    return int(bits.ljust(round_up(len(bits), 8), "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def list_invalid_prefixes(kind: str, good: bytes, other: bytes) -> Iterator[tuple[str, bytes, str, str]]:
    """What any file can have wrong before its fields: (name, content, error, field)."""
    error, unsupported = "BitstreamError", "UnsupportedVersionError"
    header_bytes = struct.unpack_from("<I", good, 12)[0]
    yield f"{kind}_empty", b"", error, "header"
    yield f"{kind}_truncated_in_magic", good[:5], error, "header"
    yield f"{kind}_truncated_in_prefix", good[:20], error, "header"
    yield f"{kind}_truncated_in_header", good[:100], error, "header_bytes"
    yield f"{kind}_without_last_byte", good[:-1], error, "file_bytes"
    yield f"{kind}_with_trailing_byte", good + b"\0", error, "file_bytes"
    yield f"{kind}_of_zeros", bytes(len(good)), error, "magic"
    yield f"{kind}_sent_as_text", good.replace(b"\r\n", b"\n"), error, "magic"
    yield f"{kind}_of_the_other_kind", other, error, "magic"
    yield f"{kind}_magic_flipped", flip(good, 1), error, "magic"
    yield f"{kind}_version_0", reseal(good, 8, "H", 0), unsupported, "version"
    yield f"{kind}_version_2", reseal(good, 8, "H", 2), unsupported, "version"
    yield f"{kind}_flags_set", reseal(good, 10, "H", 1 << 15), unsupported, "flags"
    yield f"{kind}_header_bytes_0", put(good, 12, "I", 0), error, "header_bytes"
    yield f"{kind}_header_bytes_27", put(good, 12, "I", 27), error, "header_bytes"
    yield f"{kind}_header_bytes_beyond_the_file", put(good, 12, "I", len(good) + 1), error, "header_bytes"
    yield f"{kind}_header_bytes_4_less", reseal(good, 12, "I", header_bytes - 4), error, "header_bytes"
    yield f"{kind}_file_bytes_1_less", reseal(good, 16, "Q", len(good) - 1), error, "file_bytes"
    yield f"{kind}_file_bytes_huge", reseal(good, 16, "Q", 2**64 - 1), error, "file_bytes"
    yield f"{kind}_field_flipped", flip(good, 33), error, "header_crc"
    yield f"{kind}_header_crc_flipped", flip(good, header_bytes - 1), error, "header_crc"
    for name, offset in (("method", 38), ("dtype", 40)):
        for value in (0, 9):
            yield f"{kind}_{name}_{value}", reseal(good, offset, "B", value), unsupported, name
    yield f"{kind}_stored_tokens_2", reseal(good, 42, "H", 2), unsupported, "stored_tokens"
    yield f"{kind}_without_layers", reseal(good, 36, "H", 0), error, "num_layers"
    # A chunk's third record would be its stream index, whose lengths make no plane.
    field = "num_bins" if kind == "chunk" else "header_bytes"
    yield f"{kind}_layers_beyond_the_header", reseal(good, 36, "H", 65535), error, field
    planes_at = _CHUNK_PLANES_AT if kind == "chunk" else _TABLES_PLANES_AT
    for what, offset, layout, values, problem, field in (
        ("without_heads", 0, "H", (0,), error, "shape"),
        ("without_dims", 2, "H", (0,), error, "shape"),
        ("65792_channels", 0, "HH", (257, 256), error, "shape"),
        ("2_bins", 4, "H", (2,), error, "num_bins"),
        ("odd_bins", 4, "H", (7,), error, "num_bins"),
        ("258_bins", 4, "H", (258,), error, "num_bins"),
        ("9_low_bits", 6, "B", (9,), error, "low_bits"),
        ("too_few_low_bits", 4, "HB", (34, 0), error, "low_bits"),
        ("reserved_set", 7, "B", (1,), unsupported, "reserved"),
    ):
        yield f"{kind}_plane_{what}", reseal(good, planes_at + offset, layout, *values), problem, field


def list_invalid_chunks(files: dict[str, dict[str, bytes]]) -> Iterator[Invalid]:
    """Chunks whose fields, scales or streams are wrong, every checksum right unless it is the point."""
    error, unsupported, mismatch = "BitstreamError", "UnsupportedVersionError", "MismatchError"
    name = chunk_name(0)
    worked, packed = files["worked"][name], files["uniform8_packed"][name]
    header = parse_chunk(worked).header
    at, payload_at = _CHUNK_PLANES_AT, header.payload_offset
    index_at, scales_at = at + 2 * _PLANE_BYTES, header.header_bytes
    stream = worked[payload_at : payload_at + header.streams[0].num_bytes]
    for case in list_invalid_prefixes("chunk", worked, files["worked"][TABLES_NAME]):
        yield Invalid(case[0], "worked", *case[1:])
    nan_scale = put(worked, scales_at, "H", 0x7E00)
    nan_scale = reseal(nan_scale, 208, "I", crc32c(nan_scale[scales_at:payload_at]))
    infinite_scale = put(worked, scales_at + 10, "H", 0x7C00)
    infinite_scale = reseal(infinite_scale, 208, "I", crc32c(infinite_scale[scales_at:payload_at]))
    two_chunks = files["cachegen_bf16"]
    for what, content, problem, field in (
        ("coder_0", reseal(worked, 39, "B", 0), unsupported, "coder"),
        ("coder_4", reseal(worked, 39, "B", 4), unsupported, "coder"),
        ("named_ac", reseal(worked, 39, "B", 2), mismatch, "coder"),
        ("without_tokens", reseal(worked, 32, "I", 0), error, "num_tokens"),
        ("tokens_beyond_the_limit", reseal(worked, 32, "I", 2**24 + 1), error, "num_tokens"),
        ("tokens_beyond_the_index", reseal(worked, 32, "I", 33), error, "header_bytes"),
        ("tokens_per_stream_0", reseal(worked, at + 8, "I", 0), error, "tokens_per_stream"),
        ("tokens_per_stream_33", reseal(worked, at + 8, "I", 33), error, "tokens_per_stream"),
        ("tokens_per_stream_beyond_the_limit", reseal(worked, at + 8, "I", 2**24 + 32), error, "tokens_per_stream"),
        ("header_padding_set", reseal(worked, index_at + 24, "B", 1), error, "padding"),
        ("packed_with_a_high_part", reseal(worked, 39, "B", 3), error, "low_bits"),
        ("scales_flipped", flip(worked, scales_at), error, "scales_crc"),
        ("scales_padding_flipped", flip(worked, payload_at - 1), error, "scales_crc"),
        ("scale_nan", nan_scale, error, "scales"),
        ("scale_infinite", infinite_scale, error, "scales"),
        ("stream_flipped", flip(worked, payload_at), error, "stream 0"),
        ("stream_padding_flipped", flip(worked, len(worked) - 1), error, "stream 1"),
        ("stream_bytes_do_not_add_up", reseal(worked, index_at, "I", 32), error, "file_bytes"),
        ("stream_crc_of_another", reseal(worked, index_at + 8, "I", header.streams[1].crc ^ 1), error, "stream 0"),
        ("words_missing", reseal(worked, index_at + 4, "I", 1), error, "stream 0"),
        ("words_missing_by_billions", reseal(worked, index_at + 4, "I", 2**32 - 1), error, "stream 0"),
        ("words_left_over", replace_stream(worked, 0, stream + b"\0\0", 1), error, "stream 0"),
        ("bytes_left_over", replace_stream(worked, 0, stream + bytes(4), 0), error, "stream 0"),
        ("stream_without_bytes", replace_stream(worked, 0, b"", 0), error, "stream 0"),
        ("stream_without_a_state", replace_stream(worked, 0, stream[:-4], 0), error, "stream 0"),
        ("state_changed", replace_stream(worked, 0, flip(stream, 0), 0), error, "stream 0"),
        ("state_zero", replace_stream(worked, 0, bytes(4) + stream[4:], 0), error, "stream 0"),
        ("of_another_model", reseal(worked, 48, "B", worked[48] ^ 1), mismatch, "model_fingerprint"),
        ("of_another_context", reseal(worked, 80, "B", worked[80] ^ 1), mismatch, "token_hash"),
        ("of_another_rope", reseal(worked, 112, "B", worked[112] ^ 1), mismatch, "rope_hash"),
        ("of_another_document", reseal(worked, 144, "B", worked[144] ^ 1), mismatch, "tables_hash"),
        ("of_another_profile", reseal(worked, 176, "B", 1), mismatch, "profile_hash"),
        ("of_another_place", reseal(worked, 24, "Q", 3), mismatch, "first_token"),
        ("of_another_method", reseal(worked, 38, "B", 2), mismatch, "method"),
        ("of_another_dtype", reseal(worked, 40, "B", 2), mismatch, "dtype"),
        ("of_another_shape", reseal(worked, at, "HH", 2, 1), mismatch, "planes"),
        ("of_other_bins", reseal(worked, at + 4, "H", 16), mismatch, "planes"),
    ):
        yield Invalid(f"chunk_{what}", "worked", content, problem, field)
    yield Invalid("chunk_of_other_length", "cachegen_bf16", two_chunks[chunk_name(1)], mismatch, "first_token")

    header = parse_chunk(packed).header
    stream = packed[header.payload_offset : header.payload_offset + header.streams[0].num_bytes]
    yield Invalid("packed_chunk_named_rans", "uniform8_packed", reseal(packed, 39, "B", 1), mismatch, "coder")
    content = replace_stream(packed, 0, stream + b"\0\0", 1)
    yield Invalid("packed_chunk_with_words", "uniform8_packed", content, error, "stream 0")
    content = replace_stream(packed, 0, stream[:-4], 0)
    yield Invalid("packed_chunk_too_short", "uniform8_packed", content, error, "stream 0")

    yield from list_invalid_arithmetic_chunks(files["arithmetic"][name])
    yield from list_invalid_windowed_chunks(files["windowed"][name])


def list_invalid_arithmetic_chunks(good: bytes) -> Iterator[Invalid]:
    """Chunks of coder `ac` that are wrong in what is its own."""
    header, error = parse_chunk(good).header, "BitstreamError"
    at, start = _CHUNK_PLANES_AT, header.payload_offset
    stream = good[start : start + header.streams[0].num_bytes]
    # 64 tokens, 5 channels, 1 low bit: 40 bytes of low bits, 12 of lengths, then the codes.
    yield Invalid("arithmetic_chunk_named_rans", "arithmetic", reseal(good, 39, "B", 1), "MismatchError", "coder")
    for what, content, field in (
        ("tokens_per_stream_beyond_the_limit", reseal(good, at + 8, "I", 2**14 + 32), "tokens_per_stream"),
        ("with_words", replace_stream(good, 0, stream, 1), "stream 0"),
        ("cut_in_low_bits", replace_stream(good, 0, stream[:39], 0), "stream 0"),
        ("cut_in_lengths", replace_stream(good, 0, stream[:49], 0), "stream 0"),
        ("code_missing", replace_stream(good, 0, stream[:52], 0), "stream 0"),
        ("byte_missing", replace_stream(good, 0, stream[:-1], 0), "stream 0"),
        ("byte_left_over", replace_stream(good, 0, stream + b"\0", 0), "stream 0"),
        ("length_beyond_the_stream", replace_stream(good, 0, put(stream, 40, "H", 0xFFFF), 0), "stream 0"),
        (
            "lengths_shifted",
            replace_stream(good, 0, put(stream, 40, "HH", stream[40] - 1, stream[42] + 1), 0),
            "stream 0",
        ),
        ("code_changed", replace_stream(good, 0, flip(stream, 52), 0), "stream 0"),
        ("end_changed", replace_stream(good, 0, flip(stream, len(stream) - 1), 0), "stream 0"),
    ):
        yield Invalid(f"arithmetic_chunk_{what}", "arithmetic", content, error, field)


def list_invalid_windowed_chunks(good: bytes) -> Iterator[Invalid]:
    """Chunks that lack tokens and are wrong in which: of 40 tokens, the layers lack 0, 20 and 40."""
    error, at = "BitstreamError", _CHUNK_PLANES_AT + 6 * _PLANE_BYTES
    for what, content, problem, field in (
        ("that_lacks_more_than_it_has", reseal(good, at + 4, "I", 41), error, "num_absent"),
        ("that_lacks_billions", reseal(good, at + 4, "I", 2**32 - 1), error, "num_absent"),
        ("that_lacks_nothing", reseal(good, at, "III", 0, 0, 0), error, "num_absent"),
        ("with_streams_of_no_tokens", reseal(good, at + 4, "I", 40), error, "header_bytes"),
        ("without_its_array", reseal(good, 42, "H", 0), error, "header_bytes"),
        # One token less has as many streams, and as many bytes of scales with their padding.
        ("that_lacks_another_token", reseal(good, at + 4, "I", 21), "MismatchError", "num_absent"),
    ):
        yield Invalid(f"windowed_chunk_{what}", "windowed", content, problem, field)


def list_invalid_tables(files: dict[str, dict[str, bytes]]) -> Iterator[Invalid]:
    """Tables files whose fields or tables are wrong, every checksum right unless it is the point."""
    error, unsupported = "BitstreamError", "UnsupportedVersionError"
    worked = files["worked"][TABLES_NAME]
    header = parse_document(worked)
    tables = worked[header.header_bytes :]
    at = _TABLES_PLANES_AT
    chunks_at = at + 2 * _PLANE_BYTES
    first_plane = tables[: header.plane_table_bytes[0]]
    good_channel = "00000 00000 1 0 10"  # symbol 0 alone, class 3
    for case in list_invalid_prefixes("tables", worked, files["worked"][chunk_name(0)]):
        yield Invalid(case[0], "worked", *case[1:])
    for what, content, problem, field in (
        ("coder_0", reseal(worked, 39, "B", 0), unsupported, "coder"),
        ("coder_4", reseal(worked, 39, "B", 4), unsupported, "coder"),
        ("named_packed", reseal(worked, 39, "B", 3), error, "coder"),
        ("without_levels", reseal(worked, 41, "B", 0), error, "num_levels"),
        ("5_levels", reseal(worked, 41, "B", 5), error, "num_levels"),
        ("without_chunks", reseal(worked, 32, "I", 0), error, "num_chunks"),
        ("chunks_beyond_the_limit", reseal(worked, 32, "I", 2**20 + 1), error, "num_chunks"),
        ("chunks_beyond_the_header", reseal(worked, 32, "I", 2), error, "header_bytes"),
        ("without_block_size", reseal(worked, 44, "I", 0), error, "prefill_block_size"),
        ("chunk_without_tokens", reseal(worked, chunks_at, "I", 0), error, "chunk_tokens"),
        ("chunk_beyond_the_limit", reseal(worked, chunks_at, "I", 2**24 + 1), error, "chunk_tokens"),
        ("chunk_beyond_the_cache", reseal(worked, chunks_at, "I", 4), error, "chunk_tokens"),
        ("tables_flipped", flip(worked, header.header_bytes), error, "tables_crc"),
        ("tables_bytes_do_not_add_up", reseal(worked, at + 8, "I", 2**32 - 1), error, "file_bytes"),
        ("sizes_swapped", reseal(reseal(worked, at + 8, "I", 0), at + 20, "I", len(tables)), error, "tables"),
        ("channels_beyond_the_tables", reseal(worked, at, "HH", 256, 256), error, "tables"),
        ("byte_missing", replace_tables(worked, first_plane[:-1]), error, "tables"),
        ("byte_left_over", replace_tables(worked, first_plane + b"\0"), error, "tables"),
        ("filling_bit_set", replace_tables(worked, put(first_plane, len(first_plane) - 1, "B", 1)), error, "tables"),
        ("first_after_last", replace_tables(worked, pack_bits(f"00001 00000 1 0 10 {good_channel}")), error, "tables"),
        (
            "last_beyond_the_alphabet",
            replace_tables(worked, pack_bits("00111 00111 1 0 10" + good_channel)),
            error,
            "tables",
        ),
        ("class_below_0", replace_tables(worked, pack_bits("00000 00000 0 01" + good_channel)), error, "tables"),
        (
            "class_45",
            replace_tables(worked, pack_bits("00000 00000" + "1" * 22 + "0 10" + good_channel)),
            error,
            "tables",
        ),
        (
            "quotient_without_end",
            replace_tables(worked, pack_bits("00000 00000" + "1" * 100)),
            error,
            "tables",
        ),
        ("first_absent", replace_tables(worked, pack_bits("00000 00001 0 00 0 10" + good_channel)), error, "tables"),
        ("last_absent", replace_tables(worked, pack_bits("00000 00001 0 10 0 01" + good_channel)), error, "tables"),
    ):
        yield Invalid(f"tables_{what}", "worked", content, problem, field)

    windowed = files["windowed"][TABLES_NAME]
    first_at = at + 6 * _PLANE_BYTES + 2 * 4
    for what, content, field in (
        ("of_a_layer_behind_the_chunks", reseal(windowed, first_at + 8, "Q", 46), "first_stored"),
        ("of_a_layer_far_away", reseal(windowed, first_at + 8, "Q", 2**64 - 1), "first_stored"),
        ("that_lacks_nothing", reseal(windowed, first_at, "QQQ", 0, 0, 0), "first_stored"),
        ("without_its_array", reseal(windowed, 42, "H", 0), "header_bytes"),
    ):
        yield Invalid(f"windowed_tables_{what}", "windowed", content, error, field)


def list_invalid(files: dict[str, dict[str, bytes]]) -> list[tuple[str, Invalid]]:
    """All invalid files with their names."""
    return [(f"{case.name}{CHUNK_SUFFIX}", case) for case in list_invalid_chunks(files)] + [
        (f"{case.name}{Path(TABLES_NAME).suffix}", case) for case in list_invalid_tables(files)
    ]
