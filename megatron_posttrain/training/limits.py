"""Limits that config, rows and the model's shapes show before a model is built. Commands and `doctor` call the same."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from megatron_posttrain.config.algorithms import DistillConfig, GrpoConfig
from megatron_posttrain.config.schema import Config, RewardConfig
from megatron_posttrain.data.dataset import PromptDataset
from megatron_posttrain.data.rows import Row
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.rewards.registry import needs_answer


def check_answers(rows: Sequence[Row], rewards: Iterable[RewardConfig]) -> None:
    """Raises UserError for the first row without `answer` where a reward compares with it."""
    needs = next((spec.name for spec in rewards if needs_answer(spec)), None)
    if needs is None:
        return
    missing = [row.source for row in rows if not (row.answer or "").strip()]
    if missing:
        more = f" ({len(missing):,} of {len(rows):,} rows have none)" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: no `answer`, which the reward '{needs}' compares with{more}; data.columns: "
            "{answer: THEIR_NAME} reads it from another column"
        )


def prompts_of(config: GrpoConfig, rows: Sequence[Row], tokenizer: Any, tools: Sequence[Any] = ()) -> PromptDataset:
    """The prompts that leave room for a response, with the `tools` of an environment. Raises UserError, also for a row
    that no reward could grade, and one whose own tools nothing would answer."""
    check_answers(rows, config.rewards)
    rows = rows_with_tools(rows, tools)
    longest = config.data.sequence_length - config.rollout.at(None).max_tokens
    return PromptDataset(rows, tokenizer, longest, config.training.seed, config.data.omissions)


def rows_with_tools(rows: Sequence[Row], tools: Sequence[Any]) -> list[Row]:
    """The rows, whose prompts name an environment's tools. Raises UserError for a row that has others."""
    if not tools:
        return list(rows)
    if own := next((row for row in rows if row.tools and row.tools != tools), None):
        raise UserError(f"{own.source}: the row has tools of its own, and only those of the environment are answered")
    return [replace(row, tools=list(tools)) for row in rows]


def check_positions(lengths: Iterable[int], arch: Architecture) -> None:
    """Raises UserError where a conversation is longer than the model's positions; rows packed from several may be."""
    longest = max(lengths)
    if longest > arch.context_length:
        raise UserError(
            f"data.train: a conversation has {longest} tokens, the model has {arch.context_length} positions "
            f"(max_position_embeddings, with rope scaling); set data.sequence_length={arch.context_length} or less"
        )


def rollout_problems(config: GrpoConfig | DistillConfig, arch: Architecture | None, device: str) -> Iterator[str]:
    """Why vLLM on `device` (cpu or cuda) cannot run the config's rollouts; one reason each."""
    from megatron_posttrain.rollout.limits import engine_problems

    rollout, precision = config.rollout, config.precision.dtype
    if rollout.offload and precision != "bf16":
        yield f"rollout.offload needs precision.dtype bf16, found {precision}"
    if rollout.quantization is not None and device != "cuda":
        yield f"rollout.quantization: {rollout.quantization} runs on CUDA only; allowed here: null"
    if rollout.adapters == "ship":
        yield from _shipping_problems(config, arch, device)
    if arch is not None:
        if isinstance(config, GrpoConfig) and config.algorithm.routing_replay != "none" and arch.moe is None:
            yield f"algorithm.routing_replay={config.algorithm.routing_replay}: the model has no experts; allowed: none"
        if rollout.replay is not None:
            return
        cache = None if rollout.kv_cache_gib is None else int(rollout.kv_cache_gib * 2**30)
        sizes: Any = {"cache_bytes": cache, "dtype_bytes": 4 if precision == "fp32" else 2}
        sizes |= {"tensor": rollout.tensor, "expert": rollout.expert, "length": config.data.sequence_length}
        yield from engine_problems(arch, device, **sizes)


def _shipping_problems(config: Config, arch: Architecture | None, device: str) -> Iterator[str]:
    from megatron_posttrain.rollout.limits import RANKS

    reasons = {
        "lora is null, so there is no adapter": config.lora is None,
        "model.random_init leaves vLLM no base to read": config.model.random_init,
        "vLLM takes no magnitudes (lora.use_dora)": config.lora is not None and config.lora.use_dora,
        f"vLLM takes ranks up to {RANKS[-1]}": config.lora is not None and config.lora.rank > RANKS[-1],
        "vLLM's CPU build has no adapters of experts": device == "cpu" and arch is not None and arch.moe is not None,
    }
    yield from (f"rollout.adapters=ship: {why}; allowed: merge" for why, found in reasons.items() if found)
