"""Families with experts, or with a latent instead of keys and values."""

from __future__ import annotations

from tests.zoo.sizes import EXPERTS, LATENT, SIZES, WINDOW, Family, only, sizes

_GLOBAL_LAST = ["sliding_attention", "sliding_attention", "full_attention"]
_DEEPSEEK = {
    **LATENT,
    **EXPERTS,
    "head_dim": None,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

MIXTURES = [
    Family("Mixtral", "MixtralConfig", sizes(num_local_experts=4)),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        sizes(**EXPERTS, head_dim=None, num_experts=4, shared_expert_intermediate_size=32),
    ),
    Family("Qwen3-MoE", "Qwen3MoeConfig", sizes(**EXPERTS, num_experts=4)),
    Family(
        "Phi-3.5-MoE",
        "PhimoeConfig",
        sizes(head_dim=None, num_local_experts=4, num_experts_per_tok=2),
        half_tolerance=2.0,
    ),
    Family("OLMoE", "OlmoeConfig", sizes(head_dim=None, num_experts=4, num_experts_per_tok=2)),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        sizes(
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 8,
            },
        ),
        "attention sinks of the model's own",
        is_fast=True,
    ),
    Family(
        "GLM-4.5, 4.6",
        "Glm4MoeConfig",
        sizes(
            **EXPERTS,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            partial_rotary_factor=0.5,
        ),
    ),
    Family("GLM-4.7 Flash", "Glm4MoeLiteConfig", sizes(**_DEEPSEEK), "latent attention"),
    Family(
        "DeepSeek V2", "DeepseekV2Config", sizes(**_DEEPSEEK, topk_method="group_limited_greedy"), "latent attention"
    ),
    Family(
        "DeepSeek V3, R1, Kimi K2",
        "DeepseekV3Config",
        sizes(**_DEEPSEEK, rope_interleave=True),
        "latent attention",
        is_fast=True,
    ),
    Family("DeepSeek V3.2", "DeepseekV32Config", sizes(**_DEEPSEEK, index_n_heads=2, index_head_dim=16, index_topk=8)),
    Family("DeepSeek V4", "DeepseekV4Config", sizes(**EXPERTS, n_routed_experts=4)),
    Family("MiniMax-Text-01", "MiniMaxConfig", sizes(num_local_experts=4, num_experts_per_tok=2)),
    Family("MiniMax-M2", "MiniMaxM2Config", sizes(num_local_experts=4, num_experts_per_tok=2)),
    Family("Granite 3 MoE", "GraniteMoeConfig", sizes(head_dim=None, num_local_experts=4, num_experts_per_tok=2)),
    Family(
        "Granite 4, attention only",
        "GraniteMoeHybridConfig",
        sizes(
            head_dim=None,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=96,
            layer_types=["full_attention"] * 3,
        ),
        is_fast=True,
    ),
    Family(
        "Llama 4, text",
        "Llama4TextConfig",
        sizes(
            num_hidden_layers=4,
            attention_chunk_size=WINDOW,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=96,
            layer_types=["chunked_attention"] * 3 + ["full_attention"],
            no_rope_layers=[1, 1, 1, 0],
        ),
        "chunked layers; global layers without positions",
        is_fast=True,
    ),
    Family(
        "Ernie 4.5 MoE",
        "Ernie4_5_MoeConfig",
        sizes(moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=1),
    ),
    Family(
        "Arctic Trinity, AFMoE",
        "AfmoeConfig",
        sizes(
            **EXPERTS,
            num_experts=4,
            num_shared_experts=1,
            sliding_window=WINDOW,
            layer_types=_GLOBAL_LAST,
            num_dense_layers=1,
        ),
    ),
    Family(
        "MiMo-V2-Flash",
        "MiMoV2FlashConfig",
        sizes(
            **EXPERTS,
            n_routed_experts=4,
            sliding_window=WINDOW,
            layer_types=_GLOBAL_LAST,
            v_head_dim=8,
            swa_head_dim=16,
            swa_v_head_dim=8,
            swa_num_key_value_heads=2,
            swa_num_attention_heads=4,
            moe_layer_freq=[0, 1, 1],
        ),
    ),
    Family("HunYuan-A13B", "HunYuanMoEV1Config", sizes(num_experts=4, moe_topk=2, moe_intermediate_size=32)),
    Family("FlexOlmo", "FlexOlmoConfig", sizes(head_dim=None, num_experts=4, num_experts_per_tok=2)),
    Family(
        "LongCat-Flash",
        "LongcatFlashConfig",
        sizes(
            **{**LATENT, "head_dim": 8},
            ffn_hidden_size=96,
            expert_ffn_hidden_size=32,
            n_routed_experts=4,
            zero_expert_num=2,
            moe_topk=2,
            num_layers=2,
            num_hidden_layers=None,
            intermediate_size=None,
        ),
    ),
    Family("MiniCPM3", "MiniCPM3Config", sizes(**{**LATENT, "head_dim": None})),
    Family(
        "DBRX",
        "DbrxConfig",
        only(
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=256,
            vocab_size=SIZES["vocab_size"],
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
        ),
    ),
    Family("JetMoE", "JetMoeConfig", sizes(head_dim=None, kv_channels=16, num_local_experts=4, num_experts_per_tok=2)),
]
