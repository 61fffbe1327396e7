"""Where to compute, with whose kernels, and in what precision: the values of --device and --dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from cachegen.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from cachegen.coder.kernels import Kernels

DEVICE_NAMES = ("auto", "cpu", "cuda")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_NAMES = ("auto", *DTYPES)


def resolve_device(name: str) -> torch.device:
    """Return the device that `name` asks for: "cpu", "cuda", or "auto" for CUDA where torch has it.

    Raises:
        BackendUnavailableError: CUDA is asked for by name and torch has none.
        ConfigError: there is no such name.
    """
    if name not in DEVICE_NAMES:
        raise ConfigError(f"`device` must be one of {', '.join(DEVICE_NAMES)}, got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.version.cuda is None:
        remedy = "this torch is built without CUDA: install a CUDA build (see pytorch.org)"
    else:
        remedy = "torch sees no GPU: check nvidia-smi and the driver"
    raise BackendUnavailableError(f"`device` cuda: {remedy}, or use `device` cpu")


def resolve_dtype(name: str) -> torch.dtype | Literal["auto"]:
    """Return the dtype that `name` asks for; "auto" stands for the checkpoint's own and is returned as it is.

    Raises:
        ConfigError: there is no such name.
    """
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise ConfigError(f"`dtype` must be one of {', '.join(DTYPE_NAMES)}, got {name!r}")
    return DTYPES[name]


@dataclass(frozen=True)
class KernelChoice:
    """Whose kernels encode or decode.

    Attributes:
        kernels: what the codec takes as `kernels`.
        device: where they run.
        reason: why it is not CUDA where "auto" could have been; "" where nothing is to be said.
    """

    kernels: Kernels
    device: torch.device
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.device} ({self.reason})" if self.reason else str(self.device)


def choose_kernels(name: str) -> KernelChoice:
    """Return the kernels that `name` asks for: "cpu", "cuda", or "auto" for CUDA where torch and torchac_cuda have it.

    Raises:
        BackendUnavailableError: CUDA is asked for by name, and torch has none or torchac_cuda is not built.
        ConfigError: there is no such name.
    """
    # Late: --help and wrong flags should not need the native modules.
    from cachegen.coder.cpu_kernels import CPU
    from cachegen.coder.cuda import load_kernels

    device = resolve_device(name)
    if device.type == "cpu":
        return KernelChoice(CPU, device, "torch sees no GPU" if name == "auto" else "")
    try:
        return KernelChoice(load_kernels(device), device)
    except BackendUnavailableError as error:
        if name == "cuda":
            raise BackendUnavailableError(f"`device` cuda: {error}, or use `device` cpu") from error
        return KernelChoice(CPU, torch.device("cpu"), str(error))
