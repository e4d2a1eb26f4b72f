"""The matrix multiplications of a transformer layer, which FLOPs, memory and step time are all counted from."""

from dataclasses import dataclass
from typing import Literal

from megatron_posttrain.models.architecture import Architecture


@dataclass(frozen=True)
class Linear:
    """y = x W^T: `outputs` x `inputs` weights. Sizes are global; `sharding` says which one TP divides."""

    name: str  # megatron-core's module name
    inputs: int
    outputs: int
    sharding: Literal["column", "row", "none"]
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    def local(self, tensor: int) -> tuple[int, int]:
        """(inputs, outputs) on one of `tensor` ranks."""
        if self.sharding == "column":
            return self.inputs, self.outputs // tensor
        if self.sharding == "row":
            return self.inputs // tensor, self.outputs
        return self.inputs, self.outputs


def attention_linears(arch: Architecture) -> tuple[Linear, ...]:
    """Projections of self-attention: grouped-query or multi-latent (arXiv 2405.04434, section 2.1)."""
    hidden = arch.hidden_size
    bias = arch.qkv_bias or arch.attention_output_bias or arch.mlp_bias  # as megatron-core's switches have it
    if arch.mla is None:
        qkv = Linear("linear_qkv", hidden, arch.query_size + 2 * arch.key_value_size, "column", bias)
        return (Linear("linear_proj", arch.query_size, hidden, "row", arch.attention_output_bias), qkv)
    mla = arch.mla
    query = arch.num_heads * (mla.qk_nope_dim + mla.qk_rope_dim)
    q = [Linear("linear_q_proj", hidden, query, "column")]
    if mla.q_rank is not None:
        q = [Linear("linear_q_down_proj", hidden, mla.q_rank, "column")]
        q.append(Linear("linear_q_up_proj", mla.q_rank, query, "column"))
    return (
        Linear("linear_proj", arch.num_heads * mla.v_dim, hidden, "row", arch.attention_output_bias),
        *q,
        Linear("linear_kv_down_proj", hidden, mla.kv_rank + mla.qk_rope_dim, "column"),
        Linear("linear_kv_up_proj", mla.kv_rank, arch.num_heads * (mla.qk_nope_dim + mla.v_dim), "column"),
    )


def mlp_linears(arch: Architecture, ffn_size: int) -> tuple[Linear, Linear]:
    """Gate and up together, then down: of a dense MLP, one expert, or all shared experts."""
    return (
        Linear("linear_fc1", arch.hidden_size, 2 * ffn_size, "column", arch.mlp_bias),
        Linear("linear_fc2", ffn_size, arch.hidden_size, "row", arch.mlp_bias),
    )


def layer_linears(arch: Architecture, layer: int) -> list[tuple[Linear, bool]]:
    """All linear modules of a layer, and whether they are of each expert; the router is none of them."""
    moe = arch.moe if arch.is_moe_layer(layer) else None
    width = arch.ffn_size if moe is None else moe.shared_ffn_size
    found = [(linear, False) for linear in (*attention_linears(arch), *(mlp_linears(arch, width) if width else ()))]
    return found + [(linear, True) for linear in mlp_linears(arch, moe.expert_ffn_size)] if moe else found


def attention_dims(arch: Architecture) -> tuple[int, int]:
    """Width of all heads' query-key products and of all heads' values."""
    if arch.mla is not None:
        return arch.num_heads * (arch.mla.qk_nope_dim + arch.mla.qk_rope_dim), arch.num_heads * arch.mla.v_dim
    return arch.query_size, arch.query_size


def window_of(arch: Architecture, layer: int) -> int | None:
    """Tokens that a query of `layer` sees, itself included; None: all before it."""
    return arch.sliding_window if layer in arch.sliding_layers else None
