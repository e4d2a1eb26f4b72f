"""What checkpoints hold of a model whose adapters are trained: these alone, in megatron-core's distributed format."""

from typing import Any

from torch import Tensor, nn

from megatron_posttrain.models.adapters import Adapters
from megatron_posttrain.models.sharded import local_tensors, partition, position, unwrap
from megatron_posttrain.models.weights import GatedMLP, TensorPlan
from megatron_posttrain.parallel.groups import Groups


def sharded_adapters(chunk: nn.Module, adapters: Adapters, groups: Groups) -> dict[str, Any]:
    """The adapters' parameters of a chunk, by their names in it, which any other layout can read."""
    names = {id(parameter): name for name, parameter in unwrap(chunk).named_parameters()}
    found = local_tensors([chunk], adapters.plans, adapters.arch, position(groups.expert))
    return {names[id(tensor)]: _sharded(plan, tensor, groups) for plan, tensor in found}


def _sharded(plan: TensorPlan, tensor: Tensor, groups: Groups) -> Any:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    owned = plan.expert is not None
    copy = (
        parallel_state.get_expert_data_parallel_rank()
        if owned
        else parallel_state.get_data_parallel_rank(with_context_parallel=True)
    )
    place = position(groups.expert_tensor if owned else groups.tensor)
    rank, size = partition(plan, tensor, *place)
    offsets = [(plan.mapping.dim, rank, size)] if size > 1 else []
    replica = (0, 0 if size > 1 else place[0], copy)
    sharded = ShardedTensor.from_rank_offsets(plan.name, tensor, *offsets, replica_id=replica)
    # A shard of gate and up is one of each, not a range of rows
    gated = isinstance(plan.mapping, GatedMLP) and size > 1
    return apply_swiglu_sharded_factory(sharded, ()) if gated else sharded
