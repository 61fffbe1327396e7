"""main.py: contexts in, cache files out, and one line for everything that can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import main
from cachegen.kv_cache import from_planes, load_kv_cache, save_kv_cache
from cachegen.pipeline import model as model_module
from cachegen.pipeline.fingerprint import compute_fingerprint
from tests.fixtures import BUNDLED_MODEL, REPOSITORY
from tests.fixtures.models import copy_with_other_keys

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "The register harbour-lantern: 48213 is kept among the prose of this little context, word after word."


@pytest.fixture
def context(tmp_path) -> Path:
    path = tmp_path / "3.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Contexts 0, 2 and 10, and files that are none."""
    path = tmp_path / "contexts"
    path.mkdir()
    for i in (10, 2, 0):
        (path / f"{i}.txt").write_text(f"{TEXT} Number {i}.")
    for name in ("README.md", "notes.txt", "01.txt", "questions.json"):
        (path / name).write_text("not a context")
    return path


@pytest.fixture
def save_dir(tmp_path) -> Path:
    return tmp_path / "data"


def prefill(context: Path, save_dir: Path, *flags: str) -> int:
    return main.main(
        ["--model_id", BUNDLED_MODEL, "--path_to_context", str(context), "--save_dir", str(save_dir), *flags]
    )


def read_error(capsys) -> str:
    """The last line on stderr, which must be the only one that reports an error."""
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    return lines[-1]


def read_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_context_becomes_a_cache_of_all_tokens_but_the_last(context, save_dir):
    assert prefill(context, save_dir, "--block_size", "16") == 0
    cache, metadata = load_kv_cache(save_dir / "test_kv_3.pkl")
    token_ids = model_module.AutoTokenizer.from_pretrained(BUNDLED_MODEL)(TEXT)["input_ids"]
    assert metadata.token_ids.tolist() == token_ids[:-1]
    assert metadata.model_fingerprint == compute_fingerprint(BUNDLED_MODEL)
    assert (metadata.model_id, metadata.block_size) == (BUNDLED_MODEL, 16)
    assert (cache.num_layers, cache.num_tokens, cache.dtype) == (6, len(token_ids) - 1, torch.bfloat16)
    assert cache.keys[0].shape[1:] == (2, 64)
    assert [rotary.name for rotary in metadata.rotary_embeddings] == ["rotary_emb.inv_freq"]


def test_json_has_one_object_with_config_and_versions(context, save_dir, capsys):
    assert prefill(context, save_dir, "--json", "-", "--dtype", "float32", "--doc_id", "7") == 0
    output = capsys.readouterr()
    record = json.loads(output.out)
    assert list(record) == ["stage", "documents", "device", "dtype", "config", "versions"]
    assert (record["stage"], record["dtype"]) == ("prefill", "float32")
    (document,) = record["documents"]
    num_tokens, path = document["num_tokens"], Path(document["path_to_kv"])
    assert path == save_dir / "test_kv_7.pkl"
    assert document["file_bytes"] == path.stat().st_size
    assert document["kv_bytes"] == 2 * 6 * 2 * 2 * 64 * num_tokens
    assert (document["doc_id"], document["skipped"]) == (7, False)
    assert document["prefill_seconds"] > 0
    assert record["config"]["block_size"] == 512 and record["versions"]["torch"] == torch.__version__
    assert "tokens cached" in output.err


def test_a_folder_is_done_in_numeric_order_and_a_second_run_skips_it(folder, save_dir, capsys):
    assert prefill(folder, save_dir, "--json", "-", "--quiet") == 0
    first = read_json(capsys)["documents"]
    assert [document["doc_id"] for document in first] == [0, 2, 10]
    assert sorted(path.name for path in save_dir.iterdir()) == ["test_kv_0.pkl", "test_kv_10.pkl", "test_kv_2.pkl"]
    written_at = [path.stat().st_mtime_ns for path in sorted(save_dir.iterdir())]
    (save_dir / "test_kv_2.pkl").unlink()
    assert prefill(folder, save_dir, "--json", "-", "--quiet") == 0
    second = read_json(capsys)["documents"]
    assert [document["skipped"] for document in second] == [True, False, True]
    assert [document["num_tokens"] for document in second] == [document["num_tokens"] for document in first]
    now = [path.stat().st_mtime_ns for path in sorted(save_dir.iterdir())]
    assert [a == b for a, b in zip(written_at, now, strict=True)] == [True, True, False]


def test_quiet_prints_nothing(context, save_dir, capfd):
    assert prefill(context, save_dir, "--quiet") == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "reason"), [(["--dtype", "float32"], "another dtype"), (["--block_size", "9"], "another block size")]
)
def test_a_cache_made_otherwise_is_not_replaced_without_overwrite(context, save_dir, capsys, flags, reason):
    assert prefill(context, save_dir) == 0
    before = (save_dir / "test_kv_3.pkl").read_bytes()
    assert prefill(context, save_dir, *flags) == 7
    error = read_error(capsys)
    assert reason in error and "--overwrite" in error
    assert (save_dir / "test_kv_3.pkl").read_bytes() == before
    assert prefill(context, save_dir, *flags, "--overwrite") == 0
    assert (save_dir / "test_kv_3.pkl").read_bytes() != before


def test_a_cache_of_another_context_is_not_replaced_before_anything_is_computed(folder, save_dir, capsys):
    assert prefill(folder / "10.txt", save_dir) == 0
    (folder / "10.txt").write_text("Something else entirely.")
    assert prefill(folder, save_dir) == 7
    assert "test_kv_10.pkl: was made with another context" in read_error(capsys)
    assert [path.name for path in save_dir.iterdir()] == ["test_kv_10.pkl"]


def test_a_cache_of_another_form_is_not_replaced(context, save_dir, capsys):
    """As of a version of transformers that caches something else, of the same weights."""
    assert prefill(context, save_dir) == 0
    path = save_dir / "test_kv_3.pkl"
    cache, metadata = load_kv_cache(path)
    save_kv_cache(path, from_planes([plane.clone().flatten(1)[:, None] for plane in cache.planes]), metadata)
    assert prefill(context, save_dir) == 7
    assert "was made with another form of keys and values" in read_error(capsys)


def test_a_cache_of_another_model_is_not_replaced(context, save_dir, tmp_path, capsys):
    assert prefill(context, save_dir) == 0
    other = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "other"))
    (other / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes() + b"\n")
    assert prefill(context, save_dir, "--model_id", str(other)) == 7
    assert "was made with another model" in read_error(capsys)


def test_a_cache_of_other_weights_behind_the_same_config_is_not_taken_for_this_models(
    context, save_dir, tmp_path, capsys
):
    assert prefill(context, save_dir) == 0
    assert prefill(context, save_dir, "--model_id", str(copy_with_other_keys(tmp_path / "other"))) == 7
    assert "was made with another model" in read_error(capsys)


def test_a_finished_file_is_opened_once(context, save_dir, monkeypatch):
    assert prefill(context, save_dir) == 0
    opened = []
    monkeypatch.setattr(main, "load_kv_cache", lambda path: opened.append(path) or load_kv_cache(path))
    assert prefill(context, save_dir) == 0
    assert opened == [save_dir / "test_kv_3.pkl"]


def test_a_foreign_pickle_under_the_name_is_neither_run_nor_replaced(context, save_dir, capsys):
    save_dir.mkdir()

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(save_dir / "pwned"),)

    (save_dir / "test_kv_3.pkl").write_bytes(pickle.dumps(Hostile()))
    assert prefill(context, save_dir) == 7
    assert "--overwrite" in read_error(capsys)
    assert not (save_dir / "pwned").exists()
    assert prefill(context, save_dir, "--overwrite") == 0


def flip_a_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "last byte gone": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a bit of a value": lambda path: flip_a_bit(path, path.stat().st_size // 2),
    "a bit of the token ids": lambda path: flip_a_bit(path, path.read_bytes().index(b"data/0") + 70),
    "a bit of the block size": lambda path: flip_a_bit(path, path.read_bytes().index(b"block_size") + 13),
    "a bit of the first bytes": lambda path: flip_a_bit(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_written_again_and_the_script_says_so(context, save_dir, capsys, damage):
    assert prefill(context, save_dir) == 0
    path = save_dir / "test_kv_3.pkl"
    whole = path.read_bytes()
    DAMAGES[damage](path)
    assert path.read_bytes() != whole
    capsys.readouterr()
    assert prefill(context, save_dir, "--json", "-") == 0
    output = capsys.readouterr()
    (document,) = json.loads(output.out)["documents"]
    assert (document["skipped"], document["was_damaged"]) == (False, True)
    assert "was damaged: written again" in output.err
    assert path.read_bytes() == whole
    assert os.listdir(save_dir) == ["test_kv_3.pkl"]
    assert prefill(context, save_dir, "--json", "-", "--quiet") == 0
    (document,) = read_json(capsys)["documents"]
    assert (document["skipped"], document["was_damaged"]) == (True, False)


def test_a_whole_file_of_something_else_is_not_taken_for_a_damaged_one(context, save_dir, capsys):
    save_dir.mkdir()
    path = save_dir / "test_kv_3.pkl"
    torch.save({"my": torch.ones(3)}, path)
    mine = path.read_bytes()
    assert prefill(context, save_dir) == 7
    assert "--overwrite" in read_error(capsys)
    assert path.read_bytes() == mine


def test_a_cache_of_8_bit_weights_is_another_one(context, save_dir, capsys):
    assert prefill(context, save_dir) == 0
    path = save_dir / "test_kv_3.pkl"
    cache, metadata = load_kv_cache(path)
    save_kv_cache(path, cache, dataclasses.replace(metadata, weight_bits=8))
    assert prefill(context, save_dir) == 7
    assert "another precision of the weights (--load_in_8bit, --load_in_4bit)" in read_error(capsys)


@pytest.mark.parametrize("is_same", [True, False])
def test_what_another_process_has_put_there_meanwhile_stays(context, save_dir, monkeypatch, capsys, is_same):
    assert prefill(context, save_dir) == 0
    path = save_dir / "test_kv_3.pkl"
    theirs = path.read_bytes() if is_same else b"PK: something else"
    path.unlink()
    save = main.save_kv_cache

    def let_another_be_faster(*arguments, **flags):
        path.write_bytes(theirs)
        save(*arguments, **flags)

    monkeypatch.setattr(main, "save_kv_cache", let_another_be_faster)
    capsys.readouterr()
    assert prefill(context, save_dir) == (0 if is_same else 7)
    output = capsys.readouterr()
    assert ("the file is there already" in output.out) is is_same
    assert path.read_bytes() == theirs and os.listdir(save_dir) == ["test_kv_3.pkl"]


def test_a_context_may_come_from_a_pipe(tmp_path, save_dir):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(TEXT,))
    writer.start()
    assert prefill(tmp_path / "pipe", save_dir) == 0
    writer.join()
    assert load_kv_cache(save_dir / "test_kv_0.pkl")[0].num_tokens > 10


def test_a_missing_context_is_refused(tmp_path, save_dir, capsys):
    assert prefill(tmp_path / "nope.txt", save_dir) == 3
    assert "nope.txt: no such context file or folder" in read_error(capsys)
    assert not save_dir.exists()


def test_a_folder_without_contexts_is_refused(tmp_path, save_dir, capsys):
    (tmp_path / "notes.txt").write_text("not numbered")
    assert prefill(tmp_path, save_dir) == 3
    assert "no context files N.txt" in read_error(capsys)


def test_text_that_is_not_utf8_is_refused(context, save_dir, capsys):
    context.write_bytes(b"caf\xe9 au lait")
    assert prefill(context, save_dir) == 3
    assert "3.txt: is not UTF-8 text (byte 3)" in read_error(capsys)


def test_an_empty_context_is_refused(context, save_dir, capsys):
    context.write_text("")
    assert prefill(context, save_dir) == 3
    assert "3.txt: is empty" in read_error(capsys)


def test_a_context_of_one_token_is_refused(context, save_dir, monkeypatch, capsys):
    monkeypatch.setattr("cachegen.pipeline.prefill.tokenize", lambda loaded, text: torch.tensor([1]))
    assert prefill(context, save_dir) == 3
    assert "3.txt: a context needs at least two tokens, has 1" in read_error(capsys)


def test_a_context_longer_than_the_model_is_made_for_is_warned_about(context, save_dir, tmp_path, capsys):
    short = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    assert prefill(context, save_dir, "--model_id", str(short), "--quiet") == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "more than the 8 the model is made for" in warning


def test_a_model_that_is_nowhere_names_the_bundled_one(context, save_dir, monkeypatch, capsys):
    monkeypatch.setattr(model_module, "_is_hub_reachable", lambda: False)
    assert prefill(context, save_dir, "--model_id", "no-such/model") == 3
    assert "models/tiny-mistral" in read_error(capsys)


def test_cuda_without_cuda_is_refused(context, save_dir, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prefill(context, save_dir, "--device", "cuda") == 6
    assert "--device cpu" in read_error(capsys)


def test_a_save_dir_that_is_a_file_is_refused(context, capsys):
    assert prefill(context, context) == 7
    assert "cannot be made" in read_error(capsys)


@pytest.mark.parametrize("flags", [["--block_size", "0"], ["--doc_id", "-1"], ["--device", "tpu"], ["--num_gpus", "x"]])
def test_a_wrong_flag_is_refused(context, save_dir, capsys, flags):
    assert prefill(context, save_dir, *flags) == 2
    assert flags[0] in read_error(capsys)


def test_a_document_number_for_a_folder_is_refused(folder, save_dir, capsys):
    assert prefill(folder, save_dir, "--doc_id", "1") == 2
    assert "--doc_id is for a single file" in read_error(capsys)


def test_the_script_runs_from_elsewhere_without_an_installed_package_and_says_nothing_but_its_report(context, save_dir):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "main.py"), "--path_to_context", str(context)],
        capture_output=True,
        text=True,
        cwd=context.parent,
        env=environment,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "tokens cached" in result.stdout
    assert (context.parent / "data" / "test_kv_3.pkl").exists()
