"""What a file, a folder of chunks or a store holds, and whether all of it is whole: for `cachegen inspect`.

Every function returns a JSON object. `problems` lists what is missing or damaged, a line each; it is empty where all
checksums hold. Hashes are in hex, sizes in bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cachegen.errors import BitstreamError, InputError, MismatchError, StoreError
from cachegen.files import open_file
from cachegen.format.constants import CHUNK_MAGIC, TABLES_MAGIC
from cachegen.format.files import TABLES_NAME, chunk_name, read_whole
from cachegen.format.headers import ChunkHeader, DocumentHeader
from cachegen.kv_cache import check_planes, load_kv_cache
from cachegen.methods import load_profile, method_of, parse_chunk, parse_document
from cachegen.methods.base import Document
from cachegen.methods.profile_files import PROFILE_NAME
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.profiles import list_profiles, read_own_profile
from cachegen.store.index import STORE_INFO_NAME, read_info, read_manifest
from cachegen.store.manifest import Manifest
from cachegen.store.profiles import fetch_profile
from cachegen.store.store import Store, open_store

_BITS_OF_FP16 = 16


def inspect(path: str) -> dict[str, Any]:
    """Describe what is at a path or a store's URL.

    Args:
        path: a chunk file, a tables file, a KV file, a folder of run_encoding.py, a profile's folder, or a store: a
            folder, or an s3://, gs:// or az:// URL. A web server cannot be listed.

    Raises:
        InputError: there is nothing of ours.
        BitstreamError: a file on its own is damaged, or a folder's tables file.
        StoreError: the store cannot be read.
    """
    if "://" in path:
        return _inspect_store(open_store(path))
    place = Path(path)
    if place.is_dir():
        if (place / TABLES_NAME).exists():
            return _inspect_folder(place)
        if (place / STORE_INFO_NAME).exists():
            return _inspect_store(open_store(path))
        if (place / PROFILE_NAME).exists():
            return _describe_profile(place)
        raise InputError(
            f"{path}: neither {TABLES_NAME} nor {STORE_INFO_NAME} nor {PROFILE_NAME} is here: it is no folder of "
            "chunks, no store and no profile"
        )
    with open_file(place) as stream:
        magic = stream.read(len(CHUNK_MAGIC))
    if magic in (CHUNK_MAGIC, TABLES_MAGIC):
        return _inspect_file(place, is_chunk=magic == CHUNK_MAGIC)
    return _inspect_kv_file(place)


def inspect_profiles(places: Sequence[str]) -> dict[str, Any]:
    """Describe the profiles in some places.

    Args:
        places: profiles' folders, or as for `profile_finder`.

    Raises:
        InputError: there is none.
    """
    folders = [Path(place) for place in places if (Path(place) / PROFILE_NAME).exists()]
    folders += [path.parent for path in list_profiles(places)]
    if not folders:
        raise InputError(f"{', '.join(places)}: no profile is here; run_calibration.py makes one")
    profiles = [_describe_profile(folder) for folder in dict.fromkeys(folders)]
    problems = [problem for profile in profiles for problem in profile.pop("problems")]
    return {"kind": "profiles", "profiles": profiles, "problems": problems}


def _describe_profile(folder: Path) -> dict[str, Any]:
    """Describe a profile; one that can only decode is whole for that."""
    record: dict[str, Any] = {"kind": "profile", "path": str(folder)}
    try:
        try:
            profile = load_profile(folder, for_encoding=True)
        except InputError:  # without what only encoders read
            profile = load_profile(folder)
        profile.check()
    except (InputError, BitstreamError) as error:
        return record | {"problems": [str(error)]}
    return record | profile.describe() | {"problems": []}


def _inspect_file(path: Path, *, is_chunk: bool) -> dict[str, Any]:
    content = read_whole(path)
    try:
        header = parse_chunk(content).header if is_chunk else parse_document(content)
    except BitstreamError as error:
        raise error.at(path) from error
    record = {"kind": "chunk" if is_chunk else "tables", "path": str(path), **_describe(header), "bytes": len(content)}
    if isinstance(header, ChunkHeader):
        record |= {"level": header.level, "first_token": header.first_token, "num_tokens": header.num_tokens}
        record |= {"has_all_tokens": not header.num_absent}
        record |= {"num_streams": header.num_streams, "bytes_by_part": _parts(header), **_errors(header)}
    else:
        record |= _describe_document(header)
    return record | {"problems": []}


def _describe(header: DocumentHeader | ChunkHeader) -> dict[str, Any]:
    """Return what both kinds of file say."""
    return {
        "method": method_of(header).name,
        "coder": header.coder.name.lower(),
        "dtype": header.dtype.name.lower(),
        "num_layers": header.num_layers,
        "model_fingerprint": header.model_fingerprint.hex(),
        "profile_hash": header.profile_hash.hex() if any(header.profile_hash) else None,
    }


def _describe_document(header: DocumentHeader) -> dict[str, Any]:
    return {
        "num_tokens": sum(header.chunk_tokens),
        "num_cache_tokens": header.num_cache_tokens,
        "num_chunks": header.num_chunks,
        "num_levels": header.num_levels,
        "values_per_token": header.values_per_token,
        "is_whole_only": header.is_whole_only,
        "stored_share": sum(header.stored_values_of_chunks) / (header.num_covered_tokens * header.values_per_token),
        "token_hash": header.token_hash.hex(),
        "cache_hash": header.cache_hash.hex(),
    }


def _parts(header: ChunkHeader) -> dict[str, int]:
    """Split a chunk file's bytes by what they are for."""
    sections = header.payload_offset - header.header_bytes
    return {
        "header": header.header_bytes,
        "before_streams": sections,
        "payload": header.payload_bytes,
        "behind_streams": header.trailer_bytes,
    }


def _errors(header: ChunkHeader) -> dict[str, float | None]:
    """Return the errors of decoded values that the encoder measured, where the method records them."""
    largest, mean = header.recorded_errors if header.recorded_errors is not None else (None, None)
    return {"max_error": largest, "mean_error": mean}


def _inspect_folder(folder: Path) -> dict[str, Any]:
    document = EncodedFolder(folder, num_threads=1).document
    header = document.header
    problems: list[str] = []
    levels, num_bytes = [], header.header_bytes + header.tables_bytes + header.states_bytes
    parts = {"header": header.header_bytes, "tables": header.tables_bytes}
    if header.has_states:
        parts["states"] = header.states_bytes
    try:
        profile = read_own_profile(folder, header.profile_hash)
    except (InputError, BitstreamError) as error:
        profile, problems = {}, [str(error)]
    if profile:
        parts["profile"] = sum(map(len, profile.values()))
        num_bytes += parts["profile"]
    refined: dict[int, ChunkHeader] = {}
    num_values = sum(header.chunk_tokens) * header.values_per_token
    for level in header.levels:
        found: dict[int, ChunkHeader] = {}
        for index, chunk in _whole_chunks(folder, document, level, refined, problems):
            found[index] = chunk
            for name, size in _parts(chunk).items():
                parts[name] = parts.get(name, 0) + size
            num_bytes += chunk.file_bytes
        refined = found
        is_whole = len(found) == header.num_chunks
        errors = [chunk.recorded_errors for chunk in found.values() if chunk.recorded_errors is not None]
        levels.append(
            {
                "level": level,
                "num_chunks": len(found),
                "bytes": sum(chunk.file_bytes for chunk in found.values()),
                "bits_per_value": 8 * num_bytes / num_values if is_whole else None,
                "ratio_vs_fp16": _BITS_OF_FP16 * num_values / (8 * num_bytes) if is_whole else None,
                "max_error": max(largest for largest, _ in errors) if errors else None,
            }
        )
    return {
        "kind": "document",
        "path": str(folder),
        **_describe(header),
        **_describe_document(header),
        "bytes": num_bytes,
        "bytes_by_part": parts,
        "levels": levels,
        "problems": problems,
    }


def _whole_chunks(
    folder: Path, document: Document, level: int, refined: dict[int, ChunkHeader], problems: list[str]
) -> Iterator[tuple[int, ChunkHeader]]:
    """Yield the chunks of a level that are whole and the document's; add a line to `problems` for each other."""
    first_token = 0
    for index, num_tokens in enumerate(document.header.chunk_tokens):
        path = folder / chunk_name(index, level)
        check = functools.partial(
            document.check_place,
            level=level,
            first_token=first_token,
            num_tokens=num_tokens,
            refined=refined.get(index),
        )
        try:
            yield index, parse_chunk(read_whole(path), check=check).header
        except BitstreamError as error:
            problems.append(str(error.at(path)))
        except MismatchError as error:
            problems.append(f"{path}: {error}")
        except InputError as error:
            problems.append(str(error))
        first_token += num_tokens


def _inspect_kv_file(path: Path) -> dict[str, Any]:
    cache, metadata = load_kv_cache(path)
    problems = []
    try:
        cache_hash = check_planes(cache, metadata).hex()
    except BitstreamError as error:
        cache_hash, problems = None, [str(error)]
    return {
        "kind": "kv",
        "path": str(path),
        "dtype": str(cache.dtype).removeprefix("torch."),
        "num_layers": cache.num_layers,
        "num_tokens": cache.num_tokens,
        "model_id": metadata.model_id,
        "model_fingerprint": metadata.model_fingerprint,
        "num_layers_with_window": sum(window is not None for window in metadata.windows or ()),
        "cache_hash": cache_hash,
        "bytes": path.stat().st_size,
        "problems": problems,
    }


def _inspect_store(store: Store) -> dict[str, Any]:
    read_info(store)
    documents, problems = [], []
    for name in sorted(store.list("documents/")):
        try:
            documents.append({"name": name, **_describe_manifest(store, read_manifest(store, name), problems)})
        except (StoreError, BitstreamError) as error:
            problems.append(str(error))
    hashes = sorted({name.split("/")[1] for name in store.list("profiles/")})
    for profile_hash in hashes:
        try:
            fetch_profile(store, profile_hash)
        except (StoreError, BitstreamError) as error:
            problems.append(str(error))
    return {
        "kind": "store",
        "path": store.url,
        "documents": documents,
        "profile_hashes": hashes,
        "problems": problems,
    }


def _describe_manifest(store: Store, manifest: Manifest, problems: list[str]) -> dict[str, Any]:
    objects = {level.tables for level in manifest.levels} | {file for chunk in manifest.chunks for file in chunk.files}
    for entry in sorted(objects, key=lambda entry: entry.name):
        try:
            store.get_exactly(entry.name, entry.bytes, sha256=entry.sha256)
        except StoreError as error:
            problems.append(str(error))
    return {
        "model_id": manifest.model_id,
        "model_fingerprint": manifest.model_fingerprint,
        "dtype": manifest.dtype,
        "num_tokens": manifest.num_covered_tokens,
        "num_cache_tokens": manifest.num_cache_tokens,
        "num_chunks": len(manifest.chunks),
        "is_whole_only": manifest.is_whole_only,
        "bytes": sum(entry.bytes for entry in objects),
        "levels": [
            {
                "level": level.level,
                "method": level.method,
                "coder": level.coder,
                "refines": level.refines,
                "bits_per_value": level.bits_per_value,
                "ratio_vs_fp16": _BITS_OF_FP16 / level.bits_per_value,
                "kl": level.kl,
            }
            for level in manifest.levels
        ],
    }


def describe_lines(record: dict[str, Any]) -> Sequence[tuple[str, object]]:
    """Return the rows of the report for people: label and value."""
    rows = [(name.replace("_", " "), value) for name, value in record.items() if not isinstance(value, list | dict)]
    rows += [(name.replace("_", " "), f"{value:,} bytes") for name, value in record.get("bytes_by_part", {}).items()]
    for level in record.get("levels", ()):
        rows.append((f"level {level['level']}", _line_of(level)))
    for document in record.get("documents", ()):
        rows.append(("document", document["name"]))
        rows.append(("", _line_of({k: v for k, v in document.items() if k not in ("name", "levels")})))
        rows += [(f"level {level['level']}", _line_of(level)) for level in document["levels"]]
    for profile in record.get("profiles", ()):
        rows.append(("profile", _line_of({k: v for k, v in profile.items() if k != "kind"})))
    rows += [("profile", profile_hash) for profile_hash in record.get("profile_hashes", ())]
    return rows


def _line_of(record: dict[str, Any]) -> str:
    shown = {name: value for name, value in record.items() if value is not None and name != "level"}
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in shown.items())


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
