"""Measure how many questions of 9k_prompts the bundled model answers from its uncompressed cache.

    python tools/check_prompts.py

Each context is read once; its own question and the further ones are answered by greedy generation
from copies of that cache. An answer counts if the generated text, stripped, begins with the five
digits.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ROOT = Path(__file__).resolve().parent.parent
PREFILL_BLOCK_TOKENS = 1024
NUM_ANSWER_TOKENS = 8


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    """Compute the cache of `ids`, int64 [1, num_tokens], block by block."""
    cache = DynamicCache()
    for block in ids.split(PREFILL_BLOCK_TOKENS, dim=1):
        model(block, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    cache: DynamicCache,
) -> str:
    """Generate greedily after `ids` and return the stripped text.

    `cache` holds all but the last tokens of `ids`. It stays as it is: generate(), which appends
    to the cache that it is given, gets a copy.
    """
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=copy.deepcopy(cache),
        max_new_tokens=NUM_ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0, ids.shape[1] :]).strip()


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Measure exact match on the uncompressed cache.")
    parser.add_argument("--prompts", type=Path, default=ROOT / "9k_prompts")
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny-mistral")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--files", nargs="*", help="only these files, such as 0.txt")
    parser.add_argument("--minimum", type=float, default=0.98, help="share of right answers needed")
    parser.add_argument("--verbose", action="store_true", help="print each wrong answer")
    return parser


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 where the share is below --minimum."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    entries = json.loads((args.prompts / "questions.json").read_text(encoding="utf-8"))
    entries = [e for e in entries if not args.files or e["file"] in args.files]
    if not entries:
        raise ValueError(f"`--files` must name files of questions.json, got {args.files}")

    rows: list[tuple[str, int, int, int, int]] = []
    with tqdm(total=sum(1 + len(e["questions"]) for e in entries), unit="question") as progress:
        for entry in entries:
            text = (args.prompts / entry["file"]).read_text(encoding="utf-8")
            context = tokenizer(text, return_tensors="pt").input_ids
            cache = prefill(model, context[:, :-1])
            num_right = []
            for question, expected in [
                ("", entry["answer"]),
                *((q["question"], q["answer"]) for q in entry["questions"]),
            ]:
                appended = tokenizer(question, add_special_tokens=False).input_ids
                ids = torch.cat([context, torch.tensor([appended], dtype=torch.long)], dim=1)
                got = answer(model, tokenizer, ids, cache)
                num_right.append(got.startswith(expected))
                if args.verbose and not num_right[-1]:
                    progress.write(f"{entry['file']} {question!r}: {got!r}, not {expected}")
                progress.update()
            further = num_right[1:]
            row = (entry["file"], context.shape[1], int(num_right[0]), sum(further), len(further))
            rows.append(row)

    print("| file | tokens | own question | further questions |\n|---|---:|---:|---:|")
    for name, num_tokens, own, right, asked in rows:
        print(f"| {name} | {num_tokens:,} | {own} of 1 | {right} of {asked} |")
    own, right, asked = (sum(row[i] for row in rows) for i in (2, 3, 4))
    print(f"| all | | {own} of {len(rows)} | {right} of {asked} |")
    share = (own + right) / (len(rows) + asked)
    print(f"exact match: {own + right} of {len(rows) + asked} questions ({share:.2%})")
    return 0 if share >= args.minimum else 1


if __name__ == "__main__":
    raise SystemExit(main())
