"""Mixtral (arXiv 2401.04088): every layer has experts; the top-k probabilities are renormalised."""

from megatron_posttrain.models import common
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.disk_layout import Fusion
from megatron_posttrain.models.weights import Mapping

BLOCK = "block_sparse_moe."
EXPERT = f"{common.HF_LAYER}{BLOCK}experts.*."

# The fused layout renames the block as well.
FUSIONS = (
    Fusion(f"{common.HF_LAYER}mlp.experts.gate_up_proj", (f"{EXPERT}w1.weight", f"{EXPERT}w3.weight")),
    Fusion(f"{common.HF_LAYER}mlp.experts.down_proj", (f"{EXPERT}w2.weight",)),
    Fusion(f"{common.HF_LAYER}mlp.gate.weight", (f"{common.HF_LAYER}{BLOCK}gate.weight",)),
)


def architecture(config: HfConfig) -> Architecture:
    moe = common.mixture(config, ("num_local_experts", "num_experts"), "intermediate_size")
    window = common.sliding_layers(config, config.get("sliding_window"), 0)
    return common.base_architecture(config, moe=moe, **window)


def table(arch: Architecture) -> list[Mapping]:
    names = ("w1", "w3", "w2")
    return common.table(arch, common.router(arch, f"{BLOCK}gate"), common.experts(arch, f"{BLOCK}experts.*.", names))
