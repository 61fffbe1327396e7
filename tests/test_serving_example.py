"""The example deployment's files, without Docker: docs say that nobody has run them; tests/doors runs the processes."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import yaml

from tests.fixtures import REPOSITORY

EXAMPLE = REPOSITORY / "examples/serving"


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLE / "compose.yaml").read_text("utf-8"))


def test_services_start_after_what_they_need(compose):
    services = compose["services"]
    for service in services.values():
        for name, needed in service.get("depends_on", {}).items():
            wanted = {"service_healthy": "healthcheck", "service_completed_successfully": "entrypoint"}
            assert wanted[needed["condition"]] in services[name]
    used = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert used == set(compose["volumes"])


def test_engines_share_a_store_but_no_gpu_and_no_port(compose):
    engines = [service for name, service in compose["services"].items() if name.startswith("engine")]
    stores = {service["command"][service["command"].index("--store") + 1] for service in engines}
    devices = [service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for service in engines]
    ports = [port for service in engines for port in service["ports"]]
    assert len(engines) == 2 and stores == {"s3://kv/blocks"}
    assert devices == [["0"], ["1"]] and ports == ["8001:8000", "8002:8000"]
    for service in engines:
        dockerfile = EXAMPLE / service["build"]["context"] / service["build"]["dockerfile"]
        assert "examples/serving/serve.py" in dockerfile.read_text("utf-8")


def test_its_commands_are_flags_of_the_script(compose, monkeypatch):
    spec = importlib.util.spec_from_file_location("serve", EXAMPLE / "serve.py")
    assert spec is not None and spec.loader is not None
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    started: list[list[str]] = []
    monkeypatch.setattr(serve.os, "execv", lambda program, arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["serve.py", *compose["services"]["engine-1"]["command"]])
    serve.main()
    (arguments,) = started
    assert arguments[arguments.index("--host") + 1] == "0.0.0.0"
    assert arguments[arguments.index("--port") + 1] == "8000"
    assert '"store": "s3://kv/blocks"' in arguments[arguments.index("--kv-transfer-config") + 1]
