"""The contexts that a study reads: a prompts folder, texts, or JSON Lines of the usual data sets.

A context's own question is the end of its text. Reading needs no model; `fit_contexts` then cuts texts to a number of
tokens and puts prompts into the model's chat template. docs/datasets.md lists the kinds of records and their fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cachegen.errors import ConfigError, InputError
from cachegen.fields import Fields, parse_fields, parse_json, refuse_input
from cachegen.files import read_file
from cachegen.pipeline.context import MAX_CONTEXT_BYTES, read_context
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_files import first_line
from cachegen.pipeline.prefill import tokenize

MAX_QUESTIONS_BYTES = 16 << 20
MAX_RECORDS_BYTES = 1 << 28
_MAX_QUESTIONS = 100_000
_MAX_ANSWERS = 1000
_RECORDS_SUFFIX = ".jsonl"
_TEXT_SUFFIX = ".txt"


@dataclass(frozen=True)
class Question:
    """What follows the context, and the right answer to it; the text is empty for the context's own question.

    Attributes:
        answer: the right answer, the first of `answers`.
        lead: stands between the question and its answer.
        answers: all right answers, or all parts of it where `metric` is "all"; empty: `answer` alone.
        metric: a name of `scoring.METRICS`.
    """

    text: str
    answer: str
    lead: str = " "
    answers: tuple[str, ...] = ()
    metric: str = "contained"

    @property
    def all_answers(self) -> tuple[str, ...]:
        """What a scorer compares a prediction with."""
        return self.answers or (self.answer,)


@dataclass(frozen=True)
class PromptContext:
    """One context, and what is asked of it.

    Attributes:
        name: of its file in a folder; of a data set or a text the file's name and a number.
        text: the context, with its own question at its end.
        questions: its own question, then the further ones; none for a text that is only read.
        answer_prefix: the begin of the answer to its own question, which follows the text.
        has_special_tokens: whether the text holds the tokens that the tokenizer would put around it.
    """

    name: str
    text: str
    questions: tuple[Question, ...]
    answer_prefix: str = ""
    has_special_tokens: bool = False

    @property
    def stem(self) -> str:
        """What files about this context are called, without their suffix."""
        return self.name.removesuffix(_TEXT_SUFFIX)


def tokenize_context(loaded: LoadedModel, context: PromptContext) -> torch.Tensor:
    """Return the token ids of a context, int32 `[num_tokens]` on the CPU."""
    text = context.text + context.answer_prefix
    return tokenize(loaded, text, add_special_tokens=not context.has_special_tokens)


def read_contexts(path: Path, count: int | None = None, num_questions: int | None = None) -> list[PromptContext]:
    """Read the first `count` contexts of a folder, a file of records or a text, with their first `num_questions`.

    A text is one context without questions, whatever `count` is: `fit_contexts` cuts it.

    Args:
        path: a folder of N.txt and questions.json, a folder of texts without it, a file of records (.jsonl), or any
            other file of UTF-8 text.

    Raises:
        InputError: it is none of these, is damaged, or has fewer contexts.
    """
    if not path.is_file():
        texts = [] if (path / "questions.json").exists() else sorted(path.glob(f"*{_TEXT_SUFFIX}"), key=_numbers_first)
        contexts = [PromptContext(text.name, read_context(text), ()) for text in texts] or read_prompts(path)
    elif path.suffix == _RECORDS_SUFFIX:
        contexts = _read_records(path, count)
    elif path.suffix == ".json":
        raise InputError(f"{path}: must be a folder, a text, or records in lines ({_RECORDS_SUFFIX})")
    else:
        return [PromptContext(path.name, read_context(path), ())]
    if not contexts:
        raise InputError(f"{path}: has no contexts")
    if count is not None and len(contexts) < count:
        raise InputError(f"{path}: has only {len(contexts)} contexts, {count} were asked for")
    return [dataclasses.replace(c, questions=c.questions[:num_questions]) for c in contexts[:count]]


def _numbers_first(path: Path) -> tuple[bool, int, str]:
    return (not path.stem.isdecimal(), int(path.stem) if path.stem.isdecimal() else 0, path.name)


def read_prompts(folder: Path) -> list[PromptContext]:
    """Read a prompts folder: questions.json and the files that it names.

    Raises:
        InputError: they are not there or not such files.
    """
    path = folder / "questions.json"
    text = read_file(path, MAX_QUESTIONS_BYTES, hint="a prompts folder like 9k_prompts has one")
    entries = parse_json(text, refuse_input(path))
    if not isinstance(entries, list):
        raise InputError(f"{path}: must be a list of contexts with questions")
    return [_read_prompt(Fields(entry, refuse_input(path), f"[{i}]"), folder) for i, entry in enumerate(entries)]


def _read_prompt(fields: Fields, folder: Path) -> PromptContext:
    questions = [Question("", fields.text("answer"))]
    for question in fields.objects("questions", 0, _MAX_QUESTIONS):
        questions.append(Question(question.text("question"), question.text("answer")))
    path = folder / fields.text("file")
    return PromptContext(path.name, read_context(path), tuple(questions))


# --- records ----------------------------------------------------------------------------------------------------------


def _read_records(path: Path, count: int | None) -> list[PromptContext]:
    """Read the first records of a file, one in each line that is not empty."""
    lines = read_file(path, MAX_RECORDS_BYTES, kind="file of records").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    contexts = []
    for index, (number, line) in enumerate(numbered[:count]):
        fields = parse_fields(line, refuse_input(f"{path}: line {number}"))
        contexts.append(_read_record(fields, f"{path.stem}-{index}"))
    return contexts


def _read_record(fields: Fields, name: str) -> PromptContext:
    for names, read in _RECORD_KINDS:
        if all(field in fields for field in names):
            return read(fields, name)
    known = "; ".join(" and ".join(names) for names, _ in _RECORD_KINDS)
    raise fields.error("", f"must have the fields of a data set that is known: {known}")


def _read_topics(fields: Fields, name: str) -> PromptContext:
    topics = _texts(fields, "topics")
    return _make_context(name, _long_text(fields, "prompt"), topics[:1], "topic")


def _read_lines(fields: Fields, name: str) -> PromptContext:
    number = fields.integer("expected_number", -(1 << 62), 1 << 62)
    return _make_context(name, _long_text(fields, "prompt"), (str(number),), "number")


def _read_label(fields: Fields, name: str) -> PromptContext:
    prompt = _long_text(fields, "prompt")
    if type(fields.value("label")) is list:  # CacheGen's LongChat: all topics, the wanted one first
        return _make_context(name, prompt, _texts(fields, "label")[:1], "topic")
    return _make_context(name, prompt, (_text(fields, "label"),), "contained")


def _read_answers(fields: Fields, name: str) -> PromptContext:
    return _make_context(name, _long_text(fields, "prompt"), _texts(fields, "answers"), "f1")


def _read_long_bench(fields: Fields, name: str) -> PromptContext:
    # LongBench words the prompt of each of its tasks otherwise; two wordings serve all of them here.
    question = fields.text("input", MAX_CONTEXT_BYTES)
    end = f"Question: {_check_text(fields, 'input', question, False)}\nAnswer:" if question else "Summary:"
    text = f"{_long_text(fields, 'context')}\n\n{end}"
    return _make_context(name, text, _texts(fields, "answers"), "f1")


def _read_ruler(fields: Fields, name: str) -> PromptContext:
    outputs = _texts(fields, "outputs")
    context = _make_context(name, _long_text(fields, "input"), outputs, "all")
    prefix = _text(fields, "answer_prefix", is_empty_allowed=True) if fields.has_value("answer_prefix") else ""
    return dataclasses.replace(context, answer_prefix=prefix)


# The first whose fields a record has all says what it is.
_RECORD_KINDS: tuple[tuple[tuple[str, ...], Callable[[Fields, str], PromptContext]], ...] = (
    (("prompt", "topics"), _read_topics),
    (("prompt", "expected_number"), _read_lines),
    (("prompt", "label"), _read_label),
    (("prompt", "answers"), _read_answers),
    (("context", "input", "answers"), _read_long_bench),
    (("input", "outputs"), _read_ruler),
)


def _make_context(name: str, text: str, answers: tuple[str, ...], metric: str) -> PromptContext:
    lead = "" if text[-1].isspace() else " "
    return PromptContext(name, text, (Question("", answers[0], lead, answers, metric),))


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    items = fields.items(name, 1, _MAX_ANSWERS)
    below = Fields({str(i): item for i, item in enumerate(items)}, lambda problem, i: fields.error(name, problem))
    return tuple(_text(below, i) for i in below.names)


def _text(fields: Fields, name: str, *, is_empty_allowed: bool = False) -> str:
    return _check_text(fields, name, fields.text(name), is_empty_allowed)


def _long_text(fields: Fields, name: str) -> str:
    return _check_text(fields, name, fields.text(name, MAX_CONTEXT_BYTES), False)


def _check_text(fields: Fields, name: str, text: str, is_empty_allowed: bool) -> str:
    if not text and not is_empty_allowed:
        raise fields.error(name, "must not be empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise fields.error(name, "holds half a character, which is no text") from None
    return text


# --- fitting to a model -----------------------------------------------------------------------------------------------


def fit_contexts(
    contexts: Sequence[PromptContext],
    loaded: LoadedModel,
    *,
    count: int | None = None,
    context_tokens: int | None = None,
    chat_template: bool = False,
) -> list[PromptContext]:
    """Cut contexts to a number of tokens, and put prompts into the model's chat template.

    A text without questions is cut into windows of `context_tokens`, one after the other; what is left at its end is
    dropped. A longer prompt loses its middle, as in LongBench: the first and the last half of the tokens stay. Both are
    cut between characters of the text, whose tokens may be one or two more or fewer when it is tokenized again.

    Args:
        contexts: from `read_contexts`.
        loaded: the model, with its tokenizer.
        count: windows of a text at most; None takes all.
        context_tokens: tokens of a context at most, without those of the chat template; None cuts nothing.
        chat_template: whether a prompt becomes a user's message, which the assistant is about to answer.

    Raises:
        InputError: a text has fewer windows than `count`, or the model has no chat template or none that works.
        ConfigError: there is no number of tokens to cut a text into windows, or too small a one; or the template is
            asked for where it is of no use: for a text, or before further questions.
    """
    fitted = []
    for context in contexts:
        if context_tokens is not None:
            fitted += _cut(context, loaded, context_tokens, count)
        elif not context.questions and count not in (None, 1):
            raise ConfigError(f"{context.name}: a text is one context: give `context_tokens` to cut it into {count}")
        else:
            fitted.append(context)
    return [_apply_template(context, loaded) for context in fitted] if chat_template else fitted


def _cut(context: PromptContext, loaded: LoadedModel, num_tokens: int, count: int | None) -> list[PromptContext]:
    num_special = len(tokenize(loaded, ""))
    room = num_tokens - num_special
    if room < 2:
        raise ConfigError(f"`context_tokens` must be at least {num_special + 2}, got {num_tokens}")
    spans = _find_spans(context, loaded)
    if context.questions:
        return [dataclasses.replace(context, text=_drop_middle(context.text, spans, room))]
    windows = list(_list_windows(context.text, spans, room))[:count]
    if len(windows) < (1 if count is None else count):
        raise InputError(
            f"{context.name}: has {len(spans)} tokens, which are only {len(windows)} windows of {num_tokens}"
        )
    stem = context.name.rsplit(".", 1)[0]
    return [PromptContext(f"{stem}-{i}", text, ()) for i, text in enumerate(windows)]


def _find_spans(context: PromptContext, loaded: LoadedModel) -> list[tuple[int, int]]:
    """Return where the characters of each token begin and end."""
    if not loaded.tokenizer.is_fast:
        raise InputError(f"{loaded.model_id}: its tokenizer does not say which characters a token is of")
    encoded = loaded.tokenizer(context.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["offset_mapping"]


def _list_windows(text: str, spans: Sequence[tuple[int, int]], room: int) -> Iterator[str]:
    for first in range(0, len(spans) - room + 1, room):
        stop = spans[first + room][0] if first + room < len(spans) else len(text)
        yield text[spans[first][0] : stop]


def _drop_middle(text: str, spans: Sequence[tuple[int, int]], room: int) -> str:
    if len(spans) <= room:
        return text
    first, last = room // 2, room - room // 2
    return text[: spans[first][0]] + text[spans[-last][0] :]


def _apply_template(context: PromptContext, loaded: LoadedModel) -> PromptContext:
    if len(context.questions) != 1:
        what = "further questions, which follow its text" if context.questions else "no question"
        raise ConfigError(f"`chat_template` is for prompts with one question, but {context.name} has {what}")
    messages: list[dict[str, Any]] = [{"role": "user", "content": context.text}]
    try:
        text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is the model's, and raises what it likes
        raise InputError(f"{loaded.model_id}: its chat template cannot be used: {first_line(error)}") from error
    lead = " " if context.answer_prefix and not context.answer_prefix[-1].isspace() else ""
    question = dataclasses.replace(context.questions[0], lead=lead)
    return dataclasses.replace(context, text=text, questions=(question,), has_special_tokens=True)
