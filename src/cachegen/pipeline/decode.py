"""From chunk files, in a folder or in memory, to a cache: while a chunk decodes, the next one is read.

Where a GPU decodes, the chunk in between is checked and copied there meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import BitstreamError, CacheGenError, ConfigError, MismatchError
from cachegen.format.files import TABLES_NAME, chunk_name
from cachegen.kv_cache import KVCache, describe_difference, hash_rotary_embeddings, hash_token_prefixes
from cachegen.methods import open_document
from cachegen.methods.base import DecodingPart, Document, FindProfile, check_output
from cachegen.pipeline.document_files import DocumentFiles, FolderFiles
from cachegen.states import find_different_state

if TYPE_CHECKING:
    from cachegen.pipeline.model import LoadedModel


@dataclass(frozen=True)
class DecodeResult:
    """What decoding took.

    Attributes:
        encoded_bytes: of the files that were read.
        load_seconds: reading files, which overlaps with decoding.
        decode_seconds: checking and decoding, and copying to the cache's device.
    """

    num_tokens: int
    encoded_bytes: int
    load_seconds: float
    decode_seconds: float


class EncodedFiles:
    """An encoded document, wherever its files are.

    Attributes:
        document: its tables file, parsed.
        path: of its folder; for messages, where it has none.
    """

    def __init__(
        self,
        files: DocumentFiles,
        num_threads: int,
        kernels: Kernels = CPU,
        *,
        find_profile: FindProfile | None = None,
        level: int | None = None,
    ) -> None:
        """Read the tables file, and the profile that it names with method `transform`.

        Args:
            find_profile: as for `open_document`.
            level: decode from the files of levels 1 to this one; None is all that the document has.

        Raises:
            InputError: there is none.
            BitstreamError: it is corrupt.
            ConfigError: the document has no such level.
            MismatchError: the profile is not the one that the document names.
        """
        self._files, self.path = files, files.path
        self._num_threads, self._kernels = num_threads, kernels
        self.tables_path = self.path / TABLES_NAME
        start = time.perf_counter()
        content = files.read(TABLES_NAME)
        self._read_seconds = time.perf_counter() - start
        start = time.perf_counter()
        try:
            self.document = open_document(content, num_threads=num_threads, kernels=kernels, find_profile=find_profile)
        except BitstreamError as error:
            if error.path is not None:  # the profile's
                raise
            raise error.at(self.tables_path) from error
        self._parse_seconds = time.perf_counter() - start
        self._shared_bytes = len(content) + files.measure_own_profile(self.document.header.profile_hash)
        self._levels = self._select_levels(level)

    def select_chunks(self, num_chunks: int | None) -> tuple[int, ...]:
        """Return the token counts of the first `num_chunks` chunks; None: of all.

        Raises:
            ConfigError: there are not so many, or the document can only be used whole.
        """
        available = self.document.header.chunk_tokens
        if num_chunks is not None and num_chunks > len(available):
            raise ConfigError(f"{self.path}: `num_chunks` {num_chunks} asked for, {len(available)} are there")
        if num_chunks is not None and num_chunks < len(available) and self.document.header.is_whole_only:
            raise ConfigError(
                f"{self.path}: `num_chunks` {num_chunks} asked for, but the document can only be used whole, all "
                f"{len(available)}: what no token behind it attends to is not stored (`keep_all_tokens` keeps it)"
            )
        return available[:num_chunks]

    @property
    def num_levels(self) -> int:
        """The number of levels that are decoded."""
        return len(self._levels)

    def _select_levels(self, level: int | None) -> tuple[int, ...]:
        available = self.document.header.levels
        if level is not None and level not in available:
            levels = "1 level" if len(available) == 1 else f"{len(available)} levels"
            raise ConfigError(f"{self.path}: `level` {level} asked for, the document has {levels}")
        return available[:level]

    def check_model(self, loaded: LoadedModel) -> None:
        """Refuse a model that is not the one whose cache was encoded.

        Raises:
            MismatchError: naming the field that differs.
        """
        check_model(self.document, self.tables_path, loaded)

    def check_context(self, token_ids: torch.Tensor, num_cached_tokens: int, context_name: object) -> None:
        """Refuse a context that is not the one that was encoded.

        Args:
            token_ids: the context's tokens, integers `[num_tokens]`.
            num_cached_tokens: those that will be decoded; at least one more token must follow.

        Raises:
            MismatchError: the context is another one.
        """
        header = self.document.header
        if num_cached_tokens >= len(token_ids):
            raise MismatchError(
                f"{context_name}: the context has {len(token_ids)} tokens, but {self.path} caches "
                f"{num_cached_tokens} and one more must follow: it is another context"
            )
        num_compared = min(header.num_cache_tokens, len(token_ids))
        if num_compared == header.num_cache_tokens:
            found = bytes.fromhex(hash_token_prefixes(token_ids, [num_compared])[0])
            if found != header.token_hash:
                raise MismatchError(
                    f"{context_name}: token_hash is {found.hex()[:12]}, but {self.tables_path} says "
                    f"{header.token_hash.hex()[:12]}: the files are of another context"
                )

    def decode_into(
        self,
        output: KVCache,
        token_ids: torch.Tensor | None,
        chunk_tokens: Sequence[int],
        progress: Callable[[int], object] | None = None,
    ) -> DecodeResult:
        """Decode chunks, in order, into a cache.

        Args:
            output: at least as many tokens as the chunks have, on any device.
            token_ids: the context's tokens, which every chunk's hash is compared with; None compares none.
            chunk_tokens: from `select_chunks`.
            progress: called with the number of tokens after each chunk.

        Raises:
            InputError: a chunk file is missing.
            BitstreamError: one is corrupt, or the tables are.
            MismatchError: one belongs elsewhere, or the output has other shapes.
        """
        stops, hashes = _plan_stops(token_ids, chunk_tokens)
        self._prepare(output)
        load_seconds, decode_seconds = self._read_seconds, self._parse_seconds
        encoded_bytes = self._shared_bytes
        in_flight: deque[tuple[int, Callable[[], None]]] = deque()

        def finish_until(num_left: int) -> None:
            while len(in_flight) > num_left:
                index, finish = in_flight.popleft()
                try:
                    with self._naming(index):
                        finish()
                except CacheGenError:
                    in_flight.clear()  # what came later does not matter any more
                    raise
                if progress is not None:
                    progress(chunk_tokens[index])

        try:
            for index, (contents, seconds) in enumerate(self._read_ahead(len(chunk_tokens))):
                start = time.perf_counter()
                tokens = output.slice(stops[index] - chunk_tokens[index], stops[index])
                with self._naming(index):
                    finish = _start_decoding(
                        contents,
                        self.document,
                        tokens,
                        first_token=stops[index] - chunk_tokens[index],
                        token_hash=hashes[index],
                        num_threads=self._num_threads,
                        kernels=self._kernels,
                    )
                in_flight.append((index, finish))
                finish_until(self._kernels.chunks_in_flight)
                load_seconds += seconds
                decode_seconds += time.perf_counter() - start
                encoded_bytes += sum(map(len, contents))
            start = time.perf_counter()
            finish_until(0)
            decode_seconds += time.perf_counter() - start
        except CacheGenError:
            finish_until(0)  # an earlier chunk's error comes first
            raise
        return DecodeResult(sum(chunk_tokens), encoded_bytes, load_seconds, decode_seconds)

    def decode_layers(
        self, output: KVCache, token_ids: torch.Tensor | None, chunk_tokens: Sequence[int]
    ) -> Iterator[range]:
        """Decode chunks into a cache, the first layers of all chunks first, so that a model can start on them.

        All files are read and checked before the first layers are decoded. With methods that decode all layers of a
        chunk together, all become ready at once.

        Args:
            output: as for `decode_into`, on the kernels' device.
            token_ids, chunk_tokens: as for `decode_into`.

        Yields:
            Layers that are ready, from 0 on; the others hold no usable values yet.

        Raises:
            InputError, BitstreamError, MismatchError: as `decode_into`, before the first layers or between.
        """
        stops, hashes = _plan_stops(token_ids, chunk_tokens)
        if any(plane.device.type != self._kernels.device.type for plane in output.planes):
            raise ValueError(f"`output` must be on {self._kernels.device.type}, where it is decoded")
        self._prepare(output)
        chunks: list[deque[DecodingPart]] = []
        for index, (contents, _) in enumerate(self._read_ahead(len(chunk_tokens))):
            first_token = stops[index] - chunk_tokens[index]
            with self._naming(index):
                parts = self.document.list_parts(
                    contents,
                    output.slice(first_token, stops[index]),
                    first_token=first_token,
                    token_hash=hashes[index],
                    num_threads=self._num_threads,
                    kernels=self._kernels,
                )
            chunks.append(deque(parts))
        num_ready, done = 0, [0] * len(chunks)
        while chunks and num_ready < self.document.header.num_layers:
            # Chunks may have other parts than each other.
            goal = min(parts[0].layers.stop if parts else stop for parts, stop in zip(chunks, done, strict=True))
            for index, parts in enumerate(chunks):
                while done[index] < goal:
                    part = parts.popleft()
                    with self._naming(index):
                        part.start()()
                    done[index] = part.layers.stop
            yield range(num_ready, min(done))
            num_ready = min(done)

    def _prepare(self, output: KVCache) -> None:
        """Unpack what all chunks share, now that the document is known to be this output's."""
        start = time.perf_counter()
        try:
            check_output(self.document.header.shapes, output)
            self.document.prepare()
        except MismatchError as error:
            raise MismatchError(f"{self.tables_path}: {error}") from error
        except BitstreamError as error:
            raise error.at(self.tables_path) from error
        self._parse_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Let errors say which chunk's file they are about."""
        try:
            yield
        except BitstreamError as error:
            raise error.at(self._path_of(index, error)) from error
        except MismatchError as error:
            raise MismatchError(f"{self._path_of(index, error)}: {error}") from error

    def _path_of(self, index: int, error: CacheGenError) -> Path:
        """Return the file of a chunk that an error is about."""
        return self.path / chunk_name(index, error.level or self._levels[-1])

    def _read_ahead(self, num_chunks: int) -> Iterator[tuple[list[bytes], float]]:
        """Yield each chunk's files and how long reading them took; the next ones are being read meanwhile."""

        def read(index: int) -> tuple[list[bytes], float]:
            start = time.perf_counter()
            names = [chunk_name(index, level) for level in self._levels]
            contents = [self._files.read(name) for name in names]
            return contents, time.perf_counter() - start

        with ThreadPoolExecutor(max_workers=1) as reader:  # starts its thread for the second chunk
            current = read(0) if num_chunks else None
            for index in range(1, num_chunks + 1):
                pending = reader.submit(read, index) if index < num_chunks else None
                assert current is not None
                yield current
                current = pending.result() if pending is not None else None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tables file, of a profile of the document's own, and of the chunk files that are decoded.

        Raises:
            InputError: a chunk file is missing.
        """
        names = [chunk_name(i, level) for i in range(self.document.header.num_chunks) for level in self._levels]
        return self._shared_bytes + sum(map(self._files.measure, names))

    @property
    def plane_shapes(self) -> list[tuple[int, int]]:
        """(num_kv_heads, head_dim) of every plane."""
        return self.document.header.shapes

    @property
    def dtype(self) -> torch.dtype:
        """The cache's dtype."""
        return self.document.dtype


class EncodedFolder(EncodedFiles):
    """An encoded document on disk."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_threads: int,
        kernels: Kernels = CPU,
        *,
        find_profile: FindProfile | None = None,
        level: int | None = None,
    ) -> None:
        """See `EncodedFiles`."""
        super().__init__(FolderFiles(folder), num_threads, kernels, find_profile=find_profile, level=level)


def check_model(document: Document, tables_name: str | os.PathLike[str], loaded: LoadedModel) -> None:
    """Refuse a model that is not the one whose cache was encoded, or whose cache has other shapes.

    Nothing of a document's size has been allocated before. The shapes are those that one token of the model gives. A
    document that leaves out tokens must have all that the model's windows show behind it.

    Args:
        tables_name: of the document's tables file, for messages.

    Raises:
        MismatchError: naming the field that differs.
    """
    from cachegen.pipeline.model_cache import view_kv_cache  # transformers takes seconds to import
    from cachegen.pipeline.prefill import measure_cache
    from cachegen.pipeline.state_layers import states_of_cache

    header = document.header
    gates: list[tuple[str, object, object]] = [
        ("dtype", document.dtype, loaded.dtype),
        ("model_fingerprint", header.model_fingerprint.hex()[:12], loaded.fingerprint[:12]),
        ("rope_hash", header.rope_hash.hex()[:12], hash_rotary_embeddings(loaded.rotary_embeddings)[:12]),
    ]
    remedy = "give the model that computed the cache (`model_id`, `dtype`, `load_in_8bit`, `load_in_4bit`)"
    for field, found, expected in gates:
        if found != expected:
            raise MismatchError(f"{tables_name}: {field} is {found}, but {loaded.model_id} has {expected}: {remedy}")
    measured = measure_cache(loaded)
    shapes = [(plane.shape[1], plane.shape[2]) for plane in view_kv_cache(measured, 1).planes]
    difference = describe_difference(header.shapes, shapes)
    if difference is not None:
        raise MismatchError(f"{tables_name}: planes: {difference} with {loaded.model_id}: {remedy}")
    try:
        difference = find_different_state(document.read_states(), states_of_cache(measured))
    except BitstreamError as error:
        raise error.at(tables_name) from error
    if difference is not None:
        raise MismatchError(f"{tables_name}: states: {difference} with {loaded.model_id}: {remedy}")
    check_windows(header.first_stored, header.num_covered_tokens, tables_name, loaded)


def check_windows(first_stored: Sequence[int], num_tokens: int, name: object, loaded: LoadedModel) -> None:
    """Refuse a document that leaves out what the tokens behind it attend to.

    Args:
        first_stored: as in `DocumentHeader`.
        num_tokens: of its chunks.
        name: of the file that says so, for messages.

    Raises:
        MismatchError: naming the first layer that lacks tokens.
    """
    if not first_stored:
        return
    from cachegen.pipeline.windows import find_first_visible

    visible = find_first_visible(loaded.text_config, num_tokens)
    for layer, (stored, needed) in enumerate(zip(first_stored, visible, strict=True)):
        if stored > needed:
            raise MismatchError(
                f"{name}: first_stored is {stored} in layer {layer}, but {loaded.model_id} attends to token {needed} "
                f"there from token {num_tokens} on: encode the context again, or give the model that computed the cache"
            )


def empty_on(device: torch.device, cache: KVCache, num_tokens: int | None = None) -> KVCache:
    """Return an undefined cache of the shapes and dtype of `cache` on another device, pinned on the CPU for a GPU's.

    Args:
        num_tokens: None for as many as `cache` has.
    """

    def like(plane: torch.Tensor) -> torch.Tensor:
        is_pinned = device.type == "cpu" and plane.device.type == "cuda"
        shape = (plane.shape[0] if num_tokens is None else num_tokens, *plane.shape[1:])
        return torch.empty(shape, dtype=plane.dtype, device=device, pin_memory=is_pinned)

    return KVCache([like(plane) for plane in cache.keys], [like(plane) for plane in cache.values])


def copy_cache(source: KVCache, target: KVCache) -> None:
    """Copy tokens between caches of one shape, on any devices."""
    for plane, copied in zip(target.planes, source.planes, strict=True):
        plane.copy_(copied)


def _plan_stops(
    token_ids: torch.Tensor | None, chunk_tokens: Sequence[int]
) -> tuple[list[int], Sequence[bytes | None]]:
    """Return the token after each chunk, and the hash of all tokens before that; None where no tokens are given."""
    stops = list(itertools.accumulate(chunk_tokens))
    if token_ids is None:
        return stops, [None] * len(stops)
    return stops, [bytes.fromhex(digest) for digest in hash_token_prefixes(token_ids, stops)]


def _start_decoding(
    contents: Sequence[bytes],
    document: Document,
    output: KVCache,
    *,
    first_token: int,
    token_hash: bytes | None,
    num_threads: int,
    kernels: Kernels,
) -> Callable[[], None]:
    """Begin to decode straight into the output, or by way of the kernels' device where the output is elsewhere.

    Returns:
        What waits for the rest: as of `Document.start_decoding`.
    """
    is_direct = all(plane.device.type == kernels.device.type for plane in output.planes)
    target = output if is_direct else empty_on(kernels.device, output)
    finish = document.start_decoding(
        contents,
        target,
        first_token=first_token,
        token_hash=token_hash,
        num_threads=num_threads,
        kernels=kernels,
    )
    if is_direct:
        return finish

    def finish_and_copy() -> None:
        finish()
        copy_cache(target, output)

    return finish_and_copy
