"""A training process: its output at the start, its leave at the end."""

import logging

import torch.distributed as dist

from megatron_posttrain.parallel.groups import start_distributed


def quiet_libraries() -> None:
    """One readable stream: libraries speak up only for errors."""
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("megatron", "transformers", "torch.distributed", "torch._library", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(text: str) -> None:
    """A line for a person, once a job."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def finish(status: int = 0) -> None:
    """Leaves the job together; a rank that goes early would break the others' last collective. `status`: the process's,
    which rollout ranks take over."""
    if dist.is_initialized():
        if not (bridge := start_distributed()).generates:
            bridge.order("leave", status)
        dist.barrier()
        dist.destroy_process_group()
