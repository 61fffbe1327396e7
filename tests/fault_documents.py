"""What the fault tests work on: the bundled model, a short context, and everything the scripts make of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY, read_folder
from script_processes import Outcome, ScriptServer, script_server

from cachegen.files import is_temporary

METHODS = {
    "rans": ("quantization_tiny", "rans"),
    "ac": ("quantization_tiny", "ac"),
    "packed": ("uniform_4bit", "packed"),
    "transform": ("transform_tiny_levels", "rans"),
}
CHUNK_SIZE = 100


@dataclass(frozen=True)
class Documents:
    """Made once, undisturbed; tests copy what they disturb.

    Attributes:
        folder: `0.txt`, `data/test_kv_0.pkl`, `encoded-METHOD`, `store`.
    """

    server: ScriptServer
    folder: Path

    @property
    def context(self) -> Path:
        return self.folder / "0.txt"

    @property
    def kv_path(self) -> Path:
        return self.folder / "data" / "test_kv_0.pkl"

    def prefill_flags(self, save_dir: Path) -> list[object]:
        return ["--path_to_context", self.context, "--save_dir", save_dir, "--device", "cpu"]

    def encode_flags(self, method: str, output: Path) -> list[object]:
        config, coder = METHODS[method]
        flags = ["--path_to_kv", self.kv_path, "--output_path", output, "--chunk_size", CHUNK_SIZE, "--threads", 1]
        return [*flags, "--quantization_config", REPOSITORY / "config" / f"{config}.json", "--coder", coder]

    def decode_flags(self, folder: Path) -> list[object]:
        return ["--path_to_encoded_kv", folder, "--path_to_context", self.context, "--threads", 1, "--device", "cpu"]

    def publish_flags(self, store: Path) -> list[object]:
        encoded = self.folder / "encoded-transform"
        return ["--path_to_encoded_kv", encoded, "--path_to_kv", self.kv_path, "--path_to_store", store]

    def remote_flags(self, url: object) -> list[object]:
        flags = ["--path_to_encoded_kv", url, "--path_to_context", self.context, "--threads", 1, "--device", "cpu"]
        return [*flags, "--slo", 5]

    def encoded(self, method: str) -> Path:
        return self.folder / f"encoded-{method}"


@pytest.fixture(scope="session", name="server")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptServer]:
    """A server of runs for all fault tests of this process."""
    with script_server(tmp_path_factory.mktemp("runs")) as running:
        yield running


@pytest.fixture(scope="session", name="documents")
def make_documents(tmp_path_factory: pytest.TempPathFactory, server: ScriptServer) -> Documents:
    """What undisturbed runs make."""
    made = Documents(server, tmp_path_factory.mktemp("undisturbed"))
    made.context.write_text(make_context())
    steps: list[tuple[str, Sequence[object]]] = [("main", made.prefill_flags(made.folder / "data"))]
    steps += [("run_encoding", made.encode_flags(method, made.encoded(method))) for method in METHODS]
    steps.append(("run_publishing", made.publish_flags(made.folder / "store")))
    for script, argv in steps:
        outcome = server.run(script, argv)
        assert (outcome.exit_code, outcome.err) == (0, ""), outcome
    return made


def make_context() -> str:
    """The beginning of a bundled context, with a question that the model answers the same from any good cache."""
    lines = (REPOSITORY / "9k_prompts" / "8.txt").read_text().split("\n")[:7]
    name = next(line.split(": ")[0] for line in lines if line.startswith("register "))
    return "\n".join([*lines, "The record ends.", f"What is the value of {name}?\n{name}:"])


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; temporaries of killed runs among them."""
    return read_folder(folder) if folder.is_dir() else {}


def without_temporaries(content: dict[str, bytes]) -> dict[str, bytes]:
    return {name: file for name, file in content.items() if not is_temporary(Path(name))}


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return target


def answer_of(outcome: Outcome) -> str:
    """What a run with `--json -` answered: the first word, the value that was asked for."""
    return json.loads(outcome.out)["text"].split()[0]


def is_root() -> bool:
    return os.geteuid() == 0
