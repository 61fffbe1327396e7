"""scripts/real_report.py: its texts, what it measures and puts together, resuming, and its refusals."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("real_report_script", ROOT / "scripts/real_report.py")
assert _SPEC is not None and _SPEC.loader is not None
script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)

MODEL = ["--model_id", str(ROOT / "models/tiny-mistral"), "--profile", str(ROOT / "models/tiny-mistral/profile")]
SMALL = ["--context_tokens", "300", "--answer_tokens", "300", "--num_records", "1", "--tasks", "niah_single", "--quiet"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of the names and sizes of the data sets, of this repository's text."""
    text = (ROOT / "9k_prompts/calibration/0.txt").read_text()
    for name, content in (
        (script.WIKITEXT_VALID, text),
        (script.WIKITEXT_TEST, text.replace("register", "<unk> @-@ register")),
        (script.NOVEL, text * (1 + 310_000 // len(text))),
    ):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(content)
    return tmp_path / "data"


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_everything_is_measured_put_together_and_resumed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(script, "TEXT_SCHEMES", ("uniform=8-bit", "hadamard"))
    monkeypatch.setattr(script, "ANSWER_SCHEMES", ("uniform=8-bit",))
    argv = [*MODEL, *SMALL, "--work_path", str(tmp_path / "work"), "--output_path", str(tmp_path / "out")]
    assert script.main([*argv, "--leave_out", "hadamard"]) == 0
    rows = read_rows(tmp_path / "out/results.csv")
    methods = ["uncompressed", "uniform", "uniform-rans", "uniform-profile"]
    assert [(r["protocol"], r["method"]) for r in rows] == [(p, m) for p in ("tail", "half") for m in methods]
    assert len(read_rows(tmp_path / "out/contexts.csv")) == 2 * 4 * script.NUM_OWN_TESTS
    assert {r["context"] for r in read_rows(tmp_path / "out/answers.csv")} == {"niah_single-0"}
    table = (tmp_path / "out/table.md").read_text()
    assert "Protocol `tail`" in table and "Protocol `half`" in table and "Answers to `niah_single`" in table
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    assert script.main([*argv, "--leave_out", "hadamard"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")} == before


def test_contexts_are_windows_of_the_texts_without_their_marks(data, tmp_path) -> None:
    args = [*MODEL, *SMALL, "--half_tokens", "100", "--path_to_data", str(data), "--work_path", str(tmp_path / "work")]
    parsed = script.build_parser().parse_args(args)
    script._write_texts(parsed)
    calibration = [(tmp_path / f"work/calibration/{number}.txt").read_text() for number in range(8)]
    tests = [(tmp_path / f"work/test/{number}.txt").read_text() for number in range(3)]
    assert "".join(calibration[:6]) in (data / script.WIKITEXT_VALID).read_text()[100:]
    assert not any(mark in text for text in tests for mark in ("<unk>", "@-@"))
    tokenizer = script.load_tokenizer(parsed.model_id)
    assert all(abs(len(tokenizer(text).input_ids) - 300) <= 2 for text in (*calibration, *tests))
    halves = [(tmp_path / f"work/test_half/{number}.txt").read_text() for number in range(3)]
    assert all(text.startswith(half) for text, half in zip(tests, halves, strict=True))
    assert all(abs(len(tokenizer(half).input_ids) - 100) <= 2 for half in halves)


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--path_to_data", "nowhere"], 3, "nowhere/wikitext-2"),
        (["--model_id", "nowhere"], 3, "nowhere"),
        (["--leave_out", "nothing"], 2, "no scheme nothing"),
        (["--context_tokens", "1"], 2, "--context_tokens must be larger"),
        (["--half_tokens", "1"], 2, "--half_tokens must be larger"),
        (["--context_tokens", "100000"], 3, "has too few tokens"),
        (["--work_path", "/dev/null/x"], 7, "/dev/null"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, refuse, flags, exit_code, words) -> None:
    argv = [*MODEL, *SMALL, "--work_path", tmp_path / "work", "--output_path", tmp_path / "out", *flags]
    assert words in refuse(script.main, argv, exit_code)
    assert not (tmp_path / "out").exists()


def test_a_working_folder_of_other_inputs_is_refused(tmp_path, refuse) -> None:
    argv = [*MODEL, *SMALL, "--work_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    script._write_texts(script.build_parser().parse_args(argv))
    assert "choose another --work_path" in refuse(script.main, [*argv, "--context_tokens", "200"], 5)
