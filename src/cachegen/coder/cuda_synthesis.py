"""The inverse transform on a GPU but for its matrix product: checks, then addresses and sizes to `torchac_cuda`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from cachegen.coder import cpu, cuda_memory
from cachegen.coder.cuda_transfers import Transfers
from cachegen.coder.kernels import Angles
from cachegen.format import LANES, MAX_CHANNELS
from cachegen.rotation import Rotation

_MAX_TOKENS = (1 << 31) - LANES
_MAX_COMPONENTS = 1 << 30  # of a token: its digits fit an int


class CudaSynthesis:
    """See `cachegen.coder.kernels.SynthesisKernels`; all is queued on torch's current stream."""

    def __init__(
        self, module: ModuleType, device: torch.device, transfers: Callable[[torch.device], Transfers]
    ) -> None:
        """Wrap a module.

        Args:
            module: `torchac_cuda`.
            device: its type is that of all tensors.
            transfers: of a device.
        """
        self._module, self._device, self._transfers = module, device, transfers

    def split_digits(
        self, components: torch.Tensor, num_large: int, digits: torch.Tensor, beyond: torch.Tensor
    ) -> None:
        """Split components into digits, in one launch."""
        num_groups, num_tokens, count = _shape_of("components", components, torch.int32)
        if not 0 <= num_large <= count <= _MAX_COMPONENTS or num_tokens > _MAX_TOKENS:
            raise ValueError(f"`num_large` must be 0 to {count}, and sizes must fit 31 bits, got {num_large}")
        if count > 1 and components.stride(2) != 1:
            raise ValueError("`components` must have the components of a token contiguous")
        device = self._device_of(components)
        _check_dense("digits", digits, torch.bfloat16, [num_groups, num_tokens, count + num_large], device)
        _check_dense("beyond", beyond, torch.int32, [1], device)
        if not digits.numel():
            return
        with cuda_memory.on_device(device):
            self._module.split_digits(
                device=device.index or 0,
                stream=cuda_memory.stream_of(device),
                components=components.data_ptr(),
                group_stride=components.stride(0) if num_groups > 1 else 0,
                token_stride=components.stride(1) if num_tokens > 1 else 0,
                num_groups=num_groups,
                num_tokens=num_tokens,
                num_components=count,
                num_large=num_large,
                digits=digits.data_ptr(),
                beyond=beyond.data_ptr(),
            )

    def start_reading(self, beyond: torch.Tensor) -> Callable[[], bool]:
        """Queue the copy of the flag to the host."""
        device = self._device_of(beyond)
        with cuda_memory.on_device(device):
            download = self._transfers(device).start_download(beyond)
        return lambda: bool(download.finish().any())

    def place_vectors(
        self,
        product: torch.Tensor,
        means: torch.Tensor,
        step: float,
        planes: Sequence[torch.Tensor],
        rotations: Sequence[Rotation | None],
        angles: Sequence[Angles | None],
    ) -> None:
        """Turn and round vectors into their planes, in one launch per `MAX_PLACED_PLANES`."""
        num_groups, num_tokens, num_channels = _shape_of("product", product, torch.float32)
        if num_tokens > _MAX_TOKENS or len(rotations) != 2 or len(angles) != 2:
            raise ValueError(
                "`product` must have fewer tokens, and `rotations` and `angles` must be of keys and values"
            )
        device = self._device_of(product)
        _check_dense("product", product, torch.float32, [num_groups, num_tokens, num_channels], device)
        _check_dense("means", means, torch.float32, [num_groups, num_channels], device)
        if not product.numel():
            return
        _check_planes(planes, num_groups, num_tokens, num_channels, device)
        kinds = [
            self._describe_kind(plane, rotation, turned)
            for plane, rotation, turned in zip(planes[:2], rotations, angles, strict=True)
        ]
        with cuda_memory.on_device(device):
            self._module.place_vectors(
                device=device.index or 0,
                stream=cuda_memory.stream_of(device),
                dtype=int(cpu.DTYPES[planes[0].dtype]),
                product=product.data_ptr(),
                means=means.data_ptr(),
                step=step,
                num_layers=len(planes) // (2 * num_groups),
                num_tokens=num_tokens,
                keys=kinds[0],
                values=kinds[1],
                planes=[field for plane in planes for field in _record(plane)],
            )

    def _describe_kind(self, plane: torch.Tensor, rotation: Rotation | None, angles: Angles | None):
        """Return what all keys have in common, or all values, as src/csrc/cuda/launch.h has it."""
        num_tokens, num_heads, head_dim = plane.shape
        if (rotation is None) != (angles is None) or (rotation is not None and not rotation.fits(head_dim)):
            raise ValueError(f"`rotations` must fit heads of {head_dim} dims, and have angles")
        cosines = sines = num_pairs = 0
        if rotation is not None and angles is not None:
            num_pairs = len(rotation.inv_freq)
            for part in angles:
                _check_dense("angles", part, torch.float32, [num_tokens, 1, num_pairs], plane.device)
            cosines, sines = (part.data_ptr() for part in angles)
        return self._module.PlaneKind(
            num_heads=num_heads,
            head_dim=head_dim,
            offset=rotation.offset if rotation is not None else 0,
            num_pairs=num_pairs,
            is_interleaved=rotation is not None and rotation.pairing == "interleaved",
            scaling=rotation.attention_scaling if rotation is not None else 1.0,
            cosines=cosines,
            sines=sines,
        )

    def _device_of(self, values: torch.Tensor) -> torch.device:
        if values.device.type != self._device.type:
            raise ValueError(f"tensors must be on a {self._device.type} device, got {values.device}")
        return values.device


def _shape_of(name: str, values: torch.Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    if values.ndim != 3 or values.dtype != dtype:
        raise ValueError(f"`{name}` must be {dtype} of three dims, got {values.dtype} {list(values.shape)}")
    first, second, third = values.shape
    return first, second, third


def _check_dense(
    name: str, values: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    if list(values.shape) != list(shape) or values.dtype != dtype or values.device != device:
        found = f"{values.dtype} {list(values.shape)} on {values.device}"
        raise ValueError(f"`{name}` must be {dtype} {list(shape)} on {device}, got {found}")
    if not values.is_contiguous():
        raise ValueError(f"`{name}` must be contiguous")


def _check_planes(
    planes: Sequence[torch.Tensor], num_groups: int, num_tokens: int, num_channels: int, device: torch.device
) -> None:
    """Check that planes are what vectors of so many channels are placed in."""
    if not planes or len(planes) % (2 * num_groups):
        raise ValueError(f"`planes` must be keys and values of layers of {num_groups} groups, got {len(planes)}")
    dtype = planes[0].dtype
    if dtype not in cpu.DTYPES:
        raise ValueError(f"`planes` must be of {', '.join(map(str, cpu.DTYPES))}, got {dtype}")
    for index, plane in enumerate(planes):
        shape = [num_tokens, *planes[index % 2].shape[1:]]
        is_plane = plane.ndim == 3 and list(plane.shape) == shape and plane.shape[1] * plane.shape[2] <= MAX_CHANNELS
        if not is_plane or plane.dtype != dtype or plane.device != device:
            found = f"{plane.dtype} {list(plane.shape)} on {plane.device}"
            raise ValueError(f"plane {index} must be {dtype} {shape} on {device}, got {found}")
        if plane.shape[2] > 1 and plane.stride(2) != 1:
            raise ValueError(f"plane {index} must have contiguous head dims")
    num_layers = len(planes) // (2 * num_groups)
    if num_channels != num_layers * sum(plane.shape[1] * plane.shape[2] for plane in planes[:2]):
        raise ValueError(f"`planes` must have {num_channels} channels in each group")


def _record(plane: torch.Tensor) -> tuple[int, int, int]:
    """Return a plane's PlacedPlane, field by field as in src/csrc/cuda/launch.h."""
    # The stride of a dim of one may be any number.
    token_stride = plane.stride(0) if plane.shape[0] > 1 else 0
    return plane.data_ptr(), token_stride, plane.stride(1) if plane.shape[1] > 1 else 0
