"""The configuration and the command that run a planned layout."""

from __future__ import annotations

from typing import Any

from megatron_posttrain.planning.gpus import Gpu
from megatron_posttrain.planning.planner import Estimate
from megatron_posttrain.planning.workload import Workload

FP8_RECIPES = {"fp8": "tensorwise", "mxfp8": "mxfp8"}
SAMPLES_PER_PROMPT = 8


def command_of(task: str) -> str:
    """The training command of a task; pre-training runs on the same rows as SFT."""
    return "grpo" if task == "grpo" else "sft"


def config_of(model: str, e: Estimate, work: Workload) -> dict[str, Any]:
    """A configuration tree with what the plan decides; data, rewards and learning rate are the user's."""
    sizes = {key: size for key, size in e.layout.sizes.items() if size > 1}
    tree: dict[str, Any] = {
        "model": {"path": model, "recompute": e.recompute},
        "parallel": sizes,
        "precision": {"dtype": "bf16", "fp8": FP8_RECIPES.get(work.precision)},
        "data": {"train": "TRAIN.jsonl", "sequence_length": work.sequence_length},
        "training": {"global_batch_size": work.global_batch, "micro_batch_size": e.micro_batch},
        "output": "runs/plan",
    }
    if work.task == "lora":
        tree["lora"] = {"rank": work.lora_rank}
    if work.task == "grpo":
        samples = SAMPLES_PER_PROMPT if work.global_batch % SAMPLES_PER_PROMPT == 0 else 1
        tree["rollout"] = {
            "prompts_per_step": work.global_batch // samples,
            "samples_per_prompt": samples,
            "tensor": e.rollout_tensor,
        } | ({"offload": True} if work.offload else {})
    return {name: section for name, section in tree.items() if section != {}}


def launch_of(task: str, gpus: int, gpu: Gpu, config: str = "plan.yaml") -> str:
    """The torchrun command, to be started on every node."""
    per_node = min(gpus, gpu.per_node)
    nodes = -(-gpus // per_node)
    where = "--standalone" if nodes == 1 else f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500"
    return f"torchrun {where} --nproc-per-node {per_node} -m megatron_posttrain {command_of(task)} --config {config}"
