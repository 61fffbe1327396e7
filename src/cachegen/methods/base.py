"""What every method of coding a KV cache gives: a document to decode from, and an encoder that makes its files.

A document is one saved cache. It has one tables file, whose hash stands in every chunk, and chunks that follow each
other from token 0, at one or several levels; each chunk decodes by itself, given the tables.

A method is a folder beside this file. It says what its headers are (`Method.document_header`, `Method.chunk_header`),
reads its config, and has a `Document` and an `Encoder`. `cachegen.methods` lists the methods there are; nothing outside
their folders asks which one it has.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias, cast

import torch

from cachegen import _native
from cachegen.coder.cpu import DTYPES, TORCH_DTYPES
from cachegen.coder.cpu_kernels import CPU
from cachegen.coder.kernels import Kernels
from cachegen.errors import BitstreamError, ConfigError, MismatchError, UnsupportedVersionError
from cachegen.fields import Fields
from cachegen.format.constants import CHUNK_MAGIC, LANES, MAX_STATES_BYTES, Coder
from cachegen.format.files import Chunk, split_chunk
from cachegen.format.framing import Buffer, open_header
from cachegen.format.headers import METHOD_OFFSET, ChunkHeader, DocumentHeader
from cachegen.kv_cache import (
    ContextMetadata,
    KVCache,
    check_planes,
    describe_difference,
    hash_planes,
    hash_token_prefixes,
)
from cachegen.methods.profile_files import AnyProfile, ReadFile
from cachegen.states import States, pack_states, unpack_states

FindProfile: TypeAlias = Callable[[bytes], Any]
"""Returns what a method calls a profile, by its hash of 32 bytes."""


@dataclass(frozen=True)
class ErrorMeasure:
    """How far decoded values are from those of the cache.

    Attributes:
        largest: the largest difference, or a bound of it.
        mean: over all values; None where it was not measured.
    """

    largest: float
    mean: float | None = None


@dataclass(frozen=True)
class DecodingPart:
    """Some layers of a chunk, to be decoded together.

    Attributes:
        layers: consecutive ones.
        start: begins; returns what waits for the end, as `Document.start_decoding` does.
    """

    layers: range
    start: Callable[[], Callable[[], None]]


def start_all(parts: Iterable[DecodingPart]) -> Callable[[], None]:
    """Begin all parts; returns what waits for them, as `Document.start_decoding` does."""
    finishes = [part.start() for part in parts]

    def finish_all() -> None:
        for finish in finishes:
            finish()

    return finish_all


class Document(ABC):
    """What decoding needs of a document.

    Attributes:
        header: of its tables file.
        tables_hash: SHA-256 of that file.
        states_section: of that file: see `read_states`.
    """

    states_section: bytes = b""

    def __init__(self, header: Any, tables_hash: bytes) -> None:
        self.header: DocumentHeader = header
        self.tables_hash = tables_hash

    @property
    def dtype(self) -> torch.dtype:
        """The cache's dtype."""
        return TORCH_DTYPES[self.header.dtype]

    def read_states(self) -> States:
        """Return the recurrent states at the end of the context, on the CPU; nothing for a model without.

        Raises:
            BitstreamError: they are corrupt.
        """
        return unpack_states(self.states_section)

    @abstractmethod
    def prepare(self) -> None:
        """Do what decoding needs once, and may take memory, now that the document is known to be the right one.

        Raises:
            BitstreamError: the tables file is corrupt.
            InputError: something that the document names is missing.
        """

    def decode(
        self,
        contents: Sequence[Buffer],
        output: KVCache,
        *,
        first_token: int,
        token_hash: bytes | None,
        num_threads: int = 1,
        kernels: Kernels = CPU,
    ) -> None:
        """Decode one chunk: `start_decoding`, waited for."""
        finish = self.start_decoding(
            contents, output, first_token=first_token, token_hash=token_hash, num_threads=num_threads, kernels=kernels
        )
        finish()

    def start_decoding(
        self,
        contents: Sequence[Buffer],
        output: KVCache,
        *,
        first_token: int,
        token_hash: bytes | None,
        num_threads: int = 1,
        kernels: Kernels = CPU,
    ) -> Callable[[], None]:
        """Begin to decode one chunk: make all checks that need no decoding, and on a GPU queue the rest there.

        Args:
            contents: the files of level 1, of level 2, ...; more of them give a finer result.
            output: where the chunk's tokens go: exactly as many as it must have, in the cache's dtype, on the kernels'
                device. What a layer does not hold of them becomes zero.
            first_token: where in the context the chunk must begin.
            token_hash: hash of the context's tokens up to the chunk's end; None where the caller has no context to
                compare: the chunk is then the document's, whatever context that is of.

        Returns:
            A function that waits for the GPU and raises what is left to raise: BitstreamError. Until it has returned,
            `output` holds no usable values. With kernels of the CPU all is done before.

        Raises:
            BitstreamError: a file is corrupt, naming its level; `output` then holds no usable values.
            MismatchError: a file is of another document, model, context, configuration or level, naming the field.
        """
        parts = self.list_parts(
            contents, output, first_token=first_token, token_hash=token_hash, num_threads=num_threads, kernels=kernels
        )
        return start_all(parts)

    def list_parts(
        self,
        contents: Sequence[Buffer],
        output: KVCache,
        *,
        first_token: int,
        token_hash: bytes | None,
        num_threads: int = 1,
        kernels: Kernels = CPU,
    ) -> list[DecodingPart]:
        """Make the checks of `start_decoding`, and return the parts of decoding, in the order of their layers.

        Args:
            contents, output, first_token, token_hash: as for `start_decoding`; both must outlive the parts.

        Returns:
            Parts to be begun in this order, each once; together they cover all layers.

        Raises:
            BitstreamError, MismatchError: as `start_decoding`.
        """
        if not contents:
            raise ValueError("`contents` must have at least the file of level 1")
        check_output(self.header.shapes, output)
        chunks: list[Chunk[Any]] = []
        for level, content in enumerate(contents, 1):
            with naming_level(level):
                chunks.append(self._split(content, level, chunks, output, first_token, token_hash, num_threads))
        num_absent = self.header.num_absent(first_token, output.num_tokens)
        for index, plane in enumerate(output.planes if num_absent else ()):
            plane[: num_absent[index // 2]].zero_()
        return self._list_parts(chunks, output, first_token, num_threads, kernels)

    def _list_parts(
        self, chunks: Sequence[Chunk[Any]], output: KVCache, first_token: int, num_threads: int, kernels: Kernels
    ) -> list[DecodingPart]:
        """Return the parts of a chunk that is taken apart: one, for methods that decode all layers together."""
        layers = range(self.header.num_layers)
        return [DecodingPart(layers, lambda: self._start(chunks, output, first_token, num_threads, kernels))]

    def _split(
        self,
        content: Buffer,
        level: int,
        before: Sequence[Chunk[Any]],
        output: KVCache,
        first_token: int,
        token_hash: bytes | None,
        num_threads: int,
    ) -> Chunk[Any]:
        """Take a file apart, refusing one that does not belong here before its size in memory is taken."""

        def check(header: ChunkHeader) -> None:
            self.check_place(
                header,
                level=level,
                first_token=first_token,
                num_tokens=output.num_tokens,
                token_hash=token_hash,
                refined=before[-1].header if before else None,
                own_gates=self.gates(header) if header.method == self.header.method else (),
            )

        method = method_of_file(content, CHUNK_MAGIC, "chunk")
        return split_chunk(content, method.chunk_header, num_threads, check=check)

    def check_place(
        self,
        header: ChunkHeader,
        *,
        level: int,
        first_token: int,
        num_tokens: int,
        token_hash: bytes | None = None,
        refined: ChunkHeader | None = None,
        own_gates: Iterable[tuple[str, object, object]] = (),
    ) -> None:
        """Refuse a chunk that is not the document's at some place.

        Args:
            token_hash: None compares no context.
            refined: of the chunk's file of the level before, where there is one.
            own_gates: the method's.

        Raises:
            MismatchError: naming the field that differs.
        """
        expected = self.header
        check_gates(
            [
                ("method", method_of(header).name, method_of(expected).name),
                ("model_fingerprint", header.model_fingerprint, expected.model_fingerprint),
                ("rope_hash", header.rope_hash, expected.rope_hash),
                ("first_token", header.first_token, first_token),
                ("num_tokens", header.num_tokens, num_tokens),
                *([("token_hash", header.token_hash, token_hash)] if token_hash is not None else []),
                ("coder", header.coder, expected.coder),
                ("dtype", header.dtype, expected.dtype),
                ("num_layers", header.num_layers, expected.num_layers),
                ("level", header.level, level),
                *own_gates,
                ("profile_hash", header.profile_hash, expected.profile_hash),
                ("tables_hash", header.tables_hash, self.tables_hash),
            ]
        )
        if refined is not None and header.refines != refined.header_crc:
            raise MismatchError(
                f"refines a file of level {level - 1} that is not the one beside it: encode the chunk again"
            )

    @abstractmethod
    def gates(self, header: Any) -> list[tuple[str, object, object]]:
        """Return the method's own gates of a chunk: (field, found, wanted).

        Of a method that can leave out tokens, `num_absent` is one of them.
        """

    @abstractmethod
    def _start(
        self, chunks: Sequence[Chunk[Any]], output: KVCache, first_token: int, num_threads: int, kernels: Kernels
    ) -> Callable[[], None]:
        """Begin to decode chunk files that belong here; see `start_decoding`."""


class Encoder(ABC):
    """Encodes one saved cache: its chunks and levels in any order.

    Attributes:
        document: what a decoder will know.
        tables_file: the tables file's bytes.
        states_section: what it has behind the tables: recurrent states.
    """

    document: Document
    tables_file: bytes
    states_section: bytes

    def __init__(
        self,
        cache: KVCache,
        metadata: ContextMetadata,
        chunk_tokens: Sequence[int],
        num_threads: int = 1,
        kernels: Kernels = CPU,
        *,
        first_stored: Sequence[int] = (),
    ) -> None:
        """Read the cache's values, for their hash.

        Args:
            cache: on the CPU; may be memory-mapped.
            chunk_tokens: the chunks' token counts, at most the cache's in all.
            first_stored: as in `DocumentHeader`; what is before it may be anything.

        Raises:
            BitstreamError: the cache's values are not those that were saved.
            ConfigError: there are recurrent states, and the chunks end before the context; or they are too large.
        """
        if sum(chunk_tokens) > cache.num_tokens or min(chunk_tokens, default=0) < 1:
            raise ValueError(f"`chunk_tokens` must be positive and at most {cache.num_tokens} in all")
        if first_stored and (len(first_stored) != cache.num_layers or max(first_stored) > sum(chunk_tokens)):
            raise ValueError("`first_stored` must have one token of the chunks, or their end, for each layer")
        self.states_section = pack_states(metadata.states)
        _check_states(len(self.states_section), sum(chunk_tokens), cache.num_tokens)
        self._cache, self._num_threads, self._kernels = cache, num_threads, kernels
        self._stops = list(itertools.accumulate(chunk_tokens))
        self._first_stored = tuple(first_stored) if any(first_stored) else ()
        cache_hash = check_planes(cache, metadata, num_threads)
        if self._first_stored:
            cache_hash = bytes.fromhex(hash_planes(cache, num_threads, first_stored=self._first_stored))
        hashes = hash_token_prefixes(metadata.token_ids, [*self._stops, cache.num_tokens])
        *self._token_hashes, token_hash = [bytes.fromhex(digest) for digest in hashes]
        self._document_fields: dict[str, Any] = {
            "num_cache_tokens": cache.num_tokens,
            "dtype": DTYPES[cache.dtype],
            "prefill_block_size": metadata.block_size,
            "model_fingerprint": bytes.fromhex(metadata.model_fingerprint),
            "token_hash": token_hash,
            "rope_hash": bytes.fromhex(metadata.rope_hash),
            "cache_hash": cache_hash,
            "states_bytes": len(self.states_section),
            "states_crc": _native.crc32c(self.states_section) if self.states_section else 0,
            "chunk_tokens": tuple(chunk_tokens),
            "first_stored": self._first_stored,
        }

    @property
    def num_chunks(self) -> int:
        return len(self._stops)

    @property
    def levels(self) -> tuple[int, ...]:
        """The numbers of the levels, 1 to the last."""
        return self.document.header.levels

    @abstractmethod
    def expected_header(self, index: int, level: int = 1) -> ChunkHeader:
        """Return a chunk's header but for what only encoding tells."""

    @abstractmethod
    def encode_chunk(self, index: int, level: int = 1) -> list[bytes | memoryview]:
        """Encode one chunk at one level; returns its file as parts to be written one after the other.

        Raises:
            InputError: the cache holds what cannot be encoded.
        """

    @abstractmethod
    def read_error(self, index: int, level: int, content: Sequence[Buffer]) -> ErrorMeasure:
        """Return what decoding loses of a chunk's values at a level.

        Args:
            content: the chunk's file of the level, as parts that follow each other.
        """

    def expected_kl(self, level: int) -> float | None:
        """Return what a level is expected to lose, in nats per token; None where it is not known."""
        return None

    def is_encoding_of(self, index: int, contents: Sequence[Buffer]) -> bool:
        """Tell whether files are this chunk, whole and unchanged, from this document and configuration.

        Args:
            contents: the files of level 1, of level 2, ... to the last.
        """
        refines, chunk_header = 0, method_of(self.document.header).chunk_header
        for level, content in zip(self.levels, contents, strict=True):
            try:
                header = split_chunk(content, chunk_header, self._num_threads).header
            except BitstreamError:
                return False
            if header.refines != refines or header.without_encoding() != self.expected_header(index, level):
                return False
            refines = header.header_crc
        return True

    def _num_absent(self, index: int) -> tuple[int, ...]:
        """Return, per layer, how many of a chunk's first tokens are not stored; empty where none is in any."""
        num_tokens = self.document.header.chunk_tokens[index]
        return self.document.header.num_absent(self._stops[index] - num_tokens, num_tokens)

    def _hash_tables(self) -> bytes:
        return hashlib.sha256(self.tables_file).digest()

    def _chunk_fields(self, index: int, level: int) -> dict[str, Any]:
        """Return what the headers of all methods say of a chunk."""
        document = self.document.header
        num_tokens = document.chunk_tokens[index]
        return {
            "first_token": self._stops[index] - num_tokens,
            "num_tokens": num_tokens,
            "num_layers": document.num_layers,
            "method": document.method,
            "coder": document.coder,
            "dtype": document.dtype,
            "level": level,
            "refines": 0,
            "model_fingerprint": document.model_fingerprint,
            "token_hash": self._token_hashes[index],
            "rope_hash": document.rope_hash,
            "tables_hash": self.document.tables_hash,
            "profile_hash": document.profile_hash,
        }


def _check_states(states_bytes: int, num_covered: int, num_tokens: int) -> None:
    """Refuse recurrent states that a document cannot hold."""
    if states_bytes > MAX_STATES_BYTES:
        raise ConfigError(f"the recurrent states have {states_bytes} bytes, {MAX_STATES_BYTES} at most can be stored")
    if states_bytes and num_covered < num_tokens:
        raise ConfigError(
            f"the chunks end after {num_covered} of {num_tokens} tokens, and recurrent states are known after the last "
            "one alone: encode the whole context"
        )


class MethodConfig(ABC):
    """What a config file says of a method; a frozen dataclass that owns its defaults.

    Attributes:
        method: the method's name.
        coder: the default of this config.
        source: the file, for messages.
        num_levels: of a document; see `Encoder.levels`.
        model_fingerprint: of the only model that the config is for, 64 hex digits; None where any will do, or nobody
            knows before `read_files`.
    """

    method: str
    coder: Coder
    source: str
    num_levels: int = 1

    @property
    def model_fingerprint(self) -> str | None:
        return None

    @property
    def needs_profile(self) -> bool:
        """Whether the config is of a method that needs a profile, and names none."""
        return False

    @property
    def named_step_log(self) -> int | None:
        """16 log2 of the quantization step that the config names; None where it names none."""
        return None

    def with_own_profile(self, profile: Any, step_log: int) -> MethodConfig:
        """Return the config with a profile that was made of the document alone, for one step.

        Args:
            profile: what the method calls a profile, loaded for encoding.
            step_log: 16 log2 of the step, in the place of any target.
        """
        raise ValueError(f"method {self.method} needs no profile, got {profile!r} for step {step_log}")

    def read_files(self) -> MethodConfig:
        """Return the config with the files that it names in memory; encoding reads those that are not.

        Raises:
            InputError, BitstreamError: one is missing or corrupt.
        """
        return self

    @abstractmethod
    def with_flags(self, flags: Mapping[str, Any]) -> MethodConfig:
        """Return the config with some values replaced.

        Args:
            flags: by the names of the command line's flags, without dashes; those that were not given are left out.

        Raises:
            ConfigError: the method has no such flag, or the flags contradict each other.
        """

    @abstractmethod
    def check_document(self, header: Any, path: object) -> None:
        """Refuse a document that was encoded otherwise.

        Args:
            header: of a document of this method.
            path: its name, for messages.

        Raises:
            MismatchError: naming the first field that differs.
        """

    def refuse_flags(self, flags: Mapping[str, Any]) -> None:
        """Refuse flags of another method.

        Raises:
            ConfigError: there are some.
        """
        for flag in flags:
            raise ConfigError(f"`{flag}` is not for method {self.method} ({self.source})")


class Method(ABC):
    """One method of coding: its name, its place in files, and how to open, configure and encode.

    Attributes:
        name: as configs, manifests and people write it.
        number: as files have it.
        uses_profile: whether documents may name a profile.
        profile_format: what profile.json of such a profile calls itself in its field `format`.
        undoes_rotations: whether encoders want to know how the planes are turned.
        num_sink_tokens: the first so many tokens of a context are computed from its text instead of decoded, where
            a model goes on from them.
    """

    name: str
    number: int
    uses_profile: bool = False
    profile_format: str | None = None
    undoes_rotations: bool = False
    num_sink_tokens: int = 0

    @property
    @abstractmethod
    def document_header(self) -> type[DocumentHeader]: ...

    @property
    @abstractmethod
    def chunk_header(self) -> type[ChunkHeader]: ...

    @abstractmethod
    def read_config(self, fields: Fields, source: str) -> MethodConfig:
        """Return what a config file says.

        Args:
            fields: of the file's JSON object.
            source: the file.

        Raises:
            ConfigError: it is not a config of this method, naming the field.
        """

    @abstractmethod
    def open_document(
        self,
        header: Any,
        tables_hash: bytes,
        tables: bytes,
        *,
        num_threads: int,
        kernels: Kernels,
        find_profile: FindProfile | None,
    ) -> Document:
        """Return the document of a tables file that has been taken apart; see `cachegen.methods.open_document`."""

    def read_profile(self, read: ReadFile, place: str, *, for_encoding: bool) -> AnyProfile:
        """Read a profile of this method from wherever its files are; see `cachegen.methods.read_profile`."""
        raise ValueError(f"method {self.name} has no profiles, got one at {place} to read with {read}, {for_encoding=}")

    @abstractmethod
    def make_encoder(
        self,
        config: Any,
        cache: KVCache,
        metadata: ContextMetadata,
        chunk_tokens: Sequence[int],
        *,
        num_threads: int,
        kernels: Kernels,
        first_stored: Sequence[int],
    ) -> Encoder:
        """Return an encoder; see `cachegen.methods.make_encoder`."""


METHODS: list[Method] = []
"""The methods that files and configs may name; `cachegen.methods` fills the list."""


def method_of(header: DocumentHeader | ChunkHeader) -> Method:
    """Return the method of a header that has been parsed."""
    return next(method for method in METHODS if method.number == header.method)


def method_of_file(content: Buffer, magic: bytes, kind: str) -> Method:
    """Return the method that a file names.

    Args:
        magic, kind: of the file that it should be, as for `open_header`.

    Raises:
        BitstreamError: the file is damaged, or of another kind.
        UnsupportedVersionError: this release does not know the method.
    """
    number = content[METHOD_OFFSET] if len(content) > METHOD_OFFSET else None
    for method in METHODS:
        if method.number == number:
            return method
    open_header(content, magic, kind, _native.crc32c)  # what is damaged is not of an unknown method
    known = ", ".join(f"{method.number} ({method.name})" for method in METHODS)
    raise UnsupportedVersionError(
        f"{number} is not supported, this release reads {known}", offset=METHOD_OFFSET, field="method"
    )


def check_gates(gates: Iterable[tuple[str, object, object]]) -> None:
    """Refuse a chunk one of whose fields, (name, found, wanted), is not what it must be, naming the first.

    Raises:
        MismatchError: there is one.
    """
    for field, found, wanted in gates:
        if found != wanted:
            raise MismatchError(
                f"{field} is {_show(found)}, but the document and the context say {_show(wanted)}: "
                "the chunk is of another document, model, configuration or level"
            )


def check_output(shapes: Sequence[tuple[int, int]], output: KVCache) -> None:
    """Refuse to decode into a cache of other shapes than a document's.

    Raises:
        MismatchError: naming the first plane that differs.
    """
    difference = describe_difference(shapes, [tuple(plane.shape[1:]) for plane in output.planes])
    if difference is not None:
        raise MismatchError(f"{difference}: the document is of another model")


class naming_level:
    """A context in which errors say of which level's file they are."""

    def __init__(self, level: int) -> None:
        self._level = level

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (BitstreamError, MismatchError)):
            error.level = self._level


def cut_streams(num_tokens: int, target: int) -> int:
    """Return the tokens of a stream, a multiple of 32, so that a chunk's streams are about `target` long, all alike."""
    num_streams = max(1, round(num_tokens / target))
    return LANES * max(1, -(-num_tokens // (num_streams * LANES)))


def _show(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()[:12]
    if isinstance(value, tuple):
        planes = cast("tuple[object, ...]", value)
        return f"{len(planes)} planes of {planes[0]}" if planes else "none"
    return value.name.lower() if isinstance(value, Enum) else str(value)
