"""What vLLM cannot run, told before an engine is made: against its own kernels, and its own messages."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_posttrain.models.architecture import Architecture, Rope
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from megatron_posttrain.rollout.limits import CPU_HEAD_SIZES, engine_problems, explained

# Which head sizes the compiled attention takes; as cpu_attn.py asks, "vec16" where 32 does not divide.
ASK = """
import json, torch
from vllm.platforms import current_platform
current_platform.import_kernels()
from vllm import _custom_ops as ops

def takes(size):
    ints = dict(dtype=torch.int32)
    try:
        ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1, num_heads=4, num_kv_heads=2, head_dim=size, seq_lens=torch.tensor([4], **ints),
            dtype=torch.float32, query_start_loc=torch.tensor([0, 4], **ints), causal=True, sliding_window_size=-1,
            isa="vec16" if size % 32 else "vec", enable_kv_split=False)
    except RuntimeError:
        return False
    return True

print(json.dumps([size for size in range(16, 529, 16) if takes(size)]))
"""
SMALL = Architecture("qwen3", 2, 64, 4, 2, 32, 128, 300, 256)


def problems(arch: Architecture, device: str = "cpu", **changed: int) -> list[str]:
    asked = {"tensor": 1, "length": 64, "dtype_bytes": 4} | changed
    cache = asked.pop("cache_bytes", None)
    return list(engine_problems(arch, device, cache_bytes=cache, **asked))  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM is built for CUDA here")
def test_head_sizes_are_those_of_the_compiled_kernels() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True, timeout=300)
    assert tuple(json.loads(done.stdout.splitlines()[-1])) == CPU_HEAD_SIZES


def test_a_model_that_runs_has_no_problem() -> None:
    assert problems(SMALL) == []
    assert problems(SMALL, tensor=2) == []
    for arch in KNOWN_MODELS.values():
        assert problems(arch, "cuda", length=4096, dtype_bytes=2) == []


def test_cache_for_one_sequence() -> None:
    """Keys and values of 2 layers x 2 groups x 32 in fp32: 1 KiB a token, half of it on each of two ranks."""
    assert problems(SMALL, cache_bytes=64 << 10) == []
    (said,) = problems(SMALL, cache_bytes=(64 << 10) - 1)
    assert "rollout.kv_cache_gib" in said
    assert problems(SMALL, tensor=2, cache_bytes=32 << 10) == []


def test_positions_count_the_scaling_of_rope() -> None:
    assert "256 positions" in problems(SMALL, length=257)[0]
    yarn = replace(SMALL, rope=Rope(1e4, "yarn", 4.0, 256))
    assert problems(yarn, length=1024) == []
    assert "1024 positions" in problems(yarn, length=1025)[0]
    assert problems(replace(SMALL, rope=Rope(1e4, "linear", 2.0)), length=512) == []


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("To serve at least one request with the models's max seq len (4096), (0.5 GiB KV cache is needed, which is "
            "larger than the available KV cache memory (0.25 GiB).", "raise rollout.kv_cache_gib"),
        ("Free memory on device cuda:0 (30.1/79.1 GiB) on startup is less than desired GPU memory utilization (0.5, "
            "39.6 GiB).", "rollout.offload=true"),
        ("Failed to find a kernel that can implement the ScaledMM linear layer. Reasons:", "bf16 first"),
        ("Total number of attention heads (4) must be divisible by tensor parallel size (3).", "change rollout.tensor"),
        ("User-specified max_model_len (512) is greater than the derived max_model_len (max_position_embeddings=256)",
            "lower data.sequence_length"),
    ],
)  # fmt: skip
def test_messages_of_vllm_get_our_keys(message: str, advice: str) -> None:
    told = explained(ValueError(f"1 validation error\n{message}\nsee the documentation"), "MODEL")
    assert told is not None
    assert message in str(told)
    assert advice in str(told)
    assert "\n" not in str(told)


def test_an_error_of_another_kind_keeps_its_traceback() -> None:
    assert explained(RuntimeError("an assertion failed in a worker"), "MODEL") is None
