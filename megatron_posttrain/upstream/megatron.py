"""megatron-core 0.16.1: gradients that are wrong, and an optimizer that cannot always be saved and loaded.

The optimizer, whatever Adam it runs: a stage without experts saves no `step` for them, and what the first stage
saves is what every stage loads. DistributedOptimizer is written for the fused Adam of Transformer Engine or apex. With
torch's own (neither is installed):
1. asking an optimizer that has not stepped for its state dict fails an assertion;
2. setting states copies into a key `step` that the saved tensors do not have (KeyError);
3. in fp32 the main parameters are leaf views, which may not be written in place outside no_grad;
4. all states share one `step` tensor, so that AdamW would count one step a parameter;
5. asking an optimizer that has no parameters for its state dict fails the same assertion.
"""

import contextlib
import multiprocessing.dummy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from megatron_posttrain.platform.scope import replaced


@contextlib.contextmanager
def optimizer_can_resume() -> Iterator[None]:
    """Scope in which the optimizer saves and loads under every layout, on torch's AdamW too."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    fixes = [(ChainedOptimizer, name, fix) for name, fix in _CHAINED_FIXES.items()]
    if not HAVE_APEX_OR_TE:  # torch's own AdamW
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


# What it gets wrong in gradients.


def mark_experts(chunk: torch.nn.Module) -> None:
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            # Summed over the ranks that hold the same expert. megatron-core says so only with expert > 1, and
            # then loses tensor ranks' parts where expert_tensor < tensor.
            parameter.allreduce = False  # type: ignore[attr-defined]
            # That sum has the tensor ranks' tokens; biases would have them a second time.
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            # Every rank's counts in the gradient norm; biases would pass for copies of tensor rank 0's.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def keep_correction_biases(chunk: torch.nn.Module) -> None:
    """Stock routers count tokens to move them, which fails on a mask of padding (router 542: [tokens, experts] with
    [tokens]); here they stay as they are."""
    for module in chunk.modules():
        if hasattr(module, "_apply_expert_bias"):
            module._apply_expert_bias = lambda *_, **__: None  # type: ignore[assignment]


def count_down_projections_once(chunk: torch.nn.Module) -> None:
    """MLA's, of Transformer Engine, which every tensor rank has whole: 2.11 marks every linear layer's weight as a part
    of one, and the gradient norm would count these once a rank."""
    for name, parameter in chunk.named_parameters():
        if "_down_proj." in name:
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def split_down_projections(chunk: torch.nn.Module) -> None:
    """MLA's, of torch layers, under sequence parallelism."""
    for name, module in chunk.named_modules():
        if name.endswith("linear_kv_down_proj"):
            module.register_forward_hook(_split_by_sequence)


def _split_by_sequence(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """[s, b, features / tensor] -> [s / tensor, b, features], as Transformer Engine's layer gives it. What
    megatron-core 0.16.1 (multi_latent_attention 607) makes of the former loses the gradients that the rotary part of
    the key, which all heads share, has from the heads of other tensor ranks."""
    from megatron.core.tensor_parallel import mappings

    whole = mappings.gather_from_tensor_model_parallel_region(output[0])
    return mappings.scatter_to_sequence_parallel_region(whole), output[1]


def written_by_threads() -> contextlib.AbstractContextManager[None]:
    """megatron-core 0.16.1 forks a process for each of a rank's files, though CUDA's, gloo's and vLLM's threads do not
    survive a fork, and starts one more, that stays, to hear from them: 2 to 4 s before a rank's first byte."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    threads = SimpleNamespace(get_context=lambda method: multiprocessing.dummy)
    return replaced([(filesystem_async, "mp", threads), (filesystem_async, "_results_queue", None)])
