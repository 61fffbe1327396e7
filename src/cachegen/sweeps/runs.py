"""One run of a sweep: the scripts it calls, and what is kept of what they say.

A run's record holds only what is the same whenever and wherever it runs; times go beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachegen.errors import CacheGenError
from cachegen.files import read_file, write_file
from cachegen.kv_cache import load_kv_cache
from cachegen.sweeps.grid import Flags, Run, resolve_paths
from cachegen.versions import collect_versions

MAX_RECORD_BYTES = 64 << 20
_DOC_ID = "0"
_KV_NAME = f"test_kv_{_DOC_ID}.pkl"
_INHERITED = ("model_id", "gguf_file", "path_to_context")  # that decoding takes from the prefill
# Of what the scripts' JSON says: what depends on the machine, the moment, or where files are.
_NOT_KEPT = frozenset(
    {
        "stage",
        "config",
        "versions",
        "device",
        "decoding_device",
        "threads",
        "output_path",
        "num_reused_chunks",
        "repaired_files",
        "chunks",
    }
)


@dataclass(frozen=True)
class Place:
    """Where a sweep's scripts are and its files go.

    Attributes:
        scripts: the folder of main.py and the others.
        working: the folder that relative paths of flags begin at.
        output: the sweep's own.
        keeps_files: whether encoded files stay there.
    """

    scripts: Path
    working: Path
    output: Path
    keeps_files: bool = False

    def record_of(self, key: str) -> Path:
        """Return the path of a run's record."""
        return self.output / "runs" / f"{key}.json"

    def times_of(self, key: str) -> Path:
        """Return the path of a run's times."""
        return self.output / "times" / f"{key}.json"


def hash_run(run: Run, identities: Mapping[Path, str], place: Place) -> str:
    """Return a name for a run and all that it reads, 16 hex digits.

    Args:
        identities: of `resolve_paths` of all runs, from `identify`.
    """
    paths = {name: identities[path] for name, path in resolve_paths(run, place.working).items()}
    content = {
        "flags": run.flags,
        "is_decoded": run.is_decoded,
        "files": paths,
        "version": collect_versions()["cachegen"],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def identify(path: Path) -> str:
    """Return what tells a file or folder that a flag names from another of its name.

    A KV file is known by the hash in it. Of a folder all files count, by name, size and content; large ones by their
    time of change.
    """
    if path.is_dir():
        lines = [f"{child.relative_to(path)} {identify(child)}" for child in sorted(path.rglob("*")) if child.is_file()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    stat = path.stat()
    if path.suffix == ".pkl":
        metadata = load_kv_cache(path)[1]
        return f"{metadata.cache_hash} {metadata.model_fingerprint} {metadata.rope_hash}"
    if stat.st_size > MAX_RECORD_BYTES:
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prefill_folder(run: Run, identities: Mapping[Path, str], place: Place) -> Path:
    """Return where the KV file of a run's prefill is, which runs of the same prefill share."""
    return place.output / "kv" / hash_run(Run(prefill=run.prefill), identities, place)


def do_prefill(task: tuple[Run, Path, Place]) -> str | None:
    """Prefill a context, unless it is there; return what went wrong."""
    run, folder, place = task
    flags = {**run.prefill, "save_dir": str(folder), "doc_id": _DOC_ID}
    return _call(place, "main.py", flags)[1]


def do_run(task: tuple[str, Run, Path | None, Place]) -> tuple[str, str | None]:
    """Encode, and decode where that is asked for, and keep the record.

    Args:
        task: the run's key, the run, the folder of its KV file where it has a prefill, and the place.

    Returns:
        The key, and what went wrong; None where nothing did. A run that went wrong keeps no record.
    """
    key, run, kv_folder, place = task
    # The same folder whenever it is run: an interrupted encoding resumes.
    files = place.output / "files" / key
    path_to_kv = run.encode.get("path_to_kv") if kv_folder is None else str(kv_folder / _KV_NAME)
    record: dict[str, Any] = {"key": key, "flags": run.flags}
    times: dict[str, Any] = {"key": key}
    flags = {**run.encode, "path_to_kv": path_to_kv, "output_path": str(files)}
    said, error = _call(place, "run_encoding.py", flags)
    if error is None:
        record["encode"], times["encode"] = _part(said)
    if error is None and run.is_decoded:
        inherited = {name: run.prefill[name] for name in _INHERITED if name in run.prefill}
        flags = {**inherited, **run.decode, "path_to_encoded_kv": str(files)}
        said, error = _call(place, "run_decoding_disk.py", flags)
        if error is None:
            record["decode"], times["decode"] = _part(said)
    if not place.keeps_files:
        shutil.rmtree(files, ignore_errors=True)
    if error is not None:
        return key, error
    write_json(place.times_of(key), times)
    write_json(place.record_of(key), record)
    return key, None


def read_record(path: Path) -> dict[str, Any] | None:
    """Return what `do_run` wrote; None where there is nothing, or something else."""
    try:
        found = json.loads(read_file(path, MAX_RECORD_BYTES))
    except (CacheGenError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("key") == path.stem else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(content, sort_keys=True) + "\n").encode())


def _part(said: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is the same in each run of a script, and the times it took."""
    times = {name: value for name, value in said.items() if name == "seconds" or name.endswith("_seconds")}
    kept = {name: value for name, value in said.items() if name not in _NOT_KEPT and name not in times}
    return {name: value for name, value in kept.items() if not name.startswith("beats_")}, times


def _call(place: Place, script: str, flags: Flags | Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Run a script, and return its JSON and its error's line."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False and value is not None:
            arguments += [f"--{name}", str(value)]
    command: Sequence[str] = [sys.executable, str(place.scripts / script), *arguments, "--json", "-", "--quiet"]
    done = subprocess.run(command, cwd=place.working, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {}, f"{script}: {lines[-1].removeprefix('error: ')}"
    return json.loads(done.stdout), None
