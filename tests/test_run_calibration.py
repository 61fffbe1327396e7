"""run_calibration.py: the report, the JSON, the profile, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import cachegen.calibration.calibrate as calibration
import run_calibration
from cachegen.calibration import complete, curve
from cachegen.files import lock_folder
from cachegen.kv_cache import save_kv_cache
from cachegen.methods.transform.profile_storage import load_profile
from cachegen.pipeline.model import load_model
from cachegen.pipeline.prefill import prefill_context
from tests.fixtures import BUNDLED_MODEL
from tests.fixtures.models import TINY_LLAMA, make_token_ids, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CHANNELS = 64


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny random model with the bundled one's tokenizer."""
    return save_model(TINY_LLAMA, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def kv_folder(tmp_path_factory, model_folder) -> Path:
    folder = tmp_path_factory.mktemp("kv")
    loaded = load_model(str(model_folder), device=torch.device("cpu"), dtype=torch.float32)
    for number in range(3):
        cache, metadata = prefill_context(loaded, make_token_ids(81, seed=number))
        save_kv_cache(folder / f"test_kv_{number}.pkl", cache, metadata)
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "profile"


@pytest.fixture
def argv(kv_folder, model_folder, output) -> list[str]:
    flags = {"--path_to_kv": kv_folder, "--model_id": model_folder, "--output_path": output}
    small = ["--fisher_tokens", "16", "--fisher_samples", "1", "--device", "cpu", "--threads", "1"]
    return [str(item) for pair in flags.items() for item in pair] + small


class TestResults:
    def test_a_profile_with_its_curve_is_written_and_nothing_else(self, argv, output, capsys):
        assert run_calibration.main([*argv, "--json", "-"]) == 0
        captured = capsys.readouterr()
        record = json.loads(captured.out)
        profile = load_profile(output, for_encoding=True)
        assert sorted(path.name for path in output.iterdir()) == [
            "analysis.safetensors",
            "profile.json",
            "synthesis.zlib",
        ]
        assert (record["stage"], record["profile_hash"]) == ("profile", profile.profile_hash)
        assert record["profile_bytes"] == profile.num_bytes
        assert (record["num_fitted_contexts"], record["num_held_out_contexts"]) == (2, 1)
        assert sum(group["num_channels"] for group in record["groups"]) == NUM_CHANNELS
        assert [point["step_log"] for point in record["curve"]] == curve.plan_steps(0.25)
        assert [point.step_log for point in profile.curve] == curve.plan_steps(0.25)
        assert {"seconds", "device", "config", "versions"} <= set(record)
        assert "bits per value" in captured.err and "fitted on" in captured.err
        calibration = profile.calibration
        assert calibration["num_contexts"] == 2 and len(calibration["held_out_token_hashes"]) == 1
        assert calibration["dtype"] == "float32"
        # JSON and hash hold no clock and no path of this machine: a second run gives the same.
        assert str(output.parent) not in (output / "profile.json").read_text().replace(
            json.dumps(calibration["model_id"]), ""
        )

    def test_two_runs_give_the_same_hash(self, argv, output, capsys):
        hashes = []
        for _ in range(2):
            assert run_calibration.main([*argv, "--no_curve", "--overwrite", "--quiet", "--json", "-"]) == 0
            hashes.append(json.loads(capsys.readouterr().out)["profile_hash"])
        assert hashes[0] == hashes[1]

    def test_without_the_curve_all_contexts_are_fitted_on(self, argv, output, capsys):
        assert run_calibration.main([*argv, "--no_curve", "--quiet"]) == 0
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", "")
        profile = load_profile(output)
        assert profile.curve == () and profile.calibration["num_contexts"] == 3

    def test_without_weights_and_curve_the_model_is_not_loaded(self, argv, output, monkeypatch):
        monkeypatch.setattr("cachegen.pipeline.model.load_model", None)
        assert run_calibration.main([*argv, "--no_curve", "--weights", "none", "--quiet"]) == 0
        assert load_profile(output).calibration["settings"]["weights"] == "none"

    def test_flags_reach_the_profile(self, argv, output):
        flags = ["--layers_per_group", "1", "--max_components", "7", "--weights", "diagonal", "--seed", "3"]
        assert run_calibration.main([*argv, "--no_curve", "--quiet", *flags]) == 0
        profile = load_profile(output)
        assert [(g.first_layer, g.num_layers, g.num_components) for g in profile.groups] == [(0, 1, 7), (1, 1, 7)]
        assert profile.calibration["settings"]["seed"] == 3


class TestInterruption:
    def test_ctrl_c_leaves_no_profile_and_the_next_run_goes_on(self, argv, output, monkeypatch, capsys):
        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(complete, "measure_curve", stop)
            assert run_calibration.main([*argv, "--quiet"]) == 130
        assert capsys.readouterr().err == "error: interrupted\n"
        assert not (output / "profile.json").exists()
        calls = []
        original = calibration.accumulate_fisher
        monkeypatch.setattr(calibration, "accumulate_fisher", lambda *a, **k: calls.append(1) or original(*a, **k))
        assert run_calibration.main([*argv, "--quiet"]) == 0
        assert calls == [] and not (output / ".work").exists()

    def test_a_profile_that_is_there_is_replaced_only_when_told(self, argv, output, refuse):
        assert run_calibration.main([*argv, "--no_curve", "--quiet"]) == 0
        before = load_profile(output).profile_hash
        assert "--overwrite" in refuse(run_calibration.main, [*argv, "--no_curve", "--seed", "1"], 7)
        assert load_profile(output).profile_hash == before
        assert run_calibration.main([*argv, "--no_curve", "--quiet", "--seed", "1", "--overwrite"]) == 0
        assert load_profile(output).profile_hash != before

    @pytest.mark.parametrize("name", ["analysis.safetensors", "synthesis.zlib", "profile.json"])
    def test_a_damaged_profile_is_made_again_and_the_script_says_so(self, argv, output, capsys, name):
        assert run_calibration.main([*argv, "--no_curve", "--quiet"]) == 0
        whole = {path.name: path.read_bytes() for path in output.iterdir()}
        (output / name).write_bytes(whole[name][:-200])
        assert run_calibration.main([*argv, "--no_curve", "--quiet"]) == 0
        assert capsys.readouterr().err == f"warning: {output}: the profile there was damaged: it is made again\n"
        assert {path.name: path.read_bytes() for path in output.iterdir()} == whole

    def test_a_profile_json_of_someone_elses_is_not_taken_for_a_damaged_profile(self, argv, output, refuse):
        output.mkdir()
        (output / "profile.json").write_text('{"name": "mine"}')
        assert "--overwrite" in refuse(run_calibration.main, [*argv, "--no_curve"], 7)
        assert os.listdir(output) == ["profile.json"]

    def test_a_second_process_in_the_folder_is_refused(self, argv, output, refuse):
        output.mkdir()
        with lock_folder(output):
            line = refuse(run_calibration.main, [*argv, "--no_curve"], 7)
        assert "another process is writing into this folder" in line
        assert os.listdir(output) == []


class TestRefusals:
    def test_no_kv_files(self, argv, tmp_path, refuse):
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "no KV cache files" in refuse(run_calibration.main, [*argv, "--path_to_kv", empty], 3)
        assert "no such KV cache file" in refuse(run_calibration.main, [*argv, "--path_to_kv", tmp_path / "none"], 3)

    def test_kv_files_of_another_model(self, argv, refuse):
        assert "--model_id" in refuse(run_calibration.main, [*argv, "--model_id", BUNDLED_MODEL], 5)
        flags = ["--model_id", BUNDLED_MODEL, "--no_curve", "--weights", "none"]
        assert "--model_id" in refuse(run_calibration.main, [*argv, *flags], 5)

    def test_no_such_model(self, argv, tmp_path, refuse):
        assert "no such model" in refuse(run_calibration.main, [*argv, "--model_id", tmp_path / "nothing"], 3)

    def test_a_corrupt_kv_file_and_the_same_context_twice(self, argv, kv_folder, tmp_path, refuse):
        folder = tmp_path / "kv"
        shutil.copytree(kv_folder, folder)
        shutil.copy(folder / "test_kv_0.pkl", folder / "test_kv_9.pkl")
        assert "same context" in refuse(run_calibration.main, [*argv, "--path_to_kv", folder], 5)
        (folder / "test_kv_9.pkl").write_bytes(b"PK but no KV file")
        assert "test_kv_9.pkl" in refuse(run_calibration.main, [*argv, "--path_to_kv", folder], 4)

    def test_too_few_tokens_or_files(self, argv, kv_folder, tmp_path, model_folder, refuse):
        one = kv_folder / "test_kv_0.pkl"
        assert "--no_curve" in refuse(run_calibration.main, [*argv, "--path_to_kv", one], 3)
        loaded = load_model(str(model_folder), device=torch.device("cpu"), dtype=torch.float32)
        save_kv_cache(tmp_path / "test_kv_0.pkl", *prefill_context(loaded, make_token_ids(41)))
        flags = ["--path_to_kv", tmp_path / "test_kv_0.pkl", "--no_curve", "--layers_per_group", "2"]
        assert "fewer than the 64 channels" in refuse(run_calibration.main, [*argv, *flags], 3)

    def test_an_output_that_is_a_file(self, argv, tmp_path, refuse):
        (tmp_path / "file").write_text("")
        assert "--output_path" in refuse(run_calibration.main, [*argv, "--output_path", tmp_path / "file"], 7)

    @pytest.mark.parametrize(
        "flags",
        [["--weights", "some"], ["--finest_step", "0"], ["--fisher_tokens", "0"], ["--layers_per_group", "-1"]],
    )
    def test_wrong_flags(self, argv, refuse, flags):
        assert flags[0] in refuse(run_calibration.main, [*argv, *flags], 2)
