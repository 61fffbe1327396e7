"""Models in a GGUF file: what is loaded, under which name and fingerprint, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

import main as main_script
import run_calibration
import run_decoding_disk
import run_encoding
from cachegen import __main__ as command
from cachegen.errors import BackendUnavailableError, ConfigError, InputError
from cachegen.kv_cache import load_kv_cache
from cachegen.methods.profile_files import PROFILE_NAME
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.fingerprint import compute_fingerprint
from cachegen.pipeline.gguf import name_gguf_model, split_gguf_name
from cachegen.pipeline.model import load_model
from cachegen.pipeline.profiles import profile_finder
from tests.fixtures import BUNDLED_MODEL
from tests.fixtures.gguf_models import write_gguf

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory) -> Path:
    """The bundled model as a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", Path(BUNDLED_MODEL))


@pytest.fixture(scope="module")
def loaded(gguf_path):
    return load_model(str(gguf_path.parent), gguf_file="tiny.gguf", device=CPU)


def refuse_model(model_id: object, error: type[Exception] = InputError, **arguments) -> str:
    with pytest.raises(error) as caught:
        load_model(str(model_id), device=CPU, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gguf_file_is_the_model_that_was_written_into_it(loaded):
    original = load_model(BUNDLED_MODEL, device=CPU)
    assert loaded.dtype == torch.bfloat16 and loaded.max_tokens == original.max_tokens
    text = "The record says that\nregister letter-pairs: is here.  And, so on."
    ids = original.tokenizer(text, add_special_tokens=False).input_ids
    assert loaded.tokenizer(text, add_special_tokens=False).input_ids == ids
    with torch.inference_mode():
        expected, found = (m.model(torch.tensor([ids])).logits for m in (original, loaded))
    assert torch.equal(expected, found)


def test_a_model_from_a_gguf_file_is_like_one_that_never_was_quantized(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_path_of_a_gguf_file_is_a_model_id(gguf_path, loaded, capfd):
    by_path = load_model(str(gguf_path), device=CPU, dtype=torch.float32)
    assert (by_path.model_id, by_path.fingerprint) == (loaded.model_id, loaded.fingerprint)
    assert by_path.dtype == torch.float32 and by_path.model_id == str(gguf_path)
    assert capfd.readouterr() == ("", "")


def test_the_fingerprint_covers_every_byte_of_a_gguf_file(gguf_path, loaded, tmp_path):
    assert compute_fingerprint(str(gguf_path)) == loaded.fingerprint
    assert loaded.fingerprint != compute_fingerprint(BUNDLED_MODEL)
    content = bytearray(gguf_path.read_bytes())
    content[-5000] ^= 1
    (tmp_path / "tiny.gguf").write_bytes(content)
    assert compute_fingerprint(str(tmp_path / "tiny.gguf")) != loaded.fingerprint


@pytest.mark.parametrize(
    ("model_id", "expected"),
    [
        ("folder/x.gguf", ("folder", "x.gguf")),
        ("x.GGUF", (".", "x.GGUF")),
        ("owner/repository/x.gguf", ("owner/repository", "x.gguf")),
        ("owner/repository/low/x.gguf", ("owner/repository", "low/x.gguf")),
        ("/a/b/c/x.gguf", ("/a/b/c", "x.gguf")),
        ("./a/b/x.gguf", ("./a/b", "x.gguf")),
        ("owner/repository", None),
    ],
)
def test_a_gguf_file_is_told_by_its_name(model_id, expected):
    assert split_gguf_name(model_id) == expected


def test_a_folder_may_end_like_a_gguf_file(tmp_path):
    folder = shutil.copytree(BUNDLED_MODEL, tmp_path / "model.gguf")
    assert split_gguf_name(str(folder)) is None
    assert compute_fingerprint(str(folder)) == compute_fingerprint(BUNDLED_MODEL)


def test_a_gguf_file_within_another_or_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="is a GGUF file itself"):
        name_gguf_model("a/x.gguf", "y.gguf")
    with pytest.raises(ConfigError, match="`gguf_file` must be the name"):
        name_gguf_model("a", "model.safetensors")


def test_8_bits_are_refused_for_a_gguf_file(gguf_path):
    assert "`load_in_8bit` is not for a GGUF file" in refuse_model(gguf_path, ConfigError, weight_bits=8)


def test_a_missing_gguf_file_is_refused(tmp_path):
    assert refuse_model(tmp_path / "x.gguf").endswith("x.gguf: no such GGUF file")
    assert "no such GGUF file" in refuse_model(tmp_path, gguf_file="x.gguf")


def test_a_missing_package_names_the_extra(gguf_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    assert "the package gguf, of the extra gguf" in refuse_model(gguf_path, BackendUnavailableError)


@pytest.mark.parametrize(
    "damage", ["other", "empty", "cut in the header", "cut in the weights", "version", "counts", "vocabulary"]
)
def test_a_damaged_gguf_file_is_refused(gguf_path, tmp_path, damage):
    content = bytearray(gguf_path.read_bytes())
    match damage:
        case "other":
            content = bytearray(b"PK\3\4" + bytes(100))
        case "empty":
            content = bytearray()
        case "cut in the header":
            content = content[:5000]
        case "cut in the weights":
            content = content[: len(content) // 2]
        case "version":
            content[4] = 99
        case "counts":
            content[8:24] = b"\xff" * 16
        case "vocabulary":
            content[content.index(b"istory")] ^= 1
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    assert refuse_model(path).startswith(f"{path}: ")


def test_a_profile_beside_a_gguf_file_is_found(gguf_path, tmp_path):
    profile = Path(BUNDLED_MODEL) / "profile"
    shutil.copytree(profile, tmp_path / "profile")
    model = shutil.copy(gguf_path, tmp_path / "tiny.gguf")
    find_profile = profile_finder(None, [model])
    assert find_profile(hashlib.sha256((profile / PROFILE_NAME).read_bytes()).digest())


def test_the_stages_take_a_gguf_file_in_either_form(gguf_path, tmp_path, capsys):
    context = tmp_path / "0.txt"
    context.write_text((ROOT / "9k_prompts/0.txt").read_text()[:1500])
    kv, encoded = tmp_path / "kv", tmp_path / "encoded"
    model = ["--model_id", str(gguf_path.parent), "--gguf_file", gguf_path.name]
    text = ["--path_to_context", str(context)]
    assert main_script.main([*model, *text, "--save_dir", str(kv)]) == 0
    assert load_kv_cache(kv / "test_kv_0.pkl")[1].model_id == str(gguf_path)
    config = ["--quantization_config", str(ROOT / "config/quantization_tiny.json")]
    assert run_encoding.main(["--path_to_kv", str(kv / "test_kv_0.pkl"), "--output_path", str(encoded), *config]) == 0
    decode = ["--path_to_encoded_kv", str(encoded), *text]
    assert run_decoding_disk.main([*decode, "--model_id", str(gguf_path), "--quiet"]) == 0
    assert run_decoding_disk.main([*decode, "--model_id", BUNDLED_MODEL]) == 5
    assert command.main(["verify", str(encoded), "--model_id", str(gguf_path)]) == 0


def test_a_profile_is_made_of_a_gguf_file(gguf_path, tmp_path):
    contexts = tmp_path / "contexts"
    contexts.mkdir()
    for number in range(2):
        (contexts / f"{number}.txt").write_text((ROOT / f"9k_prompts/{number}.txt").read_text()[:3000])
    model = ["--model_id", str(gguf_path.parent), "--gguf_file", gguf_path.name]
    kv = str(tmp_path / "kv")
    assert main_script.main([*model, "--path_to_context", str(contexts), "--save_dir", kv, "--quiet"]) == 0
    calibrate = ["--path_to_kv", kv, "--output_path", str(tmp_path / "profile"), "--no_curve", "--quiet"]
    assert run_calibration.main([*calibrate, *model, "--weights", "none"]) == 0
    assert load_profile(tmp_path / "profile").model_fingerprint == compute_fingerprint(str(gguf_path))
