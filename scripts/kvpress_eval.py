#!/usr/bin/env python3
"""Score the answers of kvpress's pipeline from decoded caches, beside those from the uncompressed one.

Reads records of RULER, LongBench and the like (docs/datasets.md). kvpress is installed by itself: docs/kvpress.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cachegen import command_line
from cachegen.comparison.datasets import PromptContext, fit_contexts, read_contexts
from cachegen.comparison.scoring import MAX_NEW_TOKENS, METRICS
from cachegen.device import DEVICE_NAMES, DTYPE_NAMES, resolve_device, resolve_dtype
from cachegen.errors import BackendUnavailableError, InputError
from cachegen.methods import load_config
from cachegen.pipeline.model import load_model

ROOT = Path(__file__).resolve().parent.parent
_QUESTION = "\nQuestion: "
_ANSWER = "\nAnswer:"


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    command_line.add_model_flags(parser, str(ROOT / "models/tiny-mistral"))
    add("--path_to_context", type=Path, nargs="+", required=True, help="files of records (.jsonl), one or several")
    add(
        "--quantization_config",
        nargs="+",
        default=[str(ROOT / "config/uniform_8bit.json")],
        help="how to encode: each config gives a row",
    )
    add("--profile", help="the model's profile, for the configs that take one and name none")
    add("--num_contexts", type=command_line.positive_int, help="only the first records of each file")
    add("--context_tokens", type=command_line.positive_int, help="cut longer prompts in their middle")
    add("--dtype", choices=DTYPE_NAMES, default="auto", help="of the model; auto is the checkpoint's")
    add("--device", choices=DEVICE_NAMES, default="auto", help="where the model runs, and what encodes")
    add("--num_threads", type=command_line.positive_int, help="of the CPU; None takes all processors")
    command_line.add_weight_flags(parser)
    command_line.add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_evaluate, build_parser(), argv)


def split_prompt(context: PromptContext) -> tuple[str, str, str]:
    """Take a prompt apart as kvpress wants it: what is to be compressed, the question, and the begin of the answer.

    The question is the last `Question:` of the prompt, as LongBench's have one here, or else its last line; what
    follows its question mark begins the answer, as in RULER.

    Raises:
        InputError: there is nothing before it.
    """
    text = context.text.rstrip()
    place = text.rfind(_QUESTION)
    if place < 0:
        place = text.rfind("\n")
    if place <= 0 or not text[:place].strip():
        raise InputError(f"{context.name}: the prompt's last line must be its question, and a context before it")
    question, prefix = text[place + 1 :], context.answer_prefix
    if not prefix and question.endswith(_ANSWER):
        question, prefix = question.removesuffix(_ANSWER), _ANSWER.strip()
    elif not prefix and "? " in question:
        asked, _, prefix = question.partition("? ")
        question = f"{asked}?"
    return text[: place + 1], question, prefix


def _evaluate(args: argparse.Namespace) -> None:
    report = command_line.Reporter(args)
    try:
        from kvpress import KVPressTextGenerationPipeline

        from cachegen.integrations.kvpress import CacheGenPress
    except ImportError as error:
        raise BackendUnavailableError(
            f"the package kvpress is needed, and not its requirements ({error}): docs/kvpress.md says how to install it"
        ) from error
    loaded = load_model(
        args.model_id,
        device=resolve_device(args.device),
        dtype=resolve_dtype(args.dtype),
        gguf_file=args.gguf_file,
        weight_bits=args.weight_bits,
    )
    contexts = [one for path in args.path_to_context for one in read_contexts(path, args.num_contexts)]
    contexts = fit_contexts(contexts, loaded, context_tokens=args.context_tokens)
    prompts = [split_prompt(context) for context in contexts]
    pipeline = KVPressTextGenerationPipeline(model=loaded.model, tokenizer=loaded.tokenizer)
    presses: dict[str, Any] = {"uncompressed": None}
    for path in args.quantization_config:
        config = load_config(path)
        wants = args.profile if config.needs_profile else None
        presses[Path(path).stem] = CacheGenPress(
            config, profile=wants, model=loaded, device=args.device, num_threads=args.num_threads
        )
    rows: dict[str, dict[str, float]] = {}
    for name, press in presses.items():
        start = time.perf_counter()
        scores = [_score(pipeline, press, context, prompt) for context, prompt in zip(contexts, prompts, strict=True)]
        bits = press.bits_per_value if press is not None else 8.0 * loaded.dtype.itemsize
        rows[name] = {
            "score": statistics.fmean(scores),
            "bits_per_value": bits,
            "seconds": time.perf_counter() - start,
        }
        report.row(name, f"score {rows[name]['score']:.3f} of {len(scores)} answers, {bits:.3f} bits per value")
    command_line.finish(args, {"num_contexts": len(contexts), "methods": rows})


def _score(pipeline: Any, press: Any, context: PromptContext, prompt: tuple[str, str, str]) -> float:
    text, asked, prefix = prompt
    (question,) = context.questions
    num_new = MAX_NEW_TOKENS[question.metric]
    with torch.inference_mode():
        found = pipeline(text, question=asked, answer_prefix=prefix, press=press, max_new_tokens=num_new)
    return METRICS[question.metric](found["answer"], question.all_answers)


if __name__ == "__main__":
    sys.exit(main())
