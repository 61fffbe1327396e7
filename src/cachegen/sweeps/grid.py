"""A sweep's YAML file: which flags each script is given, and every combination of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from cachegen.errors import ConfigError
from cachegen.files import read_file

STAGES = ("prefill", "encode", "decode")
MAX_RUNS = 100_000
MAX_GRID_BYTES = 1 << 20
_SET_BY_SWEEP = frozenset(
    {"json", "quiet", "overwrite", "output_path", "save_dir", "doc_id", "path_to_encoded_kv", "help", "version"}
)

Value: TypeAlias = str | int | float | bool
Flags: TypeAlias = Mapping[str, Value]


@dataclass(frozen=True)
class Run:
    """One combination.

    Attributes:
        prefill, encode, decode: flags of main.py, run_encoding.py and run_decoding_disk.py, without dashes; a stage
            without flags may still be run. True stands for a flag without a value.
        is_decoded: whether run_decoding_disk.py is run.
    """

    prefill: Flags = field(default_factory=dict)
    encode: Flags = field(default_factory=dict)
    decode: Flags = field(default_factory=dict)
    is_decoded: bool = False

    @property
    def flags(self) -> dict[str, Value]:
        """All flags by the name of their stage: `encode.chunk_size`."""
        return {f"{stage}.{name}": value for stage in STAGES for name, value in getattr(self, stage).items()}


@dataclass(frozen=True)
class Grid:
    """A parsed file.

    Attributes:
        runs: in the file's order, the last flag changing fastest.
        varying: names of flags, as in `Run.flags`, that have several values.
    """

    runs: tuple[Run, ...]
    varying: tuple[str, ...]


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Read a sweep's file.

    Raises:
        InputError: it cannot be read.
        ConfigError: it is no sweep's, naming what is wrong.
    """
    content = read_file(path, MAX_GRID_BYTES, kind="sweep file", hint="docs/sweeps.md says what is in it")
    try:
        parsed = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())[:200]}") from error
    try:
        return _parse(parsed)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _parse(content: Any) -> Grid:
    if not isinstance(content, dict):
        raise ConfigError(f"must have some of {', '.join(STAGES)} and `exclude`")
    unknown = sorted(str(name) for name in set(content) - {*STAGES, "exclude"})
    if unknown:
        raise ConfigError(f"`{unknown[0]}` is none of {', '.join(STAGES)} and `exclude`")
    axes = {
        f"{stage}.{name}": values for stage in STAGES for name, values in _read_stage(stage, content.get(stage)).items()
    }
    if "encode.path_to_kv" in axes and any(name.startswith("prefill.") for name in axes):
        raise ConfigError("give `prefill`, or `path_to_kv` of `encode`, not both")
    if "encode.path_to_kv" not in axes and "prefill.path_to_context" not in axes:
        raise ConfigError("give `path_to_context` of `prefill`, or `path_to_kv` of `encode`")
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MAX_RUNS:
        raise ConfigError(f"makes {count} runs, more than {MAX_RUNS}")
    excluded = [_read_excluded(item, axes) for item in _as_list(content.get("exclude", []))]
    is_decoded = "decode" in content
    runs = []
    for combination in itertools.product(*axes.values()):
        flags = dict(zip(axes, combination, strict=True))
        if not any(all(flags[name] == value for name, value in item.items()) for item in excluded):
            runs.append(_make_run(flags, is_decoded))
    if not runs:
        raise ConfigError("leaves nothing to run")
    return Grid(tuple(runs), tuple(name for name, values in axes.items() if len(values) > 1))


def _make_run(flags: Flags, is_decoded: bool) -> Run:
    of_stage = {
        stage: {name.split(".", 1)[1]: value for name, value in flags.items() if name.startswith(f"{stage}.")}
        for stage in STAGES
    }
    return Run(**of_stage, is_decoded=is_decoded)


def _read_stage(stage: str, content: Any) -> dict[str, list[Value]]:
    """Return the values of each flag of a stage."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"`{stage}` must have flags and their values")
    found: dict[str, list[Value]] = {}
    for name, given in content.items():
        if not isinstance(name, str) or not name.isidentifier() or name in _SET_BY_SWEEP:
            raise ConfigError(f"`{stage}`: {name!r} is no flag that a sweep can set: name it without its dashes")
        values = _as_list(given)
        if not values or not all(isinstance(value, (str, int, float, bool)) for value in values):
            raise ConfigError(f"`{stage}`: `{name}` must be a text, a number, true or false, or a list of these")
        if len(set(map(repr, values))) != len(values):
            raise ConfigError(f"`{stage}`: `{name}` has a value twice")
        found[name] = values
    return found


def _read_excluded(content: Any, axes: Mapping[str, Sequence[Value]]) -> dict[str, Value]:
    """Return what a combination must have to be left out."""
    if not isinstance(content, dict) or not content:
        raise ConfigError("`exclude` must be a list of flags with one value each")
    found: dict[str, Value] = {}
    for name, value in content.items():
        matching = [axis for axis in axes if axis == name or axis.split(".", 1)[1] == name]
        if len(matching) != 1 or value not in axes[matching[0]]:
            raise ConfigError(f"`exclude`: {name}: {value!r} is in no run, or in flags of two scripts")
        found[matching[0]] = value
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def resolve_paths(run: Run, folder: Path) -> dict[str, Path]:
    """Return which of a run's values are names of files or folders, as seen from a folder."""
    named = {name: folder / value for name, value in run.flags.items() if isinstance(value, str) and value}
    return {name: path for name, path in named.items() if path.exists()}
