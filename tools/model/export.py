"""Write a checkpoint of train.py as a Hugging Face folder: bf16 weights and tokenizer.

python tools/model/export.py DATA CHECKPOINT FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, processors
from train import model_config
from transformers import MistralForCausalLM, PreTrainedTokenizerFast


def export_tokenizer(source: Path, folder: Path) -> None:
    """Save the tokenizer so that it puts <s> before each text."""
    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", model_config().bos_token_id)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def export_model(checkpoint: Path, folder: Path) -> None:
    """Save the weights in bf16 with the architecture's config."""
    model = MistralForCausalLM(model_config())
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    model.to(torch.bfloat16).save_pretrained(folder)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Write a checkpoint as a Hugging Face folder.")
    parser.add_argument("data", type=Path, help="folder that tokenizer.py wrote")
    parser.add_argument("checkpoint", type=Path, help="file that train.py wrote")
    parser.add_argument("folder", type=Path, help="folder to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    export_model(args.checkpoint, args.folder)
    export_tokenizer(args.data / "tokenizer.json", args.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
