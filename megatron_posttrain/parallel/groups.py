"""torch.distributed and megatron-core's process groups, made here and nowhere else."""

import datetime
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_posttrain.parallel.bridge import Bridge, join
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.parallel.network import raise_file_limit
from megatron_posttrain.platform import platform
from megatron_posttrain.upstream.gloo import connect_lazily, shared_device

Value = TypeVar("Value")
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)  # first steps compile kernels; a hang still ends


_bridge = Bridge()


def start_distributed(rollout_ranks: int = 0) -> Bridge:
    """Joins torchrun's job, or makes a world of one process; the last `rollout_ranks` are a world of their own.
    Idempotent."""
    global _bridge
    if dist.is_initialized():
        return _bridge
    device = platform()
    raise_file_limit()
    if device.backend != "gloo":
        connect_lazily()
    alone: dict[str, Any] = {}
    if os.environ.get("WORLD_SIZE", "1") == "1":
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        # In memory: a port that was free a moment ago may be somebody else's now.
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    device.initialize(int(os.environ.get("LOCAL_RANK", "0")))
    with shared_device():
        if rollout_ranks:
            _bridge = join(rollout_ranks, COLLECTIVE_TIMEOUT)
        else:
            dist.init_process_group(device.backend, timeout=COLLECTIVE_TIMEOUT, **alone)
    return _bridge


@dataclass(frozen=True)
class Groups:
    """The process groups of this rank; a group of one rank is a group all the same."""

    layout: Layout
    tensor: ProcessGroup
    pipeline: ProcessGroup
    context: ProcessGroup
    data: ProcessGroup  # without context
    expert: ProcessGroup
    expert_tensor: ProcessGroup
    copies: ProcessGroup  # ranks that hold the same weights, but for experts
    expert_copies: ProcessGroup

    @property
    def last_stage(self) -> bool:
        return self.pipeline.rank() == self.layout.pipeline - 1


def make_groups(layout: Layout, seed: int) -> Groups:
    """Initialises megatron-core's parallel state and its random number tracker."""
    with platform().megatron(), shared_device():
        from megatron.core import parallel_state as ps
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        ps.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            create_gloo_process_groups=False,  # three more, for a way to save that is not used
        )
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
    return Groups(
        layout=layout,
        tensor=ps.get_tensor_model_parallel_group(),
        pipeline=ps.get_pipeline_model_parallel_group(),
        context=ps.get_context_parallel_group(),
        data=ps.get_data_parallel_group(),
        expert=ps.get_expert_model_parallel_group(),
        expert_tensor=ps.get_expert_tensor_parallel_group(),
        copies=ps.get_data_parallel_group(with_context_parallel=True),
        expert_copies=ps.get_expert_data_parallel_group(),
    )


def broadcast_object(value: Value) -> Value:
    """Rank 0's value in every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
