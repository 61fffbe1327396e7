"""The small objects by which a store's documents are found: its description, pointers and manifests.

docs/store.md specifies them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from cachegen.errors import BitstreamError, StoreError
from cachegen.fields import Fields, parse_fields, refuse_file
from cachegen.store.manifest import MAX_MANIFEST_BYTES, Manifest, is_object_name, unpack_manifest
from cachegen.store.store import Store

STORE_INFO_NAME = "store.json"
STORE_FORMAT = "cachegen-store"
STORE_VERSION = 1
TOKENS_PER_BLOCK = 256
MAX_SMALL_BYTES = 1 << 16


def pointer_name(model_fingerprint: str, rope_hash: str, prefix_hash: str) -> str:
    """Return the name of the pointer to a document that begins with some tokens."""
    return f"prefixes/{model_fingerprint[:16]}-{rope_hash[:16]}/{prefix_hash}.json"


def pack_small(content: Mapping[str, Any]) -> bytes:
    """Return a pointer or a description as it is stored."""
    return (json.dumps(content) + "\n").encode()


def _load_small(store: Store, name: str, names: Sequence[str]) -> Fields:
    fields = parse_fields(store.get(name, MAX_SMALL_BYTES), refuse_file(store.describe(name)))
    fields.require(names)
    return fields


def read_info(store: Store) -> int:
    """Return the store's tokens per block.

    Raises:
        StoreError: it cannot be read, or is none of ours.
        BitstreamError: its description is damaged.
        UnsupportedVersionError: it is of a later release.
    """
    address = store.describe(STORE_INFO_NAME)
    try:
        info = _load_small(store, STORE_INFO_NAME, ("format", "version", "tokens_per_block"))
    except StoreError as error:
        if not error.is_missing:
            raise
        message = f"{address}: no such object: not a store of cachegen (fill one with run_publishing.py)"
        raise StoreError(message, is_missing=True) from None
    info.check_format("format", STORE_FORMAT, "a store of cachegen")
    info.check_version("version", STORE_VERSION)
    return info.integer("tokens_per_block", 16, 1 << 20)


def read_pointer(store: Store, name: str) -> str:
    """Return the name of the manifest that a pointer leads to.

    Raises:
        StoreError: it is not there (`is_missing`) or cannot be read.
        BitstreamError: it is damaged.
    """

    def is_manifest_name(value: object) -> bool:
        return isinstance(value, str) and is_object_name(value) and value.startswith("documents/")

    return _load_small(store, name, ("manifest",)).check("manifest", is_manifest_name, "the name of a manifest")


def read_manifest(store: Store, name: str) -> Manifest:
    """Read a manifest.

    Raises:
        StoreError: it is not there (`is_missing`) or cannot be read.
        BitstreamError: it is damaged.
        UnsupportedVersionError: it was written by a later release.
    """
    address = store.describe(name)
    content = store.get(name, MAX_MANIFEST_BYTES)
    manifest = unpack_manifest(content, address)
    if not hashlib.sha256(content).hexdigest().startswith(PurePosixPath(name).stem):
        raise BitstreamError("is not the manifest of that name: its SHA-256 differs", path=address)
    return manifest


def is_same_document(first: str, second: str) -> bool:
    """Tell whether two manifests, by their names, are of the same model and the same tokens."""
    return PurePosixPath(first).parent == PurePosixPath(second).parent
