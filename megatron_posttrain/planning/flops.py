"""Model FLOPs: what the mathematics of a step asks for, whatever the implementation spends.

Conventions. A multiply-add is two FLOPs; only matrix multiplications count. A linear layer costs 2 FLOPs per weight
and token forward, 2 for the input's gradient and 2 for the weight's. Attention counts the query-key pairs that
the causal mask leaves, so about half of the square; packed sequences do not attend to each other; a sliding
window counts only pairs inside it. A mixture of experts counts the `top_k` and shared experts of a token.
The output head counts; the embedding look-up, the router, norms and recomputation do not. LoRA counts no weight
gradients of frozen layers.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.planning.layers import Linear, attention_dims, layer_linears, window_of

JOINED = {"linear_qkv": 3, "linear_fc1": 2}  # Hugging Face projections in one module


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
