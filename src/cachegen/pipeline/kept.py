"""A document whose files are kept in memory until someone saves them."""

from __future__ import annotations

from collections.abc import Sequence

from cachegen.format.files import TABLES_NAME, chunk_name
from cachegen.format.framing import Buffer
from cachegen.format.headers import ChunkHeader
from cachegen.methods.base import Encoder, ErrorMeasure
from cachegen.store.catalog import EncodedLevel


class KeptEncoding(Encoder):
    """Files that another encoder has made, all at once; the cache they were made from is not needed any more.

    Everything that takes an `Encoder` takes it, and writes the same bytes as with the one it was made by.
    """

    def __init__(self, encoder: Encoder, num_threads: int = 1) -> None:
        """Encode all chunks at all levels.

        Args:
            num_threads: for checking files that are there already.

        Raises:
            InputError: the cache holds what cannot be encoded.
        """
        self.document, self.tables_file = encoder.document, encoder.tables_file
        self.states_section = encoder.states_section
        self._num_threads = num_threads
        places = [(index, level) for index in range(encoder.num_chunks) for level in encoder.levels]
        self._files = {place: b"".join(encoder.encode_chunk(*place)) for place in places}
        self._headers = {place: encoder.expected_header(*place) for place in places}
        self._errors = {place: encoder.read_error(*place, [self._files[place]]) for place in places}
        self._losses = {level: encoder.expected_kl(level) for level in encoder.levels}

    @property
    def num_chunks(self) -> int:
        return self.document.header.num_chunks

    def list_levels(self) -> list[tuple[int, EncodedLevel]]:
        """Return bytes of the chunks and the level itself, to be published, with the loss that is expected of it."""
        levels: list[tuple[int, EncodedLevel]] = []
        for level in self.levels:
            files = [self._files[index, level] for index in range(self.num_chunks)]
            encoded = EncodedLevel(
                self.tables_file,
                [lambda file=file: file for file in files],
                refines=level - 1 if level > 1 else None,
                kl=self._losses[level],
            )
            levels.append((sum(map(len, files)), encoded))
        return levels

    def list_files(self) -> dict[str, bytes]:
        """Return all files, by the names that they have in a folder."""
        chunks = {chunk_name(index, level): content for (index, level), content in self._files.items()}
        return {TABLES_NAME: self.tables_file, **chunks}

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return len(self.tables_file) + sum(map(len, self._files.values()))

    def expected_header(self, index: int, level: int = 1) -> ChunkHeader:
        """See `Encoder.expected_header`."""
        return self._headers[index, level]

    def encode_chunk(self, index: int, level: int = 1) -> list[bytes | memoryview]:
        """Return the chunk's file, which is there already."""
        return [self._files[index, level]]

    def read_error(self, index: int, level: int, content: Sequence[Buffer]) -> ErrorMeasure:
        """Return what decoding loses of a chunk's values, by the file that is kept."""
        return self._errors[index, level]

    def expected_kl(self, level: int) -> float | None:
        """See `Encoder.expected_kl`."""
        return self._losses[level]
