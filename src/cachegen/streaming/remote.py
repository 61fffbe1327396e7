"""A document in a store, as the loader sees it: its files, fetched and checked, and what a policy knows of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import BitstreamError, ConfigError, InputError, MismatchError, StoreError
from cachegen.kv_cache import KVCache, describe_difference
from cachegen.methods import open_document
from cachegen.methods.base import Document, FindProfile
from cachegen.methods.profile_files import AnyProfile
from cachegen.states import States
from cachegen.store.catalog import FoundDocument, find_document
from cachegen.store.manifest import Manifest, StoredObject
from cachegen.store.profiles import ProfileFetcher
from cachegen.store.store import Store
from cachegen.streaming.policy import ChunkLevels

_PROFILES = ProfileFetcher()
"""Of all documents: one request after the other asks for the same."""


@dataclass(frozen=True)
class FetchedFile:
    """One chunk file that has arrived, and how.

    Attributes:
        content: checked against the manifest's SHA-256.
        retries: the errors that led to further attempts, one line each.
    """

    content: bytearray
    retries: tuple[str, ...]


class RemoteDocument:
    """The first chunks of a document in a store; methods may be called from several threads.

    Attributes:
        manifest: what the store says of it.
        num_chunks: chunks that the text shares.
        address: of the manifest, for messages.
    """

    def __init__(
        self,
        store: Store,
        found: FoundDocument,
        num_threads: int,
        kernels: Kernels = CPU,
        find_profile: FindProfile | None = None,
    ) -> None:
        self.manifest: Manifest = found.manifest
        self.address, self.num_chunks = found.address, found.num_chunks
        self._store, self._num_threads, self._kernels = store, num_threads, kernels
        self._find_profile = find_profile
        # By the hash of the tables file: levels that refine each other share one.
        self._documents: dict[str, Document] = {}
        self._locks = {level.tables.sha256: threading.Lock() for level in found.manifest.levels}
        self._plane_shapes: list[tuple[int, ...]] | None = None

    @classmethod
    def find(
        cls,
        store: Store,
        token_ids: torch.Tensor,
        *,
        model_fingerprint: str,
        rope_hash: str,
        num_threads: int,
        kernels: Kernels = CPU,
        find_profile: FindProfile | None = None,
    ) -> RemoteDocument:
        """Find the document that covers the longest prefix of a text.

        Args:
            find_profile: as for `open_document`.

        Raises:
            StoreError: there is none, or only the beginning of one that can only be used whole, or the store cannot be
                read.
            BitstreamError, MismatchError: as `catalog.find_document`.
        """
        found = find_document(store, token_ids, model_fingerprint=model_fingerprint, rope_hash=rope_hash)
        if found is None or found.num_chunks == 0:
            message = f"{store.url}: holds no chunk of this context for this model (add it with run_publishing.py)"
            raise StoreError(message, is_missing=True)
        if not found.is_usable:
            message = (
                f"{found.address}: only {found.num_chunks} of its {len(found.manifest.chunks)} chunks are of this "
                "context, and it can only be used whole: compute the context from its text, or encode that document "
                "with `keep_all_tokens`"
            )
            raise StoreError(message, is_missing=True)
        return cls(store, found, num_threads, kernels, find_profile)

    @property
    def dtype(self) -> torch.dtype:
        """The cache's dtype."""
        return getattr(torch, self.manifest.dtype)

    @property
    def num_tokens(self) -> int:
        """Tokens that the shared chunks hold."""
        return self.manifest.chunks[self.num_chunks - 1].end_token

    @property
    def is_whole_only(self) -> bool:
        """Whether the chunks lack what tokens within the document attend to, or recurrent states belong to them."""
        return self.manifest.is_whole_only

    @property
    def has_known_losses(self) -> bool:
        """Whether the manifest says what every level loses, in nats per token; otherwise losses only order levels."""
        return all(level.kl is not None for level in self.manifest.levels)

    def limit_chunks(self, num_chunks: int | None) -> None:
        """Use only the first chunks; None uses all that the text shares.

        Raises:
            ConfigError: there are not so many, or the document can only be used whole.
        """
        if num_chunks is not None and num_chunks > self.num_chunks:
            raise ConfigError(f"{self.address}: `num_chunks` {num_chunks} asked for, {self.num_chunks} are there")
        if num_chunks is not None and num_chunks < self.num_chunks and self.is_whole_only:
            raise ConfigError(
                f"{self.address}: `num_chunks` {num_chunks} asked for, but the document can only be used whole, all "
                f"{self.num_chunks}"
            )
        self.num_chunks = num_chunks or self.num_chunks

    def list_levels(self) -> tuple[ChunkLevels, ...]:
        """Return what a policy is told of each chunk.

        The loss of a level is the manifest's; where one is unknown, all are taken to fall as a uniform quantizer's
        error does, by 4 for every bit. Source: rate-distortion theory at high rate, 6 dB per bit.
        """
        levels = self.manifest.levels
        known = [level.kl for level in levels if level.kl is not None]
        losses = known if self.has_known_losses else [math.exp2(-2 * level.bits_per_value) for level in levels]
        for i in range(1, len(losses)):
            losses[i] = min(losses[i], losses[i - 1])
        share = 1 / self.num_tokens
        return tuple(
            ChunkLevels(
                first_token=chunk.first_token,
                num_tokens=chunk.num_tokens,
                file_bytes=tuple(file.bytes for file in chunk.files),
                loss=tuple(loss * chunk.num_tokens * share for loss in losses),
                is_embedded=self.manifest.is_embedded,
            )
            for chunk in self.manifest.chunks[: self.num_chunks]
        )

    def open_level(self, level: int, on_bytes: Callable[[int], object] | None = None) -> Document:
        """Return what decoding needs of a level, fetching its tables file at the first use.

        Raises:
            StoreError, BitstreamError: it cannot be had, or is corrupt.
            MismatchError: it is not the tables file that the manifest describes.
        """
        tables = self.manifest.levels[level - 1].tables
        with self._locks[tables.sha256]:
            if tables.sha256 not in self._documents:
                content = self._store.get_exactly(tables.name, tables.bytes, sha256=tables.sha256, on_bytes=on_bytes)
                try:
                    document = open_document(
                        content,
                        num_threads=self._num_threads,
                        kernels=self._kernels,
                        find_profile=self._find_profile_or_fetch,
                    )
                except BitstreamError as error:
                    raise error.at(self.describe(tables)) from error
                self._check_document(document, self.describe(tables))
                self._documents[tables.sha256] = document
            return self._documents[tables.sha256]

    def read_states(self) -> States:
        """Return the recurrent states at the end of the document, once a level is open; nothing for a model without.

        Raises:
            BitstreamError: they are corrupt in spite of their hash: they were published so.
        """
        for level in self.manifest.levels:
            if level.tables.sha256 in self._documents:
                try:
                    return self._documents[level.tables.sha256].read_states()
                except BitstreamError as error:
                    raise error.at(self.describe(level.tables)) from error
        return {}

    def _find_profile_or_fetch(self, profile_hash: bytes) -> AnyProfile:
        """Return the profile that is at hand, or else the store's.

        Raises:
            InputError: there is neither.
            StoreError, BitstreamError: the store's cannot be read, or is damaged.
        """
        try:
            if self._find_profile is None:
                raise InputError(f"no profile is at hand, and the document names {profile_hash.hex()[:12]}")
            return self._find_profile(profile_hash)
        except InputError as error:
            try:
                return _PROFILES.fetch(self._store, profile_hash.hex())
            except StoreError as missing:
                if missing.is_missing:
                    raise InputError(f"{error}; the store has none either") from missing
                raise

    def fetch(self, chunk: int, level: int, on_bytes: Callable[[int], object] | None = None) -> FetchedFile:
        """Fetch one file, whole and checked.

        Args:
            on_bytes: called with the number of bytes of each piece; may raise to stop.

        Raises:
            StoreError: it cannot be had.
            BitstreamError, MismatchError: the level's tables file is corrupt or another's.
        """
        self.open_level(level, on_bytes)
        stored = self.manifest.chunks[chunk].files[level - 1]
        retries: list[str] = []
        content = self._store.get_exactly(
            stored.name,
            stored.bytes,
            sha256=stored.sha256,
            on_bytes=on_bytes,
            on_retry=lambda error: retries.append(str(error)),
        )
        return FetchedFile(content, tuple(retries))

    def decode(self, chunk: int, level: int, contents: Mapping[int, bytearray], output: KVCache) -> None:
        """Decode a chunk.

        Args:
            contents: the file of each level that `level` needs.
            output: as many tokens as the chunk has, on the kernels' device.

        Raises:
            BitstreamError: a file is corrupt in spite of its hash: it was published so.
            MismatchError: a file is of another document.
        """
        entry = self.manifest.chunks[chunk]
        stored = entry.files[level - 1]
        document = self.open_level(level)
        try:
            document.prepare()
        except BitstreamError as error:
            raise error.at(self.describe(self.manifest.levels[level - 1].tables)) from error
        try:
            document.decode(
                [contents[needed] for needed in self.manifest.files_of(level)],
                output,
                first_token=entry.first_token,
                token_hash=bytes.fromhex(entry.token_hash),
                num_threads=self._num_threads,
                kernels=self._kernels,
            )
        except BitstreamError as error:
            raise error.at(self.describe(stored)) from error
        except MismatchError as error:
            raise MismatchError(f"{self.describe(stored)}: {error}") from error

    def describe(self, stored: StoredObject) -> str:
        """Return an object's full address."""
        return self._store.describe(stored.name)

    def expect_planes(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        """Refuse, from now on, files for caches of other (num_kv_heads, head_dim) per plane, or another dtype.

        Raises:
            MismatchError: the manifest's dtype is another one.
        """
        if dtype != self.dtype:
            raise MismatchError(
                f"{self.address}: dtype is {self.dtype}, but the model has {dtype}: load the model in that one"
            )
        self._plane_shapes = list(shapes)
        names = {level.tables.sha256: self.describe(level.tables) for level in self.manifest.levels}
        for digest, document in self._documents.items():
            self._check_document(document, names[digest])

    def _check_document(self, document: Document, name: str) -> None:
        """Refuse a tables file that is not what the manifest says; what it says of the model was compared before."""
        header, manifest = document.header, self.manifest
        gates = [
            ("model_fingerprint", header.model_fingerprint.hex(), manifest.model_fingerprint),
            ("rope_hash", header.rope_hash.hex(), manifest.rope_hash),
            ("token_hash", header.token_hash.hex(), manifest.token_hash),
            ("dtype", document.dtype, self.dtype),
            ("prefill_block_size", header.prefill_block_size, manifest.prefill_block_size),
            ("values_per_token", header.values_per_token, manifest.values_per_token),
            ("chunk_tokens", header.chunk_tokens, tuple(chunk.num_tokens for chunk in manifest.chunks)),
            ("first_stored", header.first_stored, manifest.first_stored),
            ("has_states", header.has_states, manifest.has_states),
        ]
        difference = describe_difference(header.shapes, self._plane_shapes) if self._plane_shapes is not None else None
        if difference is not None:
            raise MismatchError(f"{name}: planes: {difference}: the document is of another model")
        for field, found, wanted in gates:
            if found != wanted:
                raise MismatchError(f"{name}: {field} is not what {self.address} says: they do not belong together")
