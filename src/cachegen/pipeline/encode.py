"""From a saved cache to a folder of chunk files: resumable, and never half a file under a final name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachegen.errors import BitstreamError, ConfigError, MismatchError, OutputError, UnsupportedVersionError
from cachegen.files import atomic_write, is_temporary, lock_folder, remove_stale_temporaries, write_file
from cachegen.format.files import CHUNK_SUFFIX, TABLES_NAME, chunk_name, read_whole
from cachegen.format.headers import DocumentHeader
from cachegen.methods import parse_chunk, parse_chunk_header, parse_document
from cachegen.methods.base import Encoder, ErrorMeasure
from cachegen.methods.profile_files import PROFILE_NAME
from cachegen.methods.transform.profile import Profile
from cachegen.pipeline.profiles import (
    keep_own_profile,
    measure_own_profile,
    read_decoding_files,
    read_own_profile,
    remove_own_profile,
)
from cachegen.store.catalog import EncodedLevel

_CHUNK_NAME = re.compile(r"chunk_\d{5,}\.L\d" + re.escape(CHUNK_SUFFIX))


@dataclass(frozen=True)
class EncodedSizes:
    """Bytes of an encoded document, every file counted, by what they are for.

    Attributes:
        header: headers with their indexes of streams, and padding between sections.
        tables: frequency tables.
        states: recurrent states.
        scales: one scale per token and plane.
        payload: streams with their padding.
    """

    header: int
    tables: int
    scales: int
    payload: int
    states: int = 0

    @property
    def total(self) -> int:
        return self.header + self.tables + self.states + self.scales + self.payload


@dataclass(frozen=True)
class EncodeResult:
    """What an encoding left in its folder.

    Attributes:
        num_reused_chunks: chunk files that were there already, whole and of the same cache and configuration.
        repaired: names of files that were there but damaged, and have been written again.
        errors: per level, how far decoded values are from the cache's.
        chunk_bytes: per level, size of each chunk's file; the rest of `sizes.total` is the tables file, which all
            chunks share.
    """

    header: DocumentHeader
    sizes: EncodedSizes
    num_reused_chunks: int
    repaired: tuple[str, ...]
    errors: dict[int, ErrorMeasure]
    chunk_bytes: dict[int, list[int]]


def encode_document(
    encoder: Encoder,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_error: float | None = None,
    own_profile: Profile | None = None,
    progress: Callable[[int], object] | None = None,
) -> EncodeResult:
    """Write a document's tables file and chunk files.

    A folder that already holds files of the same cache and configuration keeps those that are whole: an interrupted
    encoding resumes, a damaged one is repaired, a finished one is checked. The tables file holds a hash of the cache,
    and every chunk one of the tables file, so that no file of another cache is ever taken for ours.

    Args:
        overwrite: replace the files of another document or configuration.
        max_error: refuse a document whose last level decodes a value further from the cache's than this.
        own_profile: a profile of this document alone, which is to be kept beside its files.
        progress: called with the number of tokens after each chunk.

    Raises:
        OutputError: the folder holds something else and `overwrite` is not given, another process is writing into it,
            or it cannot be written.
        ConfigError: `max_error` is exceeded; files that this call has written are gone again.
    """
    folder = Path(folder)
    _make_folder(folder)
    with lock_folder(folder):
        writer = _ChunkWriter(encoder, folder, _claim_folder(folder, encoder, overwrite))
        if own_profile is not None:
            keep_own_profile(own_profile, folder)
        elif overwrite and not measure_own_profile(folder, encoder.document.header.profile_hash):
            remove_own_profile(folder)
        try:
            for index in range(encoder.num_chunks):
                writer.write(index, max_error)
                if progress is not None:
                    progress(encoder.document.header.chunk_tokens[index])
        except ConfigError:
            _remove(reversed(writer.written))
            if own_profile is not None:
                remove_own_profile(folder)
            raise
    return writer.result


@dataclass(frozen=True)
class _Claim:
    """What claiming a folder did.

    Attributes:
        written: the tables file, if it was not there.
        repaired: its name, if it was damaged.
    """

    written: list[Path]
    repaired: list[str]


class _ChunkWriter:
    """Writes chunk after chunk, unless it is there, and keeps count.

    Attributes:
        written: the files that are there because of this run.
    """

    def __init__(self, encoder: Encoder, folder: Path, claim: _Claim) -> None:
        header = encoder.document.header
        self._encoder, self._folder = encoder, folder
        self._sizes = EncodedSizes(
            header.header_bytes, header.tables_bytes, scales=0, payload=0, states=header.states_bytes
        )
        self._num_reused = 0
        self._repaired, self.written = list(claim.repaired), list(claim.written)
        self._chunk_bytes: dict[int, list[int]] = {level: [] for level in encoder.levels}
        self._errors: dict[int, list[ErrorMeasure]] = {level: [] for level in encoder.levels}

    def write(self, index: int, max_error: float | None) -> None:
        """Write the files of a chunk, unless they are there.

        Where one of them is missing or damaged, all levels are encoded again: they refine each other, and another
        device may have computed those that are there, with another rounding.
        """
        encoder = self._encoder
        paths = [self._folder / chunk_name(index, level) for level in encoder.levels]
        present = [path for path in paths if path.exists()]
        found_files = [read_whole(path) for path in present]
        is_there = len(present) == len(paths) and encoder.is_encoding_of(index, found_files)
        # Files as parts: joining them would take as long as quantizing does.
        contents: list[list[bytes | memoryview]] = [[content] for content in found_files]
        if not is_there:
            found = zip(present, found_files, strict=True)
            damaged = [path for path, content in found if not _is_readable(parse_chunk, content)]
            # Whole files, all there, and still not the chunk: they have each other's names, or are of two runs.
            wrong = present if len(present) == len(paths) else []
            self._repaired += [path.name for path in damaged or wrong]
            contents = [encoder.encode_chunk(index, level) for level in encoder.levels]
        errors = [
            encoder.read_error(index, level, content) for level, content in zip(encoder.levels, contents, strict=True)
        ]
        if max_error is not None and errors[-1].largest > max_error:
            raise ConfigError(
                f"{paths[-1]}: a value decodes {errors[-1].largest:.6g} from the cache's, more than `max_error` "
                f"{max_error:.6g}: choose a configuration with more bits"
            )
        if is_there:
            self._num_reused += len(paths)
        else:
            # The finest first: whatever happens, no file stands beside one that it does not refine.
            _remove(reversed(present))
            for path, content in zip(paths, contents, strict=True):
                self.written.append(path)
                with atomic_write(path) as stream:
                    stream.writelines(content)
        self._count(index, contents, errors)

    def _count(
        self, index: int, contents: Sequence[Sequence[bytes | memoryview]], errors: Sequence[ErrorMeasure]
    ) -> None:
        for level, content, error in zip(self._encoder.levels, contents, errors, strict=True):
            header, num_bytes = self._encoder.expected_header(index, level), sum(map(len, content))
            self._sizes = dataclasses.replace(
                self._sizes,
                header=self._sizes.header + header.payload_offset - header.scales_bytes,
                scales=self._sizes.scales + header.scales_bytes,
                payload=self._sizes.payload + num_bytes - header.payload_offset,
            )
            self._chunk_bytes[level].append(num_bytes)
            self._errors[level].append(error)

    @property
    def result(self) -> EncodeResult:
        num_values = self._encoder.document.header.stored_values_of_chunks
        return EncodeResult(
            self._encoder.document.header,
            self._sizes,
            self._num_reused,
            tuple(self._repaired),
            {level: _join_errors(errors, num_values) for level, errors in self._errors.items()},
            self._chunk_bytes,
        )


def _join_errors(errors: Sequence[ErrorMeasure], num_values: Sequence[int]) -> ErrorMeasure:
    """Return the error of a document from those of its chunks, which hold so many values."""
    largest = max(error.largest for error in errors)
    total = 0.0
    for error, count in zip(errors, num_values, strict=True):
        if error.mean is None:
            return ErrorMeasure(largest)
        total += error.mean * count
    return ErrorMeasure(largest, total / max(sum(num_values), 1))


def read_encoded_levels(
    folders: Sequence[str | os.PathLike[str]],
    kl: Sequence[float] | None = None,
    profile: str | os.PathLike[str] | None = None,
) -> list[EncodedLevel]:
    """Open encodings of one cache as the levels of a document, the smallest first; chunks are read when asked for.

    Args:
        folders: written by `encode_document`: several whose files stand alone, or one of method `transform`, whose
            levels refine each other.
        kl: the expected loss of each level, in nats per token.
        profile: a profile's folder, for clients that have it not; a document's own one goes with it in any case.

    Raises:
        InputError: a file is missing.
        BitstreamError: a tables file or a profile is corrupt.
        MismatchError: the profile is not one that the folders name.
        ConfigError: not one loss per level, losses that grow with the size, or levels that do not go together.
    """
    documents: list[list[tuple[int, EncodedLevel]]] = []
    given = {} if profile is None else read_decoding_files(profile)
    given_hash = hashlib.sha256(given[PROFILE_NAME]).digest() if given else b""
    named: set[bytes] = set()
    for folder in map(Path, folders):
        tables_file = read_whole(folder / TABLES_NAME)
        try:
            header = parse_document(tables_file)
        except BitstreamError as error:
            raise error.at(folder / TABLES_NAME) from error
        levels: list[tuple[int, EncodedLevel]] = []
        named.add(header.profile_hash)
        files = given if header.profile_hash == given_hash else read_own_profile(folder, header.profile_hash)
        for level in header.levels:
            paths = [folder / chunk_name(i, level) for i in range(header.num_chunks)]
            chunks = [functools.partial(read_whole, path) for path in paths]
            num_bytes = sum(path.stat().st_size for path in paths if path.is_file())
            refines = level - 1 if level > 1 else None
            levels.append((num_bytes, EncodedLevel(tables_file, chunks, refines=refines, profile=files)))
        documents.append(levels)
    if given and given_hash not in named:
        raise MismatchError(f"{profile}: no folder was encoded with this profile (`profile`)")
    return order_levels(documents, kl)


def order_levels(
    documents: Sequence[Sequence[tuple[int, EncodedLevel]]], kl: Sequence[float] | None = None
) -> list[EncodedLevel]:
    """Return the levels of encodings of one cache, the smallest first.

    Args:
        documents: of each encoding, the levels with the bytes of their chunks; those of one stay in their order.
        kl: the expected loss of each level, in nats per token; None leaves what the levels say.

    Raises:
        ConfigError: not one loss per level, losses that grow with the size, or levels that do not go together.
    """
    if len(documents) > 1 and any(len(levels) > 1 for levels in documents):
        raise ConfigError("levels that refine each other do not go with other encodings")
    sized = [level for levels in documents for level in levels]
    order = sorted(range(len(sized)), key=lambda i: sized[i][0]) if len(documents) > 1 else range(len(sized))
    if kl is None:
        return [sized[i][1] for i in order]
    if len(kl) != len(sized):
        raise ConfigError(f"`kl` must have one value per level, got {len(kl)} for {len(sized)}")
    losses = [kl[i] for i in order]
    if losses != sorted(losses, reverse=True):
        raise ConfigError("`kl` must not be larger for a larger encoding: leave the worse one out")
    return [dataclasses.replace(sized[i][1], kl=loss) for i, loss in zip(order, losses, strict=True)]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror} (`output_path`)") from error


def _claim_folder(folder: Path, encoder: Encoder, overwrite: bool) -> _Claim:
    """Refuse what is not ours, and write the tables file, which says whose folder it is, unless it is there.

    Raises:
        OutputError: the folder holds something else; it stays as it was.
    """
    remedy = "give another folder, or `overwrite` to replace it"
    try:
        names = sorted(path.name for path in folder.iterdir() if not is_temporary(path))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read: {error.strerror}") from error
    chunks = [folder / name for name in names if _CHUNK_NAME.fullmatch(name)]
    tables_path = folder / TABLES_NAME
    has_tables, is_damaged = TABLES_NAME in names, False
    if not overwrite:
        if names and not chunks and not has_tables:
            raise OutputError(f"{folder}: is not empty and holds no {TABLES_NAME} ({names[0]}); {remedy}")
        if has_tables:
            content = read_whole(tables_path)
            is_damaged = content != encoder.tables_file
            if is_damaged and _is_readable(parse_document, content):
                raise OutputError(f"{folder}: holds the encoding of another cache or configuration; {remedy}")
        tables_hash = encoder.document.tables_hash
        for path in chunks:
            if _is_foreign(read_whole(path), tables_hash):
                raise OutputError(f"{path}: is a chunk of another cache or configuration; {remedy}")
    # Not before: a folder that is refused stays as it was.
    try:
        remove_stale_temporaries(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be swept: {error.strerror}") from error
    if overwrite:
        _remove([*chunks, tables_path])
    is_written = overwrite or is_damaged or not has_tables
    if is_written:
        write_file(tables_path, encoder.tables_file)
    return _Claim([tables_path] if is_written else [], [TABLES_NAME] if is_damaged else [])


def _is_foreign(content: bytes, tables_hash: bytes) -> bool:
    """Tell whether a chunk file says that it is of another document; of a damaged one nobody knows."""
    try:
        return parse_chunk_header(content).tables_hash != tables_hash
    except UnsupportedVersionError:
        return True
    except BitstreamError:
        return False


def _is_readable(parse: Callable[[bytes], object], content: bytes) -> bool:
    """Tell whether a file is whole, or of a release that this one does not read."""
    try:
        parse(content)
    except UnsupportedVersionError:
        return True
    except BitstreamError:
        return False
    return True


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path}: cannot be removed: {error.strerror}") from error
