"""megatron-core 0.16.1's optimizer cannot always be saved and loaded; defects mended in a scope.

Whatever Adam it runs: a pipeline stage without experts saves no `step` for them, and what the first stage saves is
what every stage loads. DistributedOptimizer is written for the fused Adam of Transformer Engine or apex. With
torch's own (neither is installed):
1. asking an optimizer that has not stepped for its state dict fails an assertion;
2. setting states copies into a key `step` that the saved tensors do not have (KeyError);
3. in fp32 the main parameters are leaf views, which may not be written in place outside no_grad;
4. all states share one `step` tensor, so that AdamW would count one step a parameter;
5. asking an optimizer that has no parameters for its state dict fails the same assertion.
`tests/test_upstream_defects.py` fails when a fix is no longer needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_posttrain.platform.scope import replaced


def uses_torch_adamw() -> bool:
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


@contextlib.contextmanager
def optimizer_can_resume() -> Iterator[None]:
    """Scope in which the optimizer saves and loads under every layout, on torch's AdamW too."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    fixes = [(ChainedOptimizer, name, fix) for name, fix in _CHAINED_FIXES.items()]
    if uses_torch_adamw():
        fixes += [(DistributedOptimizer, name, fix) for name, fix in _FIXES.items()]
    with replaced((owner, name, fix(getattr(owner, name))) for owner, name, fix in fixes):
        yield


def _same_step(original: Any) -> Any:
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        if len(self.chained_optimizers) > 1:
            groups = [group for part in found.values() for group in part["optimizer"]["param_groups"]]
            step = max(group.get("step", 0) for group in groups)
            for group in groups:
                group["step"] = step
        return found

    return sharded_state_dict


def _state_dict(original: Any) -> Any:
    def state_dict(self: Any) -> Any:
        groups = self.optimizer.param_groups
        if any(group["params"] for group in groups):
            return original(self)
        groups = [{k: v for k, v in group.items() if k != "params"} | {"step": 0} for group in groups]
        return {"optimizer": {"param_groups": groups}}

    return state_dict


def _sharded_state_dict(original: Any) -> Any:
    def sharded_state_dict(self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state_dict()["state"]:
            self._init_optimizer_states_with_dummy_values()
        return original(self, model, is_loading, *args, **kwargs)

    return sharded_state_dict


def _set_main_param_and_optimizer_states(original: Any) -> Any:
    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        main.copy_(tensors["param"])
        for name, value in self.optimizer.state[main].items():
            if name != "step":
                value.copy_(tensors[name])

    return set_states


def _load_state_dict(original: Any) -> Any:
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    return load_state_dict


_CHAINED_FIXES = {"sharded_state_dict": _same_step}
_FIXES = {
    "state_dict": _state_dict,
    "sharded_state_dict": _sharded_state_dict,
    "_set_main_param_and_optimizer_states": _set_main_param_and_optimizer_states,
    "load_state_dict": _load_state_dict,
}
