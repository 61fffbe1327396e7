"""The bytes of one block of a KV cache in an engine's store.

    header      see `_HEADER`; names what the block is of, so that nothing else is ever taken for it
    sections    one after the other, each a head (`_SECTION`), the lengths of its parts, and the parts

A section is one tensor: its bytes as they are, or the tables file and the chunk files of a document of one chunk
(docs/format.md), after the first tokens that must stay exact. All integers are little-endian. Nothing here is torch's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cachegen import _native
from cachegen.errors import BitstreamError, MismatchError, UnsupportedVersionError
from cachegen.format.framing import Buffer

BLOB_MAGIC = b"\x89KVB\r\n\x1a\n"
BLOB_VERSION = 1
MAX_SECTIONS = 1 << 10
MAX_PARTS = 1 + 1 + 4
"""Exact tokens, tables file, a chunk file for each of at most four levels."""

# Magic, version, number of sections, bytes in all, CRC-32C of the header with this field zero, CRC-32C of what follows
# the header; then SHA-256 of key, layout and codec.
_HEADER = struct.Struct("<8sHHQII32s32s32s")
_CRC, _CRC_OFFSET = struct.Struct("<I"), 8 + 2 + 2 + 8
# Kind, number of parts, first tokens stored exactly, reserved, position of the first token.
_SECTION = struct.Struct("<BBHIQ")
_LENGTH = struct.Struct("<Q")
RAW, CODED = 0, 1


@dataclass(frozen=True)
class Identity:
    """What a blob is of; each a SHA-256 of 32 bytes.

    Attributes:
        key: of the key under which the engine stores it.
        layout: of the tensors' shapes and dtypes.
        codec: of method, configuration and profile.
    """

    key: bytes
    layout: bytes
    codec: bytes


@dataclass(frozen=True)
class Section:
    """One tensor.

    Attributes:
        kind: `RAW` or `CODED`.
        parts: of a raw one its bytes; of a coded one the exact tokens' bytes, the tables file and the chunk files.
        num_exact: how many first tokens are stored exactly.
        position: of the first token, which decoding starts from.
    """

    kind: int
    parts: Sequence[Buffer]
    num_exact: int = 0
    position: int = 0

    @property
    def num_bytes(self) -> int:
        """In the blob."""
        return _SECTION.size + sum(_LENGTH.size + len(part) for part in self.parts)


def raw_section_bytes(num_bytes: int) -> int:
    """Return the length of a raw section of so many bytes; none of a blob is longer than the raw one of its tensor."""
    return _SECTION.size + _LENGTH.size + num_bytes


def max_blob_bytes(tensor_bytes: Sequence[int]) -> int:
    """Return the length that no blob of tensors of so many bytes exceeds."""
    return _HEADER.size + sum(map(raw_section_bytes, tensor_bytes))


def pack_blob(identity: Identity, sections: Sequence[Section]) -> bytearray:
    """Return a blob."""
    total = _HEADER.size + sum(section.num_bytes for section in sections)
    blob = bytearray(total)
    fields = (identity.key, identity.layout, identity.codec)
    offset = _HEADER.size
    for section in sections:
        _SECTION.pack_into(blob, offset, section.kind, len(section.parts), section.num_exact, 0, section.position)
        offset += _SECTION.size
        for part in section.parts:
            _LENGTH.pack_into(blob, offset, len(part))
            offset += _LENGTH.size
        for part in section.parts:
            blob[offset : offset + len(part)] = part
            offset += len(part)
    body_crc = _native.crc32c(memoryview(blob)[_HEADER.size :])
    _HEADER.pack_into(blob, 0, BLOB_MAGIC, BLOB_VERSION, len(sections), total, 0, body_crc, *fields)
    _CRC.pack_into(blob, _CRC_OFFSET, _native.crc32c(blob[: _HEADER.size]))
    return blob


def read_blob(content: Buffer, identity: Identity) -> list[Section]:
    """Take a blob apart, after all checks that need no decoding.

    Args:
        content: the blob; a store that hands out whole buffers may have put anything behind it.
        identity: what it must be of.

    Returns:
        The sections; their parts are views of `content`.

    Raises:
        BitstreamError: it is no blob, not whole, or changed.
        UnsupportedVersionError: a later release wrote it.
        MismatchError: it is of another key, layout or codec, naming the first that differs.
    """
    view = memoryview(content).cast("B")
    if len(view) < _HEADER.size:
        raise BitstreamError(f"has {len(view)} bytes, a blob has at least {_HEADER.size}", field="length")
    magic, version, num_sections, total, crc, body_crc, *found = _HEADER.unpack_from(view)
    if magic != BLOB_MAGIC:
        raise BitstreamError("is no blob of ours", field="magic")
    if version != BLOB_VERSION:
        problem = f"{version} is not supported, this release reads {BLOB_VERSION}"
        raise UnsupportedVersionError(problem, field="version")
    head = bytearray(view[: _HEADER.size])
    _CRC.pack_into(head, _CRC_OFFSET, 0)
    if _native.crc32c(head) != crc:
        raise BitstreamError("does not match the header: it has changed", field="header_crc")
    if not _HEADER.size <= total <= len(view):
        raise BitstreamError(f"{total} bytes are announced, {len(view)} are there: it is cut off", field="length")
    view = view[:total]
    if _native.crc32c(view[_HEADER.size :]) != body_crc:
        raise BitstreamError("does not match the bytes: they have changed", field="body_crc")
    names = ("key", "layout", "codec")
    for name, value, wanted in zip(names, found, (identity.key, identity.layout, identity.codec), strict=True):
        if value != wanted:
            raise MismatchError(f"the blob's {name} is {value.hex()[:12]}, but {wanted.hex()[:12]} is expected")
    return _read_sections(view, num_sections)


def _read_sections(view: memoryview, num_sections: int) -> list[Section]:
    if not 1 <= num_sections <= MAX_SECTIONS:
        raise BitstreamError(f"must be 1 to {MAX_SECTIONS}, got {num_sections}", field="sections")
    sections: list[Section] = []
    offset = _HEADER.size
    for index in range(num_sections):
        if offset + _SECTION.size > len(view):
            raise BitstreamError("ends within a section", field=f"section {index}")
        kind, num_parts, num_exact, _, position = _SECTION.unpack_from(view, offset)
        offset += _SECTION.size
        is_right = (kind == RAW and num_parts == 1) or (kind == CODED and 3 <= num_parts <= MAX_PARTS)
        if not is_right or offset + num_parts * _LENGTH.size > len(view):
            raise BitstreamError("is neither raw nor coded", field=f"section {index}")
        lengths = [_LENGTH.unpack_from(view, offset + part * _LENGTH.size)[0] for part in range(num_parts)]
        offset += num_parts * _LENGTH.size
        if sum(lengths) > len(view) - offset:
            raise BitstreamError("ends within a section", field=f"section {index}")
        parts: list[memoryview] = []
        for length in lengths:
            parts.append(view[offset : offset + length])
            offset += length
        sections.append(Section(kind, parts, num_exact, position))
    if offset != len(view):
        raise BitstreamError("has bytes behind its sections", field="length")
    return sections
