"""The text whose cache is computed, encoded and used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cachegen.errors import InputError
from cachegen.files import read_file

MAX_CONTEXT_BYTES = 1 << 26  # as many tokens, about, as a chunk may have


def read_context(path: Path) -> str:
    """Read a context: a file, or what comes through a pipe until its end (`/dev/stdin`, `<(command)`).

    Raises:
        InputError: there is no such file, it is a folder or a device, it is too large, it is not UTF-8 text, or it is
            empty.
    """
    content = (
        _read_pipe(path)
        if _is_pipe(path)
        else read_file(path, MAX_CONTEXT_BYTES, kind="context file", hint="`path_to_context`")
    )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    if not text:
        raise InputError(f"{path}: is empty; a context needs at least two tokens")
    return text


def _is_pipe(path: Path) -> bool:
    """Tell whether reading ends when whoever is at the other side says so: a pipe, or a terminal as standard input."""
    try:
        status = os.stat(path)
        if stat.S_ISCHR(status.st_mode) and os.isatty(0):
            return os.path.samestat(status, os.fstat(0))
        return stat.S_ISFIFO(status.st_mode)
    except (OSError, ValueError):
        return False


def _read_pipe(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            content = stream.read(MAX_CONTEXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_CONTEXT_BYTES:
        raise InputError(f"{path}: sends more than the {MAX_CONTEXT_BYTES} bytes that a context may have")
    return content
