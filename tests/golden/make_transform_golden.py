"""The golden document of method transform: two levels, two groups of layers, escapes, low bits, and its profile.

Components are drawn as integers, so that files match byte for byte on every machine; a decoder's floats must be within
the format's tolerance of `decoded_level_N.f32`, which is the inverse transform in plain Python. make_golden.py writes
the files.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from cachegen.coder.component_tables import LevelCoding, plan_level
from cachegen.format import Coder, Dtype, StreamEntry
from cachegen.format.files import TABLES_NAME, Chunk, chunk_name
from cachegen.format.headers import PlaneShape
from cachegen.kv_cache import RotaryEmbedding, hash_token_prefixes
from cachegen.methods import parse_chunk
from cachegen.methods.transform.document import METHOD_NUMBER
from cachegen.methods.transform.encoder import build_chunk as build_transform_chunk
from cachegen.methods.transform.headers import TransformChunkHeader, TransformDocumentHeader
from cachegen.methods.transform.profile import Profile, TransformGroup
from cachegen.methods.transform.profile_storage import save_profile
from cachegen.methods.transform.transform import LEVEL_RATIO_LOG, step_of_level
from tests.golden.integers import Integers
from tests.golden.invalid_files import flip, put, reseal
from tests.reference import planes as reference
from tests.reference.components import encode_component_stream

NAME = "transform"
MODEL_FINGERPRINT = hashlib.sha256(b"golden model").hexdigest()
ROTARY = RotaryEmbedding("rotary_emb", "default", (1.0, 0.25), 1.0)
SHAPES = ((1, 8), (2, 4), (1, 4), (1, 4))
NUM_CACHE_TOKENS, CHUNK_TOKENS = 45, (33, 10)
TOKENS_PER_STREAM = (32, 64)
STEP_LOG, NUM_LEVELS = -5, 2
SCALE_LOGS = (tuple(60 - 7 * i for i in range(16)), tuple(20 - 9 * i for i in range(8)))

# Per level: (token of the context, channel over all planes) -> the value that travels exactly.
EXACT_VALUES = (
    {(0, 3): 2.0**100, (0, 4): -(2.0**100), (0, 6): 65504.0, (32, 23): 0.5},
    {(0, 3): 2.0**100, (35, 0): -(2.0**-149), (35, 15): 3.0, (35, 16): -0.0},
)
CACHE_HASH = hashlib.sha256(b"golden cache").digest()

Matrix = list[list[int]]


def hadamard(order: int) -> Matrix:
    """Sylvester's matrix of 1 and -1, its own inverse but for the factor `order`."""
    return [[1 - 2 * ((row & column).bit_count() & 1) for column in range(order)] for row in range(order)]


@functools.cache
def make_profile() -> tuple[Profile, dict[str, bytes]]:
    """The document's profile, and its files by name.

    Synthesis is a Hadamard matrix over 4, analysis its exact inverse; means are multiples of 1/8.
    """
    groups = []
    for layer, logs in enumerate(SCALE_LOGS):
        matrix = torch.tensor(hadamard(len(logs)), dtype=torch.float32)
        mean = torch.tensor([(channel * 5 % 16 - 8) / 8 for channel in range(len(logs))])
        scale_logs = torch.tensor(logs, dtype=torch.int16)
        groups.append(TransformGroup(layer, 1, mean, (matrix / 4).half(), scale_logs, (matrix * 4 / len(logs)).half()))
    profile = Profile(MODEL_FINGERPRINT, (ROTARY,), SHAPES, tuple(groups), (), {"text": "none: a golden profile"})
    with tempfile.TemporaryDirectory() as folder:
        profile = save_profile(folder, profile, compression=0)
        return profile, {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def codings(level: int) -> list[LevelCoding]:
    """How each group is coded at a level."""
    step_log = STEP_LOG - LEVEL_RATIO_LOG * (level - 1)
    coarse = step_log + LEVEL_RATIO_LOG if level > 1 else None
    return [plan_level(np.array(logs, np.int16), step_log, coarse) for logs in SCALE_LOGS]


@functools.cache
def draw_components() -> list[list[Matrix]]:
    """Per level and group the components of all chunks' tokens, `[num_tokens][num_components]`.

    A component that a level codes anew is (the sum of four draws below 64, less 126) * 2^floor(s / 16) / 37, floored,
    with s the scale's logarithm less the step's, but for a few that are escapes: where (token, component) is (0, 0) of
    level 1, 2^24; (32, 0), -2^24; and of every token that is 5 modulo 16, the last one, 300 and -300 in turn. A refined
    one is 3 times the level before's, plus a draw below 3, less 1.
    """
    integers = Integers(seed=7)
    levels: list[list[Matrix]] = []
    for level in range(1, NUM_LEVELS + 1):
        step_log = STEP_LOG - LEVEL_RATIO_LOG * (level - 1)
        groups: list[Matrix] = []
        for group, coding in enumerate(codings(level)):
            rows = []
            for token in range(sum(CHUNK_TOKENS)):
                row = []
                for component in range(coding.num_components):
                    if component < coding.num_refined:
                        row.append(3 * levels[-1][group][token][component] + integers.below(3) - 1)
                        continue
                    bell = sum(integers.below(64) for _ in range(4)) - 126
                    width = 1 << max(0, (SCALE_LOGS[group][component] - step_log) // 16)
                    value = bell * width // 37
                    if token in (0, 32) and component == 0 and level == 1:
                        value = 1 << 24 if token == 0 else -1 << 24
                    elif token % 16 == 5 and component == coding.num_components - 1:
                        value = 300 if token % 32 == 5 else -300
                    row.append(value)
                rows.append(row)
            groups.append(rows)
        levels.append(groups)
    return levels


def token_hash(stop: int) -> bytes:
    """Hash of token ids 1, 2, 3, ..."""
    return bytes.fromhex(hash_token_prefixes(torch.arange(1, NUM_CACHE_TOKENS + 1, dtype=torch.int32), [stop])[0])


def make_tables() -> bytes:
    profile, _ = make_profile()
    return TransformDocumentHeader(
        num_cache_tokens=NUM_CACHE_TOKENS,
        method=METHOD_NUMBER,
        coder=Coder.RANS,
        num_levels=NUM_LEVELS,
        dtype=Dtype.FLOAT32,
        prefill_block_size=512,
        step_log=STEP_LOG,
        model_fingerprint=bytes.fromhex(MODEL_FINGERPRINT),
        token_hash=token_hash(NUM_CACHE_TOKENS),
        rope_hash=bytes.fromhex(profile.rope_hash),
        profile_hash=bytes.fromhex(profile.profile_hash),
        cache_hash=CACHE_HASH,
        planes=tuple(PlaneShape(*shape) for shape in SHAPES),
        chunk_tokens=CHUNK_TOKENS,
    ).pack()


def pack_exact(level: int, first_token: int, stop: int) -> bytes:
    """The exact values of a chunk as the format's specification has them; neighbours share a run."""
    runs: list[tuple[int, int, list[float]]] = []
    for (token, channel), value in sorted(EXACT_VALUES[level - 1].items()):
        if not first_token <= token < stop:
            continue
        if runs and runs[-1][0] == token - first_token and runs[-1][1] + len(runs[-1][2]) == channel:
            runs[-1][2].append(value)
        else:
            runs.append((token - first_token, channel, [value]))
    if not runs:
        return b""
    places = b"".join(struct.pack("<III", token, channel, len(values)) for token, channel, values in runs)
    return struct.pack("<I", len(runs)) + places + b"".join(struct.pack("<f", v) for _, _, vs in runs for v in vs)


def encode_chunk(index: int, level: int) -> bytes:
    """One chunk's file of one level, by the reference coder."""
    profile, _ = make_profile()
    components = draw_components()
    first_token = sum(CHUNK_TOKENS[:index])
    stop = first_token + CHUNK_TOKENS[index]
    entries, payloads = [], []
    for group, coding in enumerate(codings(level)):
        length = TOKENS_PER_STREAM[group]
        payload = b""
        for start in range(first_token, stop, length):
            tokens = slice(start, min(start + length, stop))
            coarse = components[level - 2][group][tokens] if level > 1 else None
            content, num_words = encode_component_stream(components[level - 1][group][tokens], coarse, coding)
            padded = content + bytes(-len(content) % 16)
            entries.append(StreamEntry(len(content), num_words, reference.crc32c(padded)))
            payload += padded
        payloads.append(payload)
    header = TransformChunkHeader(
        first_token=first_token,
        num_tokens=CHUNK_TOKENS[index],
        num_layers=len(SHAPES) // 2,
        method=METHOD_NUMBER,
        coder=Coder.RANS,
        dtype=Dtype.FLOAT32,
        level=level,
        step_log=STEP_LOG,
        model_fingerprint=bytes.fromhex(MODEL_FINGERPRINT),
        token_hash=token_hash(stop),
        rope_hash=bytes.fromhex(profile.rope_hash),
        tables_hash=hashlib.sha256(make_tables()).digest(),
        profile_hash=bytes.fromhex(profile.profile_hash),
        tokens_per_stream=TOKENS_PER_STREAM,
        refines=_header_crc(encode_chunk(index, level - 1)) if level > 1 else 0,
        max_error=0.5,
        mean_error=0.125,
    )
    exact = pack_exact(level, first_token, stop)
    return b"".join(build_transform_chunk(header, entries, payloads, exact))


def _header_crc(content: bytes) -> int:
    (header_bytes,) = struct.unpack_from("<I", content, 12)
    return struct.unpack_from("<I", content, header_bytes - 4)[0]


def synthesize(level: int) -> bytes:
    """The decoded planes of a level, one after the other, each fp32 `[token][head][dim]`, to a multiple of 2^-10."""
    components, step = draw_components()[level - 1], step_of_level(STEP_LOG, level)
    first_channels = list(itertools.accumulate((heads * dim for heads, dim in SHAPES), initial=0))
    planes: list[list[float]] = []
    for group, (logs, rows) in enumerate(zip(SCALE_LOGS, components, strict=True)):
        matrix = hadamard(len(logs))
        shapes = SHAPES[2 * group : 2 * group + 2]
        width = shapes[0][0] * shapes[0][1]
        keys, values = [], []
        for token, row in enumerate(rows):
            vector = [
                (channel * 5 % 16 - 8) / 8
                + sum(component * step * matrix[i][channel] / 4 for i, component in enumerate(row))
                for channel in range(len(logs))
            ]
            for head in range(shapes[0][0]):
                keys += rotate(vector[head * shapes[0][1] : (head + 1) * shapes[0][1]], token)
            values += vector[width:]
        planes += [keys, values]
    rounded = [[round(value * 1024) / 1024 for value in plane] for plane in planes]
    for (token, channel), value in EXACT_VALUES[level - 1].items():
        plane = max(index for index, first in enumerate(first_channels[:-1]) if first <= channel)
        width = first_channels[plane + 1] - first_channels[plane]
        rounded[plane][token * width + channel - first_channels[plane]] = value
    return b"".join(struct.pack("<f", value) for plane in rounded for value in plane)


def rotate(head: Sequence[float], position: int) -> list[float]:
    """Apply the rotary embedding to one head of one token's keys."""
    rotated, num_pairs = list(head), len(ROTARY.inv_freq)
    for i, frequency in enumerate(ROTARY.inv_freq):
        cosine, sine = math.cos(position * frequency), math.sin(position * frequency)
        first, second = head[i], head[i + num_pairs]
        rotated[i] = first * cosine - second * sine
        rotated[i + num_pairs] = second * cosine + first * sine
    return rotated


@functools.cache
def make_files() -> dict[str, bytes]:
    """All files of the document, by their path below its folder."""
    files = {TABLES_NAME: make_tables()}
    for index in range(len(CHUNK_TOKENS)):
        for level in range(1, NUM_LEVELS + 1):
            files[chunk_name(index, level)] = encode_chunk(index, level)
    files |= {f"profile/{name}": content for name, content in make_profile()[1].items()}
    files |= {f"decoded_level_{level}.f32": synthesize(level) for level in range(1, NUM_LEVELS + 1)}
    return files


def list_invalid() -> Iterator[tuple[str, bytes, str, str]]:
    """Files that must be refused: (name, content, error, field).

    A name begins with what the file stands for: `tables`, `chunk_L1` or `chunk_L2`, the others being those of the
    golden document.
    """
    files, error, unsupported, mismatch = make_files(), "BitstreamError", "UnsupportedVersionError", "MismatchError"
    tables, first, second = (files[n] for n in ("tables.cgt", "chunk_00000.L1.cgc", "chunk_00000.L2.cgc"))
    for what, content, problem, field in (
        ("empty", b"", error, "header"),
        ("truncated", tables[:100], error, "header_bytes"),
        ("with_trailing_byte", tables + b"\0", error, "file_bytes"),
        ("field_flipped", flip(tables, 33), error, "header_crc"),
        ("version_2", reseal(tables, 8, "H", 2), unsupported, "version"),
        ("coder_ac", reseal(tables, 39, "B", 2), unsupported, "coder"),
        ("without_levels", reseal(tables, 41, "B", 0), error, "num_levels"),
        ("5_levels", reseal(tables, 41, "B", 5), error, "num_levels"),
        ("dtype_0", reseal(tables, 40, "B", 0), unsupported, "dtype"),
        ("stored_tokens_2", reseal(tables, 42, "H", 2), unsupported, "stored_tokens"),
        ("without_block_size", reseal(tables, 44, "I", 0), error, "prefill_block_size"),
        ("step_beyond_the_limit", reseal(tables, 216, "i", 1025), error, "step_log"),
        ("without_heads", reseal(tables, 220, "H", 0), error, "shape"),
        ("chunks_beyond_the_cache", reseal(tables, 236, "I", 36), error, "chunk_tokens"),
        ("of_another_profile", reseal(tables, 144, "B", tables[144] ^ 1), mismatch, "profile_hash"),
        ("of_another_shape", reseal(tables, 220, "HH", 2, 4), mismatch, "planes"),
    ):
        yield f"tables_{what}.cgt", content, problem, field
    for what, content, problem, field in (
        ("empty", b"", error, "header"),
        ("truncated", first[:250], error, "header_bytes"),
        ("without_last_byte", first[:-1], error, "file_bytes"),
        ("field_flipped", flip(first, 33), error, "header_crc"),
        ("flags_set", reseal(first, 10, "H", 1), unsupported, "flags"),
        ("coder_ac", reseal(first, 39, "B", 2), unsupported, "coder"),
        ("level_0", reseal(first, 41, "B", 0), error, "level"),
        ("level_5", reseal(first, 41, "B", 5), error, "level"),
        ("step_beyond_the_limit", reseal(first, 208, "i", -1025), error, "step_log"),
        ("without_groups", reseal(first, 212, "H", 0), error, "num_groups"),
        ("reserved_set", reseal(first, 214, "H", 1), unsupported, "reserved"),
        ("tokens_per_stream_33", reseal(first, 236, "I", 33), error, "tokens_per_stream"),
        ("header_padding_set", reseal(first, 280, "B", 1), error, "padding"),
        ("refines_another", reseal(first, 44, "I", 1), error, "refines"),
        ("max_error_nan", reseal(first, 216, "f", math.nan), error, "max_error"),
        ("exact_bytes_huge", reseal(first, 224, "Q", 2**64 - 1), error, "file_bytes"),
        ("exact_values_flipped", flip(first, len(first) - 1), error, "exact_crc"),
        *_invalid_exact_values(first),
        ("stream_flipped", flip(first, struct.unpack_from("<I", first, 12)[0]), error, "stream 0"),
        ("of_another_model", reseal(first, 48, "B", first[48] ^ 1), mismatch, "model_fingerprint"),
        ("of_another_context", reseal(first, 80, "B", first[80] ^ 1), mismatch, "token_hash"),
        ("of_another_rope", reseal(first, 112, "B", first[112] ^ 1), mismatch, "rope_hash"),
        ("of_another_document", reseal(first, 144, "B", first[144] ^ 1), mismatch, "tables_hash"),
        ("of_another_profile", reseal(first, 176, "B", first[176] ^ 1), mismatch, "profile_hash"),
        ("of_another_place", reseal(first, 24, "Q", 33), mismatch, "first_token"),
        ("of_another_step", reseal(first, 208, "i", STEP_LOG + 1), mismatch, "step_log"),
        ("of_level_2", second, mismatch, "level"),
        ("of_more_layers", reseal(first, 36, "H", 3), mismatch, "num_layers"),
        *_invalid_streams(first),
    ):
        yield f"chunk_L1_{what}.cgc", content, problem, field
    yield "chunk_L2_of_level_1.cgc", first, mismatch, "level"
    yield "chunk_L2_refines_another.cgc", reseal(second, 44, "I", 1), mismatch, "refines"
    yield "chunk_L2_stream_flipped.cgc", flip(second, _exact_at(second) - 1), error, "stream 2"
    stream, num_words = _first_stream(second)
    escape = struct.pack("<Ii", 0, 1)  # of a component that level 2 refines
    content = _replace_first_stream(second, stream + bytes(-len(stream) % 4) + escape, num_words)
    yield "chunk_L2_escape_of_a_refined_component.cgc", content, error, "group 0, stream 0"


def _invalid_streams(first: bytes) -> Iterator[tuple[str, bytes, str, str]]:
    """Level 1's first stream, wrong in one way; its last 32 bytes are four escapes."""
    stream, num_words = _first_stream(first)
    at = len(stream) - 8
    last = struct.unpack_from("<Ii", stream, at)
    num_components = codings(1)[0].num_components
    for what, changed, words in (
        ("escapes_out_of_order", put(stream, at, "I", 0), num_words),
        ("escape_behind_the_stream", put(stream, at, "I", 32 * num_components), num_words),
        ("escape_beyond_2_24", put(stream, at + 4, "i", (1 << 24) + 1), num_words),
        ("escape_cut", stream[:-4], num_words),
        ("escape_twice", stream + struct.pack("<Ii", *last), num_words),
        ("state_zero", bytes(4) + stream[4:], num_words),
        ("words_missing", stream, num_words + 1),
        ("words_missing_by_billions", stream, 2**32 - 1),
        ("without_bytes", b"", 0),
    ):
        yield what, _replace_first_stream(first, changed, words), "BitstreamError", "group 0, stream 0"


def exact_of(chunk: Chunk) -> bytes:
    """The section of exact values of a chunk that was taken apart."""
    return bytes(chunk.behind[: chunk.header.exact_bytes])


def _exact_at(content: bytes) -> int:
    header = parse_chunk(content).header
    return header.payload_offset + header.payload_bytes


def _invalid_exact_values(first: bytes) -> Iterator[tuple[str, bytes, str, str]]:
    """Level 1's exact values, wrong in one way: runs (0, 3, 2), (0, 6, 1), (32, 23, 1), then four values of fp32."""
    chunk = parse_chunk(first)
    good = exact_of(chunk)
    assert isinstance(chunk.header, TransformChunkHeader) and len(good) == 4 + 3 * 12 + 4 * 4
    for what, exact in (
        ("without_runs", put(good, 0, "I", 0)),
        ("of_billions_of_runs", put(good, 0, "I", 2**32 - 1)),
        ("of_an_empty_run", put(good, 12, "I", 0)),
        ("of_a_run_of_billions", put(good, 12, "I", 2**32 - 1)),
        ("missing", good[:-4]),
        ("left_over", good + bytes(4)),
        ("cut_in_the_count", good[:3]),
        ("behind_the_chunk", put(good, 28, "I", 33)),
        ("beyond_the_channels", put(good, 32, "I", 24)),
        ("out_of_order", put(good, 20, "I", 2)),
        ("overlapping", put(good, 20, "I", 4)),
        ("infinite", put(good, 40, "f", math.inf)),
        ("nan", put(good, 52, "f", math.nan)),
    ):
        payloads = [bytes(chunk.payload)]
        content = b"".join(build_transform_chunk(chunk.header, chunk.header.streams, payloads, exact))
        yield f"exact_values_{what}", content, "BitstreamError", "exact values"


def _first_stream(content: bytes) -> tuple[bytes, int]:
    chunk = parse_chunk(content)
    entry = chunk.header.streams[0]
    return bytes(chunk.payload[: entry.num_bytes]), entry.num_words


def _replace_first_stream(content: bytes, stream: bytes, num_words: int) -> bytes:
    chunk = parse_chunk(content)
    assert isinstance(chunk.header, TransformChunkHeader)
    first, *rest = chunk.header.streams
    padded = stream + bytes(-len(stream) % 16)
    entries = [StreamEntry(len(stream), num_words, reference.crc32c(padded)), *rest]
    payloads = [padded, chunk.payload[-(-first.num_bytes // 16) * 16 :]]
    return b"".join(build_transform_chunk(chunk.header, entries, payloads, exact_of(chunk)))
