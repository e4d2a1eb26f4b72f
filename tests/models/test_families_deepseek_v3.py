import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config

from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.errors import UserError
from megatron_posttrain.models import registry
from tests.helpers.family_checks import check_family, joined, saved_tensors, tiny_model

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
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
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize("q_rank", [None, 20])
def test_deepseek_v3(tmp_path: Path, q_rank: int | None) -> None:
    config = DeepseekV3Config(**SIZES, q_lora_rank=q_rank, rope_parameters=YARN)
    arch = check_family(config, tmp_path, moe=True)
    assert arch.moe is not None
    assert arch.mla is not None
    assert (arch.moe.num_groups, arch.moe.top_k_groups, arch.moe.shared_ffn_size) == (4, 2, 48)
    assert arch.rope.mscale_all_dim == 1.0


def test_group_score_of_another_number_of_experts_is_refused() -> None:
    config = DeepseekV3Config(**SIZES).to_dict() | {"num_experts_per_tok": 3}
    with pytest.raises(UserError, match="num_experts_per_tok is 3; with topk_group=2 it has to be 4"):
        registry.architecture_from_hf(config)


def test_multi_token_prediction_layer_kept_or_dropped(tmp_path: Path) -> None:
    """The layer's names are those of the published checkpoints: layer number `num_hidden_layers`."""
    model = tiny_model(DeepseekV3Config(**SIZES, q_lora_rank=20))
    model.save_pretrained(tmp_path)
    tensors = saved_tensors(tmp_path)
    extra = {
        name.replace("layers.2.", "layers.3."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.2." in name
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        extra[f"model.layers.3.{name}.weight"] = torch.randn(32).bfloat16()
    extra["model.layers.3.eh_proj.weight"] = torch.randn(32, 64).bfloat16()
    extra["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    extra["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))

    _, dropped = check_directory(tmp_path)
    assert dropped.num_mtp_layers == 0
    assert set(registry.layout(dropped).shapes) == set(tensors)
    assert registry.hf_config(dropped, config)["num_nextn_predict_layers"] == 0

    kept = registry.architecture_from_hf(config, keep_mtp=True)
    assert registry.layout(kept).shapes == {n: tuple(t.shape) for n, t in (tensors | extra).items()}
    assert registry.hf_config(kept, config) == config
    back = dict(registry.layout(kept).assemble(joined(kept, tmp_path, 2)))
    assert all(torch.equal(back[name], tensor) for name, tensor in (tensors | extra).items())
    names = {plan.name for plan in registry.tensors(kept)}
    assert "mtp.layers.0.transformer_layer.mlp.experts.local_experts.7.linear_fc1.weight" in names
