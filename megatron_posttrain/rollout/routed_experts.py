"""The experts that vLLM chose for every token, beside its completions.

On CUDA vLLM's own (`enable_return_routed_experts`). On CPU it refuses that, for want of Triton: there `RoutedExperts`
is put where vLLM's scheduler asks for them.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_posttrain.models.architecture import Architecture


def choice_type(arch: Architecture) -> np.dtype[Any]:
    """Of a token's experts: [layers, top-k] numbers, zeros in layers without experts; `itemsize` is bytes a token."""
    assert arch.moe is not None
    return np.dtype((np.uint8 if arch.moe.num_experts <= 256 else np.int16, (arch.num_layers, arch.moe.top_k)))


class RoutedExperts:
    """Remembers the choice of every token in the cache, by its slot there.

    A prefix that is not computed again thus has the choices that were made when it was. Stands for vLLM's
    AuxOutputSchedulerConnector, whose methods the scheduler calls.
    """

    def __init__(self, engine_core: Any, choices: np.dtype[Any]) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        self.scheduler = engine_core.scheduler
        cache = self.scheduler.kv_cache_config
        whole = [
            i for i, group in enumerate(cache.kv_cache_groups) if isinstance(group.kv_cache_spec, FullAttentionSpec)
        ]
        self.group = whole[0] if whole else 0  # a window's group forgets tokens
        self.layer = cache.kv_cache_groups[self.group].layer_names[0]
        self.block = cache.kv_cache_groups[self.group].kv_cache_spec.block_size
        kind = torch.from_numpy(np.empty(0, choices.base)).dtype
        self.chosen = torch.zeros(cache.num_blocks * self.block, *choices.shape, dtype=kind)
        for module in engine_core.model_executor.driver_worker.model_runner.get_model().modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(partial(self._capture, module.layer_id))
        self.scheduler.aux_output_connector = self

    def _capture(self, layer: int, experts: Tensor) -> None:
        from vllm.forward_context import get_forward_context

        slots = get_forward_context().slot_mapping[self.layer][: len(experts)]
        real = slots >= 0
        self.chosen[slots[real], layer] = experts[: len(slots)][real].to(self.chosen.dtype)

    def take_output(self, request: Any, output: Any) -> NDArray[Any] | None:
        """[tokens - 1, layers, top-k] of a request at its end, whose last token was not computed."""
        if not request.is_finished():
            return None
        blocks = torch.tensor(self.scheduler.kv_cache_manager.get_block_ids(request.request_id)[self.group])
        slots = (blocks[:, None] * self.block + torch.arange(self.block)).flatten()
        return self.chosen[slots[: request.num_tokens - 1]].numpy()

    def build_connector_meta(self, scheduler_output: Any, requests: Any) -> None:
        return None

    def request_finished(self, request: Any) -> None:
        pass  # its blocks keep what they have

    def reset(self) -> None:
        pass  # nothing of the cache is used again
