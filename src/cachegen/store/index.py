"""The small objects by which a store's documents are found: its description, pointers and manifests.

docs/store.md specifies them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from cachegen.errors import BitstreamError, StoreError, UnsupportedVersionError
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


def _load_small(store: Store, name: str, fields: set[str]) -> dict[str, Any]:
    content = store.get(name, MAX_SMALL_BYTES)
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict) or set(loaded) != fields:
        raise BitstreamError(f"must be a JSON object of {', '.join(sorted(fields))}", path=store.describe(name))
    return loaded


def read_info(store: Store) -> int:
    """Return the store's tokens per block.

    Raises:
        StoreError: it cannot be read, or is none of ours.
        BitstreamError: its description is damaged.
        UnsupportedVersionError: it is of a later release.
    """
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


def read_pointer(store: Store, name: str) -> str:
    """Return the name of the manifest that a pointer leads to.

    Raises:
        StoreError: it is not there (`is_missing`) or cannot be read.
        BitstreamError: it is damaged.
    """
    target = _load_small(store, name, {"manifest"})["manifest"]
    if not is_object_name(target) or not target.startswith("documents/"):
        raise BitstreamError("must name a manifest", path=store.describe(name), field="manifest")
    return target


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
