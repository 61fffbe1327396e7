"""A context and the questions about it, to be answered by a model from whatever cache of the context there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachegen.errors import ConfigError
from cachegen.format.headers import DocumentHeader
from cachegen.pipeline.chunking import DEFAULT_BLOCK_SIZE
from cachegen.pipeline.frequencies import DEFAULT_ROOM, choose_frequencies, match_frequencies
from cachegen.pipeline.generate import Answer, generate_answer, generate_from_text
from cachegen.pipeline.limits import check_prompts
from cachegen.pipeline.model import LoadedModel
from cachegen.pipeline.model_cache import Cache, is_whole_only, view_kv_cache
from cachegen.pipeline.prefill import tokenize
from cachegen.pipeline.verify import compare_with_text, count_verified_tokens, is_saved_cache


@dataclass(frozen=True)
class Session:
    """What is asked, ready for the model.

    Attributes:
        loaded: the model; its dtype need not be the cache's yet.
        token_ids: of the context, integers `[num_tokens]`.
        questions: as given; None continues the context itself.
        prompts: for each question the context's tokens, followed by the question's.
        max_new_tokens: per answer.
    """

    loaded: LoadedModel
    token_ids: torch.Tensor
    questions: tuple[str | None, ...]
    prompts: tuple[torch.Tensor, ...]
    max_new_tokens: int

    @classmethod
    def open(
        cls,
        loaded: LoadedModel,
        text: str,
        questions: Sequence[str] | None,
        max_new_tokens: int,
        *,
        rope_hash: str | None = None,
        max_total_tokens: int | None = None,
    ) -> Session:
        """Tokenize a context and the questions about it; without questions the context is continued.

        Args:
            rope_hash: of the document that will be decoded, whose rotary frequencies the model keeps; None: they are
                chosen as main.py does.
            max_total_tokens: that main.py was given.

        Raises:
            ConfigError: a question is empty.
            InputError: a prompt and its answer are too long for the model.
        """
        token_ids = tokenize(loaded, text)
        if rope_hash is not None:
            loaded = match_frequencies(loaded, rope_hash)
        else:
            loaded = choose_frequencies(loaded, max_total_tokens or len(token_ids) + DEFAULT_ROOM)
        asked: tuple[str | None, ...] = tuple(questions or (None,))
        prompts = tuple(_append_question(loaded, token_ids, question) for question in asked)
        check_prompts(loaded, len(token_ids), prompts, max_new_tokens)
        return cls(loaded, token_ids, asked, prompts, max_new_tokens)

    @property
    def capacity(self) -> int:
        """Tokens that a cache needs room for: the longest prompt and its answer."""
        return max(map(len, self.prompts)) + self.max_new_tokens

    def answer(self, cache: Cache, num_cached: int, block_size: int = DEFAULT_BLOCK_SIZE) -> list[Answer]:
        """Answer every question from a cache of the context's first tokens; see `generate_answer`."""
        return [
            generate_answer(self.loaded, cache, num_cached, prompt, self.max_new_tokens, block_size)
            for prompt in self.prompts
        ]

    def describe(self, answers: Sequence[Answer], fidelity: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the answers for the JSON, with what `verify` found, where it was called."""
        return {
            "text": answers[0].text,
            "token_ids": answers[0].token_ids,
            **(fidelity or {}),
            "answers": [
                {"question": question, "text": answer.text, "token_ids": answer.token_ids}
                for question, answer in zip(self.questions, answers, strict=True)
            ],
        }

    def verify(
        self,
        answers: Sequence[Answer],
        cache: Cache,
        num_cached: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        header: DocumentHeader | None = None,
    ) -> dict[str, Any]:
        """Answer from the text, as transformers does without this project, and compare predictions and answers.

        Costs a prefill of the whole context per question, and one more, with memory for the scores of a pass in one
        piece.

        Args:
            header: of the document that the cache was decoded from, to tell whether it is the saved one bit for bit.

        Returns:
            What --verify adds to the JSON.
        """
        references = [generate_from_text(self.loaded, prompt, self.max_new_tokens) for prompt in self.prompts]
        token_ids, start = self.token_ids, None
        if num_cached > len(token_ids) - count_verified_tokens(len(token_ids)) and is_whole_only(cache):
            # It cannot end before the tokens that are usually verified: those behind it are, and the answer's.
            answer = torch.tensor(references[0].token_ids[:-1], dtype=token_ids.dtype)
            token_ids, start = torch.cat([self.prompts[0], answer]), num_cached
        fidelity = compare_with_text(
            self.loaded, token_ids, cache, num_decoded_tokens=num_cached, block_size=block_size, start=start
        )
        return {
            "kl": fidelity.kl,
            "next_token_agreement": fidelity.next_token_agreement,
            "nll_delta": fidelity.nll_delta,
            "verified_tokens": fidelity.verified_tokens,
            "bit_exact": header is not None and is_saved_cache(view_kv_cache(cache, num_cached), header),
            "greedy_match": all(a.token_ids == r.token_ids for a, r in zip(answers, references, strict=True)),
            "text_uncompressed": references[0].text,
            "texts_uncompressed": [reference.text for reference in references],
            "text_prefill_seconds": references[0].prefill_seconds,
        }


def _append_question(loaded: LoadedModel, token_ids: torch.Tensor, question: str | None) -> torch.Tensor:
    if question is None:
        return token_ids
    question_ids = tokenize(loaded, question, add_special_tokens=False)
    if len(question_ids) == 0:
        raise ConfigError("`question` must not be empty")
    return torch.cat([token_ids, question_ids])
