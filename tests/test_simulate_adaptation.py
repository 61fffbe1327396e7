"""scripts/simulate_adaptation.py: what it writes, what it reads, and one line for everything that can be wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import run_encoding
from cachegen.errors import ConfigError, MismatchError
from cachegen.simulation import scenario
from scripts import simulate_adaptation
from tests.fixtures import REPOSITORY

QUICK = ["--seeds", "2", "--num_rates", "3", "--quiet"]
LEVELS = ("levels_small_model", "levels_pessimistic")


def run_to_json(capsys, *flags: object) -> dict:
    capsys.readouterr()
    assert simulate_adaptation.main([*QUICK, "--json", "-", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def encoding(kv_path, config_path, tmp_path) -> Path:
    """What run_encoding.py --json says of 60 tokens in chunks of 25 with an uncovered tail."""
    argv = ["--path_to_kv", kv_path, "--quantization_config", config_path, "--output_path", tmp_path / "encoded"]
    flags = ["--num_chunks", 2, "--chunk_size", 25, "--quiet", "--json", tmp_path / "encoding.json"]
    assert run_encoding.main([str(word) for word in [*argv, *flags]]) == 0
    return tmp_path / "encoding.json"


def test_every_system_is_summarized_on_every_trace(capsys, tmp_path):
    record = run_to_json(capsys, "--csv", tmp_path / "all.csv")
    systems = ["text", "8-bit", "cachegen", "ours (cachegen's files)", "ours", "clairvoyant"]
    groups = list(dict.fromkeys(row["trace"] for row in record["summaries"]))
    assert len(groups) == 9
    assert [(row["trace"], row["system"]) for row in record["summaries"]] == [(g, s) for g in groups for s in systems]
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert len(rows) == (3 + 1 + 7 * 2) * len(systems)
    zero = {row["system"]: row for row in record["summaries"] if row["trace"] == "no bandwidth"}
    assert zero["8-bit"]["ttft_mean_seconds"] is None and zero["8-bit"]["miss_share"] == 1  # never is null in JSON
    assert zero["ours"]["worst_over_text"] <= 1.02


def test_the_same_seeds_give_the_same_results(capsys):
    first, second = (run_to_json(capsys, "--traces", "markov") for _ in range(2))
    assert first["summaries"] == second["summaries"]


def test_sources_and_speeds_stand_beside_the_results(capsys):
    record = run_to_json(capsys, "--traces", "zero")
    assert record["machine"] == "mistral-7b on 1 x a40" and record["text_seconds"] == pytest.approx(1.827, abs=1e-3)
    assert "PESSIMISTIC" in record["sources"]["levels"] and "ASSUMED" in record["sources"]["machine"]


def test_the_share_of_a_gpu_slows_it(capsys):
    whole, half = (run_to_json(capsys, "--traces", "zero", "--gpu_share", share) for share in (1, 0.5))
    assert half["text_seconds"] == pytest.approx(2 * whole["text_seconds"])


def test_an_encoded_document_is_simulated_with_its_own_sizes(capsys, encoding):
    record = run_to_json(capsys, "--document", encoding, "--expected_kl", 0.002, "--traces", "constant")
    assert (record["num_tokens"], record["num_chunks"]) == (60, 3)
    assert [row["system"] for row in record["summaries"]] == ["text", "cachegen", "ours", "clairvoyant"]


def test_the_bytes_of_a_document_are_those_of_its_files(encoding):
    chunks = scenario.load_encodings([encoding], [0.002])
    total = json.loads(encoding.read_text())["encoded_bytes"]
    assert total <= sum(chunk.bytes_of(1) for chunk in chunks[:2]) <= total + 2
    assert [chunk.num_levels for chunk in chunks] == [1, 1, 0]
    assert sum(chunk.loss[0] for chunk in chunks[:2]) == pytest.approx(0.002 * 50 / 60)


def test_documents_of_one_level_are_taken_together_by_size(encoding, tmp_path):
    record = json.loads(encoding.read_text())
    for chunk in record["chunks"]:
        chunk["bytes"]["1"] *= 2
    (tmp_path / "large.json").write_text(json.dumps(record))
    chunks = scenario.load_encodings([tmp_path / "large.json", encoding], [0.001, 0.002])
    assert chunks[0].num_levels == 2 and chunks[0].file_bytes[0] < chunks[0].file_bytes[1]
    assert not chunks[0].is_embedded and chunks[0].loss[0] == pytest.approx(2 * chunks[0].loss[1])


def test_embedded_levels_are_read_file_by_file(tmp_path):
    record = {
        "levels": [{"level": 1, "expected_kl": 0.01}, {"level": 2, "expected_kl": 0.001}],
        "levels_are_embedded": True,
        "shared_bytes": 10,
        "num_uncovered_tokens": 0,
        "chunks": [{"first_token": 0, "num_tokens": 10, "bytes": {"1": 100, "2": 300}}],
    }
    (tmp_path / "d.json").write_text(json.dumps(record))
    (chunk,) = scenario.load_encodings([tmp_path / "d.json"])
    assert (chunk.file_bytes, chunk.loss, chunk.bytes_of(2)) == ((110, 300), (0.01, 0.001), 410)


def test_a_document_that_can_only_be_used_whole_is_known_as_one(encoding, tmp_path):
    record = json.loads(encoding.read_text())
    assert record["is_whole_only"] is False and not scenario.can_only_be_used_whole([encoding])
    (tmp_path / "whole.json").write_text(json.dumps({**record, "is_whole_only": True}))
    assert scenario.can_only_be_used_whole([encoding, tmp_path / "whole.json"])
    (tmp_path / "whole.json").write_text(json.dumps({**record, "is_whole_only": "yes"}))
    with pytest.raises(ConfigError, match="is_whole_only must be true or false"):
        scenario.can_only_be_used_whole([tmp_path / "whole.json"])


def test_documents_in_other_chunks_are_refused(encoding, tmp_path):
    record = json.loads(encoding.read_text())
    record["chunks"][0]["num_tokens"] = 24
    (tmp_path / "other.json").write_text(json.dumps(record))
    with pytest.raises(MismatchError):
        scenario.load_encodings([encoding, tmp_path / "other.json"], [0.1, 0.2])


@pytest.mark.parametrize("levels", LEVELS)
def test_bundled_levels_are_read_and_state_their_sources(levels):
    curves, statement = scenario.load_level_curves(REPOSITORY / "config" / "adaptation" / f"{levels}.json")
    assert set(curves) == {"ours", "cachegen", "8-bit"} and all(curve.source for curve in curves.values()) and statement


def test_bundled_speeds_are_those_of_the_design():
    path = REPOSITORY / "config" / "adaptation" / "models.json"
    expected = {("mistral-7b", "a40"): 1.83, ("mistral-7b", "h100"): 0.24, ("llama-70b", "a100"): 1.83}
    for (model, gpu), seconds in expected.items():
        prefill = scenario.load_machine(path, model, gpu).speeds.prefill
        assert prefill.seconds(0, 9500) == pytest.approx(seconds, abs=0.006)


def test_every_bundled_machine_is_read_and_states_its_source():
    path = REPOSITORY / "config" / "adaptation" / "models.json"
    models = json.loads(path.read_text())["models"]
    for model, gpu in [(model, gpu) for model, content in models.items() for gpu in content["prefill"]]:
        machine = scenario.load_machine(path, model, gpu)
        assert machine.source and machine.num_layers == models[model]["num_layers"]
        halved = scenario.load_machine(path, model, gpu, 0.5).speeds
        assert halved.prefill.seconds(0, 100) == pytest.approx(2 * machine.speeds.prefill.seconds(0, 100))
        assert halved.decode.tokens_per_second == pytest.approx(machine.speeds.decode.tokens_per_second / 2)


@pytest.mark.parametrize(
    ("flags", "exit_code", "says"),
    [
        (["--model", "gpt"], 2, "models has no gpt"),
        (["--gpu", "tpu"], 2, "models.mistral-7b.prefill has no tpu"),
        (["--gpu_share", "2"], 2, "--gpu_share"),
        (["--gbps", "3", "1"], 2, "--gbps"),
        (["--slo", "0"], 2, "--slo"),
        (["--slo", "nan"], 2, "--slo"),
        (["--target_kl", "-1"], 2, "--target_kl"),
        (["--expected_kl", "0.1"], 2, "--expected_kl goes with --document"),
        (["--traces"], 2, "--traces"),
        (["--traces", "moon"], 2, "moon"),
        (["--plot", "a.gif"], 2, ".svg"),
        (["--levels", "none.json"], 3, "none.json"),
        (["--trace", "none.jsonl"], 3, "none.jsonl"),
        (["--document", "none.json"], 3, "none.json"),
    ],
)
def test_a_wrong_flag_is_one_line(refuse, flags, exit_code, says):
    assert says in refuse(simulate_adaptation.main, [*QUICK, *flags], exit_code)


def test_a_bad_trace_is_one_line(refuse, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"seconds": 1, "gbps": "fast"}\n')
    line = refuse(simulate_adaptation.main, [*QUICK, "--traces", "zero", "--trace", tmp_path / "t.jsonl"], 3)
    assert "t.jsonl: line 1: gbps" in line


def test_a_document_without_kl_asks_for_it(refuse, encoding):
    assert "--expected_kl" in refuse(simulate_adaptation.main, [*QUICK, "--document", encoding], 2)


@pytest.mark.parametrize("field", ["levels", "levels_are_embedded", "shared_bytes", "num_uncovered_tokens"])
def test_a_record_that_lacks_a_field_is_refused(encoding, tmp_path, field):
    record = json.loads(encoding.read_text())
    del record[field]
    (tmp_path / "broken.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=field):
        scenario.load_encodings([tmp_path / "broken.json"], [0.1])


def test_a_levels_file_whose_bits_do_not_increase_is_refused(tmp_path, refuse):
    content = json.loads((REPOSITORY / "config/adaptation/levels_pessimistic.json").read_text())
    content["codecs"]["ours"]["levels"][1]["bits_per_value"] = 0.1
    (tmp_path / "levels.json").write_text(json.dumps(content))
    assert "bits_per_value" in refuse(simulate_adaptation.main, [*QUICK, "--levels", tmp_path / "levels.json"], 2)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plots_are_drawn(tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{ending}"
    assert simulate_adaptation.main([*QUICK, "--traces", "constant", "zero", "markov", "--plot", str(path)]) == 0
    assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
