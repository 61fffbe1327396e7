"""What the Python fuzz targets share: seeds into a corpus, libFuzzer's flags, and JSON changed where it has fields.

A target says what inputs it begins with and runs one input; anything but an error of ours that it lets through is a
finding. JSON targets take an input as text in one case of four, and otherwise as a list of edits of a good record, so
that most inputs get past the parser to the checks of fields.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import atheris

# What a field may become: every type, both ends of every range, and what Python takes for a number.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 15, 16, 255, 256, 4096, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 63, 1 << 64, 10**400, -(1 << 64), 0.0, -0.0, 0.5, 1.5, 1e-300, 1e300, 1e308, float("inf"),
    float("nan"), "", "0", "1", "x", "ab" * 32, "AB" * 32, "zz" * 32, "../x", "a/../b", "documents/x",
    "/etc/passwd", "\0", "\ud800", "x" * 5000, [], [[]], [0], [1, 2], ["x"], [None] * 300, {}, {"x": 1},
    [[1, 2]] * 4, [{}], {"": None},
]  # fmt: skip


MAX_EDITS, MAX_PLACES = 6, 1 << 10  # a copy of a copy of a copy is soon larger than memory


def fuzz(test_one_input: Callable[[bytes], None], seeds: Mapping[str, bytes], max_len: int) -> None:
    """Run a target with the process's flags: a corpus's folder, and libFuzzer's own."""
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    if folders:
        folders[0].mkdir(parents=True, exist_ok=True)
        for name, content in seeds.items():
            (folders[0] / f"seed_{name}").write_bytes(content)
    atheris.Setup([sys.argv[0], f"-max_len={max_len}", *sys.argv[1:]], test_one_input)
    atheris.Fuzz()


def places(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value that holds another."""
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def edit(record: Any, data: bytes) -> Any:
    """Change a JSON value: three bytes say where, what happens there, and with which value."""
    record = copy.deepcopy(record)
    for at in range(0, min(len(data), 3 * MAX_EDITS) - 2, 3):
        where, how, which = data[at : at + 3]
        found = list(itertools.islice(places(record), MAX_PLACES))
        if not found:
            break
        *parents, last = found[(where | (how & 0xC0) << 2) % len(found)]
        target = record
        for parent in parents:
            target = target[parent]
        action, value = how & 7, VALUES[which % len(VALUES)]
        if action == 0:
            del target[last]
        elif action == 1 and isinstance(target, list):
            target.append(copy.deepcopy(target[last]))
        elif action == 2 and isinstance(target, list):
            target[last:last] = [copy.deepcopy(value)]
        elif action == 3 and isinstance(target, dict):
            target[f"{last}x"] = target.pop(last)
        elif action == 4 and isinstance(target[last], int):
            target[last] += which - 128
        else:
            target[last] = copy.deepcopy(value)
    return record


def json_of(data: bytes, record: Any) -> bytes:
    """Return what an input is as JSON: itself, or `record` with its edits."""
    if data[:1] and data[0] % 4 == 0:
        return data[1:]
    return json.dumps(edit(record, data[1:])).encode("utf-8", "surrogatepass")


def json_seeds(**records: Any) -> dict[str, bytes]:
    """Begin with the good records as text and as no edits at all."""
    seeds = {f"{name}_text": b"\0" + json.dumps(record).encode() for name, record in records.items()}
    return {**seeds, "no_edits": b"\1", "an_edit": b"\1\0\0\0", "edits": b"\1" + bytes(range(60))}
