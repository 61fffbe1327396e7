"""Where to compute and in what precision: the values of --device and --dtype."""

from __future__ import annotations

from typing import Literal

import torch

from cachegen.errors import BackendUnavailableError, ConfigError

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
        raise ConfigError(f"--device must be one of {', '.join(DEVICE_NAMES)}, got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.version.cuda is None:
        remedy = "this torch is built without CUDA: install a CUDA build (see pytorch.org)"
    else:
        remedy = "torch sees no GPU: check nvidia-smi and the driver"
    raise BackendUnavailableError(f"--device cuda: {remedy}, or use --device cpu")


def resolve_dtype(name: str) -> torch.dtype | Literal["auto"]:
    """Return the dtype that `name` asks for; "auto" stands for the checkpoint's own and is returned as it is.

    Raises:
        ConfigError: there is no such name.
    """
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPE_NAMES)}, got {name!r}")
    return DTYPES[name]


def resolve_coder_device(name: str) -> torch.device:
    """Return the device whose kernels encode: today always the CPU's.

    Raises:
        BackendUnavailableError: CUDA is asked for by name.
        ConfigError: there is no such name.
    """
    if name == "cuda" and resolve_device(name).type == "cuda":
        raise BackendUnavailableError("--device cuda: this release has no CUDA coder yet, use --device cpu")
    return torch.device("cpu") if name in DEVICE_NAMES else resolve_device(name)
