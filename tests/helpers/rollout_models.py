"""Tiny Qwen3 checkpoints with a byte-level tokenizer, for the tests of rollouts and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers.chat_tokenizers import CHATML, byte_tokenizer

# A file of a user's
EVEN = """
from megatron_posttrain.rewards import reward

@reward("even")
def even(sample):
    return float(len(sample.response) % 2 == 0)
"""


VOCAB = 286  # not a multiple of vLLM's padding (64), so that padding rows are exercised
KINDS = {  # name -> (mixture of experts, tied embeddings)
    "dense_tied": (False, True),
    "dense_untied": (False, False),
    "moe_tied": (True, True),
    "moe_untied": (True, False),
}


def make_model(directory: Path, kind: str, seed: int, hidden: int = 64) -> Any:
    """Random weights, large enough that every tensor matters for the log-probs; saved in fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    moe, tied = KINDS[kind]
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    if moe:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts, norm_topk_prob=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.eval().save_pretrained(directory)
    return model


def make_tokenizer(directory: Path) -> Any:
    """As Qwen3's base tokenizers: the template ends a turn with another token than the tokenizer's own end."""
    tokenizer: Any = byte_tokenizer(
        CHATML, special=["<|im_start|>", "<|im_end|>", "<|endoftext|>"], eos="<|endoftext|>"
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(directory)
    return tokenizer
