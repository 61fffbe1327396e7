"""Prompts like RULER's: their length, their answers, and that the same seed gives the same bytes."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from cachegen.comparison import ruler
from cachegen.comparison.datasets import read_contexts
from cachegen.comparison.ruler import TASKS, make_records, pack_records
from cachegen.errors import ConfigError
from cachegen.pipeline.model import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("make_ruler", ROOT / "scripts/make_ruler.py")
assert _SPEC is not None and _SPEC.loader is not None
script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)


def count_words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_tokens", [700, 3000])
def test_a_prompt_is_as_long_as_is_asked_for(task, num_tokens):
    for record in make_records(task, num_tokens, 3, 0, count_words):
        assert record.length == count_words(record.input + record.answer_prefix)
        assert num_tokens - 20 < record.length <= num_tokens


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(task):
    first, again, other = (pack_records(make_records(task, 800, 2, seed, count_words)) for seed in (1, 1, 2))
    assert first == again != other
    records = [json.loads(line) for line in first.splitlines()]
    assert records[0]["input"] != records[1]["input"]


@pytest.mark.parametrize("task", TASKS)
def test_the_text_holds_all_answers_and_the_question_none(task):
    for record in make_records(task, 1500, 5, 0, count_words):
        *text, question = record.input.split("\n\n")
        for output in record.outputs:
            assert output in "".join(text)
            assert output not in question + record.answer_prefix


def test_the_needles_of_a_key_are_its_answers_and_no_others():
    for task, num_keys, num_values in (("niah_single", 1, 1), ("niah_multikey", 4, 1), ("niah_multivalue", 1, 4)):
        for record in make_records(task, 1000, 5, 0, count_words):
            needles = re.findall(r"One of the secret numbers for (\S+) is (\d{7})\.", record.input)
            (asked,) = set(re.findall(r"for (\w+-\w+) in the text", record.input + record.answer_prefix))
            assert len({key for key, _ in needles}) == num_keys and len(needles) == num_keys * num_values
            assert {value for key, value in needles if key == asked} == set(record.outputs)


def test_the_variables_of_a_value_are_those_that_the_assignments_give_it():
    for record in make_records("vt", 1000, 5, 0, count_words):
        value_of: dict[str, str] = {}
        for target, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", record.input):
            value_of[target] = value_of.get(source, source)
        (asked,) = re.findall(r"variables have the value (\d+)", record.input)
        assert [name for name, value in value_of.items() if value == asked] == list(record.outputs)
        assert len(record.outputs) == 5 and len(value_of) == 10 and len(set(value_of.values())) == 2


def test_the_common_words_are_the_most_frequent_ones():
    for record in make_records("cwe", 1500, 3, 0, count_words):
        counts = Counter(re.findall(r"\d+\. (\w+)", record.input))
        assert {word for word, _ in counts.most_common(10)} == set(record.outputs)
        assert set(counts.values()) == {3, 30}


def test_needles_lie_at_all_depths():
    depths = []
    for record in make_records("niah_single", 1000, 50, 0, count_words):
        depths.append(record.input.index("One of the secret numbers") / len(record.input))
    assert min(depths) < 0.2 and max(depths) > 0.8


def test_too_few_tokens_are_refused():
    with pytest.raises(ConfigError, match="`num_tokens` must be at least 640 for task cwe, got 100"):
        make_records("cwe", 100, 1, 0, count_words)


def test_the_script_writes_records_that_a_study_reads(tmp_path, capsys):
    argv = ["--output_path", str(tmp_path), "--num_tokens", "500", "--num_records", "2", "--tasks", "vt", "niah_single"]
    assert script.main(argv) == 0
    assert "vt.jsonl: 2 prompts of" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(ROOT / "models/tiny-mistral"))
    for context in read_contexts(tmp_path / "vt.jsonl"):
        assert len(context.questions[0].answers) == 1 + ruler.NUM_HOPS and context.questions[0].metric == "all"
        assert 470 < len(tokenizer(context.text + context.answer_prefix).input_ids) <= 500


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--num_tokens", "20"], 2, "--num_tokens must be at least"),
        (["--tasks", "none"], 2, "--tasks"),
        (["--model_id", "./nowhere"], 3, "there is no such model folder"),
        (["--output_path", "/dev/null/x"], 7, "cannot be made"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, refuse, flags, exit_code, words):
    assert words in refuse(script.main, ["--output_path", tmp_path, *flags], exit_code)


def test_a_damaged_tokenizer_is_refused(tmp_path, refuse):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    line = refuse(script.main, ["--output_path", tmp_path / "out", "--model_id", tmp_path], 3)
    assert "its tokenizer cannot be loaded" in line
