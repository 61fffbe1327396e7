"""Any bytes as a chunk file or a tables file: reading refuses them with an error of the format, or they are one.

Coverage-guided, with atheris; `make fuzz` runs it. An input is a byte that names a golden document, a byte of flags,
and a file, which the fuzzer begins with the golden ones and the invalid ones. Mutation alone would never pass the
checksums, so lengths and checksums are made right again first, unless a flag says not to. What parses is packed again,
to the same bytes, and decoded on every path of this processor, with the same end and the same values.

Usage: fuzz_chunks.py [CORPUS] [libFuzzer's flags]; the module atheris must be installed.
"""

from __future__ import annotations

import dataclasses
import struct
from functools import cache
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["cachegen"]):
    from cachegen import format as layout
    from cachegen.coder import cpu
    from cachegen.coder.cpu_kernels import CpuKernels
    from cachegen.errors import BitstreamError, MismatchError
    from cachegen.format.files import CHUNK_SUFFIX, TABLES_NAME
    from cachegen.format.headers import ChunkHeader
    from cachegen.kv_cache import KVCache
    from cachegen.methods import open_document, parse_chunk, parse_document
    from cachegen.methods.absmax.codec import AbsmaxDocument
    from cachegen.methods.absmax.headers import AbsmaxChunkHeader
    from cachegen.methods.layer_classes import LayerClass, layer_classes
    from cachegen.methods.lossless.codec import LosslessDocument
    from cachegen.methods.lossless.headers import LosslessChunkHeader
    from cachegen.methods.transform.document import METHOD_NUMBER, TransformDocument
    from cachegen.methods.transform.headers import TransformChunkHeader
    from cachegen.methods.transform.profile_storage import load_profile

import numpy as np
import torch
from harness import fuzz

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob(f"*/{TABLES_NAME}"))
KEEP_CHECKSUMS, KEEP_FILE_BYTES, KEEP_STREAM_BYTES, KEEP_WORDS = 1, 2, 4, 8  # flags: what is not made right again
MAX_VALUES = 1 << 16  # a header of a few bytes may claim millions
MAX_TOKENS = 1 << 31  # where a chunk begins is what the reader expects: a place in a context
PREFIX_BYTES, METHOD_AT, OWN_FIELDS_AT, PLANES_AT, PLANE_BYTES, STREAM_BYTES = 24, 38, 208, 212, 12, 12
GROUPS_AT, EXACT_AT, LENGTHS_AT = 212, 224, 236  # in a chunk of method transform


@cache
def golden_document(index: int) -> AbsmaxDocument | TransformDocument | LosslessDocument:
    folder = FOLDERS[index]
    content = (folder / TABLES_NAME).read_bytes()
    document = open_document(content, find_profile=lambda _: load_profile(folder / "profile"))
    assert isinstance(document, AbsmaxDocument | TransformDocument | LosslessDocument)
    return document


@cache
def golden_transform() -> TransformDocument:
    (index,) = (index for index, folder in enumerate(FOLDERS) if folder.name == "transform")
    document = golden_document(index)
    assert isinstance(document, TransformDocument)
    return document


def seal(content: bytearray, flags: int) -> None:
    """Make what a mutation has broken right again, as far as the file can still be followed."""
    if flags & KEEP_CHECKSUMS or len(content) < PLANES_AT:
        return
    if not flags & KEEP_FILE_BYTES:
        struct.pack_into("<Q", content, 16, len(content))
    (header_bytes,) = struct.unpack_from("<I", content, 12)
    if not PREFIX_BYTES + 4 <= header_bytes <= len(content):
        return
    is_transform = content[METHOD_AT] == METHOD_NUMBER
    if content[: len(layout.TABLES_MAGIC)] == layout.TABLES_MAGIC:
        if not is_transform:
            struct.pack_into("<I", content, OWN_FIELDS_AT, cpu.crc32c(content[header_bytes:]))
    elif is_transform:
        seal_component_streams(content, header_bytes, flags)
    else:
        seal_sections(content, header_bytes, flags)
    struct.pack_into("<I", content, header_bytes - 4, cpu.crc32c(content[: header_bytes - 4]))


def seal_sections(content: bytearray, header_bytes: int, flags: int) -> None:
    """Make the checksums of a chunk's scales and streams right again, and let its last stream end with the file."""
    num_tokens, num_layers = struct.unpack_from("<IH", content, 32)
    num_planes = 2 * num_layers
    planes_end = PLANES_AT + num_planes * PLANE_BYTES
    scale_bytes = num_planes * num_tokens * (4 if content[40] == layout.Dtype.FLOAT32 else 2)
    payload_at = header_bytes + layout.round_up(scale_bytes, layout.ALIGNMENT)
    if planes_end > header_bytes or payload_at > len(content):
        return
    struct.pack_into("<I", content, OWN_FIELDS_AT, cpu.crc32c(content[header_bytes:payload_at]))
    steps = [struct.unpack_from("<I", content, at + 8)[0] for at in range(PLANES_AT, planes_end, PLANE_BYTES)]
    seal_streams(content, header_bytes, planes_end, payload_at, num_tokens, steps, flags, len(content))


def seal_component_streams(content: bytearray, header_bytes: int, flags: int) -> None:
    """The same for a chunk of method transform, which has no scales."""
    if header_bytes < LENGTHS_AT:
        return
    (num_tokens,) = struct.unpack_from("<I", content, 32)
    (num_groups,) = struct.unpack_from("<H", content, GROUPS_AT)
    index_at = LENGTHS_AT + 4 * num_groups
    if index_at > header_bytes:
        return
    steps = list(struct.unpack_from(f"<{num_groups}I", content, LENGTHS_AT))
    # What the header says of the exact values is cut to the file, and lies at its end.
    (exact_bytes,) = struct.unpack_from("<Q", content, EXACT_AT)
    exact_bytes = min(exact_bytes, max(0, len(content) - header_bytes - layout.ALIGNMENT))
    end = len(content) - layout.round_up(exact_bytes, layout.ALIGNMENT)
    struct.pack_into("<QI", content, EXACT_AT, exact_bytes, cpu.crc32c(content[end:]))
    seal_streams(content, header_bytes, index_at, header_bytes, num_tokens, steps, flags, end)


def seal_streams(
    content: bytearray,
    header_bytes: int,
    index_at: int,
    offset: int,
    num_tokens: int,
    steps: list[int],
    flags: int,
    end: int,
) -> None:
    """Make the streams' checksums right, `steps` being their tokens, and let the last one end at `end`."""
    if 0 in steps or (num_streams := sum(-(-num_tokens // step) for step in steps)) > header_bytes // STREAM_BYTES:
        return
    for stream in range(num_streams):
        at = index_at + stream * STREAM_BYTES
        if at + STREAM_BYTES > header_bytes - 4:
            return
        num_bytes, num_words, _ = struct.unpack_from("<III", content, at)
        if stream == num_streams - 1 and not flags & KEEP_STREAM_BYTES:
            rest = max(0, end - offset)
            # The padding stays as long as it was, and what is missing or left over is words.
            change = rest - layout.round_up(num_bytes, layout.ALIGNMENT)
            num_bytes = min(max(0, num_bytes + change), len(content))
            if not flags & KEEP_WORDS:
                num_words = min(max(0, num_words + change // 2), len(content))
        padded = content[offset : offset + layout.round_up(num_bytes, layout.ALIGNMENT)]
        struct.pack_into("<III", content, at, num_bytes, num_words, cpu.crc32c(padded))
        offset += len(padded)


def check_tables(content: bytes) -> None:
    header = parse_document(content)
    if header.pack() != content[: header.header_bytes]:
        raise AssertionError("the header of the tables is not what packing it gives")
    document = open_document(content, find_profile=lambda _: golden_transform().profile)
    document.prepare()
    if not isinstance(document, AbsmaxDocument) or document.classes[0][1] is None:
        return
    frequencies = np.concatenate([tables.frequencies() for _, tables in document.classes])
    if len(frequencies) != sum(plane.num_channels for plane in header.planes) or (frequencies.sum(1) != 4096).any():
        raise AssertionError("the tables are not one per channel, each of 4096")


def document_for(header: AbsmaxChunkHeader, golden: AbsmaxDocument) -> AbsmaxDocument:
    """The golden document, changed such that a chunk passes all gates: its tables over and over, as many as it takes.

    A chunk keeps the tables hash that it names: decoding must stay in bounds whatever the tables.
    """
    planes = tuple(dataclasses.replace(plane, tokens_per_stream=0) for plane in header.planes)
    golden_tables = golden.classes[0][1]
    known = np.zeros((1, 32), np.uint16) if golden_tables is None else golden_tables.frequencies()
    if golden_tables is None:
        known[0, 0] = 4096
    expected = dataclasses.replace(
        golden.header,
        method=header.method,
        coder=header.coder,
        dtype=header.dtype,
        model_fingerprint=header.model_fingerprint,
        rope_hash=header.rope_hash,
        profile_hash=header.profile_hash,
        planes=planes,
        first_stored=begin_layers(header),
    )

    def tables_of(layers: LayerClass) -> cpu.Tables | None:
        num_tables = sum(plane.num_channels for plane in layers.pick(planes))
        is_packed = header.coder is layout.Coder.PACKED
        return None if is_packed else cpu.Tables.from_frequencies(known[np.arange(num_tables) % len(known)])

    document = AbsmaxDocument(expected, header.tables_hash, b"")
    # What would be unpacked from its section.
    vars(document)["classes"] = [(layers, tables_of(layers)) for layers in layer_classes(expected)]
    return document


def begin_layers(header: ChunkHeader) -> tuple[int, ...]:
    """Where the layers of a document begin, one of whose chunks lacks what the header says."""
    return tuple(header.first_token + absent for absent in header.num_absent)


class OnePath(CpuKernels):
    """The CPU's kernels with their path fixed."""

    def __init__(self, path: str) -> None:
        self._path = path

    def start_decode(self, *arguments, **options):
        cpu.decode(*arguments, path=self._path, **options)
        return lambda: None


def check_chunk(content: bytes, golden: AbsmaxDocument | TransformDocument | LosslessDocument) -> None:
    header = parse_chunk(content).header
    if header.pack() != content[: header.header_bytes]:
        raise AssertionError("the header of the chunk is not what packing it gives")
    if isinstance(header, TransformChunkHeader):
        check_component_chunk(content, header)
        return
    if isinstance(header, LosslessChunkHeader):
        check_lossless_chunk(content, header)
        return
    if not isinstance(golden, AbsmaxDocument):
        return
    if header.num_tokens * sum(plane.num_channels for plane in header.planes) > MAX_VALUES:
        return
    document = document_for(header, golden)
    outcomes = {decode(content, header, document, path) for path in cpu.supported_paths()}
    if len(outcomes) != 1:
        raise AssertionError(f"the paths {cpu.supported_paths()} do not agree")


def decode(content: bytes, header: AbsmaxChunkHeader, document: AbsmaxDocument, path: str) -> str | bytes:
    """Decode on one path; returns what it refuses the chunk for, or the values."""
    planes = [
        torch.zeros(header.num_tokens, plane.num_kv_heads, plane.head_dim, dtype=cpu.TORCH_DTYPES[header.dtype])
        for plane in header.planes
    ]
    try:
        document.decode(
            [content],
            KVCache(planes[0::2], planes[1::2]),
            first_token=header.first_token,
            token_hash=header.token_hash,
            kernels=OnePath(path),
        )
    except BitstreamError as error:
        return str(error)
    return b"".join(plane.view(torch.uint8).numpy().tobytes() for plane in planes)


def check_lossless_chunk(content: bytes, header: LosslessChunkHeader) -> None:
    """Decode a chunk whatever document it names."""
    (index,) = (index for index, folder in enumerate(FOLDERS) if folder.name == "lossless")
    golden = golden_document(index)
    assert isinstance(golden, LosslessDocument)
    shapes = golden.header.planes
    if header.num_tokens * sum(shape.num_channels for shape in shapes) > MAX_VALUES or header.first_token >= MAX_TOKENS:
        return
    names = ("model_fingerprint", "rope_hash", "dtype", "profile_hash")
    if len(header.num_absent) not in (0, golden.header.num_layers):
        return
    # Classes would need models of their own: all layers begin together.
    first_stored = begin_layers(header)
    fields = {name: getattr(header, name) for name in names} | {"first_stored": first_stored}
    expected = dataclasses.replace(golden.header, **fields)
    if len(set(first_stored)) > 1:
        return
    tables = (FOLDERS[index] / TABLES_NAME).read_bytes()[golden.header.header_bytes :]
    dtype = cpu.TORCH_DTYPES[header.dtype]
    planes = [torch.zeros(header.num_tokens, shape.num_kv_heads, shape.head_dim, dtype=dtype) for shape in shapes]
    LosslessDocument(expected, header.tables_hash, tables).decode(
        [content],
        KVCache(planes[0::2], planes[1::2]),
        first_token=header.first_token,
        token_hash=header.token_hash,
    )


def check_component_chunk(content: bytes, header: TransformChunkHeader) -> None:
    """Decode a chunk of level 1 whatever document it names, one of level 2 on top of its golden level 1."""
    document = golden_transform()
    shapes = document.header.planes
    if header.num_tokens * sum(shape.num_channels for shape in shapes) > MAX_VALUES or header.level > 2:
        return
    if header.first_token >= MAX_TOKENS:
        return
    contents = [content]
    if header.level == 2:
        first = min(header.first_token, document.header.chunk_tokens[0])
        number = 0 if first < document.header.chunk_tokens[0] else 1
        (folder,) = (folder for folder in FOLDERS if folder.name == "transform")
        contents = [(folder / f"chunk_{number:05}.L1{CHUNK_SUFFIX}").read_bytes(), content]
    else:
        names = ("model_fingerprint", "rope_hash", "dtype", "step_log", "profile_hash")
        expected = dataclasses.replace(document.header, **{name: getattr(header, name) for name in names})
        if len(header.num_absent) == header.num_groups == len(document.transforms):
            groups = zip(document.transforms, begin_layers(header), strict=True)
            first_stored = [first for of, first in groups for _ in range(of.group.num_layers)]
            expected = dataclasses.replace(expected, first_stored=tuple(first_stored))
        document = TransformDocument(expected, header.tables_hash, document.profile)
    dtype = cpu.TORCH_DTYPES[header.dtype]
    planes = [torch.zeros(header.num_tokens, shape.num_kv_heads, shape.head_dim, dtype=dtype) for shape in shapes]
    document.decode(
        contents,
        KVCache(planes[0::2], planes[1::2]),
        first_token=header.first_token,
        token_hash=header.token_hash,
    )


def test_one_input(data: bytes) -> None:
    if len(data) < 2:
        return
    index, flags = data[0] % len(FOLDERS), data[1]
    content = bytearray(data[2:])
    seal(content, flags)
    # UnsupportedVersionError is a BitstreamError; a MismatchError says that a gate is closed, whatever was forged.
    try:
        if content[: len(layout.TABLES_MAGIC)] == layout.TABLES_MAGIC:
            check_tables(bytes(content))
        else:
            check_chunk(bytes(content), golden_document(index))
    except (BitstreamError, MismatchError):
        return


def list_seeds() -> dict[str, bytes]:
    """Every golden file, and the files that must be refused."""
    files = [(index, path) for index, folder in enumerate(FOLDERS) for path in sorted(folder.glob("*.cg?"))]
    files += [(number % len(FOLDERS), path) for number, path in enumerate(sorted(GOLDEN.glob("invalid*/*.cg?")))]
    return {f"{path.parent.name}_{path.name}": bytes([index, 0]) + path.read_bytes() for index, path in files}


if __name__ == "__main__":
    fuzz(test_one_input, list_seeds(), 8192)
