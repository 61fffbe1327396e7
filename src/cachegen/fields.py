"""Read fields of files that anyone may have made: types and ranges are checked, and errors name the field.

Every function returns the value and raises BitstreamError where it is another.
"""

from __future__ import annotations

import re
from typing import Any

from cachegen.errors import BitstreamError

_MAX_TEXT = 1 << 12
_HASH = re.compile(r"[0-9a-f]{64}")


def read_integer(value: object, field: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise BitstreamError(f"must be an integer, {low} to {high}, got {_shown(value)}", field=field)
    return value


def read_number(value: object, field: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e300:  # type: ignore[arg-type, operator]
        raise BitstreamError(f"must be a finite number, got {_shown(value)}", field=field)
    return float(value)  # type: ignore[arg-type]


def read_list(value: object, field: str, low: int, high: int) -> list[Any]:
    if type(value) is not list or not low <= len(value) <= high:
        raise BitstreamError(f"must be a list of {low} to {high}", field=field)
    return value


def read_record(value: object, field: str, *names: str) -> dict[str, Any]:
    if type(value) is not dict or not set(names) <= set(value):
        raise BitstreamError(f"must be an object with {', '.join(names)}", field=field)
    return value


def read_text(value: object, field: str) -> str:
    if type(value) is not str or len(value) > _MAX_TEXT:
        raise BitstreamError(f"must be a text of at most {_MAX_TEXT} characters", field=field)
    return value


def read_name(value: object, field: str) -> str:
    name = read_text(value, field)
    if not name.isprintable():  # nor can the rest be hashed: half a character has no UTF-8
        raise BitstreamError("must be printable characters", field=field)
    return name


def read_hash(value: object, field: str) -> str:
    if type(value) is not str or _HASH.fullmatch(value) is None:
        raise BitstreamError("must be a SHA-256 in hex", field=field)
    return value


def _shown(value: object) -> str:
    """Return a value for a message: the type where writing it out could take without end."""
    if type(value) is int and abs(value) >= 1 << 200:  # nor does Python print thousands of digits
        return "a huge number"
    return f"{value!r:.60}" if value is None or type(value) in (bool, int, float, str) else f"a {type(value).__name__}"
