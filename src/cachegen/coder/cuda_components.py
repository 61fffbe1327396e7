"""The coder of method `transform` on a GPU: checks and workspaces first, then addresses and sizes to `torchac_cuda`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.coder import cpu, cuda_memory
from cachegen.coder.component_tables import LevelCoding
from cachegen.coder.components import ComponentGroup, Components, component_tables
from cachegen.coder.cuda_synthesis import CudaSynthesis
from cachegen.coder.cuda_transfers import Transfers, operations_of
from cachegen.coder.kernels import SynthesisKernels
from cachegen.format import LANES, MAX_LOW_BITS, StreamEntry, round_up

_MAX_STREAM_SYMBOLS = (1 << 32) - 1  # an escape has 32 bits for its place
_MAX_STREAM_BYTES = (1 << 32) - 1  # the index has 32 bits for a stream's length
_MAX_TOKENS = (1 << 31) - LANES


class ComponentKernels:
    """The functions of `cachegen.coder.components` on a GPU; a part of `CudaKernels`."""

    chunks_in_flight = 1
    """How many chunks the pipeline should start to decode before it waits for the one before them: while a chunk
    decodes, the next one is checked and copied to the GPU."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        """Wrap a module.

        Args:
            module: `torchac_cuda`.
            device: where what is on the CPU is brought for encoding.
        """
        self._module, self._device = module, device
        self._transfers_of: dict[torch.device, Transfers] = {}
        self.synthesis: SynthesisKernels | None = CudaSynthesis(module, device, self._transfers)

    @property
    def device(self) -> torch.device:
        return self._device

    def components_at_a_time(self, num_threads: int) -> int:
        """See `Kernels`: a warp decodes a stream, and those of one group are too few for a GPU. They take 256 MiB."""
        del num_threads
        return 64 << 20

    def _transfers(self, device: torch.device) -> Transfers:
        if device not in self._transfers_of:
            self._transfers_of[device] = Transfers(operations_of(device))
        return self._transfers_of[device]

    @cached_property
    def _component_tables(self) -> cuda_memory.Tables:
        return cuda_memory.Tables(component_tables())

    def encode_components(
        self,
        fine: Components,
        coarse: Components | None,
        coding: LevelCoding,
        tokens_per_stream: int,
        num_threads: int = 1,
    ) -> tuple[memoryview, list[StreamEntry]]:
        """Encode the components of one group at one level; see `components.encode_components`.

        Args:
            fine: on a GPU, or on the CPU: it is then brought over.
            coarse: anywhere.
        """
        values = torch.as_tensor(fine)
        device = self._device if values.device.type == "cpu" else values.device
        with cuda_memory.on_device(device):
            values = values.to(device)
            before = torch.as_tensor(coarse).to(device) if coarse is not None else values[:, :0]
            group = _check(ComponentGroup(0, values, coding, tokens_per_stream), self._component_tables.num_tables)
            if values.shape[1] != coding.num_components:
                raise ValueError(f"`fine` must have {coding.num_components} components, got {values.shape[1]}")
            _check_tensor("coarse", before, len(values), coding.num_refined)
            if not len(values):
                return memoryview(b""), []
            num_low_bits = int(coding.low_bits.sum(dtype=np.int64))
            slot_bytes = self._module.component_slot_bytes(group.tokens_per_stream, coding.num_components, num_low_bits)
            streams = torch.zeros(group.num_streams, self._module.STREAM_FIELDS, dtype=torch.int64, device=device)
            statuses = torch.zeros(group.num_streams, dtype=torch.int32, device=device)
            slots = torch.empty(group.num_streams * slot_bytes, dtype=torch.uint8, device=device)
            records = cuda_memory.pack_records([_record(group, before, 0, 0)], device)
            component_records = torch.from_numpy(_pack_components([group])).to(device)
            launch = self._launch_components(device, records, component_records, [group])
            self._module.encode_components(launch, slots.data_ptr(), streams.data_ptr(), statuses.data_ptr())
            failed, status = cuda_memory.first_failure(statuses.cpu().numpy())
            if failed >= 0:
                raise cpu.encode_error(failed, status)
            if int(streams[:, 1].max().item()) > _MAX_STREAM_BYTES:
                raise ValueError("`tokens_per_stream` must give streams below 4 GiB")
            payload = torch.empty(cuda_memory.place_streams(streams), dtype=torch.uint8, device=device)
            self._module.compact_components(
                launch, slots.data_ptr(), streams.data_ptr(), payload.data_ptr(), payload.numel()
            )
            content = payload.cpu().numpy().data
            return content, cuda_memory.list_streams(streams, content, num_threads)

    def decode_components(
        self,
        payload: bytes | memoryview,
        streams: Sequence[StreamEntry],
        components: Components,
        coding: LevelCoding,
        tokens_per_stream: int,
        num_threads: int = 1,
    ) -> None:
        """Decode the components of one group at one level, in place; see `components.decode_components`.

        Args:
            components: on the GPU, the components of a token contiguous.
        """
        del num_threads
        group = ComponentGroup(0, components, coding, tokens_per_stream)
        failed, status = self._start_decoding_groups(payload, streams, [group])()
        if failed >= 0:
            raise cpu.decode_error(failed, status)

    def decode_component_groups(
        self,
        payload: bytes | memoryview,
        streams: Sequence[StreamEntry],
        groups: Sequence[ComponentGroup],
        num_threads: int = 1,
    ) -> None:
        """Decode the components of some groups at one level, all at once; see `components.decode_component_groups`.

        Args:
            groups: their components on one GPU, those of a token contiguous.
        """
        self.start_decode_component_groups(payload, streams, groups, num_threads)()

    def start_decode_component_groups(
        self,
        payload: bytes | memoryview,
        streams: Sequence[StreamEntry],
        groups: Sequence[ComponentGroup],
        num_threads: int = 1,
    ) -> Callable[[], None]:
        """Begin what `decode_component_groups` does: queue the copy to the GPU and the kernel.

        Returns:
            A function that waits for the GPU and raises what `decode_component_groups` raises of a corrupt payload.
            What is queued behind the kernel may read the components before, to no use if that raises.
        """
        del num_threads
        find_failure = self._start_decoding_groups(payload, streams, groups)

        def finish() -> None:
            failed, status = find_failure()
            for group in groups:
                if 0 <= failed < group.num_streams:
                    raise group.name_in(cpu.decode_error(failed, status))
                failed -= group.num_streams

        return finish

    def _start_decoding_groups(
        self, payload: bytes | memoryview, streams: Sequence[StreamEntry], groups: Sequence[ComponentGroup]
    ) -> Callable[[], tuple[int, int]]:
        """Launch; returns what waits and returns the first stream that failed and its status, or -1 and 0."""
        checked = [_check(group, self._component_tables.num_tables) for group in groups]
        num_streams = sum(group.num_streams for group in checked)
        rows = cuda_memory.describe_streams(streams, num_streams, len(payload))
        if not num_streams:
            return lambda: (-1, 0)
        tensors = [torch.as_tensor(group.components) for group in checked]
        device = tensors[0].device
        if device.type != self._device.type or any(
            tensor.device != device or len(tensor) != len(tensors[0]) for tensor in tensors
        ):
            raise ValueError(f"`components` must be on one {self._device.type} device and of equally many tokens")
        with cuda_memory.on_device(device):
            records, first_stream, first_component = [], 0, 0
            for group in checked:
                records.append(_record(group, None, first_stream, first_component))
                first_stream += group.num_streams
                first_component += group.coding.num_components
            parts = [np.array(records, np.int64), _pack_components(checked), rows, np.frombuffer(payload, np.uint8)]
            transfers = self._transfers(device)
            upload = transfers.reserve([part.nbytes for part in parts])
            for target, part in zip(upload.host, parts, strict=True):
                target[:] = part.reshape(-1).view(np.uint8)
            transfers.start(upload)
            packed, component_records, stream_records, content = upload.device
            packed = packed.view(torch.int64).view(len(records), -1)
            statuses = torch.zeros(num_streams, dtype=torch.int32, device=device)
            launch = self._launch_components(device, packed, component_records, checked)
            self._module.decode_components(
                launch, content.data_ptr(), len(payload), stream_records.data_ptr(), statuses.data_ptr()
            )
            transfers.release(upload)
            download = transfers.start_download(statuses)
        return lambda: cuda_memory.first_failure(download.finish())

    def _launch_components(
        self,
        device: torch.device,
        records: torch.Tensor,
        component_records: torch.Tensor,
        groups: Sequence[ComponentGroup],
    ):
        """Describe a launch to the module; the tensors must live until the kernels are queued."""
        tables = self._component_tables
        if tables.num_tables > self._module.MAX_COMPONENT_TABLES:
            raise ValueError(f"the kernels take at most {self._module.MAX_COMPONENT_TABLES} tables")
        return self._module.ComponentLaunch(
            device=device.index or 0,
            stream=cuda_memory.stream_of(device),
            groups=records.data_ptr(),
            num_groups=len(records),
            num_tokens=len(groups[0].components),
            max_streams=max(group.num_streams for group in groups),
            components=component_records.data_ptr(),
            tables=tables.on(device).data_ptr(),
            num_tables=tables.num_tables,
        )


def _check(group: ComponentGroup, num_tables: int) -> ComponentGroup:
    """Make every check that keeps the kernels inside their memory; returns the group, its streams no longer than it."""
    coding, components = group.coding, torch.as_tensor(group.components)
    _check_tensor("components", components, len(components), coding.num_components)
    for name, array, dtype in (
        ("table_indices", coding.table_indices, np.uint16),
        ("low_bits", coding.low_bits, np.uint8),
    ):
        if array.shape != (coding.num_components,) or array.dtype != dtype:
            raise ValueError(
                f"`{name}` must be {dtype.__name__} [{coding.num_components}], got {array.dtype} {array.shape}"
            )
    if not 0 <= coding.num_refined <= coding.num_components:
        raise ValueError(f"`num_refined` must be 0 to {coding.num_components}, got {coding.num_refined}")
    if (coding.table_indices >= num_tables).any():
        raise ValueError(f"`table_indices` must be below {num_tables}")
    if coding.low_bits[: coding.num_refined].any() or (coding.low_bits > MAX_LOW_BITS).any():
        raise ValueError(f"`low_bits` must be at most {MAX_LOW_BITS}, and 0 for refined components")
    tokens_per_stream = group.tokens_per_stream
    if tokens_per_stream < 1 or tokens_per_stream % LANES:
        raise ValueError(f"`tokens_per_stream` must be a multiple of {LANES}, got {tokens_per_stream}")
    if tokens_per_stream * max(coding.num_components, 1) > _MAX_STREAM_SYMBOLS:
        raise ValueError(f"`tokens_per_stream` must give streams of at most {_MAX_STREAM_SYMBOLS} components")
    tokens_per_stream = min(tokens_per_stream, max(round_up(len(components), LANES), LANES))
    return dataclasses.replace(group, components=components, tokens_per_stream=tokens_per_stream)


def _check_tensor(name: str, values: torch.Tensor, num_tokens: int, num_components: int) -> None:
    is_matrix = values.ndim == 2 and len(values) == num_tokens <= _MAX_TOKENS and values.shape[1] >= num_components
    if values.dtype != torch.int32 or not is_matrix or (values.shape[1] > 1 and values.stride(1) != 1):
        raise ValueError(
            f"`{name}` must be int32 [{num_tokens}, {num_components} or more], the components of a token contiguous, "
            f"got {values.dtype} {list(values.shape)}"
        )


def _record(group: ComponentGroup, coarse: torch.Tensor | None, first_stream: int, first_component: int) -> list[int]:
    """Return one group's GroupRecord, field by field as in src/csrc/cuda/launch.h."""
    components, coding = torch.as_tensor(group.components), group.coding
    return [
        components.data_ptr(),
        components.stride(0),
        coarse.data_ptr() if coarse is not None else 0,
        coarse.stride(0) if coarse is not None else 0,
        coding.num_components,
        coding.num_refined,
        int(coding.low_bits.sum(dtype=np.int64)),
        group.tokens_per_stream,
        first_stream,
        first_component,
        0,
    ]


def _pack_components(groups: Sequence[ComponentGroup]) -> NDArray[np.int64]:
    """Return the ComponentRecords of all groups' components, one after the other, as int64."""
    parts = []
    for coding in (group.coding for group in groups):
        low_bits = coding.low_bits.astype(np.int64)
        before = low_bits.cumsum() - low_bits
        parts.append(before | coding.table_indices.astype(np.int64) << 32 | low_bits << 48)
    return np.concatenate(parts)
