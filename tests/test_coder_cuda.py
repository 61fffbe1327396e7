"""The CUDA kernels on a GPU. `make test-gpu` runs these, and they fail where there is no GPU or no torchac_cuda."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cachegen.coder import cpu
from cachegen.coder.cuda import CudaKernels, load_kernels
from cachegen.errors import InputError
from cachegen.format import Coder, PlaneLayout
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods import load_config
from cachegen.methods.absmax.codec import AbsmaxEncoder
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from tests.cuda_checks import (
    SHAPES,
    OnDevice,
    Shape,
    check_corrupt_streams,
    check_shape,
    check_word_counts,
    encode_on_cpu,
)
from tests.cuda_component_checks import (
    COMPONENT_SHAPES,
    ComponentShape,
    check_component_shape,
    check_corrupt_components,
    check_corrupt_escapes,
    check_transform_document,
    encode_components_on_cpu,
)
from tests.fixtures.absmax import make_config, quantize_and_dequantize
from tests.fixtures.caches import DTYPES, are_equal, make_metadata, make_shaped_cache
from tests.golden import make_golden
from tests.golden.make_golden import FOLDER, GOLDENS, Golden
from tests.prove_gpu import CODERS, LARGE, MISTRAL

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def on_gpu(gpu: torch.device) -> CudaKernels:
    return load_kernels(gpu)


@pytest.fixture(scope="module")
def kernels(on_gpu: CudaKernels) -> OnDevice:
    return OnDevice(on_gpu)


def to(device: torch.device, cache: KVCache) -> KVCache:
    return from_planes([plane.to(device) for plane in cache.planes])


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, MISTRAL], ids=str)
def test_bytes_and_values_equal_the_cpus(kernels, shape: Shape, dtype: torch.dtype, coder: Coder) -> None:
    check_shape(kernels, shape, dtype, coder)


@pytest.mark.parametrize("shape", [*COMPONENT_SHAPES, LARGE], ids=str)
def test_components_and_their_bytes_equal_the_cpus(kernels, shape: ComponentShape) -> None:
    check_component_shape(kernels, shape)


def test_transform_documents_of_either_device_decode_on_the_other(on_gpu: CudaKernels) -> None:
    check_transform_document(on_gpu)


@pytest.mark.parametrize("golden", [golden for golden in GOLDENS if golden.coder in CODERS], ids=lambda g: g.name)
def test_golden_files_are_written_and_read(kernels, golden: Golden) -> None:
    files = {path.name: path.read_bytes() for path in sorted((FOLDER / golden.name).iterdir())}
    assert make_golden.encode(golden, kernels) == files
    expected = json.loads((FOLDER / "decoded_sha256.json").read_text("utf-8"))
    assert make_golden.hash_cache(make_golden.decode(golden, files, kernels)) == expected[golden.name]


def test_corrupt_streams_are_refused_as_on_the_cpu(kernels) -> None:
    check_corrupt_streams(kernels, encode_on_cpu(SHAPES[2], torch.float16, Coder.RANS), 300)
    check_word_counts(kernels)


def test_corrupt_components_are_refused_as_on_the_cpu(kernels) -> None:
    check_corrupt_components(kernels, encode_components_on_cpu(ComponentShape(70, (33, 5), (32, 96))), 300)
    check_corrupt_escapes(kernels)


def test_values_that_are_not_finite_are_named(kernels) -> None:
    cache = make_shaped_cache([(1, 40)] * 4, 70, torch.bfloat16)
    cache.planes[3][7:, 0, 33] = torch.nan
    with pytest.raises(InputError, match=r"layer 1, values, token 7\)"):
        kernels.measure(cache, [PlaneLayout(1, 40, 32, 0)] * 4)


def test_a_cache_on_the_gpu_is_measured_and_encoded_where_it_is(on_gpu: CudaKernels, gpu: torch.device) -> None:
    encoded = encode_on_cpu(MISTRAL, torch.float16, Coder.RANS)
    cache = to(gpu, encoded.cache)
    scales, counts = on_gpu.measure(cache, encoded.layouts)
    assert torch.equal(scales, encoded.scales) and (counts == encoded.counts).all()
    payload, streams = on_gpu.encode(cache, scales.to(gpu), encoded.layouts, encoded.load_tables(on_gpu))
    assert bytes(payload) == encoded.payload and streams == encoded.streams


def test_nothing_beside_the_tokens_is_written(on_gpu: CudaKernels, gpu: torch.device) -> None:
    encoded = encode_on_cpu(SHAPES[2], torch.float16, Coder.RANS)
    buffers = [
        torch.full((heads, 80, dim), torch.nan, dtype=torch.float16, device=gpu)
        for heads, dim in zip(SHAPES[2].heads, SHAPES[2].dims, strict=True)
    ]
    output = from_planes([buffer[:, 5:75].permute(1, 0, 2) for buffer in buffers])
    tables = encoded.load_tables(on_gpu)
    on_gpu.decode(encoded.payload, encoded.streams, encoded.scales, encoded.layouts, tables, output)
    assert are_equal(to(torch.device("cpu"), output), encoded.decode(cpu))
    assert all(torch.isnan(buffer[:, :5]).all() and torch.isnan(buffer[:, 75:]).all() for buffer in buffers)


def test_kernels_run_on_torchs_current_stream(kernels, gpu: torch.device) -> None:
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what is queued before must be waited for
        check_shape(kernels, SHAPES[3], torch.float16, Coder.RANS)
        check_component_shape(kernels, COMPONENT_SHAPES[2])
    assert stream.query()


def test_chunks_in_flight_do_not_touch_each_other(on_gpu: CudaKernels, gpu: torch.device) -> None:
    chunks = [encode_on_cpu(shape, torch.float16, Coder.RANS) for shape in (*SHAPES[:4], MISTRAL)]
    started = []
    torch.cuda._sleep(50_000_000)  # all copies are queued before the first kernel runs
    for chunk in chunks:
        output, content = to(gpu, chunk.cache), bytearray(chunk.payload)
        for plane in output.planes:
            plane.fill_(torch.nan)
        tables = chunk.load_tables(on_gpu)
        finish = on_gpu.start_decode(memoryview(content), chunk.streams, chunk.scales, chunk.layouts, tables, output)
        content[:] = bytes(len(content))
        started.append((chunk, output, finish))
    for chunk, output, finish in started:
        finish()
        assert are_equal(to(torch.device("cpu"), output), chunk.decode(cpu))


def test_the_module_allocates_nothing(kernels, gpu: torch.device) -> None:
    check_shape(kernels, MISTRAL, torch.float16, Coder.RANS)  # warm: code, and blocks of torch's allocator
    torch.cuda.synchronize(gpu)
    free, reserved = torch.cuda.mem_get_info(gpu)[0], torch.cuda.memory_reserved(gpu)
    for _ in range(5):
        check_shape(kernels, MISTRAL, torch.float16, Coder.RANS)
    torch.cuda.synchronize(gpu)
    assert torch.cuda.memory_reserved(gpu) == reserved
    assert torch.cuda.mem_get_info(gpu)[0] == free


@pytest.mark.parametrize("encoder", ["cpu", "cuda"])
@pytest.mark.parametrize("decoder", ["cpu", "cuda"])
def test_folders_of_either_device_decode_on_the_other(
    tmp_path: Path, config_path: Path, on_gpu: CudaKernels, gpu: torch.device, encoder: str, decoder: str
) -> None:
    both = {"cpu": cpu, "cuda": on_gpu}
    cache, metadata = make_shaped_cache([(2, 16)] * 4, 100, torch.bfloat16), make_metadata(100)
    config = load_config(config_path)
    encode_document(
        AbsmaxEncoder(cache, metadata, config, (60, 40), config.coder, kernels=both[encoder]), tmp_path / "encoded"
    )
    folder = EncodedFolder(tmp_path / "encoded", 1, both[decoder])
    num_bins = [group.num_bins for group in config.groups_of_planes(cache.num_layers)]
    for device in (gpu, torch.device("cpu")):
        output = from_planes([torch.full_like(plane, torch.nan, device=device) for plane in cache.planes])
        folder.decode_into(output, metadata.token_ids, folder.select_chunks(None))
        assert are_equal(to(torch.device("cpu"), output), quantize_and_dequantize(cache, make_config(num_bins)))
