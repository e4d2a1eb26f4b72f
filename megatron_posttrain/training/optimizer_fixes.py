"""megatron-core 0.16.1's DistributedOptimizer cannot be loaded with torch's AdamW; four defects, mended in a scope.

It is written for the fused Adam of Transformer Engine or apex. With torch's own (neither is installed):
1. asking an optimizer that has not stepped for its state dict fails an assertion;
2. setting states copies into a key `step` that the saved tensors do not have (KeyError);
3. in fp32 the main parameters are leaf views, which may not be written in place outside no_grad;
4. all states share one `step` tensor, so that AdamW would count one step a parameter.
`tests/test_upstream_defects.py` fails when a fix is no longer needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def uses_torch_adamw() -> bool:
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


@contextlib.contextmanager
def torch_adamw_can_resume() -> Iterator[None]:
    """Scope in which a DistributedOptimizer on torch's AdamW saves and loads."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not uses_torch_adamw():
        yield
        return
    originals = {name: getattr(DistributedOptimizer, name) for name in _FIXES}
    for name, fix in _FIXES.items():
        setattr(DistributedOptimizer, name, fix(originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(DistributedOptimizer, name, original)


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


_FIXES = {
    "sharded_state_dict": _sharded_state_dict,
    "_set_main_param_and_optimizer_states": _set_main_param_and_optimizer_states,
    "load_state_dict": _load_state_dict,
}
