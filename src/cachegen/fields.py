"""Read the fields of JSON objects that anyone may have made: types and ranges are checked, and errors name the field.

`Fields` reads them; what it raises is made by a `Refuse`, since a config of the user's is refused with another
error than a file from a server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cachegen.errors import BitstreamError, CacheGenError, ConfigError, InputError, UnsupportedVersionError

Refuse = Callable[[str, str], CacheGenError]
"""Makes the error for a problem (first) of a field (second, "" for the whole): to be raised by whoever found it."""

MAX_TEXT = 1 << 12
_HASH = re.compile(r"[0-9a-f]{64}")
# No field has more digits; Python refuses to convert thousands of them.
_MAX_DIGITS = 20


def refuse_file(path: object = None) -> Refuse:
    """Refuse a file of ours, or what a server sent for one, with BitstreamError."""
    return lambda problem, field: BitstreamError(problem, path=path, field=field or None)


def refuse_config(path: object) -> Refuse:
    """Refuse a config with ConfigError."""
    return lambda problem, field: ConfigError(f"{path}: {f'{field} ' if field else ''}{problem}")


def refuse_input(place: object) -> Refuse:
    """Refuse an input of the user's with InputError; `place` is its path, or its path and a line."""
    return lambda problem, field: InputError(f"{place}: {f'{field} ' if field else ''}{problem}")


def parse_json(content: bytes | str, refuse: Refuse) -> Any:
    """Parse JSON strictly: UTF-8, no field twice, no NaN or infinity, no nesting without end."""

    def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a field appears twice")
        return found

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return json.loads(text, object_pairs_hook=refuse_twins, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError, too
        raise refuse(f"not JSON ({str(error)[:100]})", "") from None


def parse_fields(content: bytes | str, refuse: Refuse, *, reads_digits: bool = False) -> Fields:
    """Parse a JSON object, as `parse_json` does."""
    return Fields(parse_json(content, refuse), refuse, reads_digits=reads_digits)


class Fields:
    """The fields of one object.

    Every method returns the value of the field it names, and raises what `refuse` makes where that is missing or
    something else.

    Args:
        content: a dict; anything else is refused.
        refuse: makes the errors.
        place: where in the file the object stands, such as "levels[2]"; "" for the file's own.
        reads_digits: whether integers may be given as text of their digits.
    """

    def __init__(self, content: object, refuse: Refuse, place: str = "", *, reads_digits: bool = False) -> None:
        if type(content) is not dict:
            raise refuse("must be a JSON object", place)
        self._content: dict[str, Any] = content
        self._refuse = refuse
        self._place = place
        self._reads_digits = reads_digits

    def __contains__(self, name: str) -> bool:
        return name in self._content

    def members(self, name: str) -> list[tuple[str, Fields]]:
        """Return the fields of an object whose every field is an object, by name."""
        below = self.object(name)
        return [(member, below.object(member)) for member in below.names]

    def has_value(self, name: str) -> bool:
        """Tell whether the field is there and not null."""
        return self._content.get(name) is not None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all fields, in the order of the file."""
        return tuple(self._content)

    @property
    def content(self) -> Mapping[str, Any]:
        """All fields, unchecked."""
        return self._content

    def error(self, name: str, problem: str) -> CacheGenError:
        """Return the error for a field, to be raised; `name` "" stands for the object."""
        return self._refuse(problem, ".".join(filter(None, (self._place, name))))

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Refuse an object with a field that is none of `known`."""
        unknown = sorted(set(self._content) - set(known))
        if unknown:
            raise self.error("", f"unknown field {shown(unknown[0])[1:-1]} (known: {', '.join(sorted(known))})")

    def require(self, names: Collection[str]) -> None:
        """Refuse an object whose fields are others than these."""
        if set(self._content) != set(names):
            raise self.error("", f"must be an object of {', '.join(names)}")

    def check_format(self, name: str, wanted: str, what: str) -> None:
        """Refuse a file that is not marked as one of ours; `what` says for people which kind was expected."""
        if self._content.get(name) != wanted:
            raise self.error(name, f"must be {wanted}: not {what}")

    def check_version(self, name: str, wanted: int) -> None:
        """Refuse a file of a later release.

        Raises:
            UnsupportedVersionError: a file of ours is of another version than `wanted`.
        """
        version = self.value(name)
        if type(version) is not int or version != wanted:
            error = self.error(name, f"{shown(version)} is not supported, this release reads {wanted}")
            if isinstance(error, BitstreamError):
                error = UnsupportedVersionError(error.problem, path=error.path, field=error.field)
            raise error

    def value(self, name: str) -> Any:
        """Return a field as it is."""
        if name not in self._content:
            raise self.error(name, "is missing")
        return self._content[name]

    def check(self, name: str, is_right: Callable[[Any], bool], wanted: str) -> Any:
        """Return a field that satisfies `is_right`; `wanted` says for people what that is."""
        value = self.value(name)
        if not is_right(value):
            raise self.error(name, f"must be {wanted}, got {shown(value)}")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.value(name)
        if self._reads_digits and type(value) is str and len(value) <= _MAX_DIGITS and value.strip().isdecimal():
            value = int(value)
        if type(value) is not int:
            raise self.error(name, f"must be an integer, got {shown(value)}")
        if not low <= value <= high:
            raise self.error(name, f"must be {low} to {high}, got {shown(value)}")
        return value

    def number(self, name: str, low: float = -1e300, high: float = 1e300, *, above: bool = False) -> float:
        """Return a number from `low`, or `above` it, to `high`."""
        return _number(self, name, self.value(name), low, high, above)

    def numbers(
        self, name: str, min_items: int, max_items: int, low: float = -1e300, high: float = 1e300
    ) -> tuple[float, ...]:
        """Return a list of numbers from `low` to `high`."""
        return tuple(_number(self, name, value, low, high, False) for value in self.items(name, min_items, max_items))

    def flag(self, name: str) -> bool:
        return self.check(name, lambda value: type(value) is bool, "true or false")

    def text(self, name: str, max_characters: int = MAX_TEXT) -> str:
        """Return a text; it may be of several lines."""
        wanted = f"a text of at most {max_characters} characters"
        return self.check(name, lambda value: type(value) is str and len(value) <= max_characters, wanted)

    def label(self, name: str, max_characters: int = MAX_TEXT) -> str:
        """Return a text of printable characters."""
        text = self.text(name, max_characters)
        if not text.isprintable():  # nor can the rest be hashed: half a character has no UTF-8
            raise self.error(name, "must be printable characters")
        return text

    def choice(self, name: str, choices: Sequence[str]) -> str:
        return self.check(name, lambda value: value in choices, f"one of {', '.join(choices)}")

    def hash(self, name: str) -> str:
        """Return a SHA-256 of 64 lower-case hex digits."""
        return self.check(name, _is_hash, "a SHA-256 in hex")

    def items(self, name: str, min_items: int, max_items: int) -> list[Any]:
        value = self.value(name)
        if type(value) is not list or not min_items <= len(value) <= max_items:
            raise self.error(name, f"must be a list of {min_items} to {max_items}")
        return value

    def object(self, name: str) -> Fields:
        return self._below(name, self.value(name))

    def objects(self, name: str, min_items: int, max_items: int) -> list[Fields]:
        return [self._below(f"{name}[{i}]", item) for i, item in enumerate(self.items(name, min_items, max_items))]

    def _below(self, name: str, content: Any) -> Fields:
        place = ".".join(filter(None, (self._place, name)))
        return Fields(content, self._refuse, place, reads_digits=self._reads_digits)


def _is_hash(value: object) -> bool:
    return type(value) is str and _HASH.fullmatch(value) is not None


def shown(value: object) -> str:
    """Return a value for a message: the type where writing it out could take without end."""
    if type(value) is int and abs(value) >= 1 << 200:  # nor does Python print thousands of digits
        return "a huge number"
    if value is None or type(value) in (bool, int, float, str):
        return json.dumps(value)[:80]
    return f"a {type(value).__name__}"


def _number(fields: Fields, name: str, value: Any, low: float, high: float, above: bool) -> float:
    if type(value) in (int, float) and low <= value <= high and not (above and value == low):
        return float(value)
    if low > -1e300 and not (type(value) in (int, float) and value > high):
        wanted = f"a number {'above' if above else 'of at least'} {low:g}"
    else:
        wanted = f"a number of at most {high:g}" if high < 1e300 else "a finite number"
    raise fields.error(name, f"must be {wanted}, got {shown(value)}")
