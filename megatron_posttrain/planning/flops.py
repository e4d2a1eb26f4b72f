"""The matrix multiplications of a layer, which memory and step time are counted from too, and model FLOPs: what the
mathematics of a step asks for, whatever the implementation spends.

Conventions. A multiply-add is two FLOPs; only matrix multiplications count. A linear layer costs 2 FLOPs per weight
and token forward, 2 for the input's gradient and 2 for the weight's. Attention counts the query-key pairs that
the causal mask leaves, so about half of the square; packed sequences do not attend to each other; a sliding
window counts only pairs inside it. A mixture of experts counts the `top_k` and shared experts of a token.
The output head counts; the embedding look-up, the router, norms and recomputation do not. LoRA counts no weight
gradients of frozen layers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_posttrain.models.architecture import Architecture

JOINED = {"linear_qkv": 3, "linear_fc1": 2}  # Hugging Face projections in one module


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


def attention_pairs(lengths: Sequence[int], window: int | None = None, causal: bool = True) -> int:
    """Query-key pairs of packed sequences. `window` counts the tokens seen, the query's own included."""
    if not causal:
        return sum(n * n for n in lengths)
    if window is None:
        return sum(n * (n + 1) // 2 for n in lengths)
    return sum(n * min(n, window) - min(n, window) * (min(n, window) - 1) // 2 for n in lengths)


def layer_weights(arch: Architecture, layer: int) -> int:
    """Weights of `layer`'s linear modules that one token is multiplied with."""
    used = arch.moe.top_k if arch.moe is not None else 1
    return sum(linear.weights * (used if expert else 1) for linear, expert in layer_linears(arch, layer))


def adapter_weights(linear: Linear, rank: int, tensor: int = 1) -> float:
    """LoRA's weights beside a linear module, on one of `tensor` ranks: an A for each projection in it."""
    inputs, outputs = linear.local(tensor)
    return rank * (JOINED.get(linear.name, 1) * inputs + outputs)


def training_flops(
    arch: Architecture, lengths: Sequence[int], *, lora_rank: int | None = None, causal: bool = True
) -> float:
    """Forward and backward FLOPs of packed sequences of `lengths` tokens, in total over all of them.

    `causal=False` counts every pair, as kernels that do not skip the masked half (and profilers) do.
    """
    tokens = sum(lengths)
    layers = range(arch.num_layers)
    linear = 2.0 * tokens * sum(layer_weights(arch, layer) for layer in layers)
    pairs = sum(attention_pairs(lengths, window_of(arch, layer), causal) for layer in layers)
    attention = 2.0 * pairs * sum(attention_dims(arch))
    output = 2.0 * tokens * arch.hidden_size * arch.outputs
    if lora_rank is None:
        return 3 * (linear + attention + output)
    used = arch.moe.top_k if arch.moe is not None else 1
    modules = (module for layer in layers for module in layer_linears(arch, layer))
    adapters = 2.0 * tokens * sum(adapter_weights(x, lora_rank) * (used if expert else 1) for x, expert in modules)
    return 2 * (linear + output) + 3 * (adapters + attention)


def sequence_flops(arch: Architecture, lengths: Sequence[int]) -> list[float]:
    """Training FLOPs of each sequence: a x tokens + b x pairs of attention, about b / 2 x tokens^2."""
    a = training_flops(arch, [1]) - 6.0 * arch.num_layers * sum(attention_dims(arch))
    b = 6.0 * sum(attention_dims(arch))
    layers = Counter(window_of(arch, layer) for layer in range(arch.num_layers))
    return [a * n + b * sum(count * attention_pairs([n], window) for window, count in layers.items()) for n in lengths]


@lru_cache(maxsize=1024)
def flops_per_token(arch: Architecture, sequence_length: int, lora_rank: int | None = None) -> float:
    """Training FLOPs of one token of sequences of `sequence_length`."""
    return training_flops(arch, [sequence_length], lora_rank=lora_rank) / sequence_length
