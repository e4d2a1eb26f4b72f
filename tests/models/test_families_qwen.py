from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from tests.helpers.family_checks import check_family

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2(tmp_path: Path, tied: bool) -> None:
    arch = check_family(Qwen2Config(**SIZES, tie_word_embeddings=tied), tmp_path)
    assert arch.qkv_bias
    assert arch.tied_embeddings == tied


def test_qwen2_sliding_window(tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    arch = check_family(config, tmp_path)
    assert (arch.sliding_window, arch.sliding_layers) == (8, (1, 2))


def test_qwen2_moe(tmp_path: Path) -> None:
    config = Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=40, decoder_sparse_step=2)
    arch = check_family(config, tmp_path, moe=True)
    assert arch.moe is not None
    assert arch.moe.shared_gate
    assert arch.moe.dense_layers == (0, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_qwen3(tmp_path: Path, tied: bool) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
    config = Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=tied, rope_parameters=rope)
    arch = check_family(config, tmp_path, sizes=(1, 2, 4))
    assert arch.qk_norm
    assert (arch.rope.scaling, arch.rope.factor, arch.rope.base) == ("yarn", 4.0, 1e6)


@pytest.mark.parametrize("tied", [False, True])
def test_qwen3_moe(tmp_path: Path, tied: bool) -> None:
    config = Qwen3MoeConfig(
        **SIZES, **EXPERTS, head_dim=16, tie_word_embeddings=tied, mlp_only_layers=[1], norm_topk_prob=True
    )
    arch = check_family(config, tmp_path, moe=True, sizes=(1, 2, 4))
    assert arch.moe is not None
    assert arch.moe.normalize_top_k
    assert [arch.is_moe_layer(layer) for layer in range(3)] == [True, False, True]
