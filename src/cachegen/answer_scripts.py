"""What the scripts that answer from a decoded cache share: their flags, the model, the report of the answers."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, Literal

import torch

from cachegen import command_line
from cachegen.device import DEVICE_NAMES, DTYPE_NAMES, resolve_device
from cachegen.errors import ConfigError
from cachegen.format import NO_HASH
from cachegen.methods.base import Method

if TYPE_CHECKING:
    # transformers takes seconds to import, more than it takes to say that a flag is wrong.
    from cachegen.pipeline.model import LoadedModel
    from cachegen.pipeline.session import Session


def add_answer_flags(parser: argparse.ArgumentParser, script_folder: str | os.PathLike[str]) -> None:
    """Add the flags of every script that decodes a cache and answers from it."""
    add = parser.add_argument
    model_default = command_line.default_input(script_folder, "models/tiny-mistral")
    context_default = command_line.default_input(script_folder, "9k_prompts/0.txt")
    command_line.add_model_flags(parser, model_default)
    add("--path_to_context", default=context_default, help="the text whose cache was encoded")
    add("--num_chunks", type=command_line.positive_int, help="decode only the first chunks; None decodes all")
    add("--quantization_config", help="a JSON file; if given, the chunk files must agree with it")
    add(
        "--profile",
        help="a profile's folder, for methods transform and lossless; None looks beside the model and in models/",
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
    command_line.add_weight_flags(parser)
    add("--num_gpus", type=command_line.positive_int, help="spread the layers over so many GPUs (needs accelerate)")
    add("--max_gpu_memory", type=command_line.positive_int, help="GiB of weights on each GPU at most")
    add("--threads", type=command_line.positive_int, help="CPU threads for decoding; None takes all processors")
    command_line.add_common_flags(parser)


def check_profile_flag(args: argparse.Namespace, method: Method, profile_hash: bytes | None = None) -> None:
    """Refuse --profile where nothing would use it.

    Args:
        profile_hash: that the document's tables file has; None where it was not read yet.

    Raises:
        ConfigError: the document's method has no profiles, or the document names none.
    """
    if args.profile is not None and method.uses_profile and profile_hash == NO_HASH:
        raise ConfigError(f"--profile: the document, of method {method.name}, was encoded without a profile")
    if args.profile is not None and not method.uses_profile:
        raise ConfigError(f"--profile is not for method {method.name}, which the document is of")


def open_session(
    args: argparse.Namespace,
    text: str,
    dtype: torch.dtype | Literal["auto"],
    *,
    rope_hash: str | None = None,
    max_total_tokens: int | None = None,
) -> Session:
    """Load the model that the flags name, and tokenize the context and the questions; see `Session.open`."""
    from cachegen.pipeline.session import Session

    return Session.open(
        load_model_of(args, dtype),
        text,
        args.question,
        args.max_new_tokens,
        rope_hash=rope_hash,
        max_total_tokens=max_total_tokens,
    )


def load_model_of(args: argparse.Namespace, dtype: torch.dtype | Literal["auto"]) -> LoadedModel:
    """Load the model that the flags name."""
    from cachegen.pipeline.model import load_model

    return load_model(
        args.model_id,
        device=resolve_device(args.device),
        dtype=dtype,
        gguf_file=args.gguf_file,
        weight_bits=args.weight_bits,
        num_gpus=args.num_gpus,
        max_gpu_memory=args.max_gpu_memory,
    )


def report_answers(report: command_line.Reporter, record: dict[str, Any]) -> None:
    """Print the comparison, where there was one, and the answers."""
    if "kl" in record:
        report.row("  from text", f"{record['text_prefill_seconds']:.3f} s")
        report.row("KL", f"{record['kl']:.6f} nats over the last {record['verified_tokens']} tokens")
        report.row("agreement", f"{100 * record['next_token_agreement']:.1f} % of next tokens")
        report.row("NLL difference", f"{record['nll_delta']:+.5f} nats")
        if record["bit_exact"]:
            report.row("cache", "bit for bit the one that was saved")
        report.row("same answer", "yes" if record["greedy_match"] else "NO")
    uncompressed = record.get("texts_uncompressed", [None] * len(record["answers"]))
    for answer, reference in zip(record["answers"], uncompressed, strict=True):
        if answer["question"] is not None:
            report.row("question", repr(answer["question"]))
        report.row("answer", repr(answer["text"]))
        if reference is not None and reference != answer["text"]:
            report.row("  uncompressed", repr(reference))
