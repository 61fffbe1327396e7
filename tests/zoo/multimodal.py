"""Families that take images, too, used with text alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers

from tests.zoo.sizes import EXPERTS, SIZES, WINDOW, Family

_IDS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def text(**fields: Any) -> dict[str, Any]:
    """Return the shared sizes, but for `fields`."""
    return {name: value for name, value in {**SIZES, **fields}.items() if value is not None}


def _command_r() -> transformers.Cohere2Config:
    """Return the decoder of Aya Vision and Command-A Vision."""
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    return transformers.Cohere2Config(**text(head_dim=None, sliding_window=WINDOW, layer_types=layer_types))


_FAMILIES = [
    Family(
        "Qwen2-VL",
        "Qwen2VLConfig",
        lambda: {
            "text_config": text(head_dim=None, rope_parameters=_MROPE),
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            **_IDS,
        },
    ),
    Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLConfig",
        lambda: {"text_config": text(head_dim=None, rope_parameters=_MROPE), "vision_config": _QWEN_VISION, **_IDS},
        is_fast=True,
    ),
    Family(
        "Qwen3-VL",
        "Qwen3VLConfig",
        lambda: {
            "text_config": text(rope_parameters=_MROPE),
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_IDS,
        },
    ),
    Family(
        "Qwen3.5, Qwen3.6",
        "Qwen3_5Config",
        lambda: {
            "text_config": text(
                layer_types=["linear_attention", "linear_attention", "full_attention"],
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=16,
                linear_value_head_dim=16,
            ),
            "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
            **_IDS,
        },
    ),
    Family(
        "Mistral Small 3.1",
        "Mistral3Config",
        lambda: {
            "text_config": transformers.MistralConfig(**text(sliding_window=None)),
            "vision_config": transformers.PixtralVisionConfig(**{**_SIGLIP, "head_dim": 16}),
            "image_token_index": 500,
        },
    ),
    Family(
        "Gemma 3",
        "Gemma3Config",
        lambda: {
            "text_config": transformers.Gemma3TextConfig(
                **text(sliding_window=WINDOW, layer_types=["sliding_attention", "sliding_attention", "full_attention"])
            ),
            "vision_config": transformers.SiglipVisionConfig(**_SIGLIP),
            "mm_tokens_per_image": 4,
            "image_token_index": 500,
            "boi_token_index": 501,
            "eoi_token_index": 502,
        },
    ),
    Family(
        "Llama 4",
        "Llama4Config",
        lambda: {
            "text_config": transformers.Llama4TextConfig(
                **text(
                    num_hidden_layers=4,
                    attention_chunk_size=WINDOW,
                    num_local_experts=2,
                    interleave_moe_layer_step=2,
                    intermediate_size_mlp=96,
                    layer_types=["chunked_attention"] * 3 + ["full_attention"],
                    no_rope_layers=[1, 1, 1, 0],
                )
            ),
            "vision_config": transformers.Llama4VisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                vision_output_dim=32,
                projector_input_dim=32,
                projector_output_dim=32,
            ),
            "image_token_index": 500,
        },
    ),
    Family(
        "InternVL 3",
        "InternVLConfig",
        lambda: {
            "text_config": transformers.Qwen2Config(**text(head_dim=None)),
            "vision_config": {**_SIGLIP, "image_size": [16, 16], "patch_size": [8, 8]},
            "image_token_id": 500,
        },
    ),
    Family(
        "LLaVA 1.5",
        "LlavaConfig",
        lambda: {
            "text_config": transformers.LlamaConfig(**text()),
            "vision_config": transformers.CLIPVisionConfig(**_SIGLIP),
            "image_token_index": 500,
        },
    ),
    Family(
        "LLaVA-OneVision",
        "LlavaOnevisionConfig",
        lambda: {
            "text_config": transformers.Qwen2Config(**text(head_dim=None)),
            "vision_config": transformers.SiglipVisionConfig(**_SIGLIP),
            "image_token_index": 500,
            "video_token_index": 501,
            "image_grid_pinpoints": [[16, 16]],
        },
    ),
    Family(
        "GLM-4.1V",
        "Glm4vConfig",
        lambda: {
            "text_config": text(head_dim=None, rope_parameters={**_MROPE, "mrope_section": [2, 3, 3]}),
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": 4,
                "image_size": 16,
            },
            **_IDS,
            "image_start_token_id": 504,
            "image_end_token_id": 505,
        },
    ),
    Family(
        "PaliGemma",
        "PaliGemmaConfig",
        lambda: {
            "text_config": transformers.GemmaConfig(**text()),
            "vision_config": transformers.SiglipVisionConfig(**_SIGLIP),
            "image_token_index": 500,
            "projection_dim": 64,
        },
    ),
    Family(
        "Idefics 3",
        "Idefics3Config",
        lambda: {"text_config": transformers.LlamaConfig(**text()), "vision_config": _SIGLIP, "image_token_id": 500},
    ),
    Family(
        "Qwen3-VL-MoE",
        "Qwen3VLMoeConfig",
        lambda: {
            "text_config": text(**EXPERTS, num_experts=4, rope_parameters=_MROPE),
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_IDS,
        },
    ),
    Family(
        "Llama 3.2 Vision",
        "MllamaConfig",
        lambda: {
            "text_config": text(
                head_dim=None,
                num_hidden_layers=4,
                cross_attention_layers=[1],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            ),
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": 500,
        },
    ),
    Family(
        "LLaVA-NeXT",
        "LlavaNextConfig",
        lambda: {
            "text_config": transformers.MistralConfig(**text(sliding_window=None)),
            "vision_config": transformers.CLIPVisionConfig(**_SIGLIP),
            "image_token_index": 500,
            "image_grid_pinpoints": [[16, 16]],
        },
    ),
    Family(
        "Aya Vision",
        "AyaVisionConfig",
        lambda: {
            "text_config": _command_r(),
            "vision_config": transformers.SiglipVisionConfig(**_SIGLIP),
            "image_token_index": 500,
        },
    ),
    Family(
        "Command-A Vision",
        "Cohere2VisionConfig",
        lambda: {
            "text_config": _command_r(),
            "vision_config": transformers.SiglipVisionConfig(**_SIGLIP),
            "image_token_id": 500,
        },
    ),
    Family(
        "SmolVLM 2",
        "SmolVLMConfig",
        lambda: {"text_config": transformers.LlamaConfig(**text()), "vision_config": _SIGLIP, "image_token_id": 500},
    ),
    Family(
        "GLM-4.5V",
        "Glm4vMoeConfig",
        lambda: {
            "text_config": text(
                **EXPERTS,
                head_dim=None,
                n_routed_experts=4,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                rope_parameters={**_MROPE, "mrope_section": [1, 1, 2]},
            ),
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": 4,
                "image_size": 16,
            },
            **_IDS,
            "image_start_token_id": 504,
            "image_end_token_id": 505,
        },
    ),
]
MULTIMODAL = [dataclasses.replace(family, note=family.note or "text alone") for family in _FAMILIES]
