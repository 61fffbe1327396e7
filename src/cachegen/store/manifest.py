"""The manifest of an encoded document: which objects of a store hold which chunk at which level.

JSON, read as strictly as a bitstream: it comes from a server that may be wrong or worse. Every size in it is bounded
before anything is allocated or fetched, every name stays below the store's root. docs/store.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

from cachegen.fields import Fields, parse_fields, refuse_file
from cachegen.format import MAX_CHUNK_TOKENS, MAX_CHUNKS, MAX_LAYERS, Coder
from cachegen.format.files import MAX_FILE_BYTES, MAX_TABLES_BYTES
from cachegen.methods import METHODS

MANIFEST_FORMAT = "cachegen-manifest"
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 32 << 20
MAX_STORED_LEVELS = 16
"""Of one document; those that refine each other are at most `format.MAX_LEVELS`, those that stand alone more."""

_NAME = re.compile(r"(?!.*(?:^|/)\.{1,2}(?:/|$))[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+){0,7}")
_MAX_NAME_CHARACTERS = 512
_MAX_LABEL_CHARACTERS = 1024
_MAX_MEASURE = 1e6


@dataclass(frozen=True)
class StoredObject:
    """One object: its name below the store's root, its size in bytes, and the SHA-256 of its content in hex."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Level:
    """One of several encodings of a document's chunks; number 1 is the smallest.

    Attributes:
        level: its number.
        refines: the level whose files its own refine; None where its files stand alone. Level l refines l - 1.
        method, coder: names of a method, and in lower case of a `format.Coder`; for people, and to choose by.
        tables: the tables file; levels that refine each other may share one.
        bits_per_value: of this level's files and those that it refines, tables included.
        kl: expected loss of the whole document at this level, in nats per token; None where nobody measured it.
    """

    level: int
    refines: int | None
    method: str
    coder: str
    tables: StoredObject
    bits_per_value: float
    kl: float | None


@dataclass(frozen=True)
class ChunkEntry:
    """One chunk: the span of tokens, what identifies them, and one object per level, level 1 first."""

    first_token: int
    num_tokens: int
    token_hash: str
    files: tuple[StoredObject, ...]

    @property
    def end_token(self) -> int:
        """The position after its last token."""
        return self.first_token + self.num_tokens


@dataclass(frozen=True)
class Manifest:
    """An encoded document in a store. Hashes are in hex.

    Attributes:
        model_id: for people, not compared.
        dtype: of the cache, as torch names it.
        num_cache_tokens: of the saved cache; chunks may cover fewer.
        token_hash: of those tokens.
        values_per_token: scalars of keys and values of all layers; bounds every file's size.
        first_stored: per layer, the first token that the chunks hold, as in a `DocumentHeader`; empty where they hold
            all. The manifest has the field only where it is not empty.
        has_states: whether the tables files end with recurrent states. The manifest has the field only where they do.
    """

    model_id: str
    model_fingerprint: str
    rope_hash: str
    dtype: str
    num_cache_tokens: int
    token_hash: str
    prefill_block_size: int
    values_per_token: int
    levels: tuple[Level, ...]
    chunks: tuple[ChunkEntry, ...]
    first_stored: tuple[int, ...] = ()
    has_states: bool = False

    @property
    def is_whole_only(self) -> bool:
        """Whether the chunks are of use only all together."""
        return bool(self.first_stored) or self.has_states

    @property
    def num_covered_tokens(self) -> int:
        """Tokens from the first on that the chunks hold."""
        return self.chunks[-1].end_token

    @property
    def is_embedded(self) -> bool:
        """Whether each level's files refine those of the level below."""
        return len(self.levels) > 1 and self.levels[1].refines is not None

    def files_of(self, level: int) -> tuple[int, ...]:
        """Return the levels whose files are needed to use `level`, in the order in which a decoder takes them."""
        return tuple(range(1, level + 1)) if self.is_embedded else (level,)


def pack_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as it is stored; equal manifests give equal bytes."""
    content = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **asdict(manifest)}
    if not manifest.first_stored:
        del content["first_stored"]
    if not manifest.has_states:
        del content["has_states"]
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def unpack_manifest(content: bytes, address: object = None) -> Manifest:
    """Parse a manifest, believing nothing.

    Args:
        address: where it came from, for messages.

    Raises:
        BitstreamError: it is not a manifest, or a field is not what it must be.
        UnsupportedVersionError: it was written by a later release.
    """
    refuse = refuse_file(address)
    if len(content) > MAX_MANIFEST_BYTES:
        raise refuse(f"has {len(content)} bytes, more than the {MAX_MANIFEST_BYTES} of a manifest", "")
    fields = parse_fields(content, refuse)
    fields.check_format("format", MANIFEST_FORMAT, "a manifest of cachegen")
    fields.check_version("version", MANIFEST_VERSION)
    return _read_manifest(fields)


def chunk_object(
    content_sha256: str, num_bytes: int, *, model_fingerprint: str, token_hash: str, level: Level
) -> StoredObject:
    """Return the object of a chunk at a level, named after all that its bytes depend on, and after the bytes.

    The name begins with the model and the chained hash of the tokens up to the chunk's end, so that what belongs
    together lies together; the profile or tables are in the hash of the content, which holds their hashes.
    """
    variant = f"{level.method}-{level.coder}-L{level.level}-{content_sha256[:32]}"
    return StoredObject(f"chunks/{model_fingerprint[:16]}/{token_hash[:32]}/{variant}.cgc", num_bytes, content_sha256)


def tables_object(content: bytes) -> StoredObject:
    """Return the object of a tables file, named after its bytes."""
    digest = hashlib.sha256(content).hexdigest()
    return StoredObject(f"tables/{digest[:32]}.cgt", len(content), digest)


def manifest_name(manifest: Manifest) -> str:
    """Return the name of a manifest's object: the model, the tokens that the chunks cover, and the manifest's bytes."""
    digest = hashlib.sha256(pack_manifest(manifest)).hexdigest()
    tokens = manifest.chunks[-1].token_hash[:32]
    return f"documents/{manifest.model_fingerprint[:16]}/{tokens}/{digest[:32]}.json"


def is_object_name(name: object) -> bool:
    """Tell whether this is a name that a store of ours may have: a relative path of plain characters."""
    return isinstance(name, str) and len(name) <= _MAX_NAME_CHARACTERS and _NAME.fullmatch(name) is not None


def _read_manifest(fields: Fields) -> Manifest:
    optional = {"first_stored", "has_states"}
    names = [name for name in Manifest.__dataclass_fields__ if name not in optional or name in fields]
    fields.require(("format", "version", *names))
    levels = tuple(
        _read_level(level, number) for number, level in enumerate(fields.objects("levels", 1, MAX_STORED_LEVELS), 1)
    )
    if len({level.refines is None for level in levels[1:]}) > 1:
        raise fields.error("refines", "must be null for all levels, or the level below for all but the first")
    values_per_token = fields.integer("values_per_token", 1, 1 << 30)
    num_cache_tokens = fields.integer("num_cache_tokens", 1, 1 << 40)
    chunks: list[ChunkEntry] = []
    for chunk in fields.objects("chunks", 1, MAX_CHUNKS):
        first_token = chunks[-1].end_token if chunks else 0
        chunks.append(_read_chunk(chunk, first_token, len(levels), values_per_token))
    if chunks[-1].end_token > num_cache_tokens:
        raise fields.error("chunks", f"cover more than {num_cache_tokens} tokens")
    return Manifest(
        model_id=fields.label("model_id", _MAX_LABEL_CHARACTERS),
        model_fingerprint=fields.hash("model_fingerprint"),
        rope_hash=fields.hash("rope_hash"),
        dtype=fields.choice("dtype", ("float16", "bfloat16", "float32")),
        num_cache_tokens=num_cache_tokens,
        token_hash=fields.hash("token_hash"),
        prefill_block_size=fields.integer("prefill_block_size", 1, (1 << 32) - 1),
        values_per_token=values_per_token,
        levels=levels,
        chunks=tuple(chunks),
        first_stored=_read_first_stored(fields, chunks[-1].end_token),
        has_states=_read_has_states(fields, chunks[-1].end_token == num_cache_tokens),
    )


def _read_has_states(fields: Fields, covers_all: bool) -> bool:
    if "has_states" not in fields:
        return False
    if not fields.flag("has_states") or not covers_all:
        raise fields.error("has_states", "must be true, of chunks that cover the whole cache")
    return True


def _read_first_stored(fields: Fields, num_covered: int) -> tuple[int, ...]:
    """Read the field that documents have which can only be used whole; their tables files have it, too."""
    if "first_stored" not in fields:
        return ()
    found = fields.items("first_stored", 1, MAX_LAYERS)
    if not all(type(number) is int and 0 <= number <= num_covered for number in found) or not any(found):
        raise fields.error("first_stored", f"must be numbers from 0 to {num_covered}, not all of them 0")
    return tuple(found)


def _read_level(fields: Fields, number: int) -> Level:
    fields.require(tuple(Level.__dataclass_fields__))
    return Level(
        level=fields.integer("level", number, number),
        refines=fields.integer("refines", max(1, number - 1), number - 1) if fields.has_value("refines") else None,
        method=fields.choice("method", [method.name for method in METHODS]),
        coder=fields.choice("coder", [coder.name.lower() for coder in Coder]),
        tables=_read_object(fields.object("tables"), MAX_TABLES_BYTES),
        bits_per_value=fields.number("bits_per_value", 0, _MAX_MEASURE),
        kl=fields.number("kl", 0, _MAX_MEASURE) if fields.has_value("kl") else None,
    )


def _read_chunk(fields: Fields, first_token: int, num_levels: int, values_per_token: int) -> ChunkEntry:
    fields.require(tuple(ChunkEntry.__dataclass_fields__))
    num_tokens = fields.integer("num_tokens", 1, MAX_CHUNK_TOKENS)
    files = fields.objects("files", 0, num_levels)
    if len(files) != num_levels:
        raise fields.error("files", f"must have {num_levels} files, one per level")
    # No coder needs more than raw fp32 values, a scale per token and plane, and a header with its index.
    limit = min(MAX_FILE_BYTES, 8 * num_tokens * values_per_token + (1 << 20))
    return ChunkEntry(
        first_token=fields.integer("first_token", first_token, first_token),
        num_tokens=num_tokens,
        token_hash=fields.hash("token_hash"),
        files=tuple(_read_object(file, limit) for file in files),
    )


def _read_object(fields: Fields, max_bytes: int) -> StoredObject:
    fields.require(tuple(StoredObject.__dataclass_fields__))
    name = fields.check("name", is_object_name, "a relative path of letters, digits, dots, dashes and underscores")
    return StoredObject(name, fields.integer("bytes", 1, max_bytes), fields.hash("sha256"))
