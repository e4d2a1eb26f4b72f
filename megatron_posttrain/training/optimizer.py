"""Data parallel wrapping and megatron-core's distributed AdamW, with what 0.16.1 lacks on torch's own AdamW."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_posttrain.config.schema import OptimizerConfig
from megatron_posttrain.errors import NotFiniteError
from megatron_posttrain.platform import platform

BUCKET_ELEMENTS = 40_000_000  # of one message of gradients or weights


def wrap_for_data_parallel(modules: Sequence[torch.nn.Module], model_config: Any, *, overlap: bool) -> list[Any]:
    """Each chunk in megatron-core's DistributedDataParallel; gradients are kept and summed in fp32."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        use_distributed_optimizer=True,
    )

    class Bucketed(DistributedDataParallel):  # type: ignore[misc]
        """Buckets of one size everywhere. megatron-core makes the whole buffer one without overlap, on later pipeline
        stages and in later chunks; a checkpoint sends each bucket through the device, gathered and whole."""

        bucket_size = property(lambda self: BUCKET_ELEMENTS, lambda self, size: None)

    chunks = [
        # Only the first chunk's messages of an interleaved pipeline are worth overlapping.
        Bucketed(model_config, options, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
    if overlap:
        for chunk in chunks:
            _gather_for_grouped_experts(chunk)
    return chunks


def overlaps(chosen: bool | None) -> bool:
    """Whether data parallel communication overlaps with forward and backward, where that is left open."""
    return platform().name == "cuda" if chosen is None else chosen


def _gather_for_grouped_experts(chunk: Any) -> None:
    """megatron-core waits for a weight where the module that owns it is called; grouped experts call none."""
    from megatron_posttrain.models.modules.experts import GroupedExperts

    buckets = chunk.param_to_bucket_group

    def wait(module: torch.nn.Module, *unused: Any) -> None:
        for parameter in module.parameters():
            if parameter in buckets:
                buckets[parameter].finish_param_sync()

    for module in chunk.modules():
        if isinstance(module, GroupedExperts):
            module.register_forward_pre_hook(wait)


def make_optimizer(chunks: Sequence[Any], model_config: Any, config: OptimizerConfig, *, overlap: bool) -> Any:
    """AdamW with fp32 main weights, sharded over data parallel ranks; sets the schedule's hooks."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig as Options
    from megatron.core.optimizer import ParamKey, get_megatron_optimizer, get_standard_config_overrides

    options = Options(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad or float("inf"),  # 0 would also leave the norm out of the metrics
        bf16=model_config.bf16,
        params_dtype=model_config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
    )
    groups: Any = get_standard_config_overrides(options) if config.decay == "matrices" else {}
    if config.router_lr is not None:
        # A part of what a checkpoint knows a group by, unlike a learning rate, which another attempt may change.
        groups[ParamKey(name="*.router.*")] = {"is_decoupled_lr": True}
    optimizer = get_megatron_optimizer(options, list(chunks), groups, use_gloo_process_groups=False)
    set_hyper_parameters(optimizer, config)
    model_config.finalize_model_grads_func = finalize_model_grads
    model_config.grad_scale_func = optimizer.scale_loss
    if overlap:
        no_sync = [chunk.no_sync for chunk in chunks]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    optimizer.get_grad_norm = _finite_norm(optimizer.get_grad_norm)
    return optimizer


def _finite_norm(get_grad_norm: Callable[[], float]) -> Callable[[], float]:
    """The norm, of all ranks' gradients, is asked for after them and before the first weight is written; megatron-core
    looks at it only where it scales losses (fp16)."""

    def norm() -> float:
        found = get_grad_norm()
        if not math.isfinite(found):
            raise NotFiniteError(f"the gradient norm is {found}")
        return found

    return norm


def forget_moments(optimizer: Any) -> None:
    """The next step is the first one of Adam from the present weights."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if "step" in group:  # Transformer Engine's counts by group, torch's by weight
                group["step"] = 0
            for main in group["params"]:
                for name in part.optimizer.state[main].keys() & {"exp_avg", "exp_avg_sq", "step"}:
                    part.optimizer.state[main][name].zero_()


def set_learning_rate(optimizer: Any, config: OptimizerConfig, lr: float) -> None:
    """`lr`: of the schedule's present step. Routers have theirs in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * config.router_lr / config.lr if group["is_decoupled_lr"] and config.router_lr else lr


def set_hyper_parameters(optimizer: Any, config: OptimizerConfig) -> None:
    """The config's, also after a checkpoint's state, which has those of its run, was loaded."""
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
        group["betas"], group["eps"] = (config.beta1, config.beta2), config.epsilon
