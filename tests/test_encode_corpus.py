"""A corpus: the bytes of the scripts, each context once, again when it or its files have changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import main
import run_encoding
from cachegen.store.store import open_store
from scripts import encode_corpus
from tests.fixtures import BUNDLED_MODEL, REPOSITORY, read_folder

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = REPOSITORY / "config" / "quantization_tiny.json"
TEXTS = ("The river ran low that summer. " * 9, "And the mill stood still for most of it. " * 5)


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


def encode(texts: Path, *flags: str) -> int:
    output = ["--output_path", str(texts.parent / "out"), "--model_id", str(BUNDLED_MODEL)]
    return encode_corpus.main([str(texts), "--quantization_config", str(CONFIG), *output, "--quiet", *flags])


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("records/*.json"))}


def test_documents_are_those_of_the_scripts_and_in_the_store(texts, tmp_path, capsys):
    store = tmp_path / "store"
    assert encode(texts, "--path_to_store", str(store), "--workers", "2", "--json", "-") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["num_encoded"] == said["num_contexts"] == 2 and said["bits_per_value"] < 8
    assert len(list(open_store(str(store)).list("documents/"))) == 2
    for number in range(2):
        flags = ["--model_id", str(BUNDLED_MODEL), "--path_to_context", str(texts / f"{number}.txt"), "--quiet"]
        assert main.main([*flags, "--save_dir", str(tmp_path / "kv")]) == 0
        encoded = tmp_path / f"encoded {number}"
        flags = ["--path_to_kv", str(tmp_path / "kv" / f"test_kv_{number}.pkl"), "--quantization_config", str(CONFIG)]
        assert run_encoding.main([*flags, "--output_path", str(encoded), "--quiet"]) == 0
        assert read_folder(tmp_path / "out" / "documents" / str(number)) == read_folder(encoded)


def test_only_what_has_changed_or_is_damaged_is_encoded_again(texts):
    out = texts.parent / "out"
    assert encode(texts) == 0
    first = times(out)
    assert encode(texts) == 0 and times(out) == first
    chunk = next(out.glob("documents/0/*.cgc"))
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert encode(texts) == 0
    second = times(out)
    assert chunk.read_bytes() == whole
    assert second["0.json"] != first["0.json"] and second["1.json"] == first["1.json"]
    (texts / "1.txt").write_text(TEXTS[1] + "Still.")
    shutil.rmtree(out / "documents" / "0")
    assert encode(texts) == 0
    third = times(out)
    assert third["0.json"] != second["0.json"] and third["1.json"] != second["1.json"]


def test_a_context_that_fails_is_named_and_the_others_are_encoded(texts, capsys):
    out = texts.parent / "out"
    (out / "documents").mkdir(parents=True)
    (out / "documents" / "0").write_text("in the way")
    assert encode(texts) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: 1 of 2 contexts failed; run again to try them: ") and error.count("\n") == 1
    assert "0.txt: " in error and list(times(out)) == ["1.json"]


def test_a_folder_without_texts_is_refused(tmp_path, capsys):
    assert encode(tmp_path) != 0
    assert "no context files *.txt" in capsys.readouterr().err
