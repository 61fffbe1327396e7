"""Sweeps: every combination once, the same bytes whatever happened on the way, again when what is read has changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cachegen.errors import ConfigError, InputError
from cachegen.sweeps.executors import run_all
from cachegen.sweeps.grid import MAX_RUNS, read_grid
from cachegen.sweeps.sweep import Sweep
from scripts import sweep as script
from tests.fixtures import REPOSITORY, read_folder
from tests.fixtures.caches import save_cache

GRID = """
encode:
  path_to_kv: [a.pkl, b.pkl]
  quantization_config: [coarse.json, fine.json]
  chunk_size: 16
exclude:
  - {path_to_kv: b.pkl, quantization_config: fine.json}
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with two KV files, two configs and a grid."""
    torch.set_num_threads(1)
    for seed, name in enumerate(("a.pkl", "b.pkl")):
        save_cache(tmp_path / name, seed=seed)
    for name, bits in (("coarse.json", 4), ("fine.json", 8)):
        (tmp_path / name).write_text(json.dumps({"method": "uniform", "bits": bits}))
    (tmp_path / "grid.yml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_grid(folder: Path, text: str) -> Path:
    path = folder / "grid.yml"
    path.write_text(text)
    return path


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_order_but_for_what_is_excluded(place):
    grid = read_grid(place / "grid.yml")
    names = ("path_to_kv", "quantization_config")
    combinations = [("a.pkl", "coarse.json"), ("a.pkl", "fine.json"), ("b.pkl", "coarse.json")]
    assert [tuple(run.encode[name] for name in names) for run in grid.runs] == combinations
    assert all(run.encode["chunk_size"] == 16 for run in grid.runs)
    assert grid.varying == tuple(f"encode.{name}" for name in names)
    assert not any(run.is_decoded for run in grid.runs)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "is no YAML"),
        ("!!python/object/apply:os.system [ls]", "is no YAML"),
        ("a", "must have some of prefill, encode, decode"),
        ("encoding: {}", "`encoding` is none of"),
        ("encode: {chunk_size: 5}", "give `path_to_context` of `prefill`, or `path_to_kv`"),
        ("{prefill: {path_to_context: a}, encode: {path_to_kv: b}}", "not both"),
        ("encode: {path_to_kv: a, --chunk_size: 5}", "'--chunk_size' is no flag"),
        ("encode: {path_to_kv: a, output_path: b}", "'output_path' is no flag that a sweep can set"),
        ("encode: {path_to_kv: []}", "`path_to_kv` must be a text"),
        ("encode: {path_to_kv: {a: b}}", "`path_to_kv` must be a text"),
        ("encode: {path_to_kv: [a, a]}", "a value twice"),
        ("encode: [a]", "`encode` must have flags"),
        ("{encode: {path_to_kv: a}, exclude: [{path_to_kv: b}]}", "'b' is in no run"),
        ("{encode: {path_to_kv: a}, exclude: [{path_to_kv: a}]}", "leaves nothing to run"),
        (f"encode: {{path_to_kv: a, chunk_size: {list(range(MAX_RUNS + 1))}}}", f"more than {MAX_RUNS}"),
    ],
)
def test_a_wrong_grid_is_refused_with_its_name(tmp_path, text, reason):
    path = write_grid(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_grid(path)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_grid_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such sweep file"):
        read_grid(tmp_path / "grid.yml")


# --- runs -------------------------------------------------------------------------------------------------------------


def sweep_in(folder: Path, output: str, *flags: str) -> int:
    return script.main([str(folder / "grid.yml"), "--output_path", output, "--quiet", *flags])


def deterministic(folder: Path) -> dict[str, bytes]:
    """What must be the same, however it came about."""
    return {name: content for name, content in read_folder(folder).items() if "times" not in name}


def test_shards_workers_and_a_killed_process_write_the_same_bytes(place, capsys):
    assert sweep_in(place, "one") == 0
    expected = deterministic(place / "one")
    lines = [json.loads(line) for line in expected["results.jsonl"].splitlines()]
    assert [line["flags"]["encode.path_to_kv"] for line in lines] == ["a.pkl", "a.pkl", "b.pkl"]
    assert all(line["encode"]["bits_per_value"] > 0 and "seconds" not in line["encode"] for line in lines)
    for index in (1, 0):
        assert sweep_in(place, "shards", "--shard", f"{index}/2", "--workers", "2") == 0
        assert (place / "shards" / "results.jsonl").exists() == (index == 0)
    assert deterministic(place / "shards") == expected
    command = [sys.executable, str(REPOSITORY / "scripts/sweep.py"), "grid.yml", "--output_path", "killed", "--quiet"]
    process = subprocess.Popen(command, cwd=place, start_new_session=True)
    while process.poll() is None and not list(place.glob("killed/runs/*.json")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert sweep_in(place, "killed") == 0
    assert deterministic(place / "killed") == expected
    assert capsys.readouterr().err == ""


def test_what_has_changed_is_run_again_and_nothing_else(place):
    assert sweep_in(place, "out") == 0
    first = {path.name: path.stat().st_mtime_ns for path in place.glob("out/runs/*.json")}
    assert sweep_in(place, "out") == 0
    assert first == {path.name: path.stat().st_mtime_ns for path in place.glob("out/runs/*.json")}
    (place / "fine.json").write_text(json.dumps({"method": "uniform", "bits": 7}))
    save_cache(place / "b.pkl", seed=5)
    next(iter(sorted(place.glob("out/runs/*.json")))).write_text("{")
    grid = read_grid(place / "grid.yml")
    missing = Sweep(grid, REPOSITORY, place, "out").find_missing()
    changed = {
        i for i, run in enumerate(grid.runs) if "b.pkl" in run.flags.values() or "fine.json" in run.flags.values()
    }
    assert changed <= set(missing) and len(missing) <= len(changed) + 1
    assert sweep_in(place, "out") == 0
    assert len((place / "out" / "results.jsonl").read_bytes().splitlines()) == 3


def test_a_run_that_fails_is_named_and_tried_again(place, capsys):
    good = (place / "b.pkl").read_bytes()
    (place / "coarse.json").write_text('{"method": "uniform", "bits": 99}')
    assert sweep_in(place, "out", "--json", str(place / "said.json")) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: 2 of 3 runs failed") and "run_encoding.py: " in error and error.count("\n") == 1
    said = json.loads((place / "said.json").read_text())
    assert said["num_missing"] == 2 and len(said["errors"]) == 2
    assert not (place / "out" / "results.jsonl").exists()
    (place / "coarse.json").write_text('{"method": "uniform", "bits": 5}')
    assert sweep_in(place, "out") == 0
    assert (place / "b.pkl").read_bytes() == good


def test_a_decoded_sweep_says_what_is_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "0.txt").write_text("The river ran low that summer. " * 12)
    grid = write_grid(
        tmp_path,
        f"""
prefill: {{model_id: models/tiny-mistral, path_to_context: {tmp_path}/0.txt}}
encode: {{quantization_config: [config/quantization_tiny.json, config/lossless.json]}}
decode: {{verify: true, max_new_tokens: 2}}
""",
    )
    assert script.main([str(grid), "--output_path", str(tmp_path / "out"), "--quiet", "--keep_files"]) == 0
    coarse, exact = map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines())
    assert coarse["decode"]["kl"] > exact["decode"]["kl"] and exact["decode"]["bit_exact"]
    assert len(list((tmp_path / "out/kv").iterdir())) == 1 and len(list((tmp_path / "out/files").iterdir())) == 2
    assert (tmp_path / "out/table.md").read_text().startswith("| quantization_config | bits per value |")


def test_tasks_are_done_once_each():
    assert sorted(run_all(lambda number: number * number, range(20), num_workers=3)) == [n * n for n in range(20)]
