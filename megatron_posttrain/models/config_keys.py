"""The keys of config.json that a family reads, and those that change nothing of what a model computes. All others are
refused unless their value asks for nothing (false, null, 0, empty): a key that is passed over in silence is another
model."""

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models.architecture import HfConfig

NEUTRAL = """
    architectures auto_map model_type name_or_path transformers_version torch_dtype dtype unsloth_fixed
    unsloth_version unsloth_training mlx_version is_decoder is_encoder_decoder task_specific_params
    tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    decoder_start_token_id image_token_id id2label label2id problem_type finetuning_task return_dict
    return_dict_in_generate chunk_size_feed_forward output_attentions output_hidden_states output_router_logits
    output_scores use_cache use_bfloat16 torchscript attn_implementation pretraining_tp initializer_range
    ep_size seq_aux aux_loss_alpha initial_context_length max_sequence_length model_max_length tf_legacy_loss
    cross_attention_hidden_size gradient_checkpointing max_length min_length do_sample num_beams num_beam_groups
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_return_sequences early_stopping diversity_penalty begin_suppress_tokens
    suppress_tokens bad_words_ids forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty
    remove_invalid_values is_llama_config transformers.js_config
"""

COMMON = """
    hidden_act hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers
    num_key_value_heads head_dim rms_norm_eps tie_word_embeddings vocab_size rope_parameters rope_scaling
    rope_theta partial_rotary_factor quantization_config
"""

_EXPERTS = "num_experts num_local_experts num_experts_per_tok router_aux_loss_coef"
_QWEN_MOE = f"{_EXPERTS} moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers"
_WINDOW = "sliding_window use_sliding_window max_window_layers"
READ = {
    "deepseek_v3": (
        "attention_bias rope_interleave scoring_func moe_layer_freq norm_topk_prob q_lora_rank kv_lora_rank qk_head_dim"
        " qk_nope_head_dim qk_rope_head_dim v_head_dim moe_intermediate_size num_experts_per_tok n_group topk_group"
        " topk_method n_routed_experts num_local_experts n_shared_experts first_k_dense_replace routed_scaling_factor"
        " num_nextn_predict_layers num_mtp_layers"
    ),
    "gpt_oss": (f"{_EXPERTS} experts_per_token attention_bias swiglu_alpha swiglu_limit layer_types sliding_window"),
    "llama": "attention_bias mlp_bias",
    "mistral": "sliding_window",
    "mixtral": f"{_EXPERTS} sliding_window",
    "qwen2": f"{_WINDOW} layer_types qkv_bias",
    "qwen2_moe": f"{_WINDOW} {_QWEN_MOE} layer_types qkv_bias shared_expert_intermediate_size",
    "qwen3": f"{_WINDOW} layer_types attention_bias",
    "qwen3_moe": f"{_WINDOW} {_QWEN_MOE} attention_bias",
}


def check_keys(config: HfConfig) -> None:
    """Refuses, with a `UserError`, the first key that asks for something which the family's model does not do."""
    family = config["model_type"]
    known = set(f"{NEUTRAL} {COMMON} {READ[family]}".split())
    for key, value in config.items():
        if key not in known and not key.startswith("_") and value not in (None, False, 0, "", [], {}):
            shown = str(value) if len(str(value)) < 80 else f"{str(value)[:77]}..."
            raise UserError(
                f"config.json: {key} is {shown}, which {family} models do not have here{nearest(key, known)}"
                " (remove a key that has no effect)"
            )
