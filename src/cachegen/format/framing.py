"""What all our files begin with, and reading a header's fields: bounds, versions and the header's own checksum.

docs/format.md, "What both files begin with". Standard library only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar

from cachegen.errors import BitstreamError, UnsupportedVersionError

Buffer = bytes | bytearray | memoryview
Checksum = Callable[[Buffer], int]
_Member = TypeVar("_Member", bound=IntEnum)

PREFIX = struct.Struct("<8sHHIQ")  # magic, version, flags, header_bytes, file_bytes
CRC = struct.Struct("<I")
FORMAT_VERSION = 1


def seal_header(magic: bytes, header_bytes: int, file_bytes: int, body: bytes, checksum: Checksum) -> bytes:
    """Put what all files begin with before a header's fields, and the header's checksum behind them."""
    content = PREFIX.pack(magic, FORMAT_VERSION, 0, header_bytes, file_bytes) + body
    content = content.ljust(header_bytes - CRC.size, b"\0")
    return content + CRC.pack(checksum(content))


def open_header(content: Buffer, magic: bytes, kind: str, checksum: Checksum) -> int:
    """Check what all files begin with, and the header's checksum; returns the header's length."""
    if bytes(content[: len(magic)]) != magic[: len(content)]:
        raise BitstreamError(f"not a {kind} file of cachegen", offset=0, field="magic")
    _, version, flags, header_bytes, file_bytes = unpack_record(PREFIX, content, 0, PREFIX.size)
    is_read = version == FORMAT_VERSION
    message = f"{version} is not supported, this release reads {FORMAT_VERSION}"
    require(is_read, message, 8, "version", unsupported=True)
    require(flags == 0, "reserved bits are set, a later release may read them", 10, "flags", unsupported=True)
    if not PREFIX.size + CRC.size <= header_bytes <= file_bytes or header_bytes > len(content):
        raise BitstreamError(_wrong_length(header_bytes, len(content)), offset=12, field="header_bytes")
    (expected,) = CRC.unpack_from(content, header_bytes - CRC.size)
    if checksum(content[: header_bytes - CRC.size]) != expected:
        raise BitstreamError("does not match, the header is corrupt", offset=header_bytes - 4, field="header_crc")
    check_file_bytes(content, file_bytes)
    return header_bytes


def check_file_bytes(content: Buffer, file_bytes: int) -> None:
    """Refuse a file that is not as long as its header says."""
    if len(content) != file_bytes:
        raise BitstreamError(_wrong_length(file_bytes, len(content)), offset=16, field="file_bytes")


def _wrong_length(expected: int, found: int) -> str:
    return f"the file is not whole: {expected} bytes expected, {found} found"


def unpack_record(record: struct.Struct, content: Buffer, offset: int, end: int) -> tuple[Any, ...]:
    """Unpack a record that must lie before `end`."""
    if offset + record.size > min(end, len(content)):
        raise BitstreamError(
            f"the file is not whole: it ends before byte {offset + record.size}", offset=offset, field="header"
        )
    return record.unpack_from(content, offset)


def require(condition: bool, problem: str, offset: int, field: str, *, unsupported: bool = False) -> None:
    """Raise unless `condition` holds; the error names the offset and the field."""
    if not condition:
        raise (UnsupportedVersionError if unsupported else BitstreamError)(problem, offset=offset, field=field)


def known(kind: type[_Member], value: int, offset: int, field: str) -> _Member:
    """Return the member of an enumeration that a file names."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(f"{member.value} ({member.name.lower()})" for member in kind)
        raise UnsupportedVersionError(
            f"{value} is not supported, this release reads {known}", offset=offset, field=field
        ) from None
