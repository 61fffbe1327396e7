"""The CUDA kernels' own lines, run on the CPU: the bytes of the reference and the CPU, and a mutation is noticed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cachegen.coder import components
from cachegen.coder.component_tables import LevelCoding
from cachegen.coder.components import ComponentGroup
from cachegen.coder.cpu_kernels import CPU
from cachegen.errors import BitstreamError, InputError
from cachegen.format import Coder, PlaneLayout
from cachegen.methods import parse_chunk
from cachegen.methods.transform.encoder import build_chunk as build_transform_chunk
from cachegen.methods.transform.headers import TransformChunkHeader
from tests import emulation
from tests.cuda_checks import SHAPES, Shape, check_corrupt_streams, check_shape, check_word_counts, encode_on_cpu
from tests.cuda_component_checks import (
    COMPONENT_SHAPES,
    ComponentShape,
    check_component_shape,
    check_corrupt_components,
    check_corrupt_escapes,
    check_transform_document,
    decode_transform_document,
    encode_components_on_cpu,
    make_transform_document,
)
from tests.fixtures.caches import DTYPES, make_shaped_cache
from tests.golden import make_golden
from tests.golden.make_golden import FOLDER, GOLDENS, Golden

SHAPE = Shape(70, (2, 1), (8, 9), (32, 64), (32, 96))


# --- equal to the reference and the CPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("coder", Coder)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_and_values_equal_the_cpus(kernels, shape: Shape, dtype: torch.dtype, coder: Coder) -> None:
    check_shape(kernels, shape, dtype, coder)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_golden_files_are_written_and_read(kernels, golden: Golden) -> None:
    files = {path.name: path.read_bytes() for path in sorted((FOLDER / golden.name).iterdir())}
    assert make_golden.encode(golden, kernels) == files
    decoded = make_golden.decode(golden, files, kernels)
    expected = json.loads((FOLDER / "decoded_sha256.json").read_text("utf-8"))
    assert make_golden.hash_cache(decoded) == expected[golden.name]


@pytest.mark.parametrize("shape", COMPONENT_SHAPES, ids=str)
def test_components_and_their_bytes_equal_the_cpus(kernels, shape: ComponentShape) -> None:
    check_component_shape(kernels, shape)


def test_transform_documents_of_either_decode_with_the_other(emulated) -> None:
    check_transform_document(emulated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "is_whole"), [(1, True), (4, True), (8, True), (16, False)])
def test_decoding_writes_whole_sectors(
    emulated, module_path: Path, num_rows: int, is_whole: bool, dtype: torch.dtype
) -> None:
    shape = Shape(32 * num_rows - 5, (2, 1), (16, 96), (32, 64), (32 * num_rows, 32))
    encoded = encode_on_cpu(shape, dtype, Coder.RANS)
    emulation.take_store_counts(module_path)
    decoded = encoded.decode(emulated)
    counts = emulation.take_store_counts(module_path)
    num_bytes = [plane.numel() * plane.element_size() for plane in decoded.planes]
    # Streams of more than 8 rows have room for 8 channels at a time: 16 bytes of fp16.
    num_split = 0 if is_whole or dtype is torch.float32 else num_bytes[0] // 32
    assert counts.num_whole_sectors == sum(num_bytes) // 32 - num_split
    assert counts.num_sectors == counts.num_whole_sectors + 2 * num_split


def test_decoding_components_writes_whole_sectors(emulated, module_path: Path) -> None:
    coding = LevelCoding(np.full(40, 13, np.uint16), np.zeros(40, np.uint8), 0)
    values = torch.zeros(250, 40, dtype=torch.int32)
    payload, streams = components.encode_components(values, None, coding, 256)
    emulation.take_store_counts(module_path)
    emulated.decode_components(payload, streams, values, coding, 256)
    counts = emulation.take_store_counts(module_path)
    assert counts.num_whole_sectors == counts.num_sectors == 4 * values.numel() // 32


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coder", Coder)
def test_corrupt_streams_are_refused_as_on_the_cpu(emulated, coder: Coder) -> None:
    if coder is not Coder.PACKED:
        check_corrupt_streams(emulated, encode_on_cpu(SHAPE, torch.float16, coder), 120)
        return
    # Nothing but a length can be wrong with raw bits.
    encoded = encode_on_cpu(SHAPE, torch.float16, coder)
    wrong = [encoded.streams[0]._replace(num_words=1), *encoded.streams[1:]]
    with pytest.raises(BitstreamError, match="stream 0"):
        encoded.decode(emulated, streams=wrong)


def test_words_too_many_or_too_few_are_refused_as_on_the_cpu(emulated) -> None:
    check_word_counts(emulated)


def test_corrupt_components_are_refused_as_on_the_cpu(emulated) -> None:
    check_corrupt_components(emulated, encode_components_on_cpu(ComponentShape(70, (33, 5), (32, 96))), 200)
    check_corrupt_escapes(emulated)


@pytest.mark.parametrize(
    ("changes", "tokens_per_stream", "message"),
    [
        ({"table_indices": np.array([1, 37], np.uint16)}, 32, "`table_indices` must be below 37"),
        ({"table_indices": np.array([[1, 2]], np.uint16)}, 32, "`table_indices` must be uint16 [1], got uint16 (1, 2)"),
        ({"table_indices": np.array([1, 2], np.int64)}, 32, "`table_indices` must be uint16 [2]"),
        ({"low_bits": np.array([0], np.uint8)}, 32, "`low_bits` must be uint8 [2], got uint8 (1,)"),
        ({"low_bits": np.array([0, 9], np.uint8)}, 32, "`low_bits` must be at most 8, and 0 for refined"),
        ({"low_bits": np.array([1, 0], np.uint8)}, 32, "`low_bits` must be at most 8, and 0 for refined"),
        ({"num_refined": 3}, 32, "`num_refined` must be 0 to 2, got 3"),
        ({"num_refined": -1}, 32, "`num_refined` must be 0 to 2, got -1"),
        ({}, 33, "`tokens_per_stream` must be a multiple of 32, got 33"),
        ({}, 0, "`tokens_per_stream` must be a multiple of 32, got 0"),
        ({}, 1 << 31, "`tokens_per_stream` must give streams of at most 4294967295 components"),
    ],
)
def test_codings_that_do_not_fit_are_refused(emulated, changes: dict, tokens_per_stream: int, message: str) -> None:
    coding = LevelCoding(np.array([13, 2], np.uint16), np.array([0, 1], np.uint8), 1)
    coding = dataclasses.replace(coding, **changes)
    values = torch.zeros(40, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape(message)):
        emulated.encode_components(values, values, coding, tokens_per_stream)
    with pytest.raises(ValueError, match=re.escape(message)):
        emulated.decode_components(b"", [], values, coding, tokens_per_stream)


def test_components_that_do_not_fit_are_refused(emulated) -> None:
    coding = LevelCoding(np.array([13, 2], np.uint16), np.array([0, 1], np.uint8), 1)
    values = torch.zeros(40, 2, dtype=torch.int32)
    for wrong in (values[:, :1], values.long(), values[0], values.T.contiguous().T):
        with pytest.raises(ValueError, match="`components` must be int32"):
            emulated.decode_components(b"", [], wrong, coding, 32)
    with pytest.raises(ValueError, match="`fine` must have 2 components, got 3"):
        emulated.encode_components(torch.zeros(40, 3, dtype=torch.int32), values, coding, 32)
    for wrong in (None, values[:39], values[:, :0]):
        with pytest.raises(ValueError, match="`coarse` must be int32"):
            emulated.encode_components(values, wrong, coding, 32)
    payload, streams = emulated.encode_components(values, values, coding, 32)
    with pytest.raises(ValueError, match="the payload is not as long as its streams"):
        emulated.decode_components(payload[:-16], streams, values, coding, 32)
    with pytest.raises(ValueError, match="`streams` must have 2 entries, got 1"):
        emulated.decode_components(payload, streams[:1], values, coding, 32)
    other = ComponentGroup(1, torch.zeros(39, 2, dtype=torch.int32), coding, 32)
    with pytest.raises(ValueError, match="of equally many tokens"):
        groups = [ComponentGroup(0, values, coding, 32), other]
        emulated.decode_component_groups(bytes(payload) * 2, streams * 2, groups)


@pytest.mark.parametrize("kernels", ["cpu", "emulated"])
def test_streams_longer_than_their_chunk_are_one_stream(request, kernels: str) -> None:
    coder = CPU if kernels == "cpu" else request.getfixturevalue(kernels)
    _, encoder, files = make_transform_document(CPU, num_key_heads=30, num_levels=1)
    chunk = parse_chunk(files[0][0])
    assert isinstance(chunk.header, TransformChunkHeader) and chunk.header.streams_of_groups == [1, 1]
    longer = dataclasses.replace(chunk.header, tokens_per_stream=(1 << 23, 64))
    files[0][0] = b"".join(build_transform_chunk(longer, chunk.header.streams, [chunk.payload]))
    decode_transform_document(coder, encoder, files, 1)


@pytest.mark.parametrize("kernels", ["cpu", "emulated"])
def test_components_that_no_symbol_stands_for_are_refused(request, kernels: str) -> None:
    coder = components if kernels == "cpu" else request.getfixturevalue(kernels)
    coding = LevelCoding(np.array([13, 2], np.uint16), np.array([0, 1], np.uint8), 1)
    coarse = torch.full((70, 1), -5, dtype=torch.int32)
    fine = torch.tensor([[-15, 0]] * 70, dtype=torch.int32)
    coder.encode_components(fine, coarse, coding, 32)
    for token, component, value in ((69, 0, -13), (69, 0, -17), (69, 1, (1 << 24) + 1), (69, 1, -(2**31))):
        wrong = fine.clone()
        wrong[token, component] = value
        with pytest.raises(ValueError, match="stream 2 cannot be encoded: NO_FREQUENCY"):
            coder.encode_components(wrong, coarse, coding, 32)


def test_no_tokens_or_no_components_are_nothing(emulated) -> None:
    empty = LevelCoding(np.zeros(0, np.uint16), np.zeros(0, np.uint8), 0)
    for shape in ((0, 0), (0, 3), (40, 0)):
        values = torch.zeros(*shape, dtype=torch.int32)
        coding = empty if shape[1] == 0 else LevelCoding(np.zeros(3, np.uint16), np.zeros(3, np.uint8), 0)
        payload, streams = components.encode_components(values, None, coding, 32)
        found, entries = emulated.encode_components(values, None, coding, 32)
        assert bytes(found) == bytes(payload) and entries == streams
        emulated.decode_components(payload, streams, values, coding, 32)


@pytest.mark.parametrize(("plane", "token"), [(0, 0), (1, 69), (3, 7)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(emulated, plane: int, token: int, value: float) -> None:
    cache = make_shaped_cache([(1, 40)] * 4, 70, torch.bfloat16)
    cache.planes[plane][token:, 0, 33] = value
    kind = "values" if plane % 2 else "keys"
    with pytest.raises(InputError, match=rf"layer {plane // 2}, {kind}, token {token}\)"):
        emulated.measure(cache, [PlaneLayout(1, 40, 32, 0)] * 4)


def test_what_the_cpus_encoder_refuses_is_refused(emulated) -> None:
    encoded = encode_on_cpu(SHAPE, torch.float16, Coder.RANS)
    tables = encoded.load_tables(emulated)
    with pytest.raises(ValueError, match="stream 0 cannot be encoded: NOT_FINITE"):
        emulated.encode(encoded.cache, encoded.scales / 16, encoded.layouts, tables)
    other = encode_on_cpu(Shape(1, (2, 1), (8, 9), (32, 64), (32, 96)), torch.float16, Coder.RANS)
    with pytest.raises(ValueError, match="stream 0 cannot be encoded: NO_FREQUENCY"):
        emulated.encode(encoded.cache, encoded.scales, encoded.layouts, other.load_tables(emulated))
    with pytest.raises(ValueError, match="`tables` must hold 25 tables, got 2"):
        few = encode_on_cpu(Shape(1, (1, 1), (1, 1), (32, 32), (32, 32)), torch.float16, Coder.RANS)
        emulated.encode(encoded.cache, encoded.scales, encoded.layouts, few.load_tables(emulated))
    with pytest.raises(ValueError, match="`tables` must go with the coder"):
        emulated.encode(encoded.cache, encoded.scales, encoded.layouts, None, coder=Coder.RANS)


def test_a_payload_that_is_not_as_long_as_its_streams_is_refused(emulated) -> None:
    encoded = encode_on_cpu(SHAPE, torch.float16, Coder.RANS)
    with pytest.raises(ValueError, match="the payload is not as long as its streams"):
        encoded.decode(emulated, encoded.payload[:-16])
    with pytest.raises(ValueError, match="`streams` must have 4 entries, got 3"):
        encoded.decode(emulated, streams=encoded.streams[:-1])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (PlaneLayout(2, 8, 15, 0, tokens_per_stream=32), "`num_bins` must be an even number"),
        (PlaneLayout(2, 8, 256, 0, tokens_per_stream=32), "`low_bits` of plane 0 must fit 256 bins, got 0"),
        (PlaneLayout(2, 8, 16, 9, tokens_per_stream=32), "`low_bits` of plane 0 must fit 16 bins, got 9"),
        (PlaneLayout(2, 8, 16, 0, tokens_per_stream=33), "`tokens_per_stream` must be a multiple of 32, got 33"),
        (PlaneLayout(4, 4, 16, 0, tokens_per_stream=32), "plane 0 must be a tensor"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(emulated, layout: PlaneLayout, message: str) -> None:
    encoded = encode_on_cpu(SHAPE, torch.float16, Coder.PACKED)
    encoded.layouts[0] = layout
    with pytest.raises(ValueError, match=message):
        emulated.measure(encoded.cache, encoded.layouts)
    with pytest.raises(ValueError, match=message):
        encoded.decode(emulated)


def test_a_device_that_is_not_there_is_refused(module_path: Path) -> None:
    assert emulation.load(module_path).find_problem(0) is None
    assert emulation.load(module_path).find_problem(1) == "there is no such device"


# --- the comparison sees what it should -------------------------------------------------------------------------------

MUTATIONS = {
    "a lane counts itself among the lower ones": (
        "rans_decode.cuh",
        "__popc(needing & ((1u << lane) - 1))",
        "__popc(needing & ((2u << lane) - 1))",
    ),
    "the ring is refilled over words that are still read": (
        "rans_decode.cuh",
        "(refill_at - kRefillWords) % kNumWords",
        "refill_at % kNumWords",
    ),
    "a lane refills the ring while others read from it": (
        "rans_decode.cuh",
        "__syncwarp();  // no lane reads the words that are stored over any more",
        "",
    ),
    "a refill comes too late": ("rans_decode.cuh", "next_word >= ring.refill_at", "next_word > ring.refill_at + 64"),
    "a refill loads what is in the ring": (
        "rans_decode.cuh",
        "load_pair(refill_at + kRefillWords, lane)",
        "load_pair(refill_at, lane)",
    ),
    "the last of an odd number of words is not loaded": (
        "rans_decode.cuh",
        "word < num_words ? words[word] : 0",
        "0",
    ),
    "missing words go unnoticed": ("rans_decode.cuh", "if (next_word > ring.num_words) return Status::kTruncated;", ""),
    "left-over words go unnoticed": ("rans_decode.cuh", "next_word < ring.num_words || unfinished", "unfinished"),
    "a search leaves a quarter of its table out": ("rans_decode.cuh", "is_high ? high_middle : low_middle", "middle"),
    "a tile has the tables of the first one": (
        "rans_decode.cuh",
        "kTableSize, tile, tile_end)",
        "kTableSize, 0, tile_end - tile)",
    ),
    "a tile's tables are loaded while the one before decodes": (
        "rans_decode.cuh",
        "__syncthreads();  // nobody reads the tables of the tile before any more",
        "",
    ),
    "the tail row is dropped": ("rans_decode.cuh", "if (last_full_row == last_row) continue;", "continue;"),
    "one lane too many is live": (
        "rans_encode.cuh",
        "row * kNumLanes + lane < stream.num_tokens",
        "row * kNumLanes + lane <= stream.num_tokens",
    ),
    "low bits forget the rows before": (
        "arithmetic.cuh",
        "const int64_t within = position - row * row_bits;",
        "const int64_t within = position;",
    ),
    "a barrier is missing": ("rans_encode.cuh", "__syncwarp();  // lanes read what other lanes have staged", ""),
    "a barrier of components is missing": (
        "components.cuh",
        "__syncwarp();  // lanes read what other lanes have staged",
        "",
    ),
    "a barrier of encoded components is missing": (
        "components.cuh",
        "__syncwarp();  // lanes encode what other lanes have staged",
        "",
    ),
    "low bits forget the components before": (
        "components.cuh",
        "int64_t{component.low_bits_before} * live_lanes",
        "int64_t{component.low_bits_before} * (live_lanes % kNumLanes)",
    ),
    "a dead lane decodes a component": (
        "components.cuh",
        "lane_decoder.decode(table, is_live, lane)",
        "lane_decoder.decode(table, true, lane)",
    ),
    "one component too few is refined": (
        "components.cuh",
        "group.first_channel + component < record.num_refined",
        "group.first_channel + component + 1 < record.num_refined",
    ),
    "escapes ascend from the first one only": (
        "components.cuh",
        "i > 0 ? int64_t{escapes[i - 1].place} : -1",
        "i > 0 ? int64_t{escapes[0].place} : -1",
    ),
    "a lane applies its first escape only": (
        "components.cuh",
        "i < num_escapes; i += kNumLanes",
        "i < kNumLanes && i < num_escapes; i += kNumLanes",
    ),
    "escapes are listed in each other's places": (
        "components.cuh",
        "escapes[__popc(escaping & ((1u << lane) - 1))]",
        "escapes[__popc(escaping >> lane >> 1)]",
    ),
    "the escapes of a stream's tokens are the chunk's": (
        "components.cuh",
        "const int64_t chunk_token = int64_t{stream.first_token} + token;",
        "const int64_t chunk_token = token;",
    ),
    "a high digit is not rounded": (
        "synthesis.cuh",
        "static_cast<uint32_t>(value) + (1u << (kDigitBits - 1))",
        "static_cast<uint32_t>(value)",
    ),
    "a component at the limit is beyond": (
        "synthesis.cuh",
        "magnitude_of(value) > limit",
        "magnitude_of(value) >= limit",
    ),
    "large components have one digit's limit": ("synthesis.cuh", "(kMaxExact << kDigitBits) - 1", "kMaxExact"),
    "a block clears the flag of others": (
        "synthesis.cuh",
        "if (is_beyond) atomicOr(launch.beyond, 1u);",
        "*launch.beyond = is_beyond;",
    ),
    "digits are split by eights where they are not eights": (
        "synthesis.cuh",
        "(launch.num_components | launch.num_large) % kDigitWidth == 0",
        "(launch.num_components | launch.num_large) % 1 == 0",
    ),
    "digits are stored by eights where they are not aligned": (
        "synthesis.cuh",
        "reinterpret_cast<uintptr_t>(launch.digits)) %",
        "0) %",
    ),
    "values are stored by fours where they are not aligned": (
        "synthesis.cuh",
        "plane.values % (kPlacedWidth * sizeof(Storage)) == 0",
        "true",
    ),
    "pairs turn backwards": ("synthesis.cuh", "fmaf(-y, sine, x * cosine)", "fmaf(y, sine, x * cosine)"),
    "what has turned is not scaled": (
        "synthesis.cuh",
        "fmaf(x, sine, y * cosine) * kind.scaling",
        "fmaf(x, sine, y * cosine)",
    ),
    "tokens have the angles of the first one": ("synthesis.cuh", "cosine_at += token_step * kind.num_pairs;", ""),
    "dims behind the pairs are taken for pairs": (
        "synthesis.cuh",
        "still < kind.offset ? still : still + 2 * kind.num_pairs",
        "still",
    ),
    "a layer has the first layer's channels": (
        "synthesis.cuh",
        "const int first = layer * layer_channels +",
        "const int first = layer +",
    ),
    "a group has the first group's means": (
        "synthesis.cuh",
        "launch.means + group * num_channels + first",
        "launch.means + first",
    ),
}
IN_EVERY_RUN = {
    "the ring is refilled over words that are still read",
    "missing words go unnoticed",
    "the tail row is dropped",
    "low bits forget the rows before",
    "a barrier of components is missing",
    "escapes ascend from the first one only",
    "a component at the limit is beyond",
    "dims behind the pairs are taken for pairs",
}


def run(program: str, module: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", f"tests.emulation.{program}", str(module)]
    return subprocess.run(
        command, cwd=emulation.ROOT, env={"PYTHONPATH": "src"}, capture_output=True, text=True, timeout=120
    )


def mutate(folder: Path, file_name: str, line: str, mutated: str) -> Path:
    """Build the kernels with one line changed."""
    native = folder / "csrc"
    shutil.copytree(emulation.NATIVE, native)
    source = native / "cuda" / file_name
    text = source.read_text("utf-8")
    assert text.count(line) == 1, "the kernels have changed: adapt the mutation"
    source.write_text(text.replace(line, mutated), "utf-8")
    return emulation.build(folder, native)


def test_comparison_agrees_without_a_mutation(module_path: Path) -> None:
    result = run("compare", module_path)
    assert (result.returncode, result.stdout) == (0, "agrees\n"), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", emulation.choose_mutations(MUTATIONS, IN_EVERY_RUN))
def test_comparison_notices_a_mutated_line(tmp_path: Path, name: str) -> None:
    result = run("compare", mutate(tmp_path, *MUTATIONS[name]))
    assert result.returncode == 1 and result.stdout.startswith("differs: "), result.stdout + result.stderr


def test_corrupt_streams_are_not_read_beyond_their_payload(module_path: Path) -> None:
    result = run("guarded", module_path)
    assert (result.returncode, result.stdout) == (0, "stayed inside\n"), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_name", "check", "mutated"),
    [
        ("rans_decode.cuh", "if (word + 1 < num_words) return", "if (word < 2 * num_words) return"),
        ("rans_decode.cuh", "word < num_words ? words[word] : 0", "words[word]"),
        (
            "synthesis.cuh",
            "kRunTokens ? launch.num_tokens : first + kRunTokens;\n    const PlacedVectors",
            "kRunTokens ? first + kRunTokens : first + kRunTokens;\n    const PlacedVectors",
        ),
    ],
)
def test_the_guard_notices_a_dropped_check(tmp_path: Path, file_name: str, check: str, mutated: str) -> None:
    result = run("guarded", mutate(tmp_path, file_name, check, mutated))
    assert result.returncode == -signal.SIGSEGV, result.stdout + result.stderr
