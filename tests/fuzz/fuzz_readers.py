"""Any bytes as a KV file, profile, config, manifest, a store's JSON, records: refused with an error of ours, or good.

Coverage-guided, with atheris; `make fuzz` runs each target. What is accepted must be usable: a cache is read to its
last value and is no larger than its file, a manifest packs to what it was.

Usage: fuzz_readers.py kv|profile|config|manifest|store|records [CORPUS] [libFuzzer's flags]
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["cachegen"]):
    from cachegen import kv_archive, kv_cache, windows
    from cachegen.comparison import datasets, scoring
    from cachegen.config import load_model_config
    from cachegen.errors import CacheGenError, StoreError
    from cachegen.format.files import MAX_FILE_BYTES
    from cachegen.methods import load_config
    from cachegen.methods.profile_files import PROFILE_NAME
    from cachegen.methods.transform import profile, profile_storage
    from cachegen.simulation import scenario, traces
    from cachegen.store import manifest
    from cachegen.store.catalog import find_document

import torch
from harness import fuzz, json_of, json_seeds

ROOT = Path(__file__).resolve().parents[2]
# Files are read by name: in memory, where there is such a place.
FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None, prefix="fuzz-"))

# --- KV files ---------------------------------------------------------------------------------------------------------


@functools.cache
def kv_members() -> dict[str, bytes]:
    """The members of a small KV file, the pickle first."""
    cache = kv_cache.from_planes([torch.arange(12.0).reshape(3, 2, 2).half() + i for i in range(4)])
    rotary = kv_cache.RotaryEmbedding("rotary_emb.inv_freq", "default", (1.0,), 1.0)
    ids = torch.tensor([5, 6, 7], dtype=torch.int32)
    shown = (windows.Window("sliding", 2), None)
    metadata = kv_cache.ContextMetadata("m", "ab" * 32, ids, (rotary,), 512, windows=shown)
    kv_cache.save_kv_cache(FOLDER / "good", cache, metadata)
    with zipfile.ZipFile(FOLDER / "good") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def build_archive(pickle: bytes) -> bytes:
    """A zip with another pickle: members where torch.save puts them, checksums right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in kv_members().items():
            member = zipfile.ZipInfo(name)
            num_padding = -(stream.tell() + 34 + len(name)) % 64
            member.extra = struct.pack("<HH", 0xCAFE, num_padding) + bytes(num_padding)
            archive.writestr(member, pickle if name.endswith("data.pkl") else content)
    return stream.getvalue()


def test_kv(data: bytes) -> None:
    if not data:
        return
    content = data[1:] if data[0] % 4 == 0 else build_archive(data[1:])
    (FOLDER / "kv").write_bytes(content)
    try:
        cache, metadata = kv_cache.load_kv_cache(FOLDER / "kv")
    except CacheGenError as error:
        check_message(error, FOLDER / "kv")
        kv_archive.is_damaged_kv_file(FOLDER / "kv")
        return
    if sum(plane.numel() * plane.element_size() for plane in cache.planes) > len(content):
        raise AssertionError("the cache is larger than its file")
    kv_cache.hash_planes(cache)
    if (len(metadata.token_ids), str(metadata.model_fingerprint)) != (cache.num_tokens, metadata.model_fingerprint):
        raise AssertionError("the metadata is not the cache's")


def kv_seeds() -> dict[str, bytes]:
    pickle = next(content for name, content in kv_members().items() if name.endswith("data.pkl"))
    return {
        "pickle": b"\1" + pickle,
        "file": b"\0" + (FOLDER / "good").read_bytes(),
        "zip": b"\0" + build_archive(pickle),
    }


def check_message(error: CacheGenError, path: Path) -> None:
    if str(path) not in str(error) or len(str(error)) > 2000:  # the scripts make one line of any
        raise AssertionError(f"not a message that names the file: {str(error)[:500]!r}")


# --- profiles ---------------------------------------------------------------------------------------------------------


@functools.cache
def good_profile() -> tuple[dict[str, Any], dict[str, bytes]]:
    """The record of a small profile, and its tensors' files."""
    groups = []
    for first_layer in (0, 1):
        matrix = torch.arange(32.0).reshape(4, 8)
        logs = torch.tensor([3, 2, 2, -1], dtype=torch.int16)
        groups.append(profile.TransformGroup(first_layer, 1, torch.zeros(8), matrix.half(), logs, matrix.T.half()))
    points = tuple(profile.CurvePoint(step, bits, kl) for step, bits, kl in ((16, 1.0, 0.1), (0, 2.0, 0.01)))
    rotary = kv_cache.RotaryEmbedding("rotary_emb.inv_freq", "default", (1.0,), 1.0)
    made = profile.Profile("ab" * 32, (rotary,), ((2, 2),) * 4, tuple(groups), points, {"note": "made for fuzzing"})
    profile_storage.save_profile(FOLDER / "profile", made)
    record = json.loads((FOLDER / "profile" / PROFILE_NAME).read_text())
    names = (profile_storage.SYNTHESIS_NAME, profile_storage.ANALYSIS_NAME)
    return record, {name: (FOLDER / "profile" / name).read_bytes() for name in names}


def test_profile(data: bytes) -> None:
    record, tensors = good_profile()
    if data[:1] and data[0] % 4 == 1:  # other tensors, whose hash the record names
        content = data[1:]
        first, second = record["groups"]
        begin = min(record["vectors_bytes"], len(content))
        middle = min(begin + first["matrix_bytes"], len(content))
        groups = [first | {"matrix_bytes": middle - begin}, second | {"matrix_bytes": len(content) - middle}]
        hashes = {**record["sha256"], profile_storage.SYNTHESIS_NAME: hashlib.sha256(content).hexdigest()}
        record = {**record, "vectors_bytes": begin, "groups": groups, "sha256": hashes}
        (FOLDER / "profile" / profile_storage.SYNTHESIS_NAME).write_bytes(content)
        text = json.dumps(record).encode()
    else:
        (FOLDER / "profile" / profile_storage.SYNTHESIS_NAME).write_bytes(tensors[profile_storage.SYNTHESIS_NAME])
        text = json_of(data, record)
    (FOLDER / "profile" / PROFILE_NAME).write_bytes(text)
    try:
        loaded = profile_storage.load_profile(FOLDER / "profile", for_encoding=True)
        loaded.check()
    except CacheGenError as error:
        check_message(error, FOLDER / "profile")
        return
    assert loaded.num_layers == 2 and loaded.rope_hash
    if len(loaded.curve) > 1:
        loaded.choose_step(kl=0.05)
        loaded.expect(3)


def profile_seeds() -> dict[str, bytes]:
    record, tensors = good_profile()
    return {**json_seeds(profile=record), "tensors": b"\1" + tensors[profile_storage.SYNTHESIS_NAME]}


# --- configs: quantization, model, levels and speeds, traces ----------------------------------------------------------

CONFIGS: list[tuple[str, Callable[[Path], object]]] = [
    ("config/quantization_tiny.json", load_config),
    ("config/transform_tiny_levels.json", load_config),
    ("config/uniform_4bit.json", load_config),
    ("config/mistral_7b.json", load_model_config),
    ("config/adaptation/levels_small_model.json", scenario.load_level_curves),
    ("config/adaptation/models.json", lambda path: scenario.load_machine(path, "mistral-7b", "a40")),
]


@functools.cache
def config_record(index: int) -> Any:
    return json.loads((ROOT / CONFIGS[index][0]).read_text())


def test_config(data: bytes) -> None:
    if not data:
        return
    index = data[0] % (len(CONFIGS) + 1)
    if index == len(CONFIGS):
        load, text = traces.load_trace, data[1:]
    else:
        load, text = CONFIGS[index][1], json_of(data[1:], config_record(index))
    (FOLDER / "config.json").write_bytes(text)
    try:
        load(FOLDER / "config.json")
    except CacheGenError as error:
        check_message(error, FOLDER / "config.json")


def config_seeds() -> dict[str, bytes]:
    seeds = {}
    for index in range(len(CONFIGS)):
        for name, content in json_seeds(record=config_record(index)).items():
            seeds[f"{index}_{name}"] = bytes([index]) + content
    trace = b'{"name": "x", "first_byte_seconds": [0.1]}\n{"seconds": 1, "gbps": 2.5}\n'
    return {**seeds, "trace": bytes([len(CONFIGS)]) + trace}


# --- manifests, and the other JSON of a store -------------------------------------------------------------------------

TOKEN_IDS = torch.arange(40, dtype=torch.int32)
HASHES = kv_cache.hash_token_prefixes(TOKEN_IDS, [16, 32])


@functools.cache
def good_manifest() -> dict[str, Any]:
    stored = {"bytes": 100, "sha256": "cd" * 32}
    level = {"refines": None, "method": "cachegen", "coder": "rans", "bits_per_value": 3.0, "kl": 0.1}
    levels = [{"level": n, **level, "tables": {"name": f"tables/{n}", **stored}} for n in (1, 2)]
    files = [{"name": f"chunks/{n}", **stored} for n in (1, 2)]
    chunks = [{"first_token": 16 * n, "num_tokens": 16, "token_hash": HASHES[n], "files": files} for n in range(2)]
    return {
        "format": manifest.MANIFEST_FORMAT, "version": manifest.MANIFEST_VERSION, "model_id": "m",
        "model_fingerprint": "ab" * 32, "rope_hash": "ef" * 32, "dtype": "float16", "num_cache_tokens": 39,
        "token_hash": "cd" * 32, "prefill_block_size": 512, "values_per_token": 16, "levels": levels, "chunks": chunks,
        "first_stored": [0, 20],
    }  # fmt: skip


def test_manifest(data: bytes) -> None:
    try:
        found = manifest.unpack_manifest(json_of(data, good_manifest()), "address")
    except CacheGenError as error:
        check_message(error, Path("address"))
        return
    if manifest.unpack_manifest(manifest.pack_manifest(found)) != found:
        raise AssertionError("a manifest is not what packing it gives")
    if any(size.bytes > MAX_FILE_BYTES for chunk in found.chunks for size in chunk.files):
        raise AssertionError("a file of any size was accepted")


class FuzzedStore:
    """A store whose every object is what the input says."""

    def __init__(self, objects: Mapping[str, bytes], default: bytes | None) -> None:
        self._objects, self._default = objects, default

    def describe(self, name: str) -> str:
        return f"store/{name}"

    def get(self, name: str, max_bytes: int, **_: object) -> bytes:
        kind = name.split("/")[0]
        content = self._objects.get(kind, self._default)
        if content is None or len(content) > max_bytes:
            raise StoreError(f"{name}: no such object", is_missing=True)
        return content

    def exists(self, name: str, **_: object) -> bool:
        return self._default is not None or "prefixes" in self._objects


STORE_INFO = {"format": "cachegen-store", "version": 1, "tokens_per_block": 16}
POINTER = {"manifest": "documents/x.json"}


def test_store(data: bytes) -> None:
    if not data:
        return
    kinds = {"store.json": STORE_INFO, "prefixes": POINTER, "documents": good_manifest()}
    objects = {kind: json.dumps(record).encode() for kind, record in kinds.items()}
    changed = list(kinds)[data[0] % 3]
    objects[changed] = json_of(data[1:], kinds[changed])
    store: Any = FuzzedStore(objects, b"" if data[0] & 64 else None)
    try:
        found = find_document(store, TOKEN_IDS, model_fingerprint="ab" * 32, rope_hash="ef" * 32)
    except CacheGenError as error:
        if "\n" in str(error):
            raise AssertionError("not one line") from error
        return
    if found is not None and not 0 <= found.num_chunks <= len(found.manifest.chunks):
        raise AssertionError("more chunks are shared than there are")


def store_seeds() -> dict[str, bytes]:
    seeds = {}
    for number, record in enumerate((STORE_INFO, POINTER, good_manifest())):
        for name, content in json_seeds(record=record).items():
            seeds[f"{number}_{name}"] = bytes([number]) + content
    return seeds


# --- records of data sets ---------------------------------------------------------------------------------------------

RECORDS: tuple[dict[str, Any], ...] = (
    {"prompt": "a", "topics": ["b", "c"]},
    {"prompt": "a", "expected_number": 1},
    {"prompt": "a", "label": "b"},
    {"prompt": "a", "answers": ["b"]},
    {"context": "a", "input": "b", "answers": ["c"]},
    {"input": "a", "outputs": ["b"], "answer_prefix": "c"},
)


def test_records(data: bytes) -> None:
    if not data:
        return
    content = data[1:] if data[0] >= len(RECORDS) else json_of(data[1:], RECORDS[data[0]])
    (FOLDER / "records.jsonl").write_bytes(content)
    try:
        contexts = datasets.read_contexts(FOLDER / "records.jsonl")
    except CacheGenError as error:
        check_message(error, FOLDER / "records.jsonl")
        return
    for context in contexts:
        (question,) = context.questions
        (context.text + context.answer_prefix).encode()
        for prediction in (question.answer, context.text):
            if not 0 <= scoring.METRICS[question.metric](prediction, question.all_answers) <= 1 + 1e-9:
                raise AssertionError("a score is not from 0 to 1")


def records_seeds() -> dict[str, bytes]:
    seeds = {"file": b"\xff" + b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)}
    for index, record in enumerate(RECORDS):
        for name, content in json_seeds(record=record).items():
            seeds[f"{index}_{name}"] = bytes([index]) + content
    return seeds


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], Mapping[str, bytes]], int]] = {
    "kv": (test_kv, kv_seeds, 8192),
    "profile": (test_profile, profile_seeds, 4096),
    "config": (test_config, config_seeds, 4096),
    "manifest": (test_manifest, lambda: json_seeds(manifest=good_manifest()), 4096),
    "store": (test_store, store_seeds, 4096),
    "records": (test_records, records_seeds, 4096),
}


def main() -> None:
    test_one_input, seeds, max_len = TARGETS[sys.argv.pop(1)]
    fuzz(test_one_input, seeds(), max_len)


if __name__ == "__main__":
    main()
