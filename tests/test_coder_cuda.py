"""The CUDA kernels on a GPU. `make test-gpu` runs these, and they fail where there is no GPU or no torchac_cuda."""

from __future__ import annotations

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
    check_shape,
    encode_on_cpu,
)
from tests.cuda_component_checks import (
    COMPONENT_SHAPES,
    check_component_shape,
)
from tests.cuda_synthesis_checks import PLACE_SHAPES, check_place
from tests.fixtures.absmax import make_config, quantize_and_dequantize
from tests.fixtures.caches import are_equal, make_metadata, make_shaped_cache
from tests.prove_gpu import MISTRAL, Check, list_checks

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


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in list_checks(is_short=False)])
def test_a_gpu_does_what_the_cpu_does(on_gpu: CudaKernels, check: Check) -> None:
    check(on_gpu)


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


def test_kernels_run_on_torchs_current_stream(kernels, on_gpu: CudaKernels, gpu: torch.device) -> None:
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what is queued before must be waited for
        check_shape(kernels, SHAPES[3], torch.float16, Coder.RANS)
        check_component_shape(kernels, COMPONENT_SHAPES[2])
        check_place(on_gpu, PLACE_SHAPES[4], torch.float16)
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
