"""The text whose cache is computed, encoded and used."""

from __future__ import annotations

from pathlib import Path

from cachegen.errors import InputError


def read_context(path: Path) -> str:
    """Read a context.

    Raises:
        InputError: there is no such file, it is not UTF-8 text, or it is empty.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such context file (--path_to_context)")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    if not text:
        raise InputError(f"{path}: is empty; a context needs at least two tokens")
    return text
