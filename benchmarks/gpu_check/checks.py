"""What has to be right before speed matters: kernels, layers, FP8, refit, GRPO."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import subjects
from benchmarks.gpu_check.harness import Check, Facts, Setting, Skip
from megatron_posttrain.models.modules import kernels
from megatron_posttrain.models.modules.attention import PackedAttention
from megatron_posttrain.platform import platform
from megatron_posttrain.platform.cuda import fp8_recipes
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.sequences import sequence_logprobs

SUBJECTS = ("Qwen3-8B", "Qwen3-30B-A3B")  # their structure, at small sizes
ROOT = Path(__file__).resolve().parents[2]
# bf16 has 8 bits of mantissa: 2^-8 of a value, and sums of a few roundings.
KERNEL_TOLERANCE = 0.02
LOGPROB_TOLERANCE = 0.05  # mean difference of bf16 layers to fp32, nats; a tenth of what a swapped weight does
LOSS_TOLERANCE = 0.03  # relative, of the mean of the last five losses


def device_check(setting: Setting) -> Facts:
    """The device multiplies, and the process group starts."""
    device, found = platform(), subjects.groups()
    a = torch.arange(9.0, device=device.device).view(3, 3)
    total = (a @ a).sum()
    torch.distributed.all_reduce(total, group=found.data)
    assert total.item() == 486.0, f"3 x 3 product sums to {total.item()}, not 486"
    return {"platform": device.name, "backend": device.backend, "transformer_engine": device.has_transformer_engine()}


def attention_check(setting: Setting) -> Facts:
    """PackedAttention, with and without a window, against softmax written out in fp32; gradients too."""
    lengths, heads, groups, dim = (33, 7, 64) if setting.toy else (1000, 37, 2048), 8, 2, 64
    device = platform().device
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    facts: Facts = {"kernel": "varlen" if kernels.varlen_attention(torch.bfloat16, dim) else "sdpa"}
    pg = SimpleNamespace(cp=subjects.groups().context, tp=subjects.groups().tensor)
    for window in (None, 16):
        options = SimpleNamespace(
            kv_channels=dim, softmax_type="vanilla", window_attn_skip_freq=None, window_size=window and (window - 1, 0)
        )
        attention = PackedAttention(options, 1, pg_collection=pg)
        generator = torch.Generator(device=device).manual_seed(0)
        shapes = ((heads, dim), (groups, dim), (groups, dim), (heads, dim))
        q, k, v, weights = (
            torch.randn(sum(lengths), *s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes
        )
        packed = SimpleNamespace(cu_seqlens_q=bounds, max_seqlen_q=max(lengths))

        def ours(*x: Tensor, module: PackedAttention = attention, packed: Any = packed) -> Tensor:
            return module(*x, None, packed_seq_params=packed).view(-1, heads, dim)

        def formula(*x: Tensor, window: int | None = window) -> Tensor:
            parts = zip(*(t.split(lengths) for t in x), strict=True)
            return torch.cat([_softmax_attention(q, k, v, window) for q, k, v in parts])

        found = _with_gradients(ours, (q, k, v), weights)
        expected = _with_gradients(formula, tuple(x.float() for x in (q, k, v)), weights)
        facts["window" if window else "full"] = _close(found, expected)
    return facts


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    repeat, n = q.shape[1] // k.shape[1], q.shape[0]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)[None]
    seen = (distance >= 0) & (distance < (window or n))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def experts_check(setting: Setting) -> Facts:
    """GroupedExperts in bf16 against megatron-core's own forward pass, expert by expert, on the same weights."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_posttrain.models.build import transformer_config
    from megatron_posttrain.models.modules.experts import GroupedExperts

    of, hidden = subjects.config("torch"), 64 if setting.toy else 1024
    layout, arch = subjects.groups().layout, subjects.shrunk("Qwen3-30B-A3B", hidden)
    counts = [3, 0, 64, 17, 1, 0, 30, 5]
    device = platform().device
    with platform().megatron():
        experts = GroupedExperts(
            len(counts),
            transformer_config(arch, layout, of.model, of.precision),
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ).to(device)
        x = torch.randn(sum(counts), hidden, device=device, dtype=torch.bfloat16)
        probs = torch.rand(sum(counts), device=device)
        per_expert = torch.tensor(counts)
        found, expected = (
            _with_gradients(lambda x, p, run=run: run(experts, x, per_expert, p)[0], (x, probs), torch.ones_like(x))
            for run in (GroupedExperts.forward, SequentialMLP.forward)
        )
    return {"difference": _close(found, expected), "in use": kernels.grouped_matmul(torch.bfloat16)}


def parity_check(implementation: str, name: str) -> Check:
    """Log-probs of a small model in bf16 against the same weights on the CPU in fp32."""

    def check(setting: Setting) -> Facts:
        if implementation == "transformer_engine":
            subjects.need_transformer_engine()
        hidden = 64 if setting.toy else 256
        arch = subjects.shrunk(name, hidden)
        engine = Engine.of(subjects.config(implementation), arch, subjects.groups(), train=False)
        found = sequence_logprobs(engine, subjects.sequences(4, 48, arch.vocab_size, 0), 96)
        weights = {k: v.float().cpu() for k, v in subjects.named(engine.modules, arch).items()}
        with tempfile.TemporaryDirectory() as directory:
            given, told = Path(directory) / "in.pt", Path(directory) / "out.pt"
            torch.save((name, hidden, weights), given)
            _process("-m", "benchmarks.gpu_check.reference", given, told, CUDA_VISIBLE_DEVICES="")
            expected = torch.load(told, weights_only=True)
        difference = (torch.cat(found) - torch.cat(expected)).abs()
        mean = float(difference.mean())
        assert mean < LOGPROB_TOLERANCE, f"mean difference of log-probs {mean:.3g}, allowed {LOGPROB_TOLERANCE}"
        return {"mean": mean, "largest": float(difference.max())}

    return check


def training_check(fp8: str | None) -> Check:
    """Losses of bf16 against fp32 or, with a recipe, of FP8 against bf16, from the same weights."""

    def check(setting: Setting) -> Facts:
        if fp8 is not None:
            subjects.need_transformer_engine()
            capability = torch.cuda.get_device_capability()
            if fp8 not in fp8_recipes(capability):
                raise Skip(f"{fp8} does not run on compute capability {capability[0]}.{capability[1]}")
        arch = subjects.shrunk("Qwen3-8B", 64 if setting.toy else 256)
        # Transformer Engine's attention over packed rows has no fp32.
        layers = "torch" if fp8 is None else "transformer_engine"
        wide = subjects.config(layers, "fp32" if fp8 is None else "bf16")
        start = subjects.named(Engine.of(wide, arch, subjects.groups(), train=False).modules, arch)
        expected = subjects.losses(setting, wide, start, arch)
        found = subjects.losses(setting, subjects.config(layers, fp8=fp8), start, arch)
        last, wanted = (sum(x[-5:]) / len(x[-5:]) for x in (found, expected))
        assert abs(last / wanted - 1) < LOSS_TOLERANCE, f"last losses {last:.4f}, reference {wanted:.4f}"
        return {"steps": len(found), "first": found[0], "last": last, "reference": wanted}

    return check


def grpo_check(setting: Setting) -> Facts:
    """The quickstart's model: three steps of GRPO, whose every refit is proved against the trainer's log-probs."""
    if setting.toy:
        raise Skip("toy run: the tests of GRPO do this on CPU")
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    with tempfile.TemporaryDirectory() as directory:
        assets, output = Path(directory) / "assets", Path(directory) / "grpo"
        _process(ROOT / "examples/quickstart/make_assets.py", assets, "--train", 100, "--rl", 64, "--heldout", 16)
        overrides = {
            "parallel.tensor": 1, "parallel.pipeline": 1, "parallel.expert": 1, "precision.dtype": "bf16",
            "training.steps": 3, "model.path": assets / "model", "data.train": assets / "rl.jsonl", "output": output,
        }  # fmt: skip
        config = ROOT / "examples/quickstart/grpo.yaml"
        _process("-m", "megatron_posttrain", "grpo", "--config", config, *(f"{k}={v}" for k, v in overrides.items()))
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3, f"{len(steps)} steps of 3"
    return {k: steps[-1].get(k) for k in ("logprob_difference", "refit_seconds", "rollout_seconds", "step_seconds")}


def _with_gradients(work: Callable[..., Tensor], inputs: tuple[Tensor, ...], weights: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = work(*leaves)
    return [out.detach(), *torch.autograd.grad((out.float() * weights.float()).sum(), leaves)]


def _close(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest root mean square error relative to the reference's root mean square."""
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < KERNEL_TOLERANCE, f"relative errors of the output and gradients: {errors}"
    return max(errors)


def _process(*arguments: Any, **environment: str) -> None:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    base = {k: v for k, v in os.environ.items() if k not in dropped} | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, env=base | environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(line[1:4])} exited with {done.returncode}: {done.stderr[-600:]}"


CHECKS: list[tuple[str, Check]] = [
    ("platform", device_check),
    ("attention kernel", attention_check),
    ("grouped experts kernel", experts_check),
    *((f"layers, torch, {m}", parity_check("torch", m)) for m in SUBJECTS),
    *((f"layers, transformer_engine, {m}", parity_check("transformer_engine", m)) for m in SUBJECTS),
    ("training, bf16 against fp32", training_check(None)),
    *((f"training, fp8 {r} against bf16", training_check(r)) for r in ("delayed", "tensorwise", "blockwise", "mxfp8")),
    ("refit proof and GRPO, 3 steps", grpo_check),
]  # fmt: skip
