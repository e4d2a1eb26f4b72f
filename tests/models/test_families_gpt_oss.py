from pathlib import Path

import torch
from transformers import GptOssConfig

from megatron_posttrain.checkpoint.hf import HfReader, directory_layout
from megatron_posttrain.models import registry
from tests.helpers.family_checks import check_family, split, tiny_model

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
}


def test_gpt_oss(tmp_path: Path) -> None:
    arch = check_family(GptOssConfig(**SIZES), tmp_path, moe=True)
    assert arch.attention_sinks
    assert arch.sliding_layers == (0, 2)
    assert (arch.rope.scaling, arch.rope.truncate) == ("yarn", False)


def test_expert_computes_what_transformers_computes(tmp_path: Path) -> None:
    """The shards of one expert, as megatron-core would use them, against the module of `transformers`."""
    model = tiny_model(GptOssConfig(**SIZES), torch.float32)
    model.save_pretrained(tmp_path)
    arch = registry.architecture_from_hf(model.config.to_dict())
    reader = HfReader(tmp_path)
    read = directory_layout(reader, arch).reader(reader.get_slice)
    plans = {plan.name: plan for plan in registry.tensors(arch)}
    prefix, x = "decoder.layers.1.mlp.experts.local_experts.3.", torch.randn(5, 32)
    out = split(plans[f"{prefix}linear_fc2.bias"], read, 0, 2).expand(5, -1)
    for rank in range(2):
        fc1, bias, fc2 = (
            split(plans[prefix + name], read, rank, 2)
            for name in ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight")
        )
        gate, up = torch.nn.functional.linear(x, fc1, bias).chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        out = out + torch.nn.functional.linear((up + 1) * gate * torch.sigmoid(1.702 * gate), fc2)
    experts = model.model.layers[1].mlp.experts
    chosen, weights = torch.full((5, 1), 3), torch.ones(5, 1)
    torch.testing.assert_close(out, experts(x, chosen, weights), atol=1e-5, rtol=1e-5)
