"""A folder of contexts into files and a store: prefilled and encoded in one go, several at a time.

Each process loads the model once. No KV file is written. A context that is done is known by its record, which names all
that its files depend on.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cachegen.errors import CacheGenError, InputError
from cachegen.inspection import inspect
from cachegen.pipeline.context import read_context
from cachegen.sweeps.runs import identify, read_record, write_json
from cachegen.versions import collect_versions

_RECORDS = "records"
_DOCUMENTS = "documents"


@dataclass(frozen=True)
class CorpusSettings:
    """What all contexts are encoded with.

    Attributes:
        model_id, dtype, device: as of main.py.
        config: path of a quantization config.
        profile: folder of a profile; None for what the config needs and is found.
        chunk_tokens, block_size: tokens per chunk, and per step of the prefill.
        output: folder of the encoded documents and the records.
        store: folder or URL of a store that they are published to; None for none.
        num_threads: of each worker.
    """

    model_id: str
    dtype: str
    device: str
    config: str
    profile: str | None
    chunk_tokens: int
    block_size: int
    output: str
    store: str | None
    num_threads: int

    def record_of(self, name: str) -> Path:
        """Return the path of a context's record."""
        return Path(self.output) / _RECORDS / f"{name}.json"

    def folder_of(self, name: str) -> Path:
        """Return the folder of a context's encoded document."""
        return Path(self.output) / _DOCUMENTS / name


@dataclass(frozen=True)
class ContextTask:
    """One context.

    Attributes:
        path: of its text.
        name: of its document and record.
        identity: of text, model, config and settings.
    """

    path: str
    name: str
    identity: str
    settings: CorpusSettings


def find_tasks(folder: Path, settings: CorpusSettings, model_fingerprint: str) -> list[ContextTask]:
    """Return the contexts of a folder, its files `*.txt` by name.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise InputError(f"{folder}: no context files *.txt in this folder (`path_to_contexts`)")
    shared = {
        "settings": {name: value for name, value in asdict(settings).items() if name not in ("output", "num_threads")},
        "model_fingerprint": model_fingerprint,
        "files": [identify(Path(path)) for path in (settings.config, settings.profile) if path is not None],
        "versions": collect_versions(),
    }
    start = json.dumps(shared, sort_keys=True).encode()
    tasks = []
    for path in paths:
        identity = hashlib.sha256(start + read_context(path).encode()).hexdigest()
        tasks.append(ContextTask(str(path), path.stem, identity, settings))
    return tasks


def is_done(task: ContextTask) -> bool:
    """Tell whether a context's files are there, whole, and of what the task says."""
    record = read_record(task.settings.record_of(task.name))
    if record is None or record.get("identity") != task.identity:
        return False
    try:
        return not inspect(str(task.settings.folder_of(task.name)))["problems"]
    except CacheGenError:
        return False


def encode_context(task: ContextTask) -> tuple[str, str | None]:
    """Prefill a context, encode and publish it, and keep its record.

    Returns:
        Its name, and what went wrong; None where nothing did.
    """
    try:
        _encode(task)
    except (CacheGenError, MemoryError) as error:
        return task.name, f"{task.path}: {' '.join(str(error).split()) or 'out of memory'}"
    return task.name, None


def _encode(task: ContextTask) -> None:
    import torch

    from cachegen.api.compressing import compress, publish
    from cachegen.pipeline.frequencies import DEFAULT_ROOM, choose_frequencies
    from cachegen.pipeline.limits import check_context
    from cachegen.pipeline.prefill import prefill, tokenize

    settings = task.settings
    torch.set_num_threads(settings.num_threads)
    loaded = _load_model(settings.model_id, settings.dtype, settings.device)
    token_ids = tokenize(loaded, read_context(Path(task.path)))
    if len(token_ids) < 2:
        raise InputError(f"a context needs at least two tokens, has {len(token_ids)}")
    loaded = choose_frequencies(loaded, len(token_ids) + DEFAULT_ROOM)
    check_context(loaded, len(token_ids), "the context")
    # All but the last, with which generation begins, as main.py does.
    cached_ids = token_ids[:-1]
    compressed = compress(
        prefill(loaded, cached_ids, settings.block_size),
        cached_ids,
        loaded,
        settings.config,
        profile=settings.profile,
        chunk_tokens=settings.chunk_tokens,
        block_size=settings.block_size,
        device=settings.device,
        num_threads=settings.num_threads,
    )
    compressed.save(settings.folder_of(task.name), overwrite=True)
    if settings.store is not None:
        publish(settings.store, compressed)
    record = {
        "key": task.name,
        "identity": task.identity,
        "num_tokens": compressed.num_tokens,
        "num_values": compressed.num_values,
        "num_bytes": compressed.num_bytes,
    }
    write_json(settings.record_of(task.name), record)


@functools.lru_cache(maxsize=1)
def _load_model(model_id: str, dtype: str, device: str) -> Any:
    from cachegen.device import resolve_device, resolve_dtype
    from cachegen.pipeline.model import load_model

    return load_model(model_id, device=resolve_device(device), dtype=resolve_dtype(dtype))


def summarize(tasks: Sequence[ContextTask]) -> dict[str, Any]:
    """Return counts and sizes over the records of contexts that are done."""
    records = [read_record(task.settings.record_of(task.name)) for task in tasks]
    found = [record for record in records if record is not None]
    num_values, num_bytes = (sum(record[name] for record in found) for name in ("num_values", "num_bytes"))
    return {
        "num_contexts": len(tasks),
        "num_encoded": len(found),
        "num_tokens": sum(record["num_tokens"] for record in found),
        "num_bytes": num_bytes,
        "bits_per_value": 8 * num_bytes / num_values if num_values else None,
        "ratio_vs_fp16": 2 * num_values / num_bytes if num_bytes else None,
    }
