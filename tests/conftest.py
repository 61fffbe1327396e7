"""What pytest hands to the tests of several files by the name of an argument; the functions are in tests/fixtures."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.fixtures.absmax import write_config
from tests.fixtures.caches import save_cache
from tests.fixtures.emulated_kernels import emulated, kernels, module_path  # noqa: F401
from tests.fixtures.fault_documents import make_documents, start_server  # noqa: F401

# A shell starts what runs in its background with SIGINT ignored, and so would be the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def refuse(capsys) -> Callable[..., str]:
    """Run a script's main, which must fail with an exit code, one line on stderr and nothing on stdout; its line."""

    def run(main: Callable[[list[str]], int], argv: Sequence[object], exit_code: int) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == exit_code
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ") and output.err.endswith("\n") and output.err.count("\n") == 1
        return output.err

    return run


@pytest.fixture
def config_path(tmp_path) -> Path:
    """A config of 32 and 16 bins."""
    return write_config(tmp_path / "config.json")


@pytest.fixture
def kv_path(tmp_path) -> Path:
    """A KV file of 60 tokens, two layers, one head of 8 dims, fp16."""
    return save_cache(tmp_path / "kv.pkl")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: a small model's steps are short, and on a busy machine threads wait long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system; skips where that is not allowed."""
    mounted = []

    def mount(*, kilobytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a small file system cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
