"""Which documents a store has: publishing one, and finding the one that covers the longest prefix of some tokens.

A store need not be able to list. Every `tokens_per_block` tokens of a published document, an object named by the hash
of all tokens up to there points to its manifest. Pointers of a document are written from the shortest on, so where one
exists, all shorter ones do, and the longest is found by bisection: log2(number of blocks) requests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cachegen import container
from cachegen.errors import BitstreamError, MismatchError, StoreError, UnsupportedVersionError
from cachegen.format import TablesHeader
from cachegen.kv_cache import ContextMetadata, hash_token_prefixes
from cachegen.manifest import (
    MAX_LEVELS,
    MAX_MANIFEST_BYTES,
    ChunkEntry,
    Level,
    Manifest,
    StoredObject,
    chunk_object,
    is_object_name,
    manifest_name,
    pack_manifest,
    tables_object,
    unpack_manifest,
)
from cachegen.store import Store
from cachegen.transform_format import TransformTablesHeader

STORE_INFO_NAME = "store.json"
STORE_FORMAT = "cachegen-store"
STORE_VERSION = 1
TOKENS_PER_BLOCK = 256
_MAX_SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class EncodedLevel:
    """One level to be published: the bytes of its tables file and of its chunk files, and what is known of its loss.

    Attributes:
        chunks: one file per chunk; read when asked for, so that a document need not fit into memory.
        refines: the level whose files these refine; None where they stand alone.
        kl: as in `manifest.Level`.
    """

    tables_file: bytes
    chunks: Sequence[Callable[[], bytes]]
    refines: int | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Published:
    """What publishing did.

    Attributes:
        num_written: objects that were not there yet.
        bytes_written: theirs.
    """

    manifest: Manifest
    name: str
    num_written: int
    bytes_written: int


@dataclass(frozen=True)
class FoundDocument:
    """A document that shares its beginning with some tokens.

    Attributes:
        num_chunks: the first chunks, all of whose tokens are shared.
    """

    manifest: Manifest
    address: str
    num_chunks: int


def publish_document(
    store: Store,
    levels: Sequence[EncodedLevel],
    metadata: ContextMetadata,
    progress: Callable[[int], object] | None = None,
) -> Published:
    """Put an encoded document into a store: objects, then the manifest, then the pointers to it.

    Whoever reads meanwhile, or after an interruption, sees the whole document or none of it.

    Args:
        levels: of the same tokens in the same chunks, the smallest first.
        metadata: of the saved cache, for its tokens.
        progress: called with the number of bytes of each chunk file.

    Raises:
        BitstreamError: a file is corrupt.
        MismatchError: the levels, or levels and metadata, do not belong together.
        OutputError: the store cannot be written.
    """
    writer = _Writer(store)
    writer.check_info()
    headers = [container.parse_tables(level.tables_file)[0] for level in levels]
    _check_together(headers, metadata)
    header = headers[0]
    stops = [sum(header.chunk_tokens[: i + 1]) for i in range(len(header.chunk_tokens))]
    hashes = hash_token_prefixes(metadata.token_ids, stops)
    descriptions, chunk_files = [], []
    for number, (level, level_header) in enumerate(zip(levels, headers, strict=True), 1):
        tables = tables_object(level.tables_file)
        writer.put(tables, level.tables_file)
        description, files = _publish_level(writer, number, level, level_header, tables, hashes, stops, progress)
        descriptions.append(description)
        chunk_files.append(files)
    manifest = Manifest(
        # A folder's path is its owner's business; a store may be public.
        model_id=Path(metadata.model_id).name if Path(metadata.model_id).is_absolute() else metadata.model_id,
        model_fingerprint=metadata.model_fingerprint,
        rope_hash=metadata.rope_hash,
        dtype=header.dtype.name.lower(),
        num_cache_tokens=header.num_cache_tokens,
        token_hash=header.token_hash.hex(),
        prefill_block_size=header.prefill_block_size,
        values_per_token=_values_per_token(header),
        levels=tuple(_sum_bits(descriptions)),
        chunks=tuple(
            ChunkEntry(stop - num_tokens, num_tokens, token_hash, files)
            for stop, num_tokens, token_hash, files in zip(
                stops, header.chunk_tokens, hashes, zip(*chunk_files, strict=True), strict=True
            )
        ),
    )
    content, name = pack_manifest(manifest), manifest_name(manifest)
    unpack_manifest(content)  # what we would refuse must not be written
    writer.put_bytes(name, content)
    writer.put_pointers(name, metadata, stops[-1])
    return Published(manifest, name, writer.num_written, writer.bytes_written)


def find_document(
    store: Store, token_ids: torch.Tensor, *, model_fingerprint: str, rope_hash: str
) -> FoundDocument | None:
    """Find the document with the longest whole-block prefix of a text; None where there is none of any length.

    Args:
        token_ids: integers `[num_tokens]`; the last one is not looked for, since generation begins with it.

    Raises:
        StoreError: the store cannot be read, or is none of ours.
        BitstreamError: the store's description, a pointer or the manifest is corrupt.
        MismatchError: the pointer leads to a document of another model or context.
    """
    tokens_per_block = _read_info(store)
    num_tokens = len(token_ids) - 1
    stops = list(range(tokens_per_block, num_tokens + 1, tokens_per_block))
    if num_tokens % tokens_per_block:
        stops.append(num_tokens)  # a document may end anywhere: its last pointer is at its end
    names = [_pointer_name(model_fingerprint, rope_hash, digest) for digest in hash_token_prefixes(token_ids, stops)]
    name = _find_whole(store, names[-1]) if names and num_tokens % tokens_per_block else None
    if name is None:
        low, found = 0, num_tokens // tokens_per_block + 1  # names[low - 1] exists, names[found - 1] does not
        while found - low > 1:
            middle = (low + found) // 2
            low, found = (middle, found) if store.exists(names[middle - 1]) else (low, middle)
        if low == 0:
            return None
        name = _read_pointer(store, names[low - 1])
    address = store.describe(name)
    manifest = unpack_manifest(store.get(name, MAX_MANIFEST_BYTES), address)
    for field, value, wanted in (
        ("model_fingerprint", manifest.model_fingerprint, model_fingerprint),
        ("rope_hash", manifest.rope_hash, rope_hash),
    ):
        if value != wanted:
            raise MismatchError(f"{address}: {field} is {value[:12]}, but the pointer to it was for {wanted[:12]}")
    return FoundDocument(manifest, address, count_shared_chunks(manifest, token_ids))


def _find_whole(store: Store, pointer: str) -> str | None:
    """Return the manifest of the document that ends where the text does, in one request; None where there is none."""
    try:
        return _read_pointer(store, pointer)
    except StoreError as error:
        if not error.is_missing:
            raise
        return None


def count_shared_chunks(manifest: Manifest, token_ids: torch.Tensor) -> int:
    """Return how many of a document's first chunks hold exactly the first tokens of a text, one token of it left."""
    stops = [chunk.end_token for chunk in manifest.chunks if chunk.end_token < len(token_ids)]
    hashes = hash_token_prefixes(token_ids, stops)
    differing = (i for i, digest in enumerate(hashes) if digest != manifest.chunks[i].token_hash)
    return next(differing, len(hashes))


class _Writer:
    """Puts objects and counts them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.num_written = self.bytes_written = 0

    def check_info(self) -> None:
        """Make a store of ours, or see that it is one."""
        content = _pack({"format": STORE_FORMAT, "version": STORE_VERSION, "tokens_per_block": TOKENS_PER_BLOCK})
        self.put_bytes(STORE_INFO_NAME, content)
        self._tokens_per_block = _read_info(self._store)

    def put(self, described: StoredObject, content: bytes) -> None:
        self.put_bytes(described.name, content)

    def put_bytes(self, name: str, content: bytes) -> None:
        if self._store.put(name, content):
            self.num_written += 1
            self.bytes_written += len(content)

    def put_pointers(self, manifest: str, metadata: ContextMetadata, num_tokens: int) -> None:
        """Point to a manifest every block of its tokens, the shortest prefix first, and at their end."""
        stops = [*range(self._tokens_per_block, num_tokens, self._tokens_per_block), num_tokens]
        for digest in hash_token_prefixes(metadata.token_ids, stops):
            name = _pointer_name(metadata.model_fingerprint, metadata.rope_hash, digest)
            self.put_bytes(name, _pack({"manifest": manifest}))


def _publish_level(
    writer: _Writer,
    number: int,
    level: EncodedLevel,
    header: TablesHeader | TransformTablesHeader,
    tables: StoredObject,
    hashes: Sequence[str],
    stops: Sequence[int],
    progress: Callable[[int], object] | None,
) -> tuple[Level, list[StoredObject]]:
    """Put a level's chunks; returns its description, with the bits of its own files only, and its objects."""
    files: list[StoredObject] = []
    description: Level | None = None
    for token_hash, stop, num_tokens, read in zip(hashes, stops, header.chunk_tokens, level.chunks, strict=True):
        content = read()
        try:
            chunk = container.parse_chunk(content).header
        except BitstreamError as error:
            raise error.at(f"level {number}, chunk {len(files)}") from error
        wanted = (token_hash, tables.sha256, stop - num_tokens, num_tokens)
        if (chunk.token_hash.hex(), chunk.tables_hash.hex(), chunk.first_token, chunk.num_tokens) != wanted:
            raise MismatchError(
                f"level {number}, chunk {len(files)}: is of another document than its tables file: encode again"
            )
        if description is None:
            method, coder = header.method.name.lower(), chunk.coder.name.lower()
            description = Level(number, level.refines, method, coder, tables, 0.0, level.kl)
        digest = hashlib.sha256(content).hexdigest()
        described = chunk_object(
            digest,
            len(content),
            model_fingerprint=header.model_fingerprint.hex(),
            token_hash=token_hash,
            level=description,
        )
        writer.put(described, content)
        files.append(described)
        if progress is not None:
            progress(len(content))
    if description is None:
        raise MismatchError(f"level {number}: has no chunks")
    num_values = stops[-1] * _values_per_token(header)
    bits = 8 * (tables.bytes + sum(file.bytes for file in files)) / num_values
    return Level(**{**vars(description), "bits_per_value": bits}), files


def _sum_bits(levels: Sequence[Level]) -> list[Level]:
    """Add to the bits of each level those of the levels that it refines, their shared tables once."""
    summed: list[Level] = []
    for level in levels:
        bits = level.bits_per_value + (summed[-1].bits_per_value if level.refines is not None else 0.0)
        summed.append(Level(**{**vars(level), "bits_per_value": bits}))
    return summed


def _check_together(headers: Sequence[TablesHeader | TransformTablesHeader], metadata: ContextMetadata) -> None:
    """Refuse levels of different contexts, models, cache shapes or chunk plans, and tokens that are not theirs."""
    if not 0 < len(headers) <= MAX_LEVELS:
        raise MismatchError(f"a document has 1 to {MAX_LEVELS} levels, got {len(headers)}")
    tokens = hash_token_prefixes(metadata.token_ids, [len(metadata.token_ids)])[0]
    first = headers[0]
    for number, header in enumerate(headers, 1):
        gates = [
            ("token_hash", header.token_hash.hex(), tokens),
            ("model_fingerprint", header.model_fingerprint.hex(), metadata.model_fingerprint),
            ("rope_hash", header.rope_hash.hex(), metadata.rope_hash),
            ("dtype", header.dtype, first.dtype),
            ("prefill_block_size", header.prefill_block_size, first.prefill_block_size),
            ("chunk_tokens", header.chunk_tokens, first.chunk_tokens),
            ("planes", _shapes(header), _shapes(first)),
        ]
        for field, found, wanted in gates:
            if found != wanted:
                raise MismatchError(
                    f"level {number}: {field} differs from that of level 1 or of the saved cache: "
                    "encode the same cache with the same --num_chunks and --chunk_size"
                )


def _shapes(header: TablesHeader | TransformTablesHeader) -> list[tuple[int, int]]:
    return [(plane.num_kv_heads, plane.head_dim) for plane in header.planes]


def _values_per_token(header: TablesHeader | TransformTablesHeader) -> int:
    return sum(plane.num_channels for plane in header.planes)


def _pointer_name(model_fingerprint: str, rope_hash: str, prefix_hash: str) -> str:
    return f"prefixes/{model_fingerprint[:16]}-{rope_hash[:16]}/{prefix_hash}.json"


def _pack(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _load_small(store: Store, name: str, fields: set[str]) -> dict[str, Any]:
    content = store.get(name, _MAX_SMALL_BYTES)
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict) or set(loaded) != fields:
        raise BitstreamError(f"must be a JSON object of {', '.join(sorted(fields))}", path=store.describe(name))
    return loaded


def _read_info(store: Store) -> int:
    """Return the store's tokens per block."""
    address = store.describe(STORE_INFO_NAME)
    try:
        info = _load_small(store, STORE_INFO_NAME, {"format", "version", "tokens_per_block"})
    except StoreError as error:
        if not error.is_missing:
            raise
        message = f"{address}: no such object: not a store of cachegen (fill one with run_publishing.py)"
        raise StoreError(message, is_missing=True) from None
    if info["format"] != STORE_FORMAT:
        raise BitstreamError(f"must be {STORE_FORMAT}", path=address, field="format")
    if info["version"] != STORE_VERSION:
        problem = f"{str(info['version'])[:20]} is not supported, this release reads {STORE_VERSION}"
        raise UnsupportedVersionError(problem, path=address, field="version")
    tokens_per_block = info["tokens_per_block"]
    if type(tokens_per_block) is not int or not 16 <= tokens_per_block <= 1 << 20:
        raise BitstreamError("must be an integer, 16 to 1048576", path=address, field="tokens_per_block")
    return tokens_per_block


def _read_pointer(store: Store, name: str) -> str:
    target = _load_small(store, name, {"manifest"})["manifest"]
    if not is_object_name(target) or not target.startswith("documents/"):
        raise BitstreamError("must name a manifest", path=store.describe(name), field="manifest")
    return target
