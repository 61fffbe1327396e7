"""The README's own commands run, and its table of exit codes is the code's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from cachegen import errors
from cachegen.command_line import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def list_documented_commands() -> list[list[str]]:
    block = README.split("<!-- tested -->", 1)[1].split("\n\n", 2)[1]
    return [line.split()[1:] for line in block.splitlines()]


def test_commands_of_the_readme_answer_the_question(tmp_path):
    commands = list_documented_commands()
    assert [command[0] for command in commands] == ["main.py", "run_encoding.py", "run_decoding_disk.py"]
    for link in ("models", "config", "9k_prompts"):
        (tmp_path / link).symlink_to(ROOT / link)
    for command in commands:
        script, *flags = command
        result = subprocess.run(
            [sys.executable, ROOT / script, *flags, "--json", f"{script}.json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
    encoded = json.loads((tmp_path / "run_encoding.py.json").read_text())
    decoded = json.loads((tmp_path / "run_decoding_disk.py.json").read_text())
    answer = json.loads((ROOT / "9k_prompts/questions.json").read_text())[0]["answer"]
    assert encoded["encoded_bytes"] < 0.30 * encoded["kv_bytes"]
    assert decoded["text"].split()[0] == answer == decoded["text_uncompressed"].split()[0]
    assert decoded["kl"] < 0.01


def test_exit_codes_of_the_readme_are_those_of_the_errors():
    table = README.split("### Exit codes", 1)[1].split("\n\n", 2)[1]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert documented == {0, EXIT_INTERRUPTED} | {kind.exit_code for kind in classes}
