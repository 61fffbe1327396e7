"""The methods of coding a KV cache, each in a folder of its own; nothing outside these folders asks which one it has.

To add one, write a folder with what `base` asks for and list it in `METHODS`. CONTRIBUTING.md has the steps.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.config import load_config_fields
from cachegen.errors import BitstreamError, MismatchError
from cachegen.fields import Fields, parse_fields, refuse_config, refuse_file
from cachegen.format.constants import CHUNK_MAGIC, TABLES_MAGIC
from cachegen.format.files import Chunk, split_chunk, split_document
from cachegen.format.framing import Buffer
from cachegen.format.headers import ChunkHeader, DocumentHeader
from cachegen.kv_cache import ContextMetadata, KVCache
from cachegen.methods import absmax, lossless, transform
from cachegen.methods.base import (
    METHODS,
    Document,
    Encoder,
    FindProfile,
    Method,
    MethodConfig,
    method_of,
    method_of_file,
)
from cachegen.methods.profile_files import MAX_PROFILE_BYTES, PROFILE_NAME, AnyProfile, ReadFile, folder_reader

METHODS.extend([*absmax.METHODS, *transform.METHODS, *lossless.METHODS])
DEFAULT_METHOD = "cachegen"


def method_named(name: object) -> Method | None:
    """Return the method of that name; None where there is none."""
    return next((method for method in METHODS if method.name == name), None)


def load_config(path: str | os.PathLike[str]) -> MethodConfig:
    """Read a quantization config; its field `method` says whose it is, `cachegen` where it is missing.

    Raises:
        InputError: there is no such file.
        ConfigError: the file is not such a config, naming the field.
    """
    return _read_config(load_config_fields(path), str(path))


def read_config(content: Mapping[str, Any], source: str) -> MethodConfig:
    """Return what the JSON object of a quantization config says.

    Args:
        source: names it in messages; the folders that it names are relative to the folder of this path.

    Raises:
        ConfigError: it is not such a config, naming the field.
    """
    return _read_config(Fields(dict(content), refuse_config(source), reads_digits=True), source)


def _read_config(fields: Fields, source: str) -> MethodConfig:
    name = fields.choice("method", [method.name for method in METHODS]) if "method" in fields else DEFAULT_METHOD
    return next(method for method in METHODS if method.name == name).read_config(fields, source)


def default_config(num_layers: int) -> MethodConfig:
    """Return a config for a model of `num_layers` that needs no file; see `absmax.config.default_config`."""
    return absmax.default_config(num_layers)


def check_config(config: MethodConfig, header: DocumentHeader, path: object) -> None:
    """Refuse a document that was not encoded as a config says.

    Args:
        path: of the document's tables file, for messages.

    Raises:
        MismatchError: naming the first field that differs.
    """
    found = method_of(header).name
    if found != config.method:
        raise MismatchError(f"{path}: method is {found}, but {config.source} says {config.method}")
    config.check_document(header, path)


def make_encoder(
    config: MethodConfig,
    cache: KVCache,
    metadata: ContextMetadata,
    chunk_tokens: Sequence[int],
    *,
    num_threads: int = 1,
    kernels: Kernels = CPU,
    first_stored: Sequence[int] = (),
) -> Encoder:
    """Return the encoder of a saved cache.

    Args:
        config: from `load_config`.
        cache: on the CPU; may be memory-mapped.
        chunk_tokens: the chunks' token counts, at most the cache's in all.
        first_stored: per layer, the first token to store, such as `ContextMetadata.first_visible` of all tokens of the
            chunks: then the document can only be used whole. Empty stores all tokens. A method that codes layers
            together stores what is stored of any of them.

    Raises:
        BitstreamError: the cache's values are not those that were saved.
        InputError, ConfigError, MismatchError: cache and config do not go together.
    """
    method = method_named(config.method)
    if method is None:
        raise ValueError(f"`config` must be of a known method, got {config.method!r}")
    encoder = method.make_encoder(
        config, cache, metadata, chunk_tokens, num_threads=num_threads, kernels=kernels, first_stored=first_stored
    )
    encoder.document.states_section = encoder.states_section
    return encoder


def open_document(
    tables_file: Buffer,
    *,
    num_threads: int = 1,
    kernels: Kernels = CPU,
    find_profile: FindProfile | None = None,
) -> Document:
    """Parse a tables file. What takes memory beyond its size waits for `Document.prepare`.

    Args:
        find_profile: called where the document names a profile; None where nothing will be decoded.

    Raises:
        BitstreamError: the file is corrupt.
        MismatchError: the profile found is not the one that the document names.
    """
    content = bytes(tables_file)
    method = method_of_file(content, TABLES_MAGIC, "tables")
    header, tables, states = split_document(content, method.document_header)
    document = method.open_document(
        header,
        hashlib.sha256(content).digest(),
        tables,
        num_threads=num_threads,
        kernels=kernels,
        find_profile=find_profile,
    )
    document.states_section = states
    return document


def read_profile(read: ReadFile, place: str, *, for_encoding: bool = False) -> AnyProfile:
    """Read a profile of any method from wherever its files are.

    Args:
        read: returns a file by its name, or fails where it has more bytes than are given.
        place: what holds them, for messages.
        for_encoding: read what encoders need as well.

    Raises:
        CacheGenError: whatever `read` raises.
        BitstreamError: a file is corrupt or not a profile's.
        UnsupportedVersionError: it was written by a later release.
    """
    record = read(PROFILE_NAME, MAX_PROFILE_BYTES)
    try:
        found = parse_fields(record, refuse_file()).content.get("format")
    except BitstreamError:
        found = None  # the reader says what is wrong with it

    def read_again(name: str, max_bytes: int) -> bytes:
        return record if name == PROFILE_NAME else read(name, max_bytes)

    readers = [method for method in METHODS if method.profile_format is not None]
    method = next((method for method in readers if method.profile_format == found), readers[0])
    return method.read_profile(read_again, place, for_encoding=for_encoding)


def load_profile(folder: str | os.PathLike[str], *, for_encoding: bool = False) -> AnyProfile:
    """Read a profile's folder; see `read_profile`.

    Raises:
        InputError: there is none.
    """
    return read_profile(folder_reader(folder), os.fspath(folder), for_encoding=for_encoding)


def parse_document(tables_file: Buffer) -> DocumentHeader:
    """Check a tables file of any method and return its header.

    Raises:
        BitstreamError: the file is not whole, or any bit of it has changed.
        UnsupportedVersionError: this release does not read it.
    """
    content = bytes(tables_file)
    return split_document(content, method_of_file(content, TABLES_MAGIC, "tables").document_header)[0]


def parse_chunk(
    content: Buffer, num_threads: int = 1, *, check: Callable[[ChunkHeader], object] | None = None
) -> Chunk[Any]:
    """Take a chunk file of any method apart and check all of it; see `split_chunk`."""
    return split_chunk(content, method_of_file(content, CHUNK_MAGIC, "chunk").chunk_header, num_threads, check=check)


def parse_chunk_header(content: Buffer) -> ChunkHeader:
    """Parse and check the header of a chunk file of any method, not what follows it.

    Raises:
        BitstreamError: the header is not whole, or the file has another length than it says.
        UnsupportedVersionError: this release does not read it.
    """
    return method_of_file(content, CHUNK_MAGIC, "chunk").chunk_header.unpack(content)
