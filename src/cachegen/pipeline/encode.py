"""From a saved cache to a folder of chunk files: resumable, and never half a file under a final name."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cachegen import container
from cachegen.catalog import EncodedLevel
from cachegen.codec import DocumentEncoder
from cachegen.errors import BitstreamError, ConfigError, OutputError
from cachegen.files import atomic_write, is_temporary, remove_stale_temporaries, write_file
from cachegen.format import TablesHeader
from cachegen.transform_codec import TransformEncoder
from cachegen.transform_format import TransformTablesHeader

Encoder: TypeAlias = DocumentEncoder | TransformEncoder

_CHUNK_NAME = re.compile(r"chunk_\d{5,}(\.L\d)?" + re.escape(container.CHUNK_SUFFIX))


@dataclass(frozen=True)
class EncodedSizes:
    """Bytes of an encoded document, every file counted, by what they are for.

    Attributes:
        header: headers with their indexes of streams, and padding between sections.
        tables: frequency tables.
        scales: one scale per token and plane.
        payload: streams with their padding.
    """

    header: int
    tables: int
    scales: int
    payload: int

    @property
    def total(self) -> int:
        return self.header + self.tables + self.scales + self.payload


@dataclass(frozen=True)
class EncodeResult:
    """What an encoding left in its folder.

    Attributes:
        num_reused_chunks: chunks that an interrupted run had finished.
        chunk_bytes: per level, size of each chunk's file; the rest of `sizes.total` is the tables file, which all
            chunks share.
    """

    header: TablesHeader | TransformTablesHeader
    sizes: EncodedSizes
    num_reused_chunks: int
    chunk_bytes: dict[int, list[int]]


def encode_document(
    encoder: Encoder,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> EncodeResult:
    """Write a document's tables file and chunk files.

    A folder that already holds whole files of the same document and configuration keeps them: an interrupted encoding
    resumes, a finished one is checked.

    Args:
        overwrite: replace the files of another document or configuration.
        progress: called with the number of tokens after each chunk.

    Raises:
        OutputError: the folder holds something else and `overwrite` is not given, or it cannot be written.
    """
    folder = Path(folder)
    _claim_folder(folder, encoder, overwrite)
    sizes = EncodedSizes(
        encoder.document.header.header_bytes, encoder.document.header.tables_bytes, scales=0, payload=0
    )
    num_reused = 0
    chunk_bytes: dict[int, list[int]] = {level: [] for level in encoder.levels}
    for index in range(encoder.num_chunks):
        for level in encoder.levels:
            path = folder / container.chunk_name(index, level)
            if _is_finished(path, encoder, index, level):
                num_reused += 1
            else:
                with atomic_write(path) as stream:
                    for part in encoder.encode_chunk(index, level):
                        stream.write(part)
            chunk_bytes[level].append(path.stat().st_size)
            sizes = _add_chunk(sizes, encoder, index, level, chunk_bytes[level][-1])
        if progress is not None:
            progress(encoder.document.header.chunk_tokens[index])
    return EncodeResult(encoder.document.header, sizes, num_reused, chunk_bytes)


def read_encoded_levels(
    folders: Sequence[str | os.PathLike[str]], kl: Sequence[float] | None = None
) -> list[EncodedLevel]:
    """Open encodings of one cache as the levels of a document, the smallest first; chunks are read when asked for.

    Args:
        folders: written by `encode_document`: several whose files stand alone, or one of method `transform`, whose
            levels refine each other.
        kl: the expected loss of each level, in nats per token.

    Raises:
        InputError: a file is missing.
        BitstreamError: a tables file is corrupt.
        ConfigError: not one loss per level, losses that grow with the size, or levels that do not go together.
    """
    sized: list[tuple[int, EncodedLevel]] = []
    for folder in map(Path, folders):
        tables_file = container.read_whole(folder / container.TABLES_NAME)
        try:
            header = container.parse_tables(tables_file)[0]
        except BitstreamError as error:
            raise error.at(folder / container.TABLES_NAME) from error
        num_levels = header.num_levels if isinstance(header, TransformTablesHeader) else 0
        if num_levels > 1 and len(folders) > 1:
            raise ConfigError(f"{folder}: has levels that refine each other, which do not go with other folders'")
        for level in range(1, num_levels + 1) if num_levels else [0]:
            paths = [folder / container.chunk_name(i, level) for i in range(len(header.chunk_tokens))]
            chunks = [functools.partial(container.read_whole, path) for path in paths]
            num_bytes = sum(path.stat().st_size for path in paths if path.is_file())
            sized.append((num_bytes, EncodedLevel(tables_file, chunks, refines=level - 1 if level > 1 else None)))
    # Stable, and levels of one folder come in their order, whatever their sizes.
    levels = [level for _, level in (sized if len(folders) == 1 else sorted(sized, key=lambda pair: pair[0]))]
    if kl is None:
        return levels
    if len(kl) != len(levels):
        raise ConfigError(f"--kl must have one value per level, got {len(kl)} for {len(levels)}")
    losses = list(kl)
    if len(folders) > 1:  # in the order of the folders
        order = sorted(range(len(sized)), key=lambda i: sized[i][0])
        losses = [kl[i] for i in order]
    if losses != sorted(losses, reverse=True):
        raise ConfigError("--kl must not be larger for a larger encoding: leave the worse one out")
    return [dataclasses.replace(level, kl=loss) for level, loss in zip(levels, losses, strict=True)]


def _add_chunk(sizes: EncodedSizes, encoder: Encoder, index: int, level: int, file_bytes: int) -> EncodedSizes:
    header = encoder.expected_header(index, level)
    return EncodedSizes(
        header=sizes.header + header.payload_offset - header.scales_bytes,
        tables=sizes.tables,
        scales=sizes.scales + header.scales_bytes,
        payload=sizes.payload + file_bytes - header.payload_offset,
    )


def _claim_folder(folder: Path, encoder: Encoder, overwrite: bool) -> None:
    """Make the folder, refuse what is not ours, and write the tables file that says whose it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir() if not is_temporary(path))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made or read: {error.strerror} (--output_path)") from error
    tables_path = folder / container.TABLES_NAME
    remedy = "give another --output_path, or --overwrite to replace it"
    is_claimed = bool(names) and not overwrite
    if is_claimed:
        if container.TABLES_NAME not in names:
            raise OutputError(f"{folder}: is not empty and holds no {container.TABLES_NAME} ({names[0]}); {remedy}")
        if container.read_whole(tables_path) != encoder.tables_file:
            raise OutputError(f"{folder}: holds the encoding of another document or configuration; {remedy}")
    try:
        # Not before: a folder that is refused stays as it was.
        remove_stale_temporaries(folder)
        for name in names:
            if not is_claimed and (name == container.TABLES_NAME or _CHUNK_NAME.fullmatch(name)):
                (folder / name).unlink()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be emptied: {error.strerror}") from error
    if not is_claimed:
        write_file(tables_path, encoder.tables_file)


def _is_finished(path: Path, encoder: Encoder, index: int, level: int) -> bool:
    """Tell whether a chunk file is there, whole and the right one; a damaged one is encoded again.

    Raises:
        OutputError: it is a whole chunk of something else.
    """
    if not path.exists():
        return False
    content = container.read_whole(path)
    if encoder.is_encoding_of(index, content, level):
        return True
    try:
        container.parse_chunk(content)
    except BitstreamError:
        return False
    raise OutputError(f"{path}: is a chunk of another document or configuration (--overwrite replaces the folder's)")
