"""The configuration and the command that run a planned layout."""

import math
from typing import Any

from megatron_posttrain.planning.gpus import Gpu
from megatron_posttrain.planning.planner import COMMUNICATOR_GIB, ENGINE_COMMUNICATORS, Estimate
from megatron_posttrain.planning.rollout import ENGINE_GIB, GIB
from megatron_posttrain.planning.workload import Workload

FP8_RECIPES = {"fp8": "tensorwise", "mxfp8": "mxfp8"}
SAMPLES_PER_PROMPT = (8, 16, 4, 6, 10, 5, 7, 3, 2)  # the first that divides the batch
PROMPT_TOKENS = 1024  # left for a prompt in a sequence, or a quarter of a short one


def command_of(task: str) -> str:
    """The training command of a task; pre-training runs on the same rows as SFT."""
    return "sft" if task in ("pretrain", "lora") else task


def config_of(model: str, e: Estimate, work: Workload, gpu: Gpu) -> dict[str, Any]:
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
    if work.lora:
        tree["lora"] = {"rank": work.rank} | ({"quantization": work.quantization} if work.quantization else {})
    if work.beside is not None:
        tree["critic" if work.rollouts else "teacher"] = {"path": work.beside_path}
    if e.rollout is not None:
        samples = next((n for n in SAMPLES_PER_PROMPT if work.global_batch % n == 0), work.global_batch)
        tree["rollout"] = {
            "prompts_per_step": work.global_batch // samples,
            "samples_per_prompt": samples,
            "max_tokens": work.sequence_length - min(PROMPT_TOKENS, work.sequence_length // 4),
        } | rollout_of(e, gpu)
    return {name: section for name, section in tree.items() if section != {}}


def rollout_of(e: Estimate, gpu: Gpu) -> dict[str, Any]:
    """What is chosen of an engine. vLLM is given room for its weights and the cache of all samples, and no more than
    is free then."""
    assert e.rollout is not None
    wanted = (e.rollout.weights_bytes + e.rollout.cache_bytes) / GIB + ENGINE_GIB
    kept = ["weights", "critic_weights", "fp8_weights", "communication", "allocator"]
    kept += [] if e.offload else ["gradients", "critic_gradients", "optimizer", "critic_optimizer"]
    free = gpu.memory_gib - sum(e.memory_gib.get(name, 0.0) for name in kept) - ENGINE_COMMUNICATORS * COMMUNICATOR_GIB
    share = min(math.ceil(wanted / gpu.memory_gib * 20) / 20, math.floor(free / gpu.memory_gib * 100) / 100)
    return {"tensor": e.rollout.tensor, "offload": e.offload, "gpu_memory_fraction": max(share, 0.0)}


def launch_of(task: str, gpus: int, gpu: Gpu) -> str:
    """The torchrun command, to be started on every node."""
    per_node = min(gpus, gpu.per_node)
    nodes = -(-gpus // per_node)
    where = "--standalone" if nodes == 1 else f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500"
    return f"torchrun {where} --nproc-per-node {per_node} -m megatron_posttrain {command_of(task)} --config plan.yaml"
