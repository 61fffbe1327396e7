"""The sizes that all models of the zoo share: small enough to be made and run in about a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

VOCABULARY_SIZE = 512
WINDOW = 16
"""Tokens of a sliding window, and of a chunk of chunked attention."""
MAX_POSITIONS = 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


@dataclass(frozen=True)
class Family:
    """Models that users know by one name.

    Attributes:
        name: as its makers write it.
        class_name: of the config in transformers; a release of it that has none has no such models.
        fields: of that config.
        note: what is particular about its cache.
        is_fast: whether `make test` has it.
        half_tolerance: difference of logits in fp16, relative to their spread, that rounding may make. It makes 0.012
            at most, unless a router chooses other experts for it.
    """

    name: str
    class_name: str
    fields: Callable[[], dict[str, Any]]
    note: str = ""
    is_fast: bool = False
    half_tolerance: float = 0.05

    @property
    def is_known(self) -> bool:
        """Whether the installed transformers has such models."""
        return hasattr(transformers, self.class_name)

    def make_config(self) -> transformers.PreTrainedConfig:
        """Return the config of a tiny model."""
        return getattr(transformers, self.class_name)(**self.fields())


def sizes(**fields: Any) -> Callable[[], dict[str, Any]]:
    """Return the shared sizes, but for `fields`; a field of None is left to the class."""
    merged = {**SIZES, **fields}
    return lambda: {name: value for name, value in merged.items() if value is not None}


def only(**fields: Any) -> Callable[[], dict[str, Any]]:
    """Return `fields`, for configs that name their sizes otherwise."""
    return lambda: dict(fields)
