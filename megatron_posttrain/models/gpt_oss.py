"""gpt-oss (arXiv 2508.10925): attention sinks, windows in every other layer, experts with biases. Its checkpoints hold
all experts of a layer in one tensor, [experts, in, out], the rows of gate and up in turns; the table names the parts as
if each were a tensor of its own."""

from megatron_posttrain.models import common
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.disk_layout import Fusion
from megatron_posttrain.models.weights import ColumnParallel, Mapping, on


def _fusion(disk: str, kind: str, parts: tuple[str, ...]) -> Fusion:
    names = tuple(f"{common.EXPERTS}*.{part}.{kind}" for part in parts)
    return Fusion(f"{common.EXPERTS}{disk}", names, interleaved=True, transposed=kind == "weight")


ALWAYS_FUSED = True
FUSIONS = (
    _fusion("gate_up_proj", "weight", ("gate_proj", "up_proj")),
    _fusion("gate_up_proj_bias", "bias", ("gate_proj", "up_proj")),
    _fusion("down_proj", "weight", ("down_proj",)),
    _fusion("down_proj_bias", "bias", ("down_proj",)),
)


def architecture(config: HfConfig) -> Architecture:
    common.require(config, "attention_bias", (True,), True)
    common.require(config, "swiglu_alpha", (1.702,), 1.702)
    common.require(config, "swiglu_limit", (7.0,), 7.0)
    count = common.need(config, "num_hidden_layers")
    types = config.get("layer_types") or ["sliding_attention", "full_attention"] * count
    names = ("num_local_experts", "num_experts")
    moe = common.mixture(config, names, "intermediate_size", 0.0, softmax_after_top_k=True, router_bias=True)
    return common.base_architecture(
        config,
        rope=common.rope(config, default_base=150_000.0),
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        attention_sinks=True,
        activation="gpt_oss_glu",
        sliding_window=config.get("sliding_window", 128),
        sliding_layers=tuple(layer for layer in range(count) if types[layer] == "sliding_attention"),
        moe=moe,
    )


def table(arch: Architecture) -> list[Mapping]:
    name = f"{common.LAYER}self_attention.core_attention.softmax_offset"
    sinks = ColumnParallel(name, (f"{common.HF_LAYER}self_attn.sinks",), ((arch.num_heads,),))
    rows = common.table(arch, common.router(arch, "mlp.router"), common.experts(arch))
    return rows + on(range(arch.num_layers), [sinks])
