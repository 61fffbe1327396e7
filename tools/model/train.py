"""Train the bundled model: half on prose, half on finding records in it.

    python tools/model/train.py DATA CHECKPOINT --minutes 27 --stage 0:256:32:0.5

DATA is the folder that tokenizer.py wrote. README.md has the commands of the whole training.
Time, not steps, is the budget: a stage begins at a share of the minutes.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import MistralConfig, MistralForCausalLM

VOCABULARY_SIZE = 4096
HIDDEN_SIZE = 256
NUM_LAYERS = 6
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 64
ROPE_THETA = 100_000.0
RMS_NORM_EPS = 1e-6

ADAM_LEARNING_RATE = 3e-3
MUON_LEARNING_RATE = 0.02
MUON_MOMENTUM = 0.95
MUON_WEIGHT_DECAY = 0.1
WARM_UP_STEPS = 100
EVALUATION_SECONDS = 150
NUM_EVALUATION_BATCHES = 8
ANSWER_WEIGHT = 3.0


def model_config() -> MistralConfig:
    """Return the bundled model's architecture."""
    return MistralConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=640,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=16384,
        rms_norm_eps=RMS_NORM_EPS,
        rope_theta=ROPE_THETA,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


@dataclass(frozen=True)
class Stage:
    """What is trained from `start`, a share of the time, on."""

    start: float
    num_tokens: int
    batch_size: int
    retrieval_share: float

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read START:TOKENS:BATCH:SHARE, as in 0.3:4096:2:0.6."""
        start, num_tokens, batch_size, retrieval_share = text.split(":")
        return cls(float(start), int(num_tokens), int(batch_size), float(retrieval_share))


class TrainingData:
    """Draw sequences of prose and of the retrieval task."""

    def __init__(self, data: Path, words: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
        self._words = words.read_text(encoding="utf-8").split()
        self._train = np.load(data / "train.npy")
        self.validation = np.load(data / "val.npy")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def prose(self, num_tokens: int, rng: random.Random) -> tuple[list[int], list[float]]:
        """Draw tokens of the training text and their loss weights, all 1."""
        start = rng.randrange(len(self._train) - num_tokens - 1)
        return self._train[start : start + num_tokens].tolist(), [1.0] * num_tokens

    def retrieval(self, num_tokens: int, rng: random.Random) -> tuple[list[int], list[float]]:
        """Draw records 'register a-b: 12345' among prose, then questions that they answer.

        The shorter the sequence, the larger the share of the questions: dense supervision makes
        the model learn to look up early. Returns tokens and their loss weights.
        """
        prose_share = rng.choice([0, 0, 0.3, 0.6, 0.85]) if num_tokens > 300 else 0.0
        limits = ((300, 0.5), (1100, 0.35), (5000, 0.2))
        question_share = next((share for limit, share in limits if num_tokens <= limit), 0.12)
        body_tokens = int(num_tokens * (1 - question_share))
        mean_prose_tokens = prose_share / (1 - prose_share) * 52 + 1

        records: dict[str, str] = {}
        ids = [1, *self._encode("The record of the registers follows.\n")]
        while len(ids) < body_tokens - 20 or not records:
            if prose_share and rng.random() < 0.25:
                count = int(rng.expovariate(1 / mean_prose_tokens)) + 5
                count = min(count, max(5, body_tokens - len(ids) - 30))
                ids += self.prose(count, rng)[0] + self._encode("\n")
            register = f"{rng.choice(self._words)}-{rng.choice(self._words)}"
            if register not in records:
                records[register] = "".join(rng.choices("0123456789", k=5))
                ids += self._encode(f"register {register}: {records[register]}\n")
        ids += self._encode("The record ends.\n")
        weights = [0.3] * len(ids)

        order = list(records.items())
        rng.shuffle(order)
        asked = 0
        newline = self._encode("\n")
        while len(ids) < num_tokens:
            register, value = order[asked % len(order)]
            asked += 1
            asking = f"What is the value of register {register}?\n" if rng.random() < 0.3 else ""
            question = self._encode(f"{asking}register {register}:")
            answer = self._encode(f" {value}")
            ids += question + answer + newline
            weights += [0.2] * len(question) + [ANSWER_WEIGHT] * len(answer) + [0.3] * len(newline)
        return ids[:num_tokens], weights[:num_tokens]

    def batch(self, stage: Stage, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw ids, int64, and loss weights, float32, both [batch_size, num_tokens]."""
        rows = [
            self.retrieval(stage.num_tokens, rng)
            if rng.random() < stage.retrieval_share
            else self.prose(stage.num_tokens, rng)
            for _ in range(stage.batch_size)
        ]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([w for _, w in rows])


class Muon:
    """Momentum whose update is made orthogonal, for matrices.

    Source: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._momenta = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update with the gradients; `rate` is a share of the learning rate."""
        for parameter, momentum in zip(self._parameters, self._momenta, strict=True):
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 1 - MUON_MOMENTUM)
            # Nesterov momentum.
            gradient = parameter.grad.lerp(momentum, MUON_MOMENTUM)
            update = orthogonalize(gradient.bfloat16()).to(parameter.dtype)
            rows, columns = parameter.shape
            learning_rate = MUON_LEARNING_RATE * rate
            parameter.mul_(1 - learning_rate * MUON_WEIGHT_DECAY)
            parameter.add_(update, alpha=-learning_rate * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """Bring the singular values of `matrix` near 1 by a Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if is_tall else x
    for _ in range(num_iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn heads [batch, heads, num_tokens, head_dim] by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def forward(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Compute the logits of a Mistral model; plain functions compile better than the module."""
    batch_size, num_tokens = ids.shape
    embeddings = weights["model.embed_tokens.weight"]
    inverse_wavelengths = 1 / ROPE_THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    angles = torch.outer(torch.arange(num_tokens).float(), inverse_wavelengths)
    cosines, sines = angles.cos().to(embeddings.dtype), angles.sin().to(embeddings.dtype)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (HIDDEN_SIZE,), weights[name], RMS_NORM_EPS)

    hidden = F.embedding(ids, embeddings)
    for i in range(NUM_LAYERS):
        layer = f"model.layers.{i}."

        def linear(x: torch.Tensor, name: str, layer: str = layer) -> torch.Tensor:
            return F.linear(x, weights[f"{layer}{name}.weight"])

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(batch_size, num_tokens, -1, HEAD_DIM).transpose(1, 2)

        x = norm(hidden, f"{layer}input_layernorm.weight")
        query, key, value = (heads(linear(x, f"self_attn.{name}_proj")) for name in ("q", "k", "v"))
        query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        key, value = (x.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for x in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch_size, num_tokens, HIDDEN_SIZE)
        hidden = hidden + linear(attended, "self_attn.o_proj")
        x = norm(hidden, f"{layer}post_attention_layernorm.weight")
        gate = F.silu(linear(x, "mlp.gate_proj"))
        hidden = hidden + linear(gate * linear(x, "mlp.up_proj"), "mlp.down_proj")
    return F.linear(norm(hidden, "model.norm.weight"), embeddings)


def weighted_loss(
    parameters: dict[str, torch.nn.Parameter], ids: torch.Tensor, loss_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the weighted mean cross entropy in nats per token, with bf16 compute."""
    logits = forward({name: p.bfloat16() for name, p in parameters.items()}, ids)
    logits = logits[:, :-1].float().flatten(0, 1)
    losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    weights = loss_weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def evaluate(
    model: MistralForCausalLM,
    data: TrainingData,
    num_tokens: int = 1024,
) -> tuple[float, float]:
    """Return the validation loss, nats per token, and the share of right answer tokens."""
    loss = 0.0
    num_right = num_asked = 0
    rng = random.Random(123)
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(NUM_EVALUATION_BATCHES):
            block = data.validation[i * num_tokens : (i + 1) * num_tokens].astype(np.int64)
            prose = torch.from_numpy(block)[None]
            loss += model(prose, labels=prose).loss.item()
            ids, weights = (torch.tensor(x) for x in data.retrieval(num_tokens, rng))
            predicted = model(ids[None]).logits[0, :-1].argmax(-1)
            is_answer = weights[1:] == ANSWER_WEIGHT
            num_right += int((predicted == ids[1:])[is_answer].sum())
            num_asked += int(is_answer.sum())
    return loss / NUM_EVALUATION_BATCHES, num_right / num_asked


def learning_rate_share(progress: float, step: int) -> float:
    """Warm up over the first steps; from half of the time on, fall to a fiftieth."""
    decay = 1.0 if progress < 0.5 else max(0.02, (1 - progress) / 0.5)
    return min(1, step / WARM_UP_STEPS) * decay


def train(
    model: MistralForCausalLM,
    data: TrainingData,
    stages: Sequence[Stage],
    minutes: float,
    checkpoint: Path,
    loss_function: Callable[..., torch.Tensor],
    rng: random.Random,
) -> None:
    """Train for `minutes` of wall time, and save the weights now and then and at the end."""
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in parameters.items() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    start = last_report = time.monotonic()
    step = num_tokens = 0
    while (progress := (time.monotonic() - start) / 60 / minutes) < 1:
        stage = [s for s in stages if progress >= s.start][-1]
        ids, loss_weights = data.batch(stage, rng)
        loss = loss_function(parameters, ids, loss_weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        rate = learning_rate_share(progress, step)
        for group in adam.param_groups:
            group["lr"] = ADAM_LEARNING_RATE * rate
        adam.step()
        muon.step(rate)
        model.zero_grad(set_to_none=True)
        step += 1
        num_tokens += ids.numel()
        if time.monotonic() - last_report > EVALUATION_SECONDS:
            last_report = time.monotonic()
            validation_loss, accuracy = evaluate(model, data)
            print(
                f"{progress:.0%} step {step} tokens {num_tokens / 1e6:.2f}M of {stage.num_tokens} "
                f"loss {loss.item():.3f} validation {validation_loss:.3f} answers {accuracy:.1%}",
                flush=True,
            )
            torch.save(model.state_dict(), checkpoint)
    torch.save(model.state_dict(), checkpoint)
    print(f"trained {step} steps, {num_tokens / 1e6:.2f}M tokens")


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("data", type=Path, help="folder that tokenizer.py wrote")
    parser.add_argument("checkpoint", type=Path, help="file for the weights")
    parser.add_argument("--minutes", type=float, required=True, help="wall time to train for")
    parser.add_argument("--init", type=Path, help="checkpoint to go on from")
    parser.add_argument(
        "--stage",
        type=Stage.parse,
        action="append",
        required=True,
        metavar="START:TOKENS:BATCH:SHARE",
        help="from this share of the time on: tokens, sequences, share of retrieval; repeatable",
    )
    parser.add_argument("--words", type=Path, default=Path(__file__).with_name("words.txt"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    stages = sorted(args.stage, key=lambda stage: stage.start)
    if stages[0].start != 0:
        raise ValueError(f"`--stage` must begin at 0, got {stages[0].start}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = TrainingData(args.data, args.words)
    model = MistralForCausalLM(model_config())
    if args.init:
        model.load_state_dict(torch.load(args.init, weights_only=True))
    loss_function = weighted_loss
    if not args.no_compile:
        loss_function = torch.compile(weighted_loss, dynamic=False)
    rng = random.Random(args.seed)
    train(model, data, stages, args.minutes, args.checkpoint, loss_function, rng)
    for num_tokens in (1024, 4096):
        if num_tokens * NUM_EVALUATION_BATCHES <= len(data.validation):
            loss, accuracy = evaluate(model, data, num_tokens)
            print(f"{num_tokens} tokens: validation {loss:.3f} answers {accuracy:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
