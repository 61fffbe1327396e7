"""--device and --dtype: what each value stands for, and what is refused."""

from __future__ import annotations

import pytest
import torch

from cachegen.device import resolve_device, resolve_dtype
from cachegen.errors import BackendUnavailableError, ConfigError


def test_cpu_is_the_cpu():
    assert resolve_device("cpu") == torch.device("cpu")


def test_auto_is_the_cpu_where_torch_has_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


def test_cuda_by_name_without_cuda_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match=r"`device` cuda: .*`device` cpu"):
        resolve_device("cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_auto_and_cuda_are_the_current_gpu(name):
    assert resolve_device(name) == torch.device("cuda", torch.cuda.current_device())


def test_dtypes_go_by_their_torch_names_and_auto_stays_open():
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_dtype("float16") is torch.float16
    assert resolve_dtype("float32") is torch.float32
    assert resolve_dtype("auto") == "auto"


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="`device`"):
        resolve_device("tpu")
    with pytest.raises(ConfigError, match="`dtype`"):
        resolve_dtype("int8")
