#!/usr/bin/env python3
"""Seconds that a model of random weights takes to prefill, by default of the shape of an 8B model."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cachegen.device import resolve_device


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--intermediate_size", type=int, default=14336)
    parser.add_argument("--vocab_size", type=int, default=128256)
    parser.add_argument("--num_tokens", type=int, default=32768)
    parser.add_argument("--block_size", type=int, default=2048, help="tokens per pass")
    parser.add_argument("--rounds", type=int, default=2, help="the fastest counts")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    config = LlamaConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.num_tokens,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)
    ids = torch.randint(args.vocab_size, (1, args.num_tokens), device=device)
    seconds = [_prefill(model, ids, args.block_size, wait) for _ in range(args.rounds)]
    record = {
        "device": str(device),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_tokens": args.num_tokens,
        "block_size": args.block_size,
        "prefill_seconds": min(seconds),
        "tokens_per_second": args.num_tokens / min(seconds),
    }
    print(json.dumps(record, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


@torch.inference_mode()
def _prefill(model: LlamaForCausalLM, ids: torch.Tensor, block_size: int, wait) -> float:
    wait()
    start = time.perf_counter()
    cache = None
    for block in ids.split(block_size, dim=1):
        cache = model(block, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
