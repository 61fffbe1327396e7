"""A script that is interrupted while it imports ends in one line; torch's threads sleep while they wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cachegen import startup
from tests.fixtures import REPOSITORY, SCRIPTS


@pytest.fixture(autouse=True)
def wait_policy(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Begin without a policy, and end with the one before."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "to be restored")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    return monkeypatch


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupt_while_torch_is_imported_is_one_line_and_exit_code_130(script, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY / 'src'}"}
    command = [sys.executable, str(REPOSITORY / script), "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")


def test_only_a_script_is_guarded_and_only_for_so_long():
    handler = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        startup.guard_imports("main")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        startup.guard_imports("__main__")
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        startup.end_guard()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        startup.guard_imports("__main__")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads_sleep_while_they_wait_from_when_torch_is_imported(script, tmp_path):
    (tmp_path / "torch.py").write_text("import os\nprint(os.environ.get('OMP_WAIT_POLICY'), flush=True)\nos._exit(0)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY / 'src'}"}
    command = [sys.executable, str(REPOSITORY / script), "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert result.stdout == "PASSIVE\n"


@pytest.mark.parametrize(("module_name", "before", "after"), [("__main__", "ACTIVE", "ACTIVE"), ("main", None, None)])
def test_the_users_policy_stays_and_so_does_an_importers(wait_policy, module_name, before, after):
    if before is not None:
        wait_policy.setenv("OMP_WAIT_POLICY", before)
    handler = signal.getsignal(signal.SIGINT)
    try:
        startup.guard_imports(module_name)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert os.environ.get("OMP_WAIT_POLICY") == after
