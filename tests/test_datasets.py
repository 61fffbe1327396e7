"""What a study reads: every kind of record, folders and texts, cutting them, the chat template, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cachegen.comparison.datasets import (
    PromptContext,
    Question,
    fit_contexts,
    read_contexts,
    tokenize_context,
)
from cachegen.comparison.scoring import METRICS
from cachegen.errors import ConfigError, InputError
from cachegen.pipeline.model import load_model
from cachegen.pipeline.prefill import tokenize

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "9k_prompts/0.txt").read_text()[:8000]

RECORDS: list[tuple[dict[str, Any], str, Question, str]] = [
    (
        {"test_id": 0, "prompt": "We talked. What was first? ", "topics": ["The art of tea", "Rain"]},
        "We talked. What was first? ",
        Question("", "The art of tea", "", ("The art of tea",), "topic"),
        "",
    ),
    (
        {"prompt": "line a: <31>. Which?", "expected_number": 31, "random_idx": ["a", 0]},
        "line a: <31>. Which?",
        Question("", "31", " ", ("31",), "number"),
        "",
    ),
    ({"prompt": "Say x.", "label": "x"}, "Say x.", Question("", "x", " ", ("x",), "contained"), ""),
    ({"prompt": "Topics?", "label": ["a", "b"]}, "Topics?", Question("", "a", " ", ("a",), "topic"), ""),
    ({"prompt": "Who?", "answers": ["I", "me"]}, "Who?", Question("", "I", " ", ("I", "me"), "f1"), ""),
    (
        {"context": "A tale.", "input": "Who?", "answers": ["I"], "all_classes": None},
        "A tale.\n\nQuestion: Who?\nAnswer:",
        Question("", "I", " ", ("I",), "f1"),
        "",
    ),
    (
        {"context": "A talk.", "input": "", "answers": ["Talk."]},
        "A talk.\n\nSummary:",
        Question("", "Talk.", " ", ("Talk.",), "f1"),
        "",
    ),
    (
        {"index": 0, "input": "The number for a is", "outputs": ["1", "2"], "length": 5},
        "The number for a is",
        Question("", "1", " ", ("1", "2"), "all"),
        "",
    ),
    (
        {"input": "Which numbers?", "outputs": ["1"], "answer_prefix": " They are"},
        "Which numbers?",
        Question("", "1", " ", ("1",), "all"),
        " They are",
    ),
]


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(ROOT / "models/tiny-mistral"), device=torch.device("cpu"))


@pytest.fixture
def chatting(loaded):
    """The bundled model with a chat template."""
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = "<s>[{{ messages[0]['content'] }}]{% if add_generation_prompt %}:{% endif %}"
    return dataclasses.replace(loaded, tokenizer=tokenizer)


def write_records(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(("record", "text", "question", "prefix"), RECORDS)
def test_a_record_is_read_by_its_fields(tmp_path, record, text, question, prefix):
    (context,) = read_contexts(write_records(tmp_path / "x.jsonl", record))
    assert context == PromptContext("x-0", text, (question,), prefix)
    assert question.metric in METRICS


def test_the_first_records_are_read_and_no_others_are_looked_at(tmp_path):
    path = write_records(tmp_path / "a.b.jsonl", {"prompt": "a", "label": "1"}, {"prompt": "b", "label": "2"})
    path.write_text(path.read_text() + "\n{damaged\n")
    assert [context.stem for context in read_contexts(path, 2)] == ["a.b-0", "a.b-1"]
    with pytest.raises(InputError, match=r"a.b.jsonl: line 4: not JSON"):
        read_contexts(path)


def test_a_folder_has_texts_and_further_questions():
    contexts = read_contexts(ROOT / "9k_prompts", 2, 3)
    assert [(context.name, context.stem) for context in contexts] == [("0.txt", "0"), ("1.txt", "1")]
    assert contexts[0].text == (ROOT / "9k_prompts/0.txt").read_text()
    assert len(contexts[0].questions) == 3 and contexts[0].questions[0] == Question("", "49619")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "line 1: must be a JSON object"),
        ('{"prompt": "a"}', "line 1: must have the fields of a data set that is known: prompt and topics; "),
        ('{"prompt": "", "label": "x"}', "line 1: prompt must not be empty"),
        ('{"prompt": "a", "label": ""}', "line 1: label must not be empty"),
        ('{"prompt": "a", "label": 3}', "line 1: label must be a text"),
        ('{"prompt": 1, "label": "x"}', "line 1: prompt must be a text"),
        ('{"prompt": "\\ud800", "label": "x"}', "line 1: prompt holds half a character"),
        ('{"prompt": "a", "topics": []}', "line 1: topics must be a list of 1 to"),
        ('{"prompt": "a", "topics": [1]}', "line 1: topics must be a text"),
        ('{"prompt": "a", "expected_number": "7"}', "line 1: expected_number must be an integer"),
        ('{"input": "a", "outputs": "[\'1\']"}', "line 1: outputs must be a list"),
        ('{"input": "a", "outputs": ["1"], "answer_prefix": 1}', "line 1: answer_prefix must be a text"),
        ('{"prompt": "a", "prompt": "b", "label": "x"}', "a field appears twice"),
        ("", "has no contexts"),
        ("\xff", "not JSON"),
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path, content, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        read_contexts(path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value) and "\n" not in str(caught.value)


def test_fewer_contexts_than_asked_for_are_refused(tmp_path):
    with pytest.raises(InputError, match="has only 1 contexts, 2 were asked for"):
        read_contexts(write_records(tmp_path / "x.jsonl", {"prompt": "a", "label": "1"}), 2)


def test_a_json_file_is_not_taken_for_a_text(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="must be a folder, a text, or records"):
        read_contexts(tmp_path / "x.json")


# --- fitting to a model -----------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_windows_that_follow_each_other(tmp_path, loaded):
    (tmp_path / "book.txt").write_text(TEXT)
    contexts = fit_contexts(read_contexts(tmp_path / "book.txt", 3), loaded, count=3, context_tokens=256)
    assert [context.name for context in contexts] == ["book-0", "book-1", "book-2"]
    assert TEXT.startswith("".join(context.text for context in contexts))
    assert all(context.questions == () for context in contexts)
    assert all(abs(len(tokenize_context(loaded, context)) - 256) <= 2 for context in contexts)


def test_a_text_with_too_few_windows_is_refused(tmp_path, loaded):
    (tmp_path / "book.txt").write_text(TEXT)
    contexts = read_contexts(tmp_path / "book.txt")
    with pytest.raises(InputError, match="tokens, which are only"):
        fit_contexts(contexts, loaded, count=1000, context_tokens=256)
    with pytest.raises(InputError, match="only 0 windows of 100000"):
        fit_contexts(contexts, loaded, context_tokens=100_000)


def test_a_text_without_a_window_is_one_context(tmp_path, loaded):
    (tmp_path / "book.txt").write_text(TEXT)
    contexts = read_contexts(tmp_path / "book.txt")
    assert fit_contexts(contexts, loaded, count=1) == contexts
    with pytest.raises(ConfigError, match="give `context_tokens` to cut it into 2"):
        fit_contexts(contexts, loaded, count=2)


def test_a_long_prompt_loses_its_middle(tmp_path, loaded):
    contexts = read_contexts(write_records(tmp_path / "x.jsonl", {"prompt": TEXT, "label": "x"}))
    (context,) = fit_contexts(contexts, loaded, context_tokens=200)
    assert abs(len(tokenize_context(loaded, context)) - 200) <= 2
    half = len(context.text) // 4
    assert TEXT.startswith(context.text[:half]) and TEXT.endswith(context.text[-half:])
    assert context.questions == contexts[0].questions
    assert fit_contexts(contexts, loaded, context_tokens=100_000) == contexts


def test_windows_of_no_tokens_are_refused(tmp_path, loaded):
    contexts = read_contexts(write_records(tmp_path / "x.jsonl", {"prompt": "a", "label": "x"}))
    with pytest.raises(ConfigError, match="must be at least 3, got 2"):
        fit_contexts(contexts, loaded, context_tokens=2)


def test_the_chat_template_holds_the_prompt_and_its_special_tokens(tmp_path, chatting):
    records = [{"prompt": "Say x.", "label": "x"}, {"input": "Which?", "outputs": ["1"], "answer_prefix": "It is"}]
    contexts = read_contexts(write_records(tmp_path / "x.jsonl", *records))
    first, second = fit_contexts(contexts, chatting, chat_template=True)
    assert (first.text, first.answer_prefix, first.questions[0].lead) == ("<s>[Say x.]:", "", "")
    assert (second.text, second.answer_prefix, second.questions[0].lead) == ("<s>[Which?]:", "It is", " ")
    ids = tokenize_context(chatting, first).tolist()
    assert ids.count(1) == 1 and ids[0] == 1
    assert tokenize_context(chatting, second).tolist()[1:] == tokenize(chatting, "[Which?]:It is").tolist()[1:]


def test_the_chat_template_is_for_prompts_with_one_question(tmp_path, chatting):
    with pytest.raises(ConfigError, match=r"`chat_template` .* 0\.txt has further questions"):
        fit_contexts(read_contexts(ROOT / "9k_prompts", 1), chatting, chat_template=True)
    (tmp_path / "book.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match=r"book\.txt has no question"):
        fit_contexts(read_contexts(tmp_path / "book.txt"), chatting, chat_template=True)


@pytest.mark.parametrize("template", [None, "{{ nothing.at.all }}", "{% broken"])
def test_a_model_without_a_chat_template_that_works_is_refused(tmp_path, chatting, template):
    chatting.tokenizer.chat_template = template
    contexts = read_contexts(write_records(tmp_path / "x.jsonl", {"prompt": "a", "label": "x"}))
    with pytest.raises(InputError, match="its chat template cannot be used"):
        fit_contexts(contexts, chatting, chat_template=True)
