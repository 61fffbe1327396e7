"""The project's exceptions, each with the exit code the scripts return for it.

A bad argument to a function is a plain ValueError or TypeError; these classes are for what a user can meet:
a bad file, a bad flag, a missing backend. Every message is one line: what, where, what to do.
"""

from __future__ import annotations


class CacheGenError(Exception):
    """Base of all errors that a user can meet; the scripts print the message and return `exit_code`.

    Attributes:
        level: of the file at fault, where a chunk has one file per level.
    """

    exit_code = 1
    level: int | None = None


class ConfigError(CacheGenError):
    """Refuse a flag or a configuration value."""

    exit_code = 2


class InputError(CacheGenError):
    """Report an input that is missing, unreadable or unusable (a file, a folder, a model, a context)."""

    exit_code = 3


class NotFiniteError(InputError):
    """Name the plane, counted in file order, and the token of a NaN or infinity in a KV cache."""

    def __init__(self, plane: int, token: int) -> None:
        self.plane, self.token = plane, token
        kind = "values" if plane % 2 else "keys"
        super().__init__(
            f"the KV cache holds NaN or infinity (layer {plane // 2}, {kind}, token {token}): "
            "prefill it again, in bfloat16 or float32 if it was in float16"
        )


class MissingInputError(InputError):
    """Report an input that is not there, as the system said when it was to be opened."""


class StoreError(InputError):
    """Report a store that cannot be reached, lacks an object, or answers otherwise than it must.

    Attributes:
        is_missing: the store answered: there is no such object.
        is_temporary: the same request may succeed later.
        is_range_ignored: a part was asked for and the whole came.
        is_too_slow: an answer came too slowly or not at all, which says nothing about what there is.
    """

    def __init__(
        self,
        message: str,
        *,
        is_missing: bool = False,
        is_temporary: bool = False,
        is_range_ignored: bool = False,
        is_too_slow: bool = False,
    ) -> None:
        super().__init__(message)
        self.is_too_slow = is_too_slow
        self.is_range_ignored = is_range_ignored
        self.is_missing = is_missing
        self.is_temporary = is_temporary


class BitstreamError(CacheGenError):
    """Report a file of ours whose bytes are not what the format says: truncated, corrupt or foreign."""

    exit_code = 4

    def __init__(
        self, problem: str, *, path: object = None, offset: int | None = None, field: str | None = None
    ) -> None:
        self.problem = problem
        self.path = path
        self.offset = offset
        self.field = field
        place = [str(path)] if path is not None else []
        if offset is not None:
            place.append(f"byte {offset}")
        if field is not None:
            place.append(f"field {field}")
        super().__init__(": ".join(filter(None, [", ".join(place), problem])))

    def at(self, path: object) -> BitstreamError:
        """Return the same error with the file's path in its message."""
        located = type(self)(self.problem, path=path, offset=self.offset, field=self.field)
        located.level = self.level
        return located


class UnsupportedVersionError(BitstreamError):
    """Report a file written in a format version, method or coder that this release does not read."""


class MismatchError(CacheGenError):
    """Refuse to combine files, models, contexts or configurations that do not belong together."""

    exit_code = 5


class BackendUnavailableError(CacheGenError):
    """Report that a device, a native module or an optional package that was asked for is not there."""

    exit_code = 6


class OutputError(CacheGenError):
    """Report an output that cannot be written, or that would replace something of the user's."""

    exit_code = 7


class OutputExistsError(OutputError):
    """Refuse to replace what has the name already, if only since a moment ago: another process may have put it."""
