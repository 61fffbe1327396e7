#!/usr/bin/env python3
"""Load and decode chunk files, and answer from them without prefilling the context again: stage three of three."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

SCRIPT_FOLDER = Path(__file__).resolve().parent
# In a clone that is not installed, the package is beside the script; an installed one comes first.
sys.path.append(str(SCRIPT_FOLDER / "src"))

from cachegen import command_line  # noqa: E402
from cachegen.device import DEVICE_NAMES, DTYPE_NAMES, choose_kernels, resolve_device, resolve_dtype  # noqa: E402
from cachegen.pipeline.context import read_context  # noqa: E402

if TYPE_CHECKING:
    import torch

    from cachegen.pipeline.generate import Answer
    from cachegen.pipeline.model import LoadedModel
    from cachegen.pipeline.model_cache import Cache


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.CommandLineParser(description=__doc__)
    add = parser.add_argument
    model_default = command_line.default_input(SCRIPT_FOLDER, "models/tiny-mistral")
    context_default = command_line.default_input(SCRIPT_FOLDER, "9k_prompts/0.txt")
    add("--path_to_encoded_kv", default="encoded", help="a folder of run_encoding.py")
    add("--model_id", default=model_default, help="Hugging Face id or local folder of the model")
    add("--path_to_context", default=context_default, help="the text whose cache was encoded")
    add("--num_chunks", type=command_line.positive_int, help="decode only the first chunks; None decodes all")
    add("--quantization_config", help="a JSON file; if given, the chunk files must agree with it")
    add("--model_config", help="a JSON file; if given, the chunk files must agree with it")
    add("--max_new_tokens", type=command_line.positive_int, default=10, help="tokens to generate per answer")
    add(
        "--question",
        action="append",
        metavar="TEXT",
        help="text to append to the context before generating; may be given several times, each is answered from "
        "the same cache. None continues the context itself",
    )
    add("--verify", action="store_true", help="prefill the context again and compare with the uncompressed cache")
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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_decode_and_answer, build_parser(), argv)


def _decode_and_answer(args: argparse.Namespace) -> None:
    from cachegen.coder.cpu import default_num_threads
    from cachegen.config import load_model_config, load_quantization_config
    from cachegen.pipeline.decode import EncodedFolder

    report = command_line.Reporter(args)
    # Everything that needs no model comes first: a wrong path or config shows at once.
    num_threads = args.threads or default_num_threads()
    device, dtype = resolve_device(args.device), resolve_dtype(args.dtype)
    chosen = choose_kernels(args.device)
    folder = EncodedFolder(args.path_to_encoded_kv, num_threads, chosen.kernels)
    header = folder.document.header
    if args.quantization_config is not None:
        load_quantization_config(args.quantization_config).check_planes(
            header.method, header.planes, folder.tables_path
        )
    if args.model_config is not None:
        load_model_config(args.model_config).check_planes(header.planes, folder.tables_path)
    chunk_tokens = folder.select_chunks(args.num_chunks)
    text = read_context(Path(args.path_to_context))

    # transformers takes seconds to import, more than it takes to say that a file is missing.
    from tqdm import tqdm

    from cachegen.pipeline.generate import generate_answer
    from cachegen.pipeline.model import load_model
    from cachegen.pipeline.model_cache import allocate_cache, set_length, view_kv_cache
    from cachegen.pipeline.prefill import tokenize

    loaded = load_model(
        args.model_id,
        device=device,
        dtype=folder.dtype if dtype == "auto" else dtype,
        load_in_8bit=args.load_in_8bit,
        num_gpus=args.num_gpus,
        max_gpu_memory=args.max_gpu_memory,
    )
    folder.check_model(loaded)
    token_ids = tokenize(loaded, text)
    num_cached = sum(chunk_tokens)
    folder.check_context(token_ids, num_cached, args.path_to_context)
    prompts = [_append_question(loaded, token_ids, question) for question in args.question or [None]]
    capacity = max(map(len, prompts)) + args.max_new_tokens
    cache = allocate_cache(folder.plane_shapes, capacity, folder.dtype, loaded.layer_devices)

    # From here on the clock runs: what a server with the model in memory would do.
    start = time.perf_counter()
    with tqdm(total=num_cached, unit="token", file=sys.stderr, disable=True if report.is_quiet else None) as bar:
        decoded = folder.decode_into(view_kv_cache(cache, num_cached), token_ids, chunk_tokens, bar.update)
    set_length(cache, num_cached)
    block_size = header.prefill_block_size
    answers = [
        generate_answer(loaded, cache, num_cached, prompt, args.max_new_tokens, block_size) for prompt in prompts
    ]
    record = {
        "stage": "decode",
        "num_cached_tokens": num_cached,
        "num_recomputed_tokens": len(token_ids) - 1 - num_cached,
        "num_chunks": len(chunk_tokens),
        "encoded_bytes": decoded.encoded_bytes,
        "load_seconds": decoded.load_seconds,
        "decode_seconds": decoded.decode_seconds,
        "prefill_seconds": answers[0].prefill_seconds,
        "ttft_seconds": answers[0].first_token_at - start,
        "text": answers[0].text,
        "token_ids": answers[0].token_ids,
    }
    if args.verify:
        record |= _verify(args, loaded, token_ids, prompts, answers, cache, num_cached, block_size)
    record["answers"] = [
        {"question": question, "text": answer.text, "token_ids": answer.token_ids}
        for question, answer in zip(args.question or [None], answers, strict=True)
    ]
    record["device"] = str(loaded.device)
    record["decoding_device"] = str(chosen.device)
    record["config"] = command_line.effective_config(args)
    record["versions"] = command_line.collect_versions()
    report.row("decoding on", chosen)
    _report(report, record)
    if args.json is not None:
        command_line.write_json(args.json, record)


def _append_question(loaded: LoadedModel, token_ids: torch.Tensor, question: str | None) -> torch.Tensor:
    """Return the context's tokens, followed by those of a question."""
    import torch

    from cachegen.errors import ConfigError
    from cachegen.pipeline.prefill import tokenize

    if question is None:
        return token_ids
    question_ids = tokenize(loaded, question, add_special_tokens=False)
    if len(question_ids) == 0:
        raise ConfigError("--question must not be empty")
    return torch.cat([token_ids, question_ids])


def _verify(
    args: argparse.Namespace,
    loaded: LoadedModel,
    token_ids: torch.Tensor,
    prompts: Sequence[torch.Tensor],
    answers: Sequence[Answer],
    decoded_cache: Cache,
    num_cached: int,
    block_size: int,
) -> dict[str, Any]:
    """Prefill again, uncompressed, and compare predictions and answers."""
    from cachegen.pipeline.generate import generate_answer
    from cachegen.pipeline.prefill import prefill
    from cachegen.pipeline.verify import compare_caches

    num_reference = len(token_ids) - 1
    capacity = max(map(len, prompts)) + args.max_new_tokens
    start = time.perf_counter()
    reference_cache = prefill(loaded, token_ids[:num_reference], block_size, capacity=capacity)
    references = [
        generate_answer(loaded, reference_cache, num_reference, prompt, args.max_new_tokens, block_size)
        for prompt in prompts
    ]
    text_prefill_seconds = references[0].first_token_at - start
    fidelity = compare_caches(
        loaded,
        token_ids,
        reference_cache,
        decoded_cache,
        num_reference_tokens=num_reference,
        num_decoded_tokens=num_cached,
        block_size=block_size,
    )
    return {
        "kl": fidelity.kl,
        "next_token_agreement": fidelity.next_token_agreement,
        "nll_delta": fidelity.nll_delta,
        "verified_tokens": fidelity.verified_tokens,
        "greedy_match": all(a.token_ids == r.token_ids for a, r in zip(answers, references, strict=True)),
        "text_uncompressed": references[0].text,
        "texts_uncompressed": [reference.text for reference in references],
        "text_prefill_seconds": text_prefill_seconds,
    }


def _report(report: command_line.Reporter, record: dict[str, Any]) -> None:
    report.row("tokens", f"{record['num_cached_tokens']:,} from {record['num_chunks']} chunks")
    if record["num_recomputed_tokens"]:
        report.row("recomputed", f"{record['num_recomputed_tokens']:,} tokens that no decoded chunk covers, from text")
    report.row("read", f"{command_line.format_bytes(record['encoded_bytes'])} in {record['load_seconds']:.3f} s")
    report.row("decoded in", f"{record['decode_seconds']:.3f} s")
    report.row(
        "first token after", f"{record['ttft_seconds']:.3f} s, {record['prefill_seconds']:.3f} s of it the model"
    )
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


if __name__ == "__main__":
    sys.exit(main())
