"""scripts/ablation_*.py: their bits and KL beside those of real files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import main as main_script
import run_encoding
from cachegen.calibration.calibrate import open_contexts, split_contexts
from cachegen.calibration.curve import measure_document
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.model import load_model

ROOT = Path(__file__).resolve().parents[1]
MODEL, PROFILE = ROOT / "models/tiny-mistral", ROOT / "models/tiny-mistral/profile"

pytestmark = pytest.mark.usefixtures("one_thread")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    for number in range(2):
        text = (ROOT / f"9k_prompts/calibration/{number}.txt").read_text()[:2500]
        (folder / f"{number}.txt").write_text(text)
    flags = ["--model_id", str(MODEL), "--path_to_context", str(folder), "--save_dir", str(folder), "--quiet"]
    assert main_script.main(flags) == 0
    return folder


def test_ideal_bits_and_kl_are_near_those_of_files(caches, tmp_path) -> None:
    flags = ["--path_to_kv", str(caches), "--step_logs", "8", "--quiet", "--json", str(tmp_path / "x.json")]
    assert load_script("ablation_coding").main(flags) == 0
    rows = {row["part"]: row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    profile = load_profile(PROFILE, for_encoding=True)
    (context,) = split_contexts(open_contexts(caches))[1]
    loaded = load_model(str(MODEL), device=torch.device("cpu"), dtype=torch.float32)
    num_bytes, kl = measure_document(loaded, profile, context, 8, num_threads=1)
    file_bits = 8 * num_bytes / context.cache.num_values
    assert 0.9 * file_bits < rows["integer tables of the format"]["bits"] < file_bits
    assert rows["no token kept exact"]["kl"] == pytest.approx(kl, rel=0.1)
    assert rows["first 4 and last 128 exact"]["kl"] < rows["rounding"]["kl"] < rows["no token kept exact"]["kl"]
    assert rows["rate-distortion optimized"]["bits"] < rows["rounding"]["bits"] == rows["logistic"]["bits"]
    assert rows["each component's own counts"]["bits"] < rows["counts of a scale index"]["bits"]


def test_each_source_of_predictions_of_method_lossless_has_a_row(caches, tmp_path) -> None:
    flags = ["--path_to_kv", str(caches / "test_kv_0.pkl"), "--quiet", "--json", str(tmp_path / "x.json")]
    assert load_script("ablation_lossless").main(flags) == 0
    rows = {row["part"]: row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    config = str(ROOT / "config/lossless.json")
    argv = ["--path_to_kv", str(caches / "test_kv_0.pkl"), "--quantization_config", config, "--num_chunks", "1"]
    encoded = ["--output_path", str(tmp_path / "out"), "--quiet", "--json", str(tmp_path / "out.json")]
    assert run_encoding.main([*argv, *encoded]) == 0
    bits = json.loads((tmp_path / "out.json").read_text())["bits_per_value"]
    assert rows["and 3 layers before"]["bits_per_value"] == pytest.approx(bits, rel=1e-6)
    assert rows["the layer's own channels"]["bits_per_value"] < rows["no prediction"]["bits_per_value"]
    assert rows["no prediction"]["weights_bits_per_value"] < rows["and 3 layers before"]["weights_bits_per_value"]


def test_wider_groups_of_an_own_profile_take_fewer_bits_and_a_larger_profile(caches, tmp_path) -> None:
    flags = ["--path_to_kv", str(caches / "test_kv_0.pkl"), "--layers", "1", "2", "--step_logs", "8", "--quiet"]
    assert load_script("ablation_own_profile").main([*flags, "--json", str(tmp_path / "x.json")]) == 0
    one, two = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert one["layers"] == 1 and 0 < one["profile_bits_per_value"] < two["profile_bits_per_value"]
    alone, together = (row["bits_per_value"] - row["profile_bits_per_value"] for row in (one, two))
    assert together < alone and 0 < one["kl"] < 1
