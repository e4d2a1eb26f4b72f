from pathlib import Path

import pytest
from transformers import LlamaConfig, MistralConfig, MixtralConfig

from tests.helpers.family_checks import check_family

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("tied", [False, True])
def test_llama3(tmp_path: Path, tied: bool) -> None:
    arch = check_family(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=tied), tmp_path)
    assert (arch.rope.scaling, arch.rope.original_max_position) == ("llama3", 32)


def test_llama_biases_and_head_dim(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, head_dim=16, attention_bias=True, mlp_bias=True)
    arch = check_family(config, tmp_path)
    assert (arch.qkv_bias, arch.attention_output_bias, arch.mlp_bias) == (True, True, True)


@pytest.mark.parametrize("window", [None, 16])
def test_mistral(tmp_path: Path, window: int | None) -> None:
    arch = check_family(MistralConfig(**SIZES, sliding_window=window), tmp_path)
    assert (arch.sliding_window, arch.sliding_layers) == ((16, (0, 1)) if window else (None, ()))


def test_mixtral(tmp_path: Path) -> None:
    arch = check_family(MixtralConfig(**SIZES, num_local_experts=4), tmp_path, moe=True)
    assert arch.moe is not None
    assert arch.moe.num_experts == 4
