"""The example deployment, as processes: two servers of vLLM with one store, asked over HTTP."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.fixtures import BUNDLED_MODEL, REPOSITORY
from tests.fixtures.engines import SETTINGS

pytestmark = [pytest.mark.doors, pytest.mark.filterwarnings("default")]

EXAMPLE = REPOSITORY / "examples/serving"
ENGINE = ["--enforce-eager", "--max-model-len", "4096", "--no-enable-prefix-caching", "--dtype", "bfloat16"]
START_SECONDS = 300


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_the_second_engine_loads_what_the_first_has_computed(tmp_path):
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        for port in ports:
            command = [sys.executable, str(EXAMPLE / "serve.py"), str(BUNDLED_MODEL), "--port", str(port)]
            log = stack.enter_context((tmp_path / f"{port}.log").open("w"))
            server = subprocess.Popen(
                [*command, "--store", str(tmp_path / "store"), *ENGINE],
                env={**os.environ, **SETTINGS},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            stack.callback(server.wait, 60)
            stack.callback(server.terminate)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        asked = subprocess.run(
            [sys.executable, str(EXAMPLE / "ask_both.py"), *urls, "--wait_seconds", str(START_SECONDS)],
            capture_output=True,
            text=True,
            timeout=3 * START_SECONDS,
        )
        logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert asked.returncode == 0, f"{asked.stdout}\n{asked.stderr}\n{logs}"
    numbers = [re.findall(r"(\d+) (?:tokens in|loaded|computed)", line) for line in asked.stdout.splitlines()]
    first, second = (list(map(int, found)) for found in numbers)
    assert first[1] == 0 and first[2] == first[0]
    assert second == [first[0], first[0] // 256 * 256, first[0] % 256]
