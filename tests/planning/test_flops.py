"""Model FLOPs against torch's counter on real transformers models, forward and backward.

torch counts fused attention as the whole square. So that it counts what the causal mask leaves, the models run an
attention that multiplies every query with the keys it may see and no others, one query at a time.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_posttrain.models.registry import architecture_from_hf
from megatron_posttrain.planning.flops import attention_pairs, flops_per_token, training_flops
from megatron_posttrain.planning.known_models import KNOWN_MODELS

transformers = pytest.importorskip("transformers")

BASE = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "intermediate_size": 160, "vocab_size": 512, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1}
LATENT = {
    "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16,
}  # fmt: skip
WINDOW = {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "grouped queries": ("qwen3", {"num_key_value_heads": 2}),
    "experts": ("qwen3_moe", {"num_key_value_heads": 2, **EXPERTS}),
    "latent attention": ("deepseek_v3", LATENT),
    "sliding window": ("gpt_oss", {"num_key_value_heads": 2, **WINDOW}),
}


def visible_keys_only(lengths: list[int]) -> Any:
    """An attention function for packed sequences of `lengths`."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        window = getattr(module, "sliding_window", None) or kwargs.get("sliding_window")
        outputs, start = [], 0
        for length in lengths:
            for i in range(start, start + length):
                low = max(start, i + 1 - window) if window else start
                weights = (query[:, :, i : i + 1] @ key[:, :, low : i + 1].transpose(-1, -2) * scaling).softmax(-1)
                outputs.append(weights @ value[:, :, low : i + 1])
            start += length
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    return attention


def count(kind: str, lengths: list[int], attention: str | None = None) -> tuple[float, Any, float]:
    """(FLOPs that torch counts, our architecture, FLOPs of the routers)."""
    model_type, changes = CONFIGS[kind]
    config = transformers.AutoConfig.for_model(model_type, **{**BASE, **changes})
    name = attention or f"visible_keys_only_{'_'.join(map(str, lengths))}"
    if attention is None:
        transformers.AttentionInterface.register(name, visible_keys_only(lengths))
    config._attn_implementation = name
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=name, experts_implementation="eager", dtype=torch.float32
    )
    tokens = torch.randint(0, 512, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
    arch = architecture_from_hf(json.loads(config.to_json_string(use_diff=False)))
    sparse = sum(arch.is_moe_layer(n) for n in range(arch.num_layers))
    routers = 6.0 * sum(lengths) * sparse * (arch.moe.num_experts if arch.moe else 0) * arch.hidden_size
    return counter.get_total_flops(), arch, routers


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("lengths", [[24], [4, 13, 3]], ids=["one sequence", "packed"])
def test_against_torchs_counter(kind: str, lengths: list[int]) -> None:
    counted, arch, routers = count(kind, lengths)
    ours = training_flops(arch, lengths)
    assert ours == pytest.approx(counted - routers, rel=2e-3)
    assert ours == pytest.approx(counted, rel=0.01)  # routers, which do not count, and rotary tables


def test_whole_square_against_torchs_counter() -> None:
    counted, arch, _ = count("grouped queries", [64], attention="eager")
    assert training_flops(arch, [64], causal=False) == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize(("window", "lengths"), [(None, [5, 3]), (4, [9, 2]), (1, [6]), (100, [7])])
def test_attention_pairs_by_enumeration(window: int | None, lengths: list[int]) -> None:
    pairs = sum(1 for n in lengths for q in range(n) for k in range(q + 1) if window is None or q - k < window)
    assert attention_pairs(lengths, window) == pairs


def test_lora_against_torchs_counter() -> None:
    peft = pytest.importorskip("peft")
    config = transformers.AutoConfig.for_model("qwen3", **{**BASE, "num_key_value_heads": 2})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names))
    # The first layer's input needs no gradient in a real run either, but all other layers pass one on.
    model.enable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(0, 512, (1, 64)), use_cache=False).logits.logsumexp(-1).sum().backward()
    arch = architecture_from_hf(json.loads(config.to_json_string(use_diff=False)))
    ours = training_flops(arch, [64], lora_rank=4, causal=False)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("model", "gflop"),
    [("Qwen3-30B-A3B", 23.0), ("Qwen3-8B", 49.0), ("Qwen3-235B-A22B", 148.0), ("DeepSeek-V3", 249.8)],
)
def test_published_flops_per_token(model: str, gflop: float) -> None:
    """Published tokens/s and TFLOP/s at 4,096 tokens imply these."""
    assert flops_per_token(KNOWN_MODELS[model], 4096) / 1e9 == pytest.approx(gflop, rel=0.005)


def test_tflops_of_a_published_row() -> None:
    """Qwen3-30B-A3B on 16 H100: 8654.602 tokens/s/GPU at 4,096 tokens is reported as 199.12 TFLOP/s/GPU."""
    seconds = 1024 * 4096 / 16 / 8654.602
    reported = training_flops(KNOWN_MODELS["Qwen3-30B-A3B"], [4096] * 1024) / seconds / 16 / 1e12
    assert reported == pytest.approx(199.12, rel=0.005)
