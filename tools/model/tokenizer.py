"""Train the bundled model's tokenizer; write the corpus as tokens, and words for register names.

    python tools/model/tokenizer.py corpus.txt DATA

DATA receives tokenizer.json, train.npy, val.npy (uint16 tokens; documents are split, not mixed) and
words.txt.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from corpus import DOCUMENT_END
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 4096
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
BOS_ID = SPECIAL_TOKENS.index("<s>")

MIN_DOCUMENT_CHARS = 1000
MAX_DOCUMENT_CHARS = 120_000
SAMPLE_DOCUMENTS = 2500
SAMPLE_CHARS_PER_DOCUMENT = 20_000
VALIDATION_DOCUMENTS_ONE_IN = 50

WORD_SAMPLE_CHARS = 40_000_000
WORD_RANKS = slice(200, 1400)
"""Words of middling frequency: the commonest are poor names, the rare ones are many tokens."""


def train_tokenizer(documents: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE in which each digit is a token of its own, on a sample."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = (document[:SAMPLE_CHARS_PER_DOCUMENT] for document in documents[:SAMPLE_DOCUMENTS])
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer,
    documents: Sequence[str],
    max_tokens: int,
) -> list[np.ndarray]:
    """Encode documents, <s> before each, until there are `max_tokens`."""
    encoded: list[np.ndarray] = []
    num_tokens = 0
    for document in documents:
        ids = tokenizer.encode(document[:MAX_DOCUMENT_CHARS]).ids
        encoded.append(np.array([BOS_ID, *ids], dtype=np.uint16))
        num_tokens += len(ids)
        if num_tokens > max_tokens:
            break
    return encoded


def choose_words(text: str) -> list[str]:
    """Choose the words that register names are made of."""
    counts = collections.Counter(re.findall(r"\b[a-z]{4,8}\b", text[:WORD_SAMPLE_CHARS].lower()))
    return [word for word, _ in counts.most_common(WORD_RANKS.stop)][WORD_RANKS]


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Train the tokenizer and encode the corpus.")
    parser.add_argument("corpus", type=Path, help="the file that corpus.py wrote")
    parser.add_argument("data", type=Path, help="folder to write into")
    parser.add_argument("--max-tokens", type=int, default=28_000_000)
    parser.add_argument("--seed", type=int, default=1, help="seed of the documents' order")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    text = args.corpus.read_text(encoding="utf-8")
    documents = text.split(DOCUMENT_END)
    random.Random(args.seed).shuffle(documents)
    documents = [document for document in documents if len(document) > MIN_DOCUMENT_CHARS]

    args.data.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents)
    tokenizer.save(str(args.data / "tokenizer.json"))

    encoded = encode_documents(tokenizer, documents, args.max_tokens)
    num_validation = len(encoded) // VALIDATION_DOCUMENTS_ONE_IN
    if not num_validation:
        raise ValueError(f"`corpus` must hold more documents, got {len(encoded)}")
    for name, part in (("val", encoded[:num_validation]), ("train", encoded[num_validation:])):
        tokens = np.concatenate(part)
        np.save(args.data / f"{name}.npy", tokens)
        print(f"{name}: {len(part)} documents, {len(tokens)} tokens")
    (args.data / "words.txt").write_text("\n".join(choose_words(text)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
