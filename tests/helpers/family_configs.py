"""Tiny configs of `transformers`, one per model type, with every feature of the family switched on."""

from __future__ import annotations

from typing import Any

from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 101,  # odd, so that tensor parallelism has to pad it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LATENT: dict[str, Any] = SIZES | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
}


def tiny_configs() -> dict[str, PreTrainedConfig]:
    """By name of the test case."""
    return {
        "qwen2": Qwen2Config(**SIZES),
        "qwen2-window-tied": Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1, tie_word_embeddings=True
        ),
        "qwen2-moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=40, decoder_sparse_step=2),
        "qwen3": Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN, tie_word_embeddings=True),
        "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, norm_topk_prob=True, mlp_only_layers=[1]),
        "llama2": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
        "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
        "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=16),
        "mistral": MistralConfig(**SIZES, sliding_window=8),
        "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
        "deepseek-v3": DeepseekV3Config(**LATENT, q_lora_rank=20),
        "deepseek-v3-no-query-rank": DeepseekV3Config(**LATENT, q_lora_rank=None),
        "gpt-oss": GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    }
