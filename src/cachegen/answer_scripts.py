"""What the scripts that answer from a decoded cache share: their flags, the prompts, the comparison with --verify."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cachegen import command_line
from cachegen.device import DEVICE_NAMES, DTYPE_NAMES
from cachegen.errors import ConfigError
from cachegen.methods.base import Method

if TYPE_CHECKING:
    # transformers takes seconds to import, more than it takes to say that a flag is wrong.
    from cachegen.pipeline.generate import Answer
    from cachegen.pipeline.model import LoadedModel
    from cachegen.pipeline.model_cache import Cache


def add_answer_flags(parser: argparse.ArgumentParser, script_folder: str | os.PathLike[str]) -> None:
    """Add the flags of every script that decodes a cache and answers from it."""
    add = parser.add_argument
    model_default = command_line.default_input(script_folder, "models/tiny-mistral")
    context_default = command_line.default_input(script_folder, "9k_prompts/0.txt")
    add("--model_id", default=model_default, help="Hugging Face id or local folder of the model")
    add("--path_to_context", default=context_default, help="the text whose cache was encoded")
    add("--num_chunks", type=command_line.positive_int, help="decode only the first chunks; None decodes all")
    add("--quantization_config", help="a JSON file; if given, the chunk files must agree with it")
    add(
        "--profile",
        help="a profile's folder, for method transform; None looks beside the model and in models/",
    )
    add("--model_config", help="a JSON file; if given, the chunk files must agree with it")
    add("--max_new_tokens", type=command_line.positive_int, default=10, help="tokens to generate per answer")
    add(
        "--question",
        action="append",
        metavar="TEXT",
        help="text to append to the context before generating; may be given several times, each is answered from "
        "the same cache. None continues the context itself",
    )
    add(
        "--verify",
        action="store_true",
        help="answer from the text as well, as transformers does by itself, and compare",
    )
    add(
        "--device",
        choices=DEVICE_NAMES,
        default="auto",
        help="where the model runs and chunks decode; auto is cuda where torch has it",
    )
    add("--dtype", choices=DTYPE_NAMES, default="auto", help="auto is the encoded cache's; others must equal it")
    add("--load_in_8bit", action="store_true", help="keep the weights in 8 bits (needs bitsandbytes)")
    add("--num_gpus", type=command_line.positive_int, help="spread the layers over so many GPUs (needs accelerate)")
    add("--max_gpu_memory", type=command_line.positive_int, help="GiB of weights on each GPU at most")
    add("--threads", type=command_line.positive_int, help="CPU threads for decoding; None takes all processors")
    command_line.add_common_flags(parser)


def check_profile_flag(args: argparse.Namespace, method: Method) -> None:
    """Refuse --profile where nothing would use it.

    Raises:
        ConfigError: the document's method has no profiles.
    """
    if args.profile is not None and not method.uses_profile:
        raise ConfigError(f"--profile is not for method {method.name}, which the document is of")


def append_questions(
    loaded: LoadedModel, token_ids: torch.Tensor, questions: Sequence[str | None], max_new_tokens: int
) -> list[torch.Tensor]:
    """Return one prompt per question: the context's tokens, followed by the question's; None is the context itself.

    Raises:
        ConfigError: a question is empty.
        InputError: a prompt and its answer are too long for the model.
    """
    from cachegen.pipeline.limits import check_prompts
    from cachegen.pipeline.prefill import tokenize

    prompts = []
    for question in questions:
        if question is None:
            prompts.append(token_ids)
            continue
        question_ids = tokenize(loaded, question, add_special_tokens=False)
        if len(question_ids) == 0:
            raise ConfigError("--question must not be empty")
        prompts.append(torch.cat([token_ids, question_ids]))
    check_prompts(loaded, len(token_ids), prompts, max_new_tokens)
    return prompts


def list_answers(questions: Sequence[str | None], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return the answers with their questions, for the JSON."""
    return [
        {"question": question, "text": answer.text, "token_ids": answer.token_ids}
        for question, answer in zip(questions, answers, strict=True)
    ]


def verify_answers(
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    prompts: Sequence[torch.Tensor],
    answers: Sequence[Answer],
    decoded_cache: Cache,
    *,
    num_cached: int,
    max_new_tokens: int,
    block_size: int,
) -> dict[str, Any]:
    """Answer from the text, as transformers does without this project, and compare predictions and answers.

    Costs a prefill of the whole context per question, and one more, with memory for the scores of a pass in one piece.

    Returns:
        What --verify adds to the JSON.
    """
    from cachegen.pipeline.generate import generate_from_text
    from cachegen.pipeline.verify import compare_with_text

    references = [generate_from_text(loaded, prompt, max_new_tokens) for prompt in prompts]
    fidelity = compare_with_text(loaded, token_ids, decoded_cache, num_decoded_tokens=num_cached, block_size=block_size)
    return {
        "kl": fidelity.kl,
        "next_token_agreement": fidelity.next_token_agreement,
        "nll_delta": fidelity.nll_delta,
        "verified_tokens": fidelity.verified_tokens,
        "greedy_match": all(a.token_ids == r.token_ids for a, r in zip(answers, references, strict=True)),
        "text_uncompressed": references[0].text,
        "texts_uncompressed": [reference.text for reference in references],
        "text_prefill_seconds": references[0].prefill_seconds,
    }


def report_answers(report: command_line.Reporter, record: dict[str, Any]) -> None:
    """Print the comparison, where there was one, and the answers."""
    if "kl" in record:
        report.row("  from text", f"{record['text_prefill_seconds']:.3f} s")
        report.row("KL", f"{record['kl']:.6f} nats over the last {record['verified_tokens']} tokens")
        report.row("agreement", f"{100 * record['next_token_agreement']:.1f} % of next tokens")
        report.row("NLL difference", f"{record['nll_delta']:+.5f} nats")
        report.row("same answer", "yes" if record["greedy_match"] else "NO")
    uncompressed = record.get("texts_uncompressed", [None] * len(record["answers"]))
    for answer, reference in zip(record["answers"], uncompressed, strict=True):
        if answer["question"] is not None:
            report.row("question", repr(answer["question"]))
        report.row("answer", repr(answer["text"]))
        if reference is not None and reference != answer["text"]:
            report.row("  uncompressed", repr(reference))
