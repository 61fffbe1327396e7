"""Write a document's objects into a store: what is there and whole stays, what is damaged is repaired.

Objects are named by their content, so whatever else has the name of one is damaged. Pointers are not: one that leads
to another document stays, but where that can only be used whole and fewer texts go on from it; one that leads to an
older manifest of the same document is replaced. A pointer is written
whole or not at all, after everything that it leads to, so that a reader sees the older manifest or the newer one,
whole, whoever else publishes at the same time and wherever publishing is interrupted. Of two publishers at once each
pointer keeps what was written last.
"""

from __future__ import annotations

from cachegen.errors import BitstreamError, CacheGenError, OutputError, StoreError, UnsupportedVersionError
from cachegen.kv_cache import ContextMetadata, hash_token_prefixes
from cachegen.store.index import (
    MAX_SMALL_BYTES,
    STORE_FORMAT,
    STORE_INFO_NAME,
    STORE_VERSION,
    TOKENS_PER_BLOCK,
    is_same_document,
    pack_small,
    pointer_name,
    read_info,
    read_manifest,
    read_pointer,
)
from cachegen.store.manifest import Manifest, StoredObject
from cachegen.store.store import Ensured, Store

_MAX_RACES = 10


class StoreWriter:
    """Puts objects and pointers, and counts them.

    Attributes:
        num_written: objects that were not there, or not as they are now.
        bytes_written: theirs.
        repaired: names of objects that were there and damaged.
        superseded: by name, how many levels each older manifest of the document has; None for a damaged one.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tokens_per_block = TOKENS_PER_BLOCK
        self._manifests: dict[str, Manifest | None] = {}
        self.num_written = self.bytes_written = 0
        self.repaired: list[str] = []
        self.superseded: dict[str, int | None] = {}

    def claim(self) -> None:
        """Make a store of ours, or see that it is one.

        Raises:
            BitstreamError, UnsupportedVersionError: it is another's or a later release's.
            OutputError: it cannot be written.
        """
        ours = pack_small({"format": STORE_FORMAT, "version": STORE_VERSION, "tokens_per_block": TOKENS_PER_BLOCK})
        if self._store.put(STORE_INFO_NAME, ours):
            self._count(ours)
        try:
            self._tokens_per_block = read_info(self._store)
        except UnsupportedVersionError:
            raise
        except BitstreamError:
            found = self._store.get(STORE_INFO_NAME, MAX_SMALL_BYTES)
            # The rest of ours, or ours with bytes changed; anything else is somebody's.
            if not (ours.startswith(found) or len(found) == len(ours)):
                raise
            self._replace(STORE_INFO_NAME, ours)
            self.repaired.append(STORE_INFO_NAME)

    def put(self, described: StoredObject, content: bytes) -> None:
        """Put an object that its name describes."""
        self.put_bytes(described.name, content)

    def put_bytes(self, name: str, content: bytes) -> None:
        """Put an object that its name describes.

        Raises:
            OutputError: it cannot be written.
        """
        ensured = self._store.ensure(name, content)
        if ensured is not Ensured.THERE:
            self._count(content)
        if ensured is Ensured.REPAIRED:
            self.repaired.append(name)

    def put_pointers(self, name: str, manifest: Manifest, metadata: ContextMetadata) -> None:
        """Point to a manifest every block of its tokens, the shortest prefix first, and at their end.

        Args:
            name: of the manifest's object.

        Raises:
            OutputError: a pointer cannot be written.
        """
        num_tokens = manifest.num_covered_tokens
        stops = [*range(self._tokens_per_block, num_tokens, self._tokens_per_block), num_tokens]
        for digest in hash_token_prefixes(metadata.token_ids, stops):
            self._point(pointer_name(metadata.model_fingerprint, metadata.rope_hash, digest), name, manifest)

    def _point(self, name: str, manifest_name: str, manifest: Manifest) -> None:
        content = pack_small({"manifest": manifest_name})
        self._store.sweep(name)  # where nothing is to be written, too
        for _ in range(_MAX_RACES):
            try:
                target = read_pointer(self._store, name)
            except BitstreamError:
                self._replace(name, content)
                self.repaired.append(name)
                return
            except StoreError as error:
                if not error.is_missing:
                    raise OutputError(f"{error}; so it cannot be written") from error
                if self._store.put(name, content):
                    self._count(content)
                    return
                continue  # another publisher was quicker: see what it wrote
            if target == manifest_name:
                return
            found = self._read(target)
            if is_same_document(target, manifest_name):
                self._replace(name, content)
                self.superseded[target] = None if found is None else len(found.levels)
            elif found is None:  # it led nowhere
                self._replace(name, content)
                self.repaired.append(name)
            elif _serves_more_texts(manifest, found):
                self._replace(name, content)
            return
        raise OutputError(f"{self._store.describe(name)}: comes and goes; run it again")

    def _read(self, manifest: str) -> Manifest | None:
        """Return a manifest; None for one that is missing or damaged."""
        if manifest not in self._manifests:
            try:
                self._manifests[manifest] = read_manifest(self._store, manifest)
            except UnsupportedVersionError as error:
                raise OutputError(f"{error}; a later release keeps this store") from error
            except CacheGenError as error:
                if not isinstance(error, BitstreamError) and not getattr(error, "is_missing", False):
                    raise OutputError(f"{error}; so it cannot be published") from error
                self._manifests[manifest] = None
        return self._manifests[manifest]

    def _replace(self, name: str, content: bytes) -> None:
        self._store.put(name, content, overwrite=True)
        self._count(content)

    def _count(self, content: bytes) -> None:
        self.num_written += 1
        self.bytes_written += len(content)


def _serves_more_texts(manifest: Manifest, other: Manifest) -> bool:
    """Tell whether more texts that share a beginning with both documents can use the first than the other.

    One that can only be used whole is for texts that go on from its end.
    """
    ends_earlier = manifest.num_covered_tokens < other.num_covered_tokens
    return other.is_whole_only and (not manifest.is_whole_only or ends_earlier)
