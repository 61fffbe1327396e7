"""How a prompt is taken apart for kvpress; tests/doors has what needs the package."""

from __future__ import annotations

import json

import pytest

from cachegen.comparison.datasets import read_contexts
from cachegen.errors import InputError
from scripts import kvpress_eval
from tests.fixtures import BUNDLED_MODEL

RULER = {"input": "Grass is green.\nThe number is 7.\nWhat is the number? The number is", "outputs": ["7"]}
LONG_BENCH = {"context": "Grass is green.\n\nThe sky is not.", "input": "Is it? Say\nyes or no.", "answers": ["no"]}


def split(tmp_path, record):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record))
    (context,) = read_contexts(path)
    return kvpress_eval.split_prompt(context)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (RULER, ("Grass is green.\nThe number is 7.\n", "What is the number?", "The number is")),
        (
            {"input": "Grass.\n\nWhich? Say it.", "outputs": ["7"], "answer_prefix": "It is"},
            ("Grass.\n\n", "Which? Say it.", "It is"),
        ),
        (LONG_BENCH, ("Grass is green.\n\nThe sky is not.\n\n", "Question: Is it? Say\nyes or no.", "Answer:")),
        ({**LONG_BENCH, "input": ""}, ("Grass is green.\n\nThe sky is not.\n\n", "Summary:", "")),
    ],
)
def test_a_prompt_is_context_question_and_begin_of_the_answer(tmp_path, record, expected):
    assert split(tmp_path, record) == expected


def test_a_prompt_of_one_line_is_refused(tmp_path):
    with pytest.raises(InputError, match="records-0: the prompt's last line must be its question"):
        split(tmp_path, {"input": "What is the number? It is", "outputs": ["7"]})


def test_without_kvpress_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "kvpress", None)
    (tmp_path / "records.jsonl").write_text(json.dumps(RULER))
    flags = ["--model_id", str(BUNDLED_MODEL), "--path_to_context", str(tmp_path / "records.jsonl")]
    assert kvpress_eval.main(flags) == 6
    error = capsys.readouterr().err
    assert error.startswith("error: the package kvpress is needed") and error.count("\n") == 1
