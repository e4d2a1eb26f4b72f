"""Load of the experts; and routing replay: experts that were chosen before are chosen again; their weights are the
router's own, with gradient.
The choice of the old policy (arXiv 2507.18071, section 5.3) or of the rollout engine (R3, arXiv 2510.11370)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.platform import platform
from megatron_posttrain.training.engine import Engine

Action = Literal["record", "replay"] | None


class ExpertLoad:
    """Counts the tokens of training that each expert of each layer gets; padding is none."""

    def __init__(self, engine: Engine) -> None:
        assert engine.arch.moe is not None
        size = engine.arch.num_layers, engine.arch.moe.num_experts
        self._tokens = torch.zeros(size, dtype=torch.int64, device=platform().device)
        for router in (router for module in engine.modules for router in _routers(module)):
            router.register_forward_hook(self._count)

    def _count(self, router: Any, given: tuple[Any, ...], found: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():  # neither a look at log-probs nor the first pass of what backward computes again
            chosen = found[1] if given[1] is None else found[1] & ~given[1].reshape(-1, 1)
            self._tokens[router.layer_number - 1] += chosen.sum(0)

    def take(self) -> dict[int, list[float]]:
        """Collective: of each layer with experts, from 1, every expert's tokens since the last call over their mean."""
        dist.all_reduce(self._tokens)  # ranks that see the same tokens all do
        counted = self._tokens.cpu().double()
        self._tokens.zero_()
        found = {layer: tokens / tokens.mean() for layer, tokens in enumerate(counted, 1) if tokens.any()}
        return {layer: [round(share, 4) for share in load.tolist()] for layer, load in found.items()}


@contextmanager
def routing(engine: Engine, action: Action) -> Iterator[None]:
    """Meanwhile the routers of `engine` write down in every micro-batch which experts they choose, or choose again
    what is written there, else what its sequences bring along; None: as ever."""
    if action is None:
        yield
        return
    from megatron.core.transformer.moe.router_replay import RouterReplay

    routers = [router for module in engine.modules for router in _routers(module)]
    for router in routers:
        router.router_replay = RouterReplay()
    engine.around = _Routing(engine, action)
    try:
        yield
    finally:
        engine.around = None
        RouterReplay.clear_global_router_replay_instances()
        for router in routers:
            router.router_replay = None


def _routers(module: torch.nn.Module) -> list[Any]:
    from megatron.core.transformer.moe.router import TopKRouter

    return [part for part in module.modules() if isinstance(part, TopKRouter)]


class _Routing:
    def __init__(self, engine: Engine, action: Action) -> None:
        self.records = action == "record"
        self.parts = engine.groups.layout.sequence_split
        self.part = engine.groups.tensor.rank() % self.parts
        self.recomputes = engine.model_config.recompute_granularity == "full"

    @contextmanager
    def __call__(self, model: torch.nn.Module, batch: PackedBatch, mine: Tensor) -> Iterator[None]:
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        replays = [(router, router.router_replay) for router in _routers(model)]
        for router, replay in replays:
            if not self.records:
                replay.set_target_indices(self._chosen(router, batch, mine))
            action = RouterReplayAction.RECORD if self.records else RouterReplayAction.REPLAY_FORWARD
            replay.set_router_replay_action(action)
        yield
        for router, replay in replays:
            if self.records:
                batch.routes[router.layer_number] = replay.get_recorded_indices()
            elif self.recomputes and torch.is_grad_enabled():
                # A call outside of this scope is backward's, which takes micro-batches in the order of forward
                replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
            else:
                replay.replay_backward_list.clear()

    def _chosen(self, router: Any, batch: PackedBatch, mine: Tensor) -> Tensor:
        """[t, top-k] of this rank's tokens. Those without a choice (padding, a sequence's last) are seen by no other
        and have no loss: any experts do, and all of them are others."""
        if router.layer_number in batch.routes:
            return batch.routes[router.layer_number]
        known = torch.zeros(len(mine), router.topk, dtype=torch.int64)
        if batch.experts is not None:
            known = batch.experts[mine, router.layer_number - 1].long()
        known = torch.where(known.any(-1, keepdim=True), known, torch.arange(router.topk))
        return known.chunk(self.parts)[self.part]
