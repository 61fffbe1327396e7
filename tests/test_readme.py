"""The README's own commands run, its links lead somewhere, and the table of exit codes is the code's."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cachegen import errors
from cachegen.command_line import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def list_documented_commands(marker: str) -> list[list[str]]:
    block = README.split(f"<!-- {marker} -->", 1)[1].split("\n\n", 2)[1]
    return [line.split()[1:] for line in block.splitlines()]


def run_command(folder: Path, command: list[str]) -> dict[str, Any]:
    """Run one documented command and return its JSON."""
    script, *flags = command
    output = folder / "out.json"
    result = subprocess.run(
        [sys.executable, ROOT / script, *flags, "--json", output],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def documented(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder in which the three commands have run, and the JSON of each."""
    folder = tmp_path_factory.mktemp("readme")
    for link in ("models", "config", "9k_prompts"):
        (folder / link).symlink_to(ROOT / link)
    commands = list_documented_commands("tested")
    assert [command[0] for command in commands] == ["main.py", "run_encoding.py", "run_decoding_disk.py"]
    return folder, {command[0]: run_command(folder, command) for command in commands}


ANSWER = json.loads((ROOT / "9k_prompts/questions.json").read_text())[0]["answer"]


def test_commands_of_the_readme_answer_the_question(documented):
    _, records = documented
    encoded, decoded = records["run_encoding.py"], records["run_decoding_disk.py"]
    assert encoded["encoded_bytes"] < 0.30 * encoded["kv_bytes"]
    assert decoded["text"].split()[0] == ANSWER == decoded["text_uncompressed"].split()[0]
    assert decoded["kl"] < 0.01


def test_transform_commands_of_the_readme_answer_the_question(documented):
    folder, records = documented
    encode, decode = list_documented_commands("tested: transform")
    encoded = run_command(folder, encode)
    assert encoded["encoded_bytes"] < 0.12 * records["run_encoding.py"]["encoded_bytes"]
    assert run_command(folder, decode)["text"].split()[0] == ANSWER


def test_streaming_commands_of_the_readme_answer_the_question(documented):
    folder, _ = documented
    encode, publish, serve, decode = list_documented_commands("tested: streaming")
    run_command(folder, encode)
    assert [level["level"] for level in run_command(folder, publish)["levels"]] == [1, 2]
    assert serve[:3] == ["-m", "http.server", "8000"] and serve[-1] == "&"
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "http.server", port, *serve[3:-1]]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_server(int(port))
            record = run_command(folder, [flag.replace("8000", port) for flag in decode])
        finally:
            server.terminate()
    assert record["text"].split()[0] == ANSWER and record["problems"] == []


def wait_for_server(port: int) -> None:
    for _ in range(500):
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("the web server does not answer")


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can name."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


def test_the_readme_is_read_in_three_minutes():
    assert len(README.splitlines()) <= 150


def test_documented_exit_codes_are_those_of_the_errors():
    text = (ROOT / "docs" / "scripts.md").read_text(encoding="utf-8")
    table = text.split("## Exit codes", 1)[1].split("\n\n", 2)[1]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert documented == {0, EXIT_INTERRUPTED} | {kind.exit_code for kind in classes}
