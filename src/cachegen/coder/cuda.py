"""The coder's CUDA kernels: checks and workspaces first, then addresses and sizes to `torchac_cuda`.

`CudaKernels` has the functions of `cachegen.coder.cpu`, with the same results: bytes do not depend on the device. The
kernels run on torch's current stream, in memory of torch's allocator; the native module allocates nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.coder import cpu, cuda_memory
from cachegen.coder.cuda_components import ComponentKernels
from cachegen.coder.cuda_memory import Tables
from cachegen.coder.cuda_transfers import Download
from cachegen.errors import BackendUnavailableError, NotFiniteError
from cachegen.format import (
    LANES,
    MAX_CHANNELS,
    MAX_LOW_BITS,
    TABLE_SIZE,
    Coder,
    PlaneLayout,
    StreamEntry,
    check_num_bins,
    round_up,
)
from cachegen.kv_cache import KVCache

BUILD_COMMAND = "`pip install .`, or in a clone `python setup.py build_ext --inplace`, with nvcc 12 or newer on PATH"

_MAX_STREAM_BYTES = 1 << 32  # the index has 32 bits for a stream's length
_MEASURED_BYTES = 64 << 20  # of a plane that are on the GPU at a time while a cache on the CPU is measured
_NO_BAD_TOKEN = -1  # 0xFFFFFFFF


def load_module() -> ModuleType:
    """Import `torchac_cuda`.

    Raises:
        BackendUnavailableError: it is not built.
    """
    try:
        return importlib.import_module("torchac_cuda")
    except ImportError as error:
        raise BackendUnavailableError(
            f"the CUDA module torchac_cuda cannot be imported ({error}): build it with {BUILD_COMMAND}"
        ) from error


def load_kernels(device: torch.device) -> CudaKernels:
    """Return the kernels for a GPU.

    Raises:
        BackendUnavailableError: the module is not built, or cannot run on that GPU.
    """
    module = load_module()
    problem = module.find_problem(device.index or 0)
    if problem is not None:
        raise BackendUnavailableError(f"torchac_cuda cannot use {device}: {problem}")
    return CudaKernels(module, device)


class CudaKernels(ComponentKernels):
    """The coder on a GPU: what the codec takes as `kernels`.

    Arguments and results are those of the functions of `cachegen.coder.cpu`, and for components of
    `cachegen.coder.components`, except where said. `num_threads` is for what stays on the CPU.
    """

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        """Wrap a module; `load_kernels` is the way to it.

        Args:
            module: `torchac_cuda`.
            device: where planes that are on the CPU are brought for encoding.
        """
        super().__init__(module, device)

    def load_tables(
        self, content: bytes, planes: Sequence[PlaneLayout], plane_table_bytes: Sequence[int], num_threads: int = 1
    ) -> Tables:
        """Read the tables section of a tables file; see `cpu.load_tables`."""
        return Tables(cpu.load_tables(content, planes, plane_table_bytes, num_threads))

    def pack_tables(
        self, counts: NDArray[np.uint32], planes: Sequence[PlaneLayout], num_threads: int = 1
    ) -> list[bytes]:
        """Make the tables of all planes from symbol counts; see `cpu.pack_tables`."""
        return cpu.pack_tables(counts, planes, num_threads)

    def measure(
        self, cache: KVCache, planes: Sequence[PlaneLayout], num_threads: int = 1
    ) -> tuple[torch.Tensor, NDArray[np.uint32]]:
        """Find the scales of all tokens and count the high parts of all symbols; see `cpu.measure`.

        Args:
            cache: on the GPU, or on the CPU: it is then brought over in pieces.
        """
        del num_threads
        layouts = _check(cache, planes, None, None)
        scales = torch.empty(len(planes), cache.num_tokens, dtype=cache.dtype)
        counts = []
        for index, (values, plane) in enumerate(zip(cache.planes, layouts, strict=True)):
            device = self._device if values.device.type == "cpu" else values.device
            token_bytes = plane.num_channels * values.element_size()
            step = max(LANES, _MEASURED_BYTES // token_bytes)
            plane_counts = torch.zeros(plane.num_channels, TABLE_SIZE, dtype=torch.int32, device=device)
            for start in range(0, cache.num_tokens, step):
                piece = values[start : start + step].to(device)
                found, bad_token = self._measure_piece(piece, plane, plane_counts)
                if bad_token != _NO_BAD_TOKEN:
                    raise NotFiniteError(index, start + bad_token)
                scales[index, start : start + step] = found
            counts.append(plane_counts.cpu().numpy().view(np.uint32))
        return scales, np.concatenate(counts)

    def _measure_piece(
        self, values: torch.Tensor, plane: PlaneLayout, counts: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """Measure some tokens of one plane; returns their scales and the first that is not finite."""
        device = values.device
        with cuda_memory.on_device(device):
            scales = torch.empty(1, len(values), dtype=values.dtype, device=device)
            bad_tokens = torch.full((1,), _NO_BAD_TOKEN, dtype=torch.int32, device=device)
            rows = cuda_memory.pack_records([_record(values, scales[0], plane, 0, 0, 0)], device)
            launch = self._launch(device, rows, KVCache([values], [values]), [plane], None)
            self._module.find_scales(launch, bad_tokens.data_ptr())
            self._module.count_symbols(launch, plane.num_channels, counts.data_ptr())
            return scales[0], int(bad_tokens.item())

    def encode(
        self,
        cache: KVCache,
        scales: torch.Tensor,
        planes: Sequence[PlaneLayout],
        tables: Tables | None,
        num_threads: int = 1,
        *,
        coder: Coder | None = None,
    ) -> tuple[memoryview, list[StreamEntry]]:
        """Quantize and encode the tokens of a chunk; see `cpu.encode`.

        Args:
            cache: on one GPU, or on the CPU: the chunk is then brought over.
            scales: on any device.
            coder: None: `rans` with tables, `packed` without.
        """
        is_ac = _check_coder(coder, planes, tables)
        layouts = _check(cache, planes, scales, tables)
        devices = {values.device for values in cache.planes if values.device.type != "cpu"} or {self._device}
        if len(devices) > 1:
            raise ValueError("`cache` must be on one GPU or on the CPU")
        device = devices.pop()
        num_streams, first_table, num_slot_bytes, records = 0, 0, 0, []
        with cuda_memory.on_device(device):
            device_planes = [values.to(device) for values in cache.planes]
            device_scales = scales.to(device).contiguous()
            packed = tables.on(device) if tables is not None else None
            for index, plane in enumerate(layouts):
                places = (num_streams, first_table, num_slot_bytes)
                records.append(_record(device_planes[index], device_scales[index], plane, *places))
                plane_streams = -(-cache.num_tokens // plane.tokens_per_stream)
                shape = (plane.tokens_per_stream, plane.num_channels, plane.low_bits)
                if is_ac:
                    slot_bytes = self._module.code_slot_bytes(*shape)
                else:
                    slot_bytes = self._module.slot_bytes(*shape, tables is not None)
                if slot_bytes > _MAX_STREAM_BYTES:
                    raise ValueError(f"`tokens_per_stream` of plane {index} must give streams below 4 GiB")
                num_streams += plane_streams
                first_table += plane.num_channels
                num_slot_bytes += plane_streams * slot_bytes
            streams = torch.zeros(num_streams, self._module.STREAM_FIELDS, dtype=torch.int64, device=device)
            statuses = torch.zeros(num_streams, dtype=torch.int32, device=device)
            slots = torch.empty(num_slot_bytes, dtype=torch.uint8, device=device)
            rows = cuda_memory.pack_records(records, device)
            launch = self._launch(device, rows, cache, layouts, packed)
            start_encoding = self._module.encode_codes if is_ac else self._module.encode
            start_encoding(launch, slots.data_ptr(), streams.data_ptr(), statuses.data_ptr())
            failed, status = cuda_memory.first_failure(statuses.cpu().numpy())
            if failed >= 0:
                raise cpu.encode_error(failed, status)
            payload = torch.empty(cuda_memory.place_streams(streams), dtype=torch.uint8, device=device)
            compact = self._module.compact_codes if is_ac else self._module.compact
            compact(launch, slots.data_ptr(), streams.data_ptr(), payload.data_ptr(), payload.numel())
            content = payload.cpu().numpy().data
            return content, cuda_memory.list_streams(streams, content, num_threads)

    def decode(
        self,
        payload: bytes | memoryview,
        streams: Sequence[StreamEntry],
        scales: torch.Tensor,
        planes: Sequence[PlaneLayout],
        tables: Tables | None,
        output: KVCache,
        num_threads: int = 1,
        *,
        coder: Coder | None = None,
    ) -> None:
        """Decode and dequantize the tokens of a chunk; see `cpu.decode`.

        Args:
            scales: on any device.
            output: on the GPU, or on several: each decodes its planes.
            coder: as in `encode`.
        """
        self.start_decode(payload, streams, scales, planes, tables, output, num_threads, coder=coder)()

    def start_decode(
        self,
        payload: bytes | memoryview,
        streams: Sequence[StreamEntry],
        scales: torch.Tensor,
        planes: Sequence[PlaneLayout],
        tables: Tables | None,
        output: KVCache,
        num_threads: int = 1,
        *,
        coder: Coder | None = None,
    ) -> Callable[[], None]:
        """Begin what `decode` does: queue the copy to the GPU and the kernels. The bytes may then change.

        Returns:
            A function that waits for the GPU and raises what `decode` raises of a corrupt payload. Until it has
            returned, `output` holds no usable values.
        """
        del num_threads
        is_ac = _check_coder(coder, planes, tables)
        layouts = _check(output, planes, scales, tables)
        num_streams = sum(-(-output.num_tokens // plane.tokens_per_stream) for plane in layouts)
        stream_rows = cuda_memory.describe_streams(streams, num_streams, len(payload))
        all_statuses: list[Download] = []
        for device in sorted({values.device for values in output.planes}, key=str):
            if device.type != self._device.type:
                raise ValueError(f"`output` must be on a {self._device.type} device, got {device}")
            with cuda_memory.on_device(device):
                started = self._start_decoding(device, payload, stream_rows, scales, layouts, tables, output, is_ac)
                all_statuses.append(started)

        def finish() -> None:
            for statuses in all_statuses:
                failed, status = cuda_memory.first_failure(statuses.finish())
                if failed >= 0:
                    raise cpu.decode_error(failed, status)

        return finish

    def _start_decoding(
        self,
        device: torch.device,
        payload: bytes | memoryview,
        stream_rows: NDArray[np.int64],
        scales: torch.Tensor,
        layouts: Sequence[PlaneLayout],
        tables: Tables | None,
        output: KVCache,
        is_ac: bool,
    ) -> Download:
        """Launch the decoding of the planes on one device; returns the statuses to come, zero for other planes'."""
        num_planes = sum(values.device == device for values in output.planes)
        transfers = self._transfers(device)
        scale_bytes = scales.numel() * scales.element_size() if scales.device.type == "cpu" else 0
        record_bytes = 8 * self._module.PLANE_FIELDS * num_planes
        upload = transfers.reserve([record_bytes, stream_rows.nbytes, scale_bytes, len(payload)])
        rows, streams, device_scales, content = upload.device
        if scale_bytes:
            upload.host[2][:] = scales.contiguous().view(torch.uint8).numpy().reshape(-1)
            device_scales = device_scales.view(scales.dtype).view(scales.shape)
        else:
            device_scales = scales.to(device).contiguous()
        first_stream, first_table, records = 0, 0, []
        for index, (values, plane) in enumerate(zip(output.planes, layouts, strict=True)):
            if values.device == device:
                records.append(_record(values, device_scales[index], plane, first_stream, first_table))
            first_stream += -(-output.num_tokens // plane.tokens_per_stream)
            first_table += plane.num_channels
        upload.host[0][:] = np.array(records, np.int64).reshape(-1).view(np.uint8)
        upload.host[1][:] = stream_rows.reshape(-1).view(np.uint8)
        upload.host[3][:] = np.frombuffer(payload, np.uint8)
        transfers.start(upload)
        packed = tables.on(device) if tables is not None else None
        statuses = torch.zeros(len(stream_rows), dtype=torch.int32, device=device)
        rows = rows.view(torch.int64).view(num_planes, self._module.PLANE_FIELDS)
        launch = self._launch(device, rows, output, layouts, packed)
        arguments = (content.data_ptr(), len(payload), streams.data_ptr())
        if is_ac:
            self._module.decode_codes(launch, *arguments, statuses.data_ptr())
        else:
            self._module.decode(launch, *arguments, statuses.data_ptr())
        transfers.release(upload)
        return transfers.start_download(statuses)

    def _launch(
        self,
        device: torch.device,
        records: torch.Tensor,
        cache: KVCache,
        layouts: Sequence[PlaneLayout],
        packed_tables: torch.Tensor | None,
    ):
        """Describe a launch to the module; the tensors must live until the kernels are queued."""
        return self._module.Launch(
            device=device.index or 0,
            stream=cuda_memory.stream_of(device),
            dtype=cpu.DTYPES[cache.dtype],
            planes=records.data_ptr(),
            num_planes=len(records),
            num_tokens=cache.num_tokens,
            max_streams=max(-(-cache.num_tokens // plane.tokens_per_stream) for plane in layouts),
            tables=packed_tables.data_ptr() if packed_tables is not None else 0,
        )


def _check_coder(coder: Coder | None, planes: Sequence[PlaneLayout], tables: Tables | None) -> bool:
    """Check that tables and streams go with the coder; returns whether it is `ac`."""
    if coder is not None and (coder is Coder.PACKED) != (tables is None):
        raise ValueError(f"`tables` must go with the coder, got {'none' if tables is None else 'some'} with {coder!r}")
    if coder is Coder.AC:
        cpu.check_arithmetic_planes(planes)
    return coder is Coder.AC


def _check(
    cache: KVCache, planes: Sequence[PlaneLayout], scales: torch.Tensor | None, tables: Tables | None
) -> list[PlaneLayout]:
    """Make every check that keeps the kernels inside their memory.

    Returns:
        The layouts, their streams no longer than the cache: of a measured plane, or one with longer streams, one.
    """
    if cache.num_tokens < 1 or len(planes) != len(cache.planes):
        raise ValueError(f"`planes` must describe {len(cache.planes)} planes of at least a token, got {len(planes)}")
    if scales is not None and (list(scales.shape) != [len(planes), cache.num_tokens] or scales.dtype != cache.dtype):
        raise ValueError(f"`scales` must be {cache.dtype} [{len(planes)}, {cache.num_tokens}], got {scales.shape}")
    num_tables = sum(plane.num_channels for plane in planes)
    if tables is not None and tables.num_tables != num_tables:
        raise ValueError(f"`tables` must hold {num_tables} tables, got {tables.num_tables}")
    longest, layouts = round_up(cache.num_tokens, LANES), []
    for index, (values, plane) in enumerate(zip(cache.planes, planes, strict=True)):
        shape = [cache.num_tokens, plane.num_kv_heads, plane.head_dim]
        if list(values.shape) != shape or values.stride(2) != 1 or plane.num_channels > MAX_CHANNELS:
            raise ValueError(f"plane {index} must be a tensor {shape} with contiguous head dims")
        check_num_bins(plane.num_bins)
        if not 0 <= plane.low_bits <= MAX_LOW_BITS or plane.alphabet_size > TABLE_SIZE:
            raise ValueError(f"`low_bits` of plane {index} must fit {plane.num_bins} bins, got {plane.low_bits}")
        if plane.tokens_per_stream < 0 or plane.tokens_per_stream % LANES:
            raise ValueError(f"`tokens_per_stream` must be a multiple of {LANES}, got {plane.tokens_per_stream}")
        tokens_per_stream = min(plane.tokens_per_stream or longest, longest)
        layouts.append(dataclasses.replace(plane, tokens_per_stream=tokens_per_stream))
    return layouts


def _record(
    values: torch.Tensor,
    scales: torch.Tensor,
    plane: PlaneLayout,
    first_stream: int,
    first_table: int,
    workspace: int = 0,
) -> list[int]:
    """Return one plane's PlaneRecord, field by field as in src/csrc/cuda/launch.h."""
    return [
        values.data_ptr(),
        values.stride(0),
        values.stride(1),
        plane.num_kv_heads,
        plane.head_dim,
        scales.data_ptr(),
        plane.num_bins,
        plane.low_bits,
        plane.tokens_per_stream,
        first_stream,
        first_table,
        workspace,
    ]
