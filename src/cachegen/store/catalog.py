"""Which documents a store has: publishing one, and finding the one that covers the longest prefix of some tokens.

A store need not be able to list. Every `tokens_per_block` tokens of a published document, an object named by the hash
of all tokens up to there points to its manifest. Pointers of a document are written from the shortest on, so where one
exists, all shorter ones do, and the longest is found by bisection: log2(number of blocks) requests.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cachegen.errors import BitstreamError, MismatchError, StoreError
from cachegen.format.headers import ChunkHeader, DocumentHeader
from cachegen.kv_cache import ContextMetadata, hash_token_prefixes
from cachegen.methods import method_of, open_document, parse_chunk
from cachegen.methods.base import Document
from cachegen.store.index import pointer_name, read_info, read_manifest, read_pointer
from cachegen.store.manifest import (
    MAX_STORED_LEVELS,
    ChunkEntry,
    Level,
    Manifest,
    StoredObject,
    chunk_object,
    manifest_name,
    pack_manifest,
    tables_object,
    unpack_manifest,
)
from cachegen.store.profiles import profile_objects
from cachegen.store.store import Store
from cachegen.store.writer import StoreWriter


@dataclass(frozen=True)
class EncodedLevel:
    """One level to be published: the bytes of its tables file and of its chunk files, and what is known of its loss.

    Attributes:
        chunks: one file per chunk; read when asked for, so that a document need not fit into memory.
        refines: the level whose files these refine; None where they stand alone.
        kl: as in `manifest.Level`.
        profile: the files of a profile that clients are to find in the store; None where they have it.
    """

    tables_file: bytes
    chunks: Sequence[Callable[[], bytes]]
    refines: int | None = None
    kl: float | None = None
    profile: Mapping[str, bytes] | None = None


@dataclass(frozen=True)
class FoundDocument:
    """A document that shares its beginning with some tokens.

    Attributes:
        num_chunks: the first chunks, all of whose tokens are shared.
    """

    manifest: Manifest
    address: str
    num_chunks: int

    @property
    def is_usable(self) -> bool:
        """Whether there are shared chunks, and they can be used without the others."""
        return self.num_chunks == len(self.manifest.chunks) or (self.num_chunks > 0 and not self.manifest.is_whole_only)


@dataclass(frozen=True)
class Published:
    """What publishing did.

    Attributes:
        num_written, bytes_written, repaired, superseded: as in `StoreWriter`.
        found: what clients with this text find now; not the manifest written where another document goes on further in
            the same text, or was published meanwhile.
    """

    manifest: Manifest
    name: str
    num_written: int
    bytes_written: int
    repaired: tuple[str, ...]
    superseded: dict[str, int | None]
    found: FoundDocument | None


def publish_document(
    store: Store,
    levels: Sequence[EncodedLevel],
    metadata: ContextMetadata,
    progress: Callable[[int], object] | None = None,
) -> Published:
    """Put an encoded document into a store: objects, then the manifest, then the pointers to it.

    Whoever reads meanwhile, or after an interruption, sees the whole document or none of it. An older manifest of the
    same document is superseded: clients find the one published last, whose levels are those given here. What is there
    already is compared, and repaired where it is damaged.

    Args:
        levels: of the same tokens in the same chunks, the smallest first.
        metadata: of the saved cache, for its tokens.
        progress: called with the number of bytes of each chunk file.

    Raises:
        BitstreamError: a file is corrupt.
        MismatchError: the levels, or levels and metadata, do not belong together.
        OutputError: the store cannot be written.
    """
    writer = StoreWriter(store)
    writer.claim()
    documents = [open_document(level.tables_file) for level in levels]
    _check_together([document.header for document in documents], metadata)
    header = documents[0].header
    stops = list(itertools.accumulate(header.chunk_tokens))
    hashes = hash_token_prefixes(metadata.token_ids, stops)
    descriptions, chunk_files = [], []
    chunks: list[ChunkHeader] = []
    for number, (level, document) in enumerate(zip(levels, documents, strict=True), 1):
        if level.profile:
            for name, content in profile_objects(level.profile).items():
                writer.put_bytes(name, content)
        tables = tables_object(level.tables_file)
        writer.put(tables, level.tables_file)
        refined = chunks if level.refines is not None else None
        description, files, chunks = _publish_level(
            writer, number, level, document, tables, hashes, stops, refined, progress
        )
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
        values_per_token=header.values_per_token,
        levels=tuple(_sum_bits(descriptions)),
        chunks=tuple(
            ChunkEntry(stop - num_tokens, num_tokens, token_hash, files)
            for stop, num_tokens, token_hash, files in zip(
                stops, header.chunk_tokens, hashes, zip(*chunk_files, strict=True), strict=True
            )
        ),
        first_stored=header.first_stored,
        has_states=header.has_states,
    )
    content, name = pack_manifest(manifest), manifest_name(manifest)
    unpack_manifest(content)  # what we would refuse must not be written
    writer.put_bytes(name, content)
    writer.put_pointers(name, manifest, metadata)
    # What a client asks that goes on from this context.
    token_ids = torch.cat([metadata.token_ids, metadata.token_ids[-1:]])
    found = find_document(store, token_ids, model_fingerprint=metadata.model_fingerprint, rope_hash=metadata.rope_hash)
    return Published(
        manifest,
        name,
        writer.num_written,
        writer.bytes_written,
        tuple(writer.repaired),
        writer.superseded,
        found,
    )


def find_document(
    store: Store, token_ids: torch.Tensor, *, model_fingerprint: str, rope_hash: str
) -> FoundDocument | None:
    """Find the document with the longest whole-block prefix of a text; None where there is none of any length.

    Args:
        token_ids: integers `[num_tokens]`; the last one is not looked for, since generation begins with it.

    Returns:
        Where the document can only be used whole and the text shares a part of it only, another with a shorter prefix
        that is usable, if there is one.

    Raises:
        StoreError: the store cannot be read, or is none of ours.
        BitstreamError: the store's description, a pointer or the manifest is corrupt.
        MismatchError: the pointer leads to a document of another model or context.
    """
    tokens_per_block = read_info(store)
    num_tokens = len(token_ids) - 1
    stops = list(range(tokens_per_block, num_tokens + 1, tokens_per_block))
    if num_tokens % tokens_per_block:
        stops.append(num_tokens)  # a document may end anywhere: its last pointer is at its end
    names = [pointer_name(model_fingerprint, rope_hash, digest) for digest in hash_token_prefixes(token_ids, stops)]
    name = _find_whole(store, names[-1]) if names and num_tokens % tokens_per_block else None
    if name is not None:
        return _open(store, name, token_ids, model_fingerprint, rope_hash)
    low = _bisect(0, num_tokens // tokens_per_block, lambda count: store.exists(names[count - 1]))
    longest: FoundDocument | None = None
    while low > 0:
        name = read_pointer(store, names[low - 1])
        found = _open(store, name, token_ids, model_fingerprint, rope_hash)
        longest = longest or found
        if found.is_usable or not found.manifest.is_whole_only:
            return found if found.is_usable else longest
        # Shorter prefixes lead to documents that end earlier, if there are any.
        low = _bisect(0, low - 1, lambda count, name=name: read_pointer(store, names[count - 1]) != name)
    return longest


def _bisect(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number from `low`, of which something holds, to `high` of which it holds; below, it does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _open(store: Store, name: str, token_ids: torch.Tensor, model_fingerprint: str, rope_hash: str) -> FoundDocument:
    """Read a manifest that a pointer led to, and compare it with a text."""
    address = store.describe(name)
    manifest = read_manifest(store, name)
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
        return read_pointer(store, pointer)
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


def _publish_level(
    writer: StoreWriter,
    number: int,
    level: EncodedLevel,
    document: Document,
    tables: StoredObject,
    hashes: Sequence[str],
    stops: Sequence[int],
    refined: Sequence[ChunkHeader] | None,
    progress: Callable[[int], object] | None,
) -> tuple[Level, list[StoredObject], list[ChunkHeader]]:
    """Put a level's chunks; returns its description, with the bits of its own files only, its objects, their headers.

    Args:
        refined: headers of the level that this one refines.
    """
    header = document.header
    headers: list[ChunkHeader] = []
    files: list[StoredObject] = []
    description: Level | None = None
    for token_hash, stop, num_tokens, read in zip(hashes, stops, header.chunk_tokens, level.chunks, strict=True):
        content = read()
        try:
            chunk = parse_chunk(content).header
            document.check_place(
                chunk,
                level=(level.refines or 0) + 1,
                first_token=stop - num_tokens,
                num_tokens=num_tokens,
                token_hash=bytes.fromhex(token_hash),
                refined=refined[len(files)] if refined is not None else None,
            )
        except BitstreamError as error:
            raise error.at(f"level {number}, chunk {len(files)}") from error
        except MismatchError as error:
            raise MismatchError(f"level {number}, chunk {len(files)}: {error}") from error
        headers.append(chunk)
        if description is None:
            method, coder = method_of(header).name, chunk.coder.name.lower()
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
    num_values = stops[-1] * header.values_per_token
    bits = 8 * (tables.bytes + sum(file.bytes for file in files)) / num_values
    return Level(**{**vars(description), "bits_per_value": bits}), files, headers


def _sum_bits(levels: Sequence[Level]) -> list[Level]:
    """Add to the bits of each level those of the levels that it refines, their shared tables once."""
    summed: list[Level] = []
    for level in levels:
        bits = level.bits_per_value + (summed[-1].bits_per_value if level.refines is not None else 0.0)
        summed.append(Level(**{**vars(level), "bits_per_value": bits}))
    return summed


def _check_together(headers: Sequence[DocumentHeader], metadata: ContextMetadata) -> None:
    """Refuse levels of different contexts, models, cache shapes or chunk plans, and tokens that are not theirs."""
    if not 0 < len(headers) <= MAX_STORED_LEVELS:
        raise MismatchError(f"a document has 1 to {MAX_STORED_LEVELS} levels, got {len(headers)}")
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
            ("first_stored", header.first_stored, first.first_stored),
            ("states", (header.states_bytes, header.states_crc), (first.states_bytes, first.states_crc)),
            ("planes", header.shapes, first.shapes),
        ]
        for field, found, wanted in gates:
            if found != wanted:
                raise MismatchError(
                    f"level {number}: {field} differs from that of level 1 or of the saved cache: "
                    "encode the same cache in the same chunks"
                )
