"""One rank of a vLLM engine inside every rank of the world (SPMD, vLLM's `external_launcher`)."""

import contextlib
import hashlib
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_posttrain.models.shares import Box
from megatron_posttrain.parallel.exchange import gathered
from megatron_posttrain.parallel.groups import broadcast_object, start_distributed
from megatron_posttrain.platform import platform
from megatron_posttrain.rollout import vllm_fixes
from megatron_posttrain.rollout.isolation import Isolation
from megatron_posttrain.rollout.limits import CPU_CACHE_BYTES, RANKS, explained
from megatron_posttrain.rollout.routed_experts import RoutedExperts
from megatron_posttrain.upstream.gloo import shared_device

REPEATED_TOKENS = 64
ALWAYS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "generation_config": "vllm",  # not the directory's sampling defaults
    "logprobs_mode": "processed_logprobs",  # after temperature and top-p
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
}
CPU: dict[str, Any] = {
    "enforce_eager": True,  # no Inductor, no C++ compiler; see Isolation for functions beside the model
    "block_size": 32,  # the attention kernel wants multiples of 32; vLLM's 128 shares no prefix of a short prompt
}
CUDA: dict[str, Any] = {  # written from vLLM 0.32's sources
    "enable_sleep_mode": True,
    # On from two ranks on Hopper; it is FlashInfer's all-reduce, see the package's environment.
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
    # FlashInfer's TRTLLM experts have crashed or kept stale weights on a weight update.
    "kernel_config": {"moe_backend": "triton"},
}


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued. A temperature of 0 is greedy.

    vLLM keeps what these need in host memory or in buffers that a request fills when it begins. Before a field is
    added: level 2 sleep discards every other tensor of the sampler (tests/rollout/test_vllm_cuda.py).
    """

    n: int = 1  # completions a prompt
    max_tokens: int = 1024  # of a completion
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    presence_penalty: float = 0.0  # its counts do not survive `sleep`: for engines that never do
    stop_token_ids: tuple[int, ...] = ()  # end a completion and are its last token
    repetitions: int | None = None  # of up to `REPEATED_TOKENS` tokens, one behind the other, end a completion


@dataclass(frozen=True)
class Completion:
    """`logprobs[t]` is log p(`token_ids[t]`) under the distribution that it was drawn from."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length", "repetition", "cut"]  # cut: there was enough
    experts: NDArray[Any] | None = None  # [prompt + completion - 1, layers, top-k] chosen for all tokens but the last


@dataclass(frozen=True)
class Request:
    """A completion of at most `limit` tokens."""

    prompt: list[int]
    seed: int
    limit: int


Feed = Callable[[int, bool], Mapping[int, Request]]
Take = Callable[[int, Completion], None]


class RolloutEngine:
    """Creation, `generate`, `greedy`, `update_weights` and `close` are collective.

    Ranks r, r + 1, ... r + tensor - 1 (r a multiple of `tensor`) are one replica: they hold shards of one
    engine and must be given identical prompts and seeds; this is checked. Replicas are independent. After
    every call the trainer's random state, threads, environment and process groups are as they were before.

    Args:
        model_path: Hugging Face directory; its tokenizer is not read.
        dtype: of weights, activations and cache.
        tensor: ranks of a replica; divides the world size.
        expert: each of them holds whole experts, its share of them; False: a slice of every one.
        max_model_len: longest prompt plus completion, tokens.
        kv_cache_bytes: cache of this rank; None: 256 MiB on CPU, on CUDA by `gpu_memory_utilization`.
        max_num_seqs: requests that run at once (`at_once`); more of them wait.
        gpu_memory_utilization: fraction of the GPU for weights and cache together; CUDA only.
        quantization: vLLM's name of what its linear layers are quantised to at every refit; CUDA only.
        lora_rank: of the adapter that `ship` brings; None: there is none.
        load_weights: False where a refit brings them before anything is generated: nothing is read.
        fp32_head: logits are not rounded to `dtype`.
        choices: of the experts of a token (`choice_type`), which completions then have; None: they have none.

    Raises ValueError where `tensor` does not divide the world, UserError where vLLM cannot run the model so.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        tensor: int = 1,
        expert: bool = False,
        kv_cache_bytes: int | None = None,
        max_num_seqs: int = 256,
        seed: int = 0,
        gpu_memory_utilization: float = 0.5,
        quantization: str | None = None,
        lora_rank: int | None = None,
        load_weights: bool = True,
        fp32_head: bool = False,
        choices: np.dtype[Any] | None = None,
    ) -> None:
        start_distributed()  # in a process without torchrun: a world of one
        if dist.get_world_size() % tensor:
            raise ValueError(f"rollout.tensor: {tensor} does not divide the {dist.get_world_size()} ranks")
        self.dtype, self.tensor, self.max_model_len, self.choices = dtype, tensor, max_model_len, choices
        self.at_once, self.version = max_num_seqs, 0
        self.replica, self.replicas = dist.get_rank() // tensor, dist.get_world_size() // tensor
        self._cpu = platform().name == "cpu"
        self._adapter: Any = None  # vLLM's request for what was shipped
        options: dict[str, Any] = {
            "model": str(model_path),
            "dtype": dtype,
            "tensor_parallel_size": tensor,
            "enable_expert_parallel": expert,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "load_format": "auto" if load_weights else "dummy",
            "quantization": quantization,
            "hf_overrides": {"head_dtype": "float32"} if fp32_head else {},
            "kv_cache_memory_bytes": kv_cache_bytes or (CPU_CACHE_BYTES if self._cpu else None),
            "seed": seed,
            "distributed_executor_backend": "external_launcher",
            "enable_return_routed_experts": choices is not None and not self._cpu,
            **ALWAYS,
            **(
                vllm_fixes.CPU_OPTIONS | CPU if self._cpu else CUDA | {"gpu_memory_utilization": gpu_memory_utilization}
            ),
        }
        if lora_rank is not None:
            room = next(room for room in RANKS if room >= lora_rank)
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
        rank = dist.get_rank()
        local = os.environ.get("LOCAL_RANK", str(torch.cuda.current_device() if not self._cpu else rank))
        self._isolated = Isolation({"RANK": str(rank), "LOCAL_RANK": local})
        self._llm: Any = self._start(options)
        # vLLM would destroy the trainer's process groups when this engine is collected, or at exit.
        self._llm.llm_engine.engine_core._finalizer.detach()
        if choices is not None and self._cpu:
            RoutedExperts(self._core, choices)

    @property
    def _core(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core

    @property
    def _peers(self) -> dist.ProcessGroup:
        """The replica's ranks, by gloo."""
        from vllm.distributed.parallel_state import get_tp_group

        return get_tp_group().cpu_group

    def _start(self, options: dict[str, Any]) -> Any:
        token = str(broadcast_object(uuid.uuid4().hex[:12]))
        on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's; vLLM sets another one
        first = int(os.environ.get("RANK", "0")) - dist.get_rank()
        with self._isolated(), shared_device(), warnings.catch_warnings(), contextlib.ExitStack() as fixes:
            warnings.simplefilter("ignore")  # what vLLM says about GPU parts that are not there
            logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
            from vllm import LLM
            from vllm.config import WeightTransferConfig

            from megatron_posttrain.rollout import transfer

            options["weight_transfer_config"] = WeightTransferConfig(backend=transfer.NAME)
            fixes.enter_context(vllm_fixes.counted_nodes(on_node, first))
            if self._cpu:
                fixes.enter_context(vllm_fixes.private_shared_memory(token))
                fixes.enter_context(vllm_fixes.unbound_memory())
                if options["enable_expert_parallel"]:
                    vllm_fixes.map_experts()
            try:
                llm = LLM(**options)
            except Exception as error:
                if (told := explained(error, options["model"])) is None:
                    raise
                raise told from error
            if self._cpu:
                dist.barrier()  # every rank has mapped the memory before its names go
            return llm

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """`sampling.n` completions of every prompt: completion j of prompt i is number i * n + j.

        Args:
            prompts: token ids, not empty; prompt plus `max_tokens` within `max_model_len`.
            seeds: one per completion. Equal prompt, seed and weights give equal tokens; on CUDA up to rounding that
                depends on what else is in the batch.

        Raises ValueError for a prompt that is empty or too long, and for another number of seeds; RuntimeError where
        ranks of one replica were given different arguments.
        """
        if len(seeds) != len(prompts) * sampling.n:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts x {sampling.n} completions")
        for i, prompt in enumerate(prompts):
            if not prompt or len(prompt) + sampling.max_tokens > self.max_model_len:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, with max_tokens {sampling.max_tokens}: "
                    f"wanted is 1 to max_model_len ({self.max_model_len}) together"
                )
        self._check_replica_agrees((prompts, sampling, seeds))
        limit = sampling.max_tokens
        waiting = [{k: Request(list(prompts[k // sampling.n]), seed, limit) for k, seed in enumerate(seeds)}]
        done: dict[int, Completion] = {}
        self.run(lambda room, idle: waiting.pop() if waiting else {}, done.__setitem__, sampling)
        return [done[k] for k in range(len(seeds))]

    def run(
        self,
        feed: Feed,
        take: Take,
        sampling: Sampling,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Collective over a replica, on whose ranks the functions give the same: generates until there is no more.

        Args:
            feed: asked before every step for requests that join those that run, by names of the caller's. It is told
                for how many there is room, and whether nothing runs: then it may wait, and no request is the end.
            take: is given every completion.
            enough: asked after every step: whether what still runs is cut off.
        """
        running: dict[str, tuple[str, int]] = {}  # by vLLM's number: its longer number, and the caller's name
        with self._isolated():
            from vllm import SamplingParams
            from vllm.sampling_params import RepetitionDetectionParams

            options: dict[str, Any] = {
                **{name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "presence_penalty")},
                "stop_token_ids": list(sampling.stop_token_ids),
                "ignore_eos": True,  # ends are the caller's `stop_token_ids`, not the directory's
                "logprobs": 0,
                "flat_logprobs": True,
                "detokenize": False,
                "skip_clone": True,
            }
            if sampling.repetitions is not None:
                options["repetition_detection"] = RepetitionDetectionParams(REPEATED_TOKENS, 1, sampling.repetitions)
            while True:
                # Where the cache has no room for what it has, vLLM lets requests wait
                room = 0 if self._core.scheduler.get_request_counts()[1] else self.at_once - len(running)
                if new := feed(room, not running):
                    prompts = [{"prompt_token_ids": request.prompt} for request in new.values()]
                    params = [SamplingParams(max_tokens=r.limit, seed=r.seed, **options) for r in new.values()]
                    numbers = self._llm.enqueue(prompts, params, lora_request=self._adapter, use_tqdm=False)
                    for number, name in zip(numbers, new, strict=True):
                        running[number.partition("-")[0]] = number, name
                if not running:
                    return
                for output in self._llm.llm_engine.step():
                    take(running.pop(output.request_id)[1], _completion(output.outputs[0], self.choices))
                if enough():
                    self._cut(dict(running.values()), take)
                    return

    def _cut(self, running: Mapping[str, int], take: Callable[[int, Completion], None]) -> None:
        for number, name in running.items():
            state = self._llm.llm_engine.output_processor.request_states[number]
            logprobs = state.logprobs_processor.logprobs
            take(name, Completion(list(state.detokenizer.output_token_ids), list(logprobs.logprobs), "cut"))
        self._llm.llm_engine.abort_request(list(running), internal=True)

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p of every token of each prompt but its first, given those before it; one more fits `max_model_len`."""
        return [said.logprobs[:-1] for said in self.said(prompts, 1)]  # a token must be drawn, and is not looked at

    def said(self, prompts: Sequence[Sequence[int]], drawn: int) -> list[Completion]:
        """Each prompt and the `drawn` likeliest tokens after it, with log p of every token but the first; with an
        adapter of these tokens alone: vLLM's layers of adapters cannot do prompts (0.32, on CPU)."""
        self._check_replica_agrees(prompts)
        if not prompts:
            return []
        with self._isolated():
            from vllm import SamplingParams

            options: dict[str, Any] = {"logprobs": 0, "flat_logprobs": True, "detokenize": False, "ignore_eos": True}
            options["prompt_logprobs"] = None if self._adapter else 0
            params = SamplingParams(max_tokens=drawn, temperature=0.0, **options)
            requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            outputs = self._llm.generate(requests, params, lora_request=self._adapter, use_tqdm=False)
        found = []
        for prompt, output in zip(prompts, outputs, strict=True):
            last = output.outputs[0]
            before = [] if self._adapter else output.prompt_logprobs.logprobs
            found.append(Completion([*prompt, *last.token_ids], [*before, *last.logprobs.logprobs], "length"))
        return found

    def greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Completion]:
        """The likeliest token at every position; log-probs at temperature 1."""
        return self.generate(prompts, Sampling(max_tokens=max_tokens, temperature=0.0), [0] * len(prompts))

    def share(self, value: Any) -> Any:
        """What the first rank of the replica gives, on all of its ranks; also while the engine sleeps."""
        box = [value]
        if self.tensor > 1:
            dist.broadcast_object_list(box, src=self.replica * self.tensor, group=self._peers)
        return box[0]

    def taken(self, shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Box]]:
        """Collective: what each rank of the replica copies out of tensors of these shapes, by name, when it loads them;
        not while it sleeps. Nothing is loaded."""
        with self._isolated():
            from vllm.config import set_current_vllm_config

            from megatron_posttrain.rollout import transfer

            tensors = {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, shape in shapes.items()}
            with set_current_vllm_config(self._llm.llm_engine.vllm_config):
                (boxes,) = self._llm.apply_model(partial(transfer.taken, tensors=tensors))
            return gathered(boxes, self._peers) if self.tensor > 1 else [boxes]

    def update_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Replaces all weights and drops the prefix cache; see `Refit`, which is what to call."""
        self.version = version
        with self._isolated():
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": {"tensors": tensors}})
            self._llm.finish_weight_update(weight_version=str(version))
            self._forget()

    def _forget(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after a weight update: requests are still running")

    def ship(self, directory: Path, version: int) -> None:
        """Collective: from now on completions are of the base with the adapter in `directory` (PEFT's files)."""
        dist.barrier()  # it is written
        self.wake("weights")
        self.wake("kv_cache")
        with self._isolated():
            from vllm.lora.request import LoRARequest

            self.version, self._adapter = version, LoRARequest("adapter", 1, str(directory))
            self._llm.llm_engine.add_lora(LoRARequest("adapter", 1, str(directory), load_inplace=True))
            self._forget()

    def sleep(self) -> None:
        """Gives the GPU's memory, weights and cache, to the trainer; nothing on CPU. A refit wakes it."""
        if not self._cpu:
            with self._isolated():
                # Level 1 keeps the weights in host memory; a refit replaces them, but where only adapters are shipped
                self._llm.sleep(level=2 if self._adapter is None else 1)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Maps memory that `sleep` gave away; what is in it is undefined."""
        if not self._cpu and self._llm.llm_engine.is_sleeping():
            with self._isolated():
                self._llm.wake_up(tags=[part])

    def close(self) -> None:
        """Frees the engine; vLLM's own shutdown also destroys torch.distributed's default group."""
        from vllm.distributed import parallel_state

        with self._isolated():
            if not self._cpu and self._llm.llm_engine.is_sleeping():
                from vllm.device_allocator.cumem import CuMemAllocator

                vllm_fixes.map_when_freed(CuMemAllocator.get_instance())
            self._core.structured_output_manager.clear_backend()
            self._core.model_executor.shutdown()
            self._core.scheduler.shutdown()
            parallel_state.destroy_model_parallel()
            if parallel_state._WORLD is not None:
                parallel_state._WORLD.destroy()
                parallel_state._WORLD = None
        del self._llm

    def _check_replica_agrees(self, arguments: object) -> None:
        """Shards that run different requests wait for each other for ever."""
        if self.tensor == 1:
            return
        digest = hashlib.sha256(repr(arguments).encode()).hexdigest()
        if len(set(gathered(digest, self._peers))) > 1:
            raise RuntimeError(f"the ranks of rollout replica {self.replica} were given different prompts or seeds")


def _completion(output: Any, choices: np.dtype[Any] | None) -> Completion:
    reason = output.finish_reason
    if reason not in ("stop", "length", "repetition"):
        raise RuntimeError(f"vLLM ended a completion with '{reason}' after {len(output.token_ids)} tokens")
    # logprobs=0 asks for the sampled token alone: one value a position
    experts = None if choices is None else output.routed_experts.astype(choices.base, copy=False)
    return Completion(list(output.token_ids), list(output.logprobs.logprobs), reason, experts)
