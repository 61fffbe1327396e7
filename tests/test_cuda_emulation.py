"""The CUDA kernels' own lines, run on the CPU: the bytes of the reference and the CPU, and a mutation is noticed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cachegen.coder.cuda import CudaKernels
from cachegen.errors import BitstreamError, InputError
from cachegen.format import BandMode, Coder, PlaneLayout
from tests import emulation
from tests.cuda_checks import SHAPES, Shape, check_corrupt_streams, check_shape, encode_on_cpu
from tests.golden import make_golden
from tests.golden.make_golden import FOLDER, GOLDENS, Golden
from tests.small_documents import DTYPES, make_cache

SHAPE = Shape(70, (2, 1), (8, 9), (32, 64), (32, 96))


@pytest.fixture(scope="module")
def module_path() -> Path:
    return emulation.build()


@pytest.fixture(scope="module")
def emulated(module_path: Path) -> CudaKernels:
    return emulation.kernels_of(module_path)


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def kernels(request, module_path: Path, emulated: CudaKernels) -> Iterator[CudaKernels]:
    """The emulated kernels, the threads of a block in either order."""
    emulation.reverse_threads(module_path, request.param)
    yield emulated
    emulation.reverse_threads(module_path, False)


# --- equal to the reference and the CPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("coder", Coder)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_and_values_equal_the_cpus(kernels, shape: Shape, dtype: torch.dtype, coder: Coder) -> None:
    check_shape(kernels, shape, dtype, coder)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_golden_files_are_written_and_read(kernels, golden: Golden) -> None:
    files = {path.name: path.read_bytes() for path in sorted((FOLDER / golden.name).iterdir())}
    if not golden.has_band_maps:  # whose encoder is the reference alone
        assert make_golden.encode(golden, kernels) == files
    decoded = make_golden.decode(golden, files, kernels)
    expected = json.loads((FOLDER / "decoded_sha256.json").read_text("utf-8"))
    assert make_golden.hash_cache(decoded) == expected[golden.name]


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


def test_random_band_maps_are_refused_or_read_as_on_the_cpu(emulated) -> None:
    encoded = encode_on_cpu(Shape(40, (1, 1), (70, 3), (32, 32), (32, 32)), torch.float16, Coder.RANS)
    mapped = [PlaneLayout(1, dim, 32, 0, BandMode.BYTES, 32) for dim in (70, 3)]
    encoded.layouts[:] = mapped  # the streams then hold a map where their first words are
    check_corrupt_streams(emulated, encoded, 60)


@pytest.mark.parametrize(("plane", "token"), [(0, 0), (1, 69), (3, 7)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(emulated, plane: int, token: int, value: float) -> None:
    cache = make_cache([(1, 40)] * 4, 70, torch.bfloat16)
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
    with pytest.raises(ValueError, match="has a band map"):
        banded = [PlaneLayout(2, 8, 32, 0, BandMode.BYTES, 32), encoded.layouts[1]]
        emulated.encode(encoded.cache, encoded.scales, banded, tables)


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
        "__popc(needing & lower_lanes)",
        "__popc(needing & (lower_lanes << 1 | 1))",
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
@pytest.mark.parametrize("name", MUTATIONS)
def test_comparison_notices_a_mutated_line(tmp_path: Path, name: str) -> None:
    result = run("compare", mutate(tmp_path, *MUTATIONS[name]))
    assert result.returncode == 1 and result.stdout.startswith("differs: "), result.stdout + result.stderr


def test_corrupt_streams_are_not_read_beyond_their_payload(module_path: Path) -> None:
    result = run("guarded", module_path)
    assert (result.returncode, result.stdout) == (0, "stayed inside\n"), result.stderr


@pytest.mark.slow
def test_the_guard_notices_a_dropped_check(tmp_path: Path) -> None:
    check = "if (needs_word && word < num_words) state"
    result = run("guarded", mutate(tmp_path, "rans_decode.cuh", check, "if (needs_word) state"))
    assert result.returncode == -signal.SIGSEGV, result.stdout + result.stderr
