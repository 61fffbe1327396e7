"""Whether a cache still answers: all questions of a context in one pass of the model.

Greedy decoding writes an answer exactly if, at each of its tokens, that token is the most likely one after those
before it. So the questions, each with its expected answer, are packed into one sequence behind the cache, where each
sees the context and itself but not the others, and one forward pass tells for every question whether greedy decoding
would write the answer. That is some twenty times less work than generating one answer after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from cachegen.comparison.datasets import Question
from cachegen.comparison.scoring import MAX_NEW_TOKENS, METRICS
from cachegen.pipeline.generate import generate_answer
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import get_capacity, set_length
from cachegen.pipeline.prefill import tokenize


@dataclass(frozen=True)
class ExpectedAnswer:
    """A question's tokens after the context's, and what the uncompressed cache and the truth say.

    Attributes:
        question_ids: integers, without the context's.
        right: the tokens of the right answer.
        uncompressed: those that the uncompressed cache wrote; the same where it was right.
    """

    question_ids: tuple[int, ...]
    right: tuple[int, ...]
    uncompressed: tuple[int, ...]


@dataclass(frozen=True)
class RetrievalScore:
    """Answers of one cache, paired with those of the uncompressed one.

    Attributes:
        questions: how many were asked.
        right: answered right.
        kept: answered as by the uncompressed cache.
        lost: right by the uncompressed cache, wrong by this one.
        gained: the other way around.
    """

    questions: int
    right: int
    kept: int
    lost: int
    gained: int


def expect_answers(
    loaded: LoadedModel, reference: Cache, token_ids: torch.Tensor, questions: Sequence[Question]
) -> list[ExpectedAnswer]:
    """Find what the uncompressed cache answers: the right answers are checked, only the others generated.

    Args:
        reference: with all tokens but the last at least, and room for a question and its answer each.
        token_ids: the context, integers `[num_tokens]`.
    """
    expected = []
    for question in questions:
        question_ids = tuple(tokenize(loaded, question.text, add_special_tokens=False).tolist())
        right = tuple(tokenize(loaded, f"{question.lead}{question.answer}", add_special_tokens=False).tolist())
        expected.append(ExpectedAnswer(question_ids, right, right))
    is_right = _write_answers(loaded, reference, token_ids, [(e.question_ids, e.right) for e in expected])
    for index, entry in enumerate(expected):
        if not is_right[index]:
            prompt = torch.cat([token_ids, torch.tensor(entry.question_ids, dtype=token_ids.dtype)])
            answer = generate_answer(loaded, reference, len(token_ids) - 1, prompt, len(entry.right))
            expected[index] = ExpectedAnswer(entry.question_ids, entry.right, answer.token_ids)
    return expected


def score_retrieval(
    loaded: LoadedModel, cache: Cache, token_ids: torch.Tensor, expected: Sequence[ExpectedAnswer]
) -> RetrievalScore:
    """Ask a cache all questions.

    Args:
        cache: holds all tokens of the context but the last; what is behind them is overwritten.
        token_ids: the context, integers `[num_tokens]`.
        expected: from `expect_answers`.
    """
    candidates = [(entry.question_ids, entry.right) for entry in expected]
    differing = [entry for entry in expected if entry.uncompressed != entry.right]
    candidates += [(entry.question_ids, entry.uncompressed) for entry in differing]
    written = _write_answers(loaded, cache, token_ids, candidates)
    right = written[: len(expected)]
    was_right = [entry.uncompressed == entry.right for entry in expected]
    lost = sum(was and not now for was, now in zip(was_right, right, strict=True))
    return RetrievalScore(
        questions=len(expected),
        right=sum(right),
        kept=sum(was_right) - lost + sum(written[len(expected) :]),
        lost=lost,
        gained=sum(now and not was for was, now in zip(was_right, right, strict=True)),
    )


@dataclass(frozen=True)
class WrittenAnswer:
    """What a model wrote, and how right that is.

    Attributes:
        text: without special tokens and what ended it.
        score: 0 to 1, by the question's metric.
    """

    text: str
    score: float


def write_answers(
    loaded: LoadedModel,
    cache: Cache,
    token_ids: torch.Tensor,
    questions: Sequence[Question],
    max_new_tokens: int | None = None,
) -> list[WrittenAnswer]:
    """Let a cache answer questions in its own words, greedily, and score each answer by the question's metric.

    Args:
        cache: holds all tokens of the context but the last, and has room for a question and its answer.
        token_ids: the context, integers `[num_tokens]`.
        max_new_tokens: of an answer; None takes those of its metric (`scoring.MAX_NEW_TOKENS`).
    """
    answers = []
    for question in questions:
        question_ids = tokenize(loaded, question.text, add_special_tokens=False)
        prompt = torch.cat([token_ids, question_ids.to(token_ids.dtype)])
        num_new = MAX_NEW_TOKENS[question.metric] if max_new_tokens is None else max_new_tokens
        text = generate_answer(loaded, cache, len(token_ids) - 1, prompt, num_new).text
        answers.append(WrittenAnswer(text, METRICS[question.metric](text, question.all_answers)))
    return answers


def count_packed_tokens(loaded: LoadedModel, questions: Sequence[Question]) -> int:
    """Return for how many tokens behind the context a cache must have room to be asked these questions."""
    sizes = [
        len(tokenize(loaded, f"{question.text}{question.lead}{question.answer}", add_special_tokens=False))
        for question in questions
    ]
    # Each question again with another answer, each begun by the context's last token, and some slack for tokenization.
    return 2 * sum(size + 4 for size in sizes)


def count_written_tokens(loaded: LoadedModel, questions: Sequence[Question]) -> int:
    """Return for how many tokens behind the context a cache must have room for `write_answers`."""
    sizes = [
        len(tokenize(loaded, question.text, add_special_tokens=False)) + MAX_NEW_TOKENS[question.metric]
        for question in questions
    ]
    return max(sizes, default=0)


@torch.inference_mode()
def _write_answers(
    loaded: LoadedModel,
    cache: Cache,
    token_ids: torch.Tensor,
    candidates: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
) -> list[bool]:
    """Tell for each (question, answer) whether greedy decoding from the cache writes the answer.

    The last token of the context is fed again for each, since the first prediction needs it.
    """
    num_cached = len(token_ids) - 1
    last = int(token_ids[-1])
    if not candidates:
        return []
    inputs: list[int] = []
    lengths = []
    for question_ids, answer in candidates:
        row = [last, *question_ids, *answer[:-1]]
        lengths.append(len(row))
        inputs += row
    num_new = len(inputs)
    if get_capacity(cache) < num_cached + num_new:
        raise ValueError(f"`cache` must have room for {num_cached + num_new} tokens, got {get_capacity(cache)}")
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    is_visible = (owner[:, None] == owner) & (position[:, None] >= position)
    mask = torch.zeros(num_new, num_cached + num_new, dtype=loaded.dtype)
    mask[:, num_cached:].masked_fill_(~is_visible, torch.finfo(loaded.dtype).min)
    set_length(cache, num_cached)
    output = loaded.model(
        input_ids=torch.tensor(inputs, device=loaded.device)[None],
        attention_mask=mask[None, None].to(loaded.device),
        position_ids=(num_cached + position)[None].to(loaded.device),
        **loaded.name_cache(cache),
        use_cache=True,
    )
    set_length(cache, num_cached)
    predicted = output.logits[0].argmax(-1).tolist()
    written, stop = [], 0
    for (_, answer), length in zip(candidates, lengths, strict=True):
        stop += length
        written.append(tuple(predicted[stop - len(answer) : stop]) == answer)
    return written
