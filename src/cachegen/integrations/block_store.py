"""A store of blocks that several engines share: a folder or an object store, one blob per block (`blobs`).

    blocks/<namespace>/about.json           what the blocks are of, for people and other readers
    blocks/<namespace>/<xx>/<hash>.kvb      a block; the hash is of its tokens and all before them, xx its first digits

A block's name says its content, as far as the codec reproduces it: whoever finds one there leaves it. So any number of
writers may work side by side, a writer that was killed is continued by whoever stores the next context, and nothing
is ever half there (`store.Store.put`).
"""

from __future__ import annotations

import array
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cachegen.errors import OutputError, StoreError
from cachegen.store.store import RetryRule, open_store

BLOCKS_FORMAT = "cachegen-blocks"
BLOCKS_VERSION = 1
RETRY = RetryRule(max_attempts=2, stall_seconds=2.0)
"""A block that does not come soon is computed sooner."""
PAUSE_SECONDS = 5.0
"""After a failure the store is not asked for so long: a request must not wait for each of its blocks in turn."""


class Namespace:
    """What blocks are of, apart from their tokens: only blocks of one namespace are exchanged.

    Attributes:
        description: fields of JSON: model, dtype, tokens of a block, rank, codec and whatever else must agree.
        name: of its folder, 32 hex digits of the SHA-256 of the description.
    """

    def __init__(self, **description: Any) -> None:
        self.description = {"format": BLOCKS_FORMAT, "version": BLOCKS_VERSION, **description}
        text = json.dumps(self.description, sort_keys=True)
        self.name = hashlib.sha256(text.encode()).hexdigest()[:32]

    def block_name(self, block_hash: bytes) -> str:
        """Return the name of a block's object."""
        digits = block_hash.hex()
        return f"blocks/{self.name}/{digits[:2]}/{digits}.kvb"

    @property
    def about_name(self) -> str:
        """Name of the object that describes it."""
        return f"blocks/{self.name}/about.json"

    def pack(self) -> bytes:
        """Return the content of that object."""
        return (json.dumps(self.description, sort_keys=True, indent=1) + "\n").encode()


def chain_hashes(token_ids: Sequence[int], block_tokens: int, salt: str = "") -> list[bytes]:
    """Return the hash of each whole block of a context: of its tokens, of all tokens before them, and of the salt.

    A hash is SHA-256 of the hash before it and the block's tokens as int32, little-endian; the first follows on the
    SHA-256 of the salt. 32 raw bytes each.
    """
    state = hashlib.sha256(b"cachegen blocks\0" + salt.encode()).digest()
    hashes: list[bytes] = []
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        tokens = array.array("i", token_ids[start : start + block_tokens])
        if sys.byteorder == "big":
            tokens.byteswap()
        state = hashlib.sha256(state + tokens.tobytes()).digest()
        hashes.append(state)
    return hashes


class BlockStore:
    """Blocks by name; from several threads at a time.

    After a failure that may pass, nothing is asked of the store for a while: all methods fail at once.

    Attributes:
        url: of the place, for messages.
    """

    def __init__(
        self, location: str, *, create: bool = False, retry: RetryRule = RETRY, pause_seconds: float = PAUSE_SECONDS
    ) -> None:
        """Open it; `location` and errors as `open_store`."""
        self._store = open_store(location, retry=retry, create=create)
        self._pause_seconds = pause_seconds
        self._lock = threading.Lock()
        self._paused_until = 0.0
        self._described: set[str] = set()

    @property
    def url(self) -> str:
        """Where it is, for messages."""
        return self._store.url

    def has(self, name: str) -> bool:
        """Tell whether there is a block.

        Raises:
            StoreError: the store does not say.
        """
        return self._watched(lambda: self._store.exists(name))

    def get(self, name: str, max_bytes: int) -> bytes:
        """Return a block's blob, unchecked.

        Raises:
            StoreError: it is not there (`is_missing`), too large, or the store does not answer.
        """
        return self._watched(lambda: self._store.get(name, max_bytes))

    def put(self, namespace: Namespace, block_hash: bytes, blob: bytes | bytearray, *, replace: bool = False) -> bool:
        """Store a block, whole or not at all; the first of a namespace also stores what it is of.

        Args:
            replace: what is there is damaged.

        Returns:
            Whether it was stored; False where it was there.

        Raises:
            OutputError: it cannot be written.
            StoreError: the store had failed a moment ago.
        """
        if namespace.name not in self._described:
            self._watched(lambda: self._store.put(namespace.about_name, namespace.pack()))
            self._described.add(namespace.name)
        content = memoryview(blob)
        return self._watched(lambda: self._store.put(namespace.block_name(block_hash), content, overwrite=replace))

    def _watched(self, action: Callable[[], Any]) -> Any:
        with self._lock:
            if time.monotonic() < self._paused_until:
                raise StoreError(f"{self.url}: failed a moment ago, and is left alone", is_temporary=True)
        try:
            return action()
        except (StoreError, OutputError) as error:
            if isinstance(error, OutputError) or error.is_temporary or error.is_too_slow:
                with self._lock:
                    self._paused_until = time.monotonic() + self._pause_seconds
            raise


def count_prefix(has: Callable[[int], bool], num_blocks: int) -> int:
    """Return how many of a context's first blocks are there, with about 2 log2 of them looked for.

    It is taken that blocks are missing from the end on. Where one within is missing, too many may be counted.
    """
    known, step = 0, 1
    while known < num_blocks and has(min(known + step, num_blocks) - 1):
        known = min(known + step, num_blocks)
        step *= 2
    missing = min(known + step, num_blocks)
    while known + 1 < missing:
        middle = (known + missing) // 2
        if has(middle - 1):
            known = middle
        else:
            missing = middle
    return known
