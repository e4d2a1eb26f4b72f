"""What this machine's vLLM cannot run, told from a model's shapes before an engine is made."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.planning.rollout import cache_bytes_per_token

CPU_CACHE_BYTES = 256 << 20
# Kernels that vLLM 0.32 was compiled with for CPU: attention by head size, experts in tiles of 32.
CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_TILE = 32
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for in adapters


@dataclass(frozen=True)
class EngineKeys:
    """What the user calls an engine's settings: configuration keys, or a command's options."""

    tensor: str = "rollout.tensor"
    length: str = "data.sequence_length"
    cache: str = "rollout.kv_cache_gib"


def engine_problems(
    arch: Architecture,
    device: str,
    *,
    tensor: int,
    expert: bool = False,
    length: int,
    cache_bytes: int | None,
    dtype_bytes: int,
    keys: EngineKeys = EngineKeys(),
) -> Iterator[str]:
    """Why an engine of `tensor` ranks for sequences of `length` tokens cannot run on `device` (cpu or cuda); one reason
    each. `cache_bytes`: of one rank; None: sized by the engine.
    """
    if length > arch.context_length:
        yield f"{keys.length}={length} is longer than the {arch.context_length} positions of the model"
    if expert and arch.moe is None:
        yield "rollout.expert=true: the model has no experts"
    sizes = {"model's attention heads": arch.num_heads, "model's MLP width": arch.ffn_size}
    if arch.moe is not None and expert:
        sizes["number of experts"] = arch.moe.num_experts
    elif arch.moe is not None:
        sizes["experts' width"] = arch.moe.expert_ffn_size
    for name, size in sizes.items():
        if size % tensor:
            yield f"{keys.tensor}={tensor} does not divide the {name} ({size})"
    if device == "cpu":
        yield from _cpu_problems(arch, 1 if expert else tensor)
        cache_bytes = cache_bytes or CPU_CACHE_BYTES
    needed = length * cache_bytes_per_token(arch, tensor, dtype_bytes)
    if cache_bytes is not None and needed > cache_bytes:
        yield (
            f"{keys.cache}={cache_bytes / 2**30:.3g} is too small for one sequence of {keys.length}={length} tokens, "
            f"which needs {needed / 2**30:.3g} GiB"
        )


def _cpu_problems(arch: Architecture, tensor: int) -> Iterator[str]:
    if arch.mla is None and arch.head_dim not in CPU_HEAD_SIZES:
        yield (
            f"model.path: vLLM on CPU has no attention for a head size of {arch.head_dim}; "
            f"allowed: {', '.join(map(str, CPU_HEAD_SIZES))}"
        )
    if arch.moe is None:
        return
    widths = {"hidden size": arch.hidden_size}
    if arch.activation == "gpt_oss_glu":  # other experts are padded
        widths["experts' width of a rank"] = arch.moe.expert_ffn_size // tensor
    for name, size in widths.items():
        if size % CPU_TILE:
            yield f"model.path: vLLM on CPU needs multiples of {CPU_TILE} with experts; found a {name} of {size}"


# Of vLLM's messages, and what to change. The first that is found explains an error.
_EXPLANATIONS = (
    (r"quantiz|fp8|mxfp4|ScaledMM", "the weights of model.path are quantised (quantization_config in its config.json) "
        "and there is no kernel for that here: write them in bf16 first (tools/convert_hf_to_megatron.py and back)"),
    (r"KV cache|cache blocks|max seq len", "raise rollout.kv_cache_gib or rollout.gpu_memory_fraction, or lower "
        "data.sequence_length"),
    (r"max_model_len|max_position_embeddings", "lower data.sequence_length"),
    (r"[Ff]ree memory|out of memory|gpu_memory_utilization", "lower rollout.gpu_memory_fraction, raise rollout.tensor, "
        "or set rollout.offload=true"),
    (r"attention heads|tensor parallel|divisible", "change rollout.tensor"),
    (r"head_dim|head size|head_size", "vLLM on this machine has no attention for the head size of model.path"),
    (r"not supported|[Uu]nsupported|architectures", "vLLM does not run this model on this machine"),
)  # fmt: skip


def explained(error: Exception, model: str) -> UserError | None:
    """A message with the project's keys for an error of vLLM's start; None where the cause is not known."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for pattern, advice in _EXPLANATIONS:
        said = next((line for line in lines if re.search(pattern, line)), None)
        if said is not None:
            return UserError(f"rollout: vLLM cannot start on {model}: {said} ({advice})")
    return None
