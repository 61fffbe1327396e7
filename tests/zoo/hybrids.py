"""Families with recurrent states beside keys and values of every token, or without any, or without a cache."""

from __future__ import annotations

from tests.zoo.sizes import EXPERTS, LATENT, VOCABULARY_SIZE, WINDOW, Family, only, sizes

_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LINEAR_LAYERS = ["linear_attention", "linear_attention", "full_attention"]

HYBRIDS = [
    Family(
        "Qwen3-Next",
        "Qwen3NextConfig",
        sizes(**EXPERTS, **_LINEAR, num_experts=4, shared_expert_intermediate_size=32, layer_types=_LINEAR_LAYERS),
        is_fast=True,
    ),
    Family("Qwen3.5, Qwen3.6, text", "Qwen3_5TextConfig", sizes(**_LINEAR, layer_types=_LINEAR_LAYERS)),
    Family(
        "Qwen3.5-MoE, text",
        "Qwen3_5MoeTextConfig",
        sizes(**EXPERTS, **_LINEAR, num_experts=4, shared_expert_intermediate_size=32, layer_types=_LINEAR_LAYERS),
    ),
    Family(
        "Jamba",
        "JambaConfig",
        sizes(
            head_dim=None,
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            mamba_d_state=8,
            mamba_dt_rank=8,
        ),
    ),
    Family(
        "Nemotron-H",
        "NemotronHConfig",
        sizes(
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            ssm_state_size=16,
            num_hidden_layers=None,
            hybrid_override_pattern="M*-",
        ),
    ),
    Family("Falcon-H1", "FalconH1Config", sizes(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16)),
    Family("LFM2", "Lfm2Config", sizes(head_dim=None, layer_types=["conv", "conv", "full_attention"])),
    Family(
        "Granite 4, hybrid",
        "GraniteMoeHybridConfig",
        sizes(
            head_dim=None,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=_LINEAR_LAYERS,
            mamba_n_heads=4,
            mamba_d_head=32,
            mamba_d_state=16,
        ),
    ),
    Family(
        "Bamba",
        "BambaConfig",
        sizes(head_dim=None, attn_layer_indices=[2], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16),
    ),
    Family(
        "Kimi-Linear",
        "KimiLinearConfig",
        sizes(
            **LATENT,
            **EXPERTS,
            num_local_experts=4,
            linear_head_dim=16,
            linear_num_heads=4,
            layer_types=_LINEAR_LAYERS,
        ),
    ),
    Family(
        "Ling 3 (Bailing hybrid)",
        "BailingHybridConfig",
        sizes(
            **LATENT,
            **EXPERTS,
            num_experts=4,
            n_group=1,
            topk_group=1,
            num_mtp_layers=0,
            layer_group_size=3,
        ),
    ),
    Family(
        "LFM2-MoE",
        "Lfm2MoeConfig",
        sizes(**EXPERTS, head_dim=None, num_experts=4, layer_types=["conv", "conv", "full_attention"]),
    ),
    Family("LFM3", "Lfm3Config", sizes(head_dim=None, layer_types=["conv", "sliding_attention", "full_attention"])),
    Family("OLMo-Hybrid", "OlmoHybridConfig", sizes()),
    Family("RecurrentGemma", "RecurrentGemmaConfig", sizes(attention_window_size=WINDOW)),
    Family("Mamba", "MambaConfig", only(vocab_size=VOCABULARY_SIZE, hidden_size=64, num_hidden_layers=2, state_size=8)),
    Family(
        "Mamba 2",
        "Mamba2Config",
        only(vocab_size=VOCABULARY_SIZE, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=8),
    ),
    Family(
        "Falcon-Mamba",
        "FalconMambaConfig",
        only(vocab_size=VOCABULARY_SIZE, hidden_size=64, num_hidden_layers=2, state_size=8),
    ),
    Family("RWKV", "RwkvConfig", only(vocab_size=VOCABULARY_SIZE, hidden_size=64, num_hidden_layers=2)),
    Family("T5", "T5Config", only(vocab_size=VOCABULARY_SIZE, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)),
]
