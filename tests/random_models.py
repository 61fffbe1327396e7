"""Small random models for the pipeline's tests: every architecture that a cache can differ in, with fixed seeds."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cachegen.pipeline.model import LoadedModel, quiet_transformers, read_rotary_embeddings

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED_MODEL = str(REPOSITORY / "models" / "tiny-mistral")
VOCABULARY_SIZE = 4096

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_SHARED),
    "mistral with a sliding window": transformers.MistralConfig(**_SHARED, sliding_window=16),
    "gemma3 with local and global layers": transformers.Gemma3TextConfig(
        **_SHARED,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=16,
    ),
    "gpt2 with learned positions": transformers.GPT2Config(
        vocab_size=VOCABULARY_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    ),
    "deepseek with unlike keys and values": transformers.DeepseekV3Config(
        **{**_SHARED, "num_key_value_heads": 4, "head_dim": 8},
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=3,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For every test of a module that imports it: with matrices this small, threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@functools.cache
def load_tokenizer() -> Any:
    """The bundled model's tokenizer; all models here have its vocabulary."""
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def make_loaded(config: transformers.PreTrainedConfig) -> LoadedModel:
    """A random fp32 model of `config` on the CPU, loud enough that its greedy tokens differ from each other."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(4)
    return LoadedModel(model, load_tokenizer(), "random", "0" * 64, read_rotary_embeddings(model))


@functools.cache
def make_named(name: str) -> LoadedModel:
    """The model of `CONFIGS[name]`; made once, so tests must not change it."""
    return make_loaded(CONFIGS[name])


def save_model(config: transformers.PreTrainedConfig, folder: Path) -> Path:
    """A folder with the model of `make_loaded` and the bundled model's tokenizer."""
    with quiet_transformers():
        make_loaded(config).model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(BUNDLED_MODEL) / name, folder / name)
    return folder


def copy_with_other_keys(folder: Path) -> Path:
    """Copy the bundled model, with larger keys in layer 2: a fine-tune behind the same config and tokenizer."""
    shutil.copytree(BUNDLED_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.k_proj.weight"] *= 1.25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_token_ids(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Random ids, int32, without the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY_SIZE, (num_tokens,), generator=generator, dtype=torch.int32)
