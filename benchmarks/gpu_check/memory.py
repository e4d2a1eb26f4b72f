"""What libraries and a sleeping engine keep on the device: figures that the planner assumes."""

from __future__ import annotations

import importlib.util
import itertools
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.gpu_check import subjects
from benchmarks.gpu_check.harness import Check, Facts, Setting, Skip
from megatron_posttrain.platform import platform

ROOT = Path(__file__).resolve().parents[2]


def device_mib() -> float:
    """Memory of the device in use, whoever uses it, less what torch's allocator only keeps."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return platform().used_memory_bytes() / 2**20


def masked_attention(setting: Setting) -> Facts:
    """Gradients of attention with a mask, log-sum-exp near -120: as torch computes it after our set-up, and cuDNN.

    pytorch issue 196678: cuDNN's are not finite with torch 2.13 and cuDNN 9.20 on Hopper.
    """
    if not torch.cuda.is_available():
        raise Skip("cuDNN's attention needs CUDA")
    length, dim = 704, 64
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, gradient = (
        torch.randn(1, 1, length, dim, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)
    )
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(dim)
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]

    def not_finite() -> int:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], attn_mask=mask)
        return sum(int((~g.isfinite()).sum()) for g in torch.autograd.grad(out, leaves, gradient))

    subjects.groups()
    ours = not_finite()
    assert ours == 0, f"{ours} gradients of masked attention are not finite"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return {"not finite": ours, "not finite, cuDNN": not_finite(), "cudnn": torch.backends.cudnn.version()}


def communicators(setting: Setting) -> Facts:
    """Device memory of NCCL communicators of one rank: the first (with what NCCL sets up once) and the next two."""
    if not torch.cuda.is_available():
        raise Skip("NCCL needs CUDA")
    subjects.groups()
    x = torch.ones(1 << 20, device=platform().device)
    used = [device_mib()]
    for _ in range(3):
        torch.distributed.all_reduce(x, group=torch.distributed.new_group([0], backend="nccl"))
        used.append(device_mib())
    steps = [b - a for a, b in itertools.pairwise(used)]
    return {"first_mib": steps[0], "second_mib": steps[1], "third_mib": steps[2], "nccl": torch.cuda.nccl.version()}


def sleeping_engine(setting: Setting) -> Facts:
    """Device memory with a vLLM engine of the quickstart's model: made, asleep, woken and written, closed."""
    if not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None:
        raise Skip("needs CUDA and vLLM")
    from megatron_posttrain.rollout import RolloutEngine

    subjects.groups()
    with tempfile.TemporaryDirectory() as directory:
        line = [sys.executable, ROOT / "examples/quickstart/make_assets.py", directory]
        subprocess.run([*map(str, line), "--train", "8", "--rl", "8", "--heldout", "8"], check=True)
        before = device_mib()
        engine = RolloutEngine(
            f"{directory}/model", dtype=torch.bfloat16, max_model_len=512, kv_cache_bytes=2 << 30, max_num_seqs=256
        )
        facts: Facts = {"awake_mib": device_mib() - before}
        first = engine.greedy([[1, 2, 3]], 8)
        engine.sleep()
        facts["asleep_mib"] = device_mib() - before
        facts["answered"] = len(first[0].token_ids)
        engine.close()
        facts["closed_mib"] = device_mib() - before
    return facts


MEMORY: list[tuple[str, Check]] = [
    ("masked attention", masked_attention),
    ("memory of communicators", communicators),
    ("memory of a sleeping engine", sleeping_engine),
]
