"""vLLM's receiving end of a weight update whose tensors are in this process.

Registered with vLLM's weight-transfer factory under `NAME`; `update_weights` is handed an iterator, and
vLLM's layerwise reload packs a layer as soon as its last tensor has come, so a model never exists twice.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel
from vllm.platforms import current_platform

from megatron_posttrain.models.shares import Box, bounds
from megatron_posttrain.platform.scope import replaced
from megatron_posttrain.rollout import vllm_fixes

NAME = "in_process"


@dataclass
class InProcessInit(WeightTransferInitInfo):
    pass


@dataclass
class InProcessUpdate(WeightTransferUpdateInfo):
    tensors: Iterator[tuple[str, Tensor]]


class InProcessTransfer(WeightTransferEngine[InProcessInit, InProcessUpdate]):
    init_info_cls = InProcessInit
    update_info_cls = InProcessUpdate

    def init_transfer_engine(self, init_info: InProcessInit) -> None:
        pass  # nothing to connect

    def start_weight_update(self) -> None:
        self._tied = vllm_fixes.tied_heads(self.model)
        if current_platform.is_cpu():
            vllm_fixes.forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: InProcessUpdate) -> None:
        self.model.load_weights(update_info.tensors)

    def finish_weight_update(self) -> None:
        missing = _incomplete(self.model, self._tied)
        if missing:
            # vLLM would go on with old values (and a warning) or with uninitialised memory.
            raise ValueError(f"weight update lacks tensors of {len(missing)} modules: {', '.join(missing[:8])}")
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            vllm_fixes.repack_tied_heads(self._tied)

    def shutdown(self) -> None:
        pass  # nothing is held


class _Taken(TorchDispatchMode):
    """Notes what of `tensors` is copied, and copies nothing."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {tensor.untyped_storage()._cdata: name for name, tensor in tensors.items()}
        self.tensors = tensors
        self.boxes: dict[str, Box] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        name = self.names.get(args[1].untyped_storage()._cdata)
        if name is not None:
            box = _box(args[1], self.tensors[name])
            self.boxes[name] = bounds(self.boxes.get(name, box), box)
        return args[0]


def _box(part: Tensor, whole: Tensor) -> Box:
    """Where a view lies in a contiguous tensor; all of it for one that is not a box."""
    strides = whole.stride()
    starts = [part.storage_offset() // stride % size for stride, size in zip(strides, whole.shape, strict=True)]
    ends = [start + 1 for start in starts]
    for size, stride in zip(part.shape, part.stride(), strict=True):
        dims = [d for d, other in enumerate(strides) if other == stride and starts[d] + size <= whole.shape[d]]
        if size > 1 and not dims:
            return tuple((0, size) for size in whole.shape)
        if size > 1:
            ends[dims[-1]] = starts[dims[-1]] + size
    return tuple(zip(starts, ends, strict=True))


def taken(model: Any, tensors: dict[str, Tensor]) -> dict[str, Box]:
    """What the engine copies out of `tensors` (on the meta device) when it loads them; nothing is loaded."""
    initialize_layerwise_reload(model)
    with replaced([(layerwise, "_layerwise_process", lambda layer, info: None)]), _Taken(tensors) as mode:
        model.load_weights(iter(tensors.items()))
    model._do_torchao_reload = model._original_do_torchao_reload
    for module in model.modules():
        info = get_layerwise_info(module)
        layerwise._place_kernel_tensors(module, info)
        info.reset()
    return mode.boxes


def _incomplete(model: torch.nn.Module, tied: Collection[torch.nn.Module]) -> list[str]:
    """Modules some of whose parameters have not come; a complete one has left the reload by now."""
    out = []
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        wanted = sum(get_tensor_load_numel(p) for p in module._parameters.values() if p is not None)
        if not info.can_load() or not wanted or module in tied or is_deferred_attention_layer(module):
            continue
        # A vocabulary's padding rows never come, so its only tensor is there or it is not.
        if info.load_numel == 0 or not isinstance(module, VocabParallelEmbedding):
            out.append(name)
    return out


if NAME not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(NAME, InProcessTransfer)
