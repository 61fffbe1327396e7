"""Records whose fields are declared once, in a dataclass: the bytes, the bounds and the specification's tables follow.

    @dataclass(frozen=True)
    class Shape(Record):
        num_kv_heads: int = u16("heads of keys and values", least=1)
        head_dim: int = u16("", least=1)

    Shape(2, 64).pack()                    -> b"\\x02\\x00\\x40\\x00"
    Shape.unpack(content, at, end)         -> a Shape, or an error that names the field and its offset
    Shape.describe()                       -> rows of docs/format.md: offset, size, name, meaning

Records are little-endian and have no gaps. Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Self

from cachegen.errors import BitstreamError
from cachegen.format.framing import Buffer, known, require, unpack_record

_DECLARED = "cachegen.format.layout"


@dataclass(frozen=True)
class Declared:
    """What a field declares.

    Attributes:
        code: the field's type, as `struct` has it.
        meaning: for docs/format.md.
        least, most: bounds of a number.
        values: the numbers that this release reads.
        is_reserved: must be zero, so that a later release can give it a meaning.
    """

    code: str
    meaning: str
    least: int | None = None
    most: int | None = None
    values: type[IntEnum] | None = None
    is_reserved: bool = False


def u8(meaning: str, *, least: int | None = None, most: int | None = None, values: type[IntEnum] | None = None) -> Any:
    """Declare an unsigned integer of 8 bits."""
    return _declare(Declared("B", meaning, least, most, values))


def u16(
    meaning: str,
    *,
    least: int | None = None,
    most: int | None = None,
    values: type[IntEnum] | None = None,
    **options: Any,
) -> Any:
    """Declare an unsigned integer of 16 bits."""
    return _declare(Declared("H", meaning, least, most, values), **options)


def u32(meaning: str, *, least: int | None = None, most: int | None = None, **options: Any) -> Any:
    """Declare an unsigned integer of 32 bits."""
    return _declare(Declared("I", meaning, least, most), **options)


def u64(meaning: str, *, least: int | None = None, most: int | None = None, **options: Any) -> Any:
    """Declare an unsigned integer of 64 bits."""
    return _declare(Declared("Q", meaning, least, most), **options)


def i32(meaning: str, *, least: int | None = None, most: int | None = None, **options: Any) -> Any:
    """Declare a signed integer of 32 bits, in two's complement."""
    return _declare(Declared("i", meaning, least, most), **options)


def f32(meaning: str, **options: Any) -> Any:
    """Declare a finite number of 32 bits, IEEE 754, that is not negative."""
    return _declare(Declared("f", meaning), **options)


def hash32(meaning: str) -> Any:
    """Declare 32 raw bytes, the length of a SHA-256."""
    return _declare(Declared("32s", meaning))


def reserved8() -> Any:
    """Declare 8 bits that must be zero."""
    return _declare(Declared("B", "zero", is_reserved=True), default=0)


def reserved16() -> Any:
    """Declare 16 bits that must be zero."""
    return _declare(Declared("H", "zero", is_reserved=True), default=0)


def _declare(declared: Declared, *, is_derived: bool = False, **options: Any) -> Any:
    """Make the dataclass's field.

    Args:
        is_derived: the dataclass sets it from its other fields, whatever it is given.
        options: of `dataclasses.field`.
    """
    if is_derived:
        options["default"] = 0
    return dataclasses.field(metadata={_DECLARED: declared}, **options)


@dataclass(frozen=True)
class Placed:
    """A declared field and where it lies in its record."""

    name: str
    offset: int
    declared: Declared

    @property
    def num_bytes(self) -> int:
        return struct.calcsize("<" + self.declared.code)

    @property
    def is_bounded(self) -> bool:
        """Whether there are bytes that the field may not hold, or that mean another value."""
        declared = self.declared
        is_number = declared.least is None and declared.most is None and declared.values is None
        return declared.is_reserved or declared.code == "f" or not is_number

    def check(self, value: Any, at: int) -> Any:
        """Return the value as the dataclass has it, refusing one out of its bounds.

        Args:
            at: offset of the field in the file.
        """
        declared = self.declared
        if declared.is_reserved:
            require(
                value == 0, "reserved bits are set, a later release may read them", at, "reserved", unsupported=True
            )
        if declared.values is not None:
            return known(declared.values, value, at, self.name)
        if declared.code == "f":
            is_size = math.isfinite(value) and value >= 0
            require(is_size, f"must be finite and not negative, got {value}", at, self.name)
        is_low = declared.least is not None and value < declared.least
        if is_low or (declared.most is not None and value > declared.most):
            raise BitstreamError(f"must be {_bounds(declared)}, got {value}", offset=at, field=self.name)
        return value


def _bounds(declared: Declared) -> str:
    if declared.most is None:
        return f"at least {declared.least}"
    return f"{declared.least or 0} to {declared.most}"


class Record:
    """A dataclass whose declared fields are the bytes of a record; other fields of it are not in the record.

    Attributes:
        first_offset: where the record begins in its file, for the specification's tables; 0 for one of several.
    """

    first_offset: ClassVar[int] = 0

    @classmethod
    @functools.cache
    def placed(cls) -> tuple[Placed, ...]:
        """Return the declared fields in the order of their bytes."""
        found: list[Placed] = []
        offset = 0
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]  (its children are dataclasses)
            if (declared := field.metadata.get(_DECLARED)) is not None:
                found.append(Placed(field.name, offset, declared))
                offset += found[-1].num_bytes
        return tuple(found)

    @classmethod
    @functools.cache
    def _struct(cls) -> struct.Struct:
        return struct.Struct("<" + "".join(placed.declared.code for placed in cls.placed()))

    @classmethod
    @functools.cache
    def _names_and_bounded(cls) -> tuple[tuple[str, ...], tuple[Placed, ...]]:
        """Return what parsing a record needs, every time: the fields' names, and those that need a look."""
        placed = cls.placed()
        return tuple(one.name for one in placed), tuple(one for one in placed if one.is_bounded)

    @classmethod
    def num_bytes(cls) -> int:
        """Return the record's length."""
        return cls._struct().size

    def pack_record(self) -> bytes:
        """Serialize the declared fields."""
        return self._struct().pack(*(getattr(self, placed.name) for placed in self.placed()))

    @classmethod
    def unpack_fields(cls, content: Buffer, at: int, end: int) -> dict[str, Any]:
        """Parse and check the declared fields at `at`, all of which must lie before `end`.

        Raises:
            BitstreamError: a field is out of its bounds.
            UnsupportedVersionError: this release does not read a value.
        """
        names, bounded = cls._names_and_bounded()
        fields = dict(zip(names, unpack_record(cls._struct(), content, at, end), strict=True))
        for placed in bounded:
            fields[placed.name] = placed.check(fields[placed.name], at + placed.offset)
        return fields

    @classmethod
    def unpack_record(cls, content: Buffer, at: int, end: int) -> Self:
        """Parse and check a record that has declared fields only; see `unpack_fields`."""
        return cls(**cls.unpack_fields(content, at, end))

    @classmethod
    def offset_of(cls, name: str) -> int:
        """Return where a field lies in its file."""
        return cls.first_offset + next(placed.offset for placed in cls.placed() if placed.name == name)

    @classmethod
    def describe(cls) -> list[tuple[int, int, str, str]]:
        """Return the rows of the specification's table: offset, bytes, name, meaning."""
        return [
            (
                cls.first_offset + placed.offset,
                placed.num_bytes,
                "reserved" if placed.declared.is_reserved else placed.name,
                placed.declared.meaning,
            )
            for placed in cls.placed()
        ]
