"""What test_rollout.py asserts, measured in 2 ranks: `rollout_checks.py DIRECTORY`.

vLLM takes long to import and an engine about two seconds to start, so one job measures everything, and writes
DIRECTORY/results.RANK.json. Then one rank fails on purpose while the other one waits for it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_posttrain.data.dataset import PromptDataset
from megatron_posttrain.data.rows import Row
from megatron_posttrain.evaluation import Task, evaluate
from megatron_posttrain.parallel.groups import broadcast_object, start_distributed
from megatron_posttrain.rewards import Reward
from megatron_posttrain.rollout import Completion, Refit, RolloutEngine, Sampling, prove, vllm_fixes
from megatron_posttrain.rollout.engine import Request
from tests.helpers.rollout_models import KINDS, VOCAB, make_tokenizer

Model = Any
ENGINES = (("dense_tied", 1), ("dense_untied", 2), ("moe_tied", 2), ("moe_untied", 1))
CANARIES = [[7, 8, 9, 10], [3] * 20, list(range(50, 90))]
CORRUPTIONS = {"expert": "experts.5.down_proj", "embedding": "embed_tokens", "norm": "post_attention_layernorm"}


def prompts(seed: int) -> list[list[int]]:
    """Longer and shorter than a cache block of 32; one shares a block with another."""
    draw = np.random.default_rng(seed)
    out = [draw.integers(0, VOCAB, size=size).tolist() for size in (1, 5, 33, 70)]
    return [*out, [*out[-1][:40], 1, 2, 3]]


@torch.no_grad()
def trainer_logprobs(model: Model) -> Callable[[list[list[int]]], list[torch.Tensor]]:
    def score(sequences: list[list[int]], temperature: float = 1.0) -> list[torch.Tensor]:
        out = []
        for sequence in sequences:
            ids = torch.tensor([sequence])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].float() / temperature
            out.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
        return out

    return score


def difference(engine: RolloutEngine, model: Model, seed: int) -> float:
    """Largest difference of sampled and greedy tokens' log-probs to those of transformers."""
    worst, score = 0.0, trainer_logprobs(model)
    for temperature in (0.7, 0.0):
        said = prompts(seed)
        sampling = Sampling(n=3, max_tokens=10, temperature=temperature)
        completions = engine.generate(said, sampling, list(range(len(said) * 3)))
        for i, completion in enumerate(completions):
            prompt = said[i // 3]
            expected = score([prompt + completion.token_ids], temperature or 1.0)[0][len(prompt) - 1 :]
            assert len(completion.logprobs) == len(completion.token_ids) == 10
            worst = max(worst, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    return worst


def greedy_disagreements(engine: RolloutEngine, model: Model, seed: int) -> int:
    count = 0
    for prompt, completion in zip(prompts(seed), engine.greedy(prompts(seed), 10), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        count += int((logits.max(-1).values - chosen > 1e-4).sum())
    return count


def state() -> tuple[Any, ...]:
    """Of the trainer: what vLLM is known to change."""
    return (
        dict(os.environ),
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.rand(3).tolist(),
        random.random(),
        float(np.random.rand()),
    )


def reseed() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def corrupted(tensors: dict[str, torch.Tensor], part: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The first layer's tensor of that name comes with its values doubled."""
    hit = next(name for name in tensors if part in name)
    yield from ((name, tensor * 2 if name == hit else tensor) for name, tensor in tensors.items())


def outcome(action: Callable[[], Any]) -> str:
    """What kind of error it ended with, and its message."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def check_engine(directory: Path, kind: str, tensor: int, rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    reseed()
    before = state()
    reseed()
    engine = RolloutEngine(
        str(directory / f"{kind}_a"), dtype=torch.float32, max_model_len=128, tensor=tensor, kv_cache_bytes=32 << 20
    )
    results["start untouched"] = state() == before
    seed = rank // tensor
    first = AutoModelForCausalLM.from_pretrained(directory / f"{kind}_a", dtype=torch.float32)
    second = AutoModelForCausalLM.from_pretrained(directory / f"{kind}_b", dtype=torch.float32)
    other = load_file(directory / f"{kind}_b" / "model.safetensors")
    reseed()
    results["before"] = difference(engine, first, seed)
    results["greedy"] = greedy_disagreements(engine, first, seed)
    refit = Refit(engine)
    engine.sleep()
    results["seconds"] = refit.update(iter(other.items()), 1)
    results["untouched"] = state() == before
    results["after"] = difference(engine, second, seed)
    results["proof"] = prove(engine, CANARIES, trainer_logprobs(second))
    results["stale"] = outcome(lambda: prove(engine, CANARIES, trainer_logprobs(first)))
    for name, part in CORRUPTIONS.items():
        if any(part in tensor_name for tensor_name in other):
            refit.update(corrupted(other, part), 2)
            results[f"corrupt {name}"] = outcome(lambda: prove(engine, CANARIES, trainer_logprobs(second)))
    for fix in ("forget_packed_experts", "repack_tied_heads"):
        results[f"without {fix}"] = without_fix(engine, fix, second, other)
    refit.update(iter(other.items()), 3)
    results["restored"] = prove(engine, CANARIES, trainer_logprobs(second))
    said = engine.generate(prompts(seed), Sampling(max_tokens=10), list(range(5)))
    if tensor > 1:
        results["disagree"] = outcome(lambda: engine.generate([[5, rank]], Sampling(max_tokens=2), [0]))
        results["shared memory"] = [p.name for p in Path("/dev/shm").glob("*megatron-posttrain*")]
    lacking = "experts.3.up_proj" if KINDS[kind][0] else "layers.1.self_attn.k_proj"
    partial = ((name, t) for name, t in other.items() if lacking not in name)
    results["incomplete"] = outcome(lambda: refit.update(partial, 4))
    engine.close()
    results |= check_unloaded(directory / f"{kind}_a", tensor, seed, second, other, said)
    results["distributed lives"] = dist.is_initialized() and dist.get_world_size() == 2
    return results


def check_unloaded(
    path: Path, tensor: int, seed: int, model: Model, tensors: dict[str, torch.Tensor], said: list[Completion]
) -> dict[str, Any]:
    """An engine that loads nothing, refitted; `said`: what one that had loaded others said after the same refit."""
    engine = RolloutEngine(
        str(path), dtype=torch.float32, max_model_len=128, tensor=tensor, kv_cache_bytes=32 << 20, load_weights=False
    )
    unrefitted = outcome(lambda: prove(engine, CANARIES, trainer_logprobs(model)))
    Refit(engine).update(iter(tensors.items()), 1)
    proof = prove(engine, CANARIES, trainer_logprobs(model))
    same = engine.generate(prompts(seed), Sampling(max_tokens=10), list(range(5))) == said
    engine.close()
    return {"unloaded, unrefitted": unrefitted, "unloaded, proof": proof, "unloaded, same": same}


def without_fix(engine: RolloutEngine, fix: str, model: Model, tensors: dict[str, torch.Tensor]) -> str:
    """What the proof says of a refit with one of vLLM's defects left alone; the weights before are others."""
    Refit(engine).update(((name, t * 0.7) for name, t in tensors.items()), 3)
    kept = getattr(vllm_fixes, fix)
    setattr(vllm_fixes, fix, lambda _: None)
    Refit(engine).update(iter(tensors.items()), 4)
    setattr(vllm_fixes, fix, kept)
    return outcome(lambda: prove(engine, CANARIES, trainer_logprobs(model)))


def check_sampling(directory: Path, rank: int) -> dict[str, Any]:
    """Seeds, stop tokens, bad arguments; and `evaluate` on two replicas."""
    path = directory / "moe_tied_a"
    engine = RolloutEngine(str(path), dtype=torch.float32, max_model_len=128, kv_cache_bytes=32 << 20)
    tokenizer = make_tokenizer(directory / f"tokenizer.{rank}")
    said = prompts(0)
    sampling = Sampling(n=2, max_tokens=8)
    completions = engine.generate(said, sampling, list(range(10)))
    again = engine.generate(said, sampling, list(range(10)))
    others = engine.generate(said, sampling, list(range(10, 20)))
    stop = completions[0].token_ids[3]
    stopped = engine.generate(said[:1], dataclasses.replace(sampling, n=1, stop_token_ids=(stop,)), [0])[0]
    loop = dataclasses.replace(sampling, n=1, temperature=0.0, repetitions=3)
    repeated = [
        engine.generate([prompt], dataclasses.replace(loop, max_tokens=engine.max_model_len - len(prompt)), [0])[0]
        for prompt in said
    ]
    rows = [Row([{"role": "user", "content": f"{i} + {i}"}], str(2 * i), source=f"x:{i}") for i in range(5)]
    questions = PromptDataset(rows, tokenizer, 100).prompts
    length = Reward("length", 1.0, lambda sample: float(len(sample.response) % 2))
    place = directory / "evaluation"
    place.mkdir(exist_ok=True)
    greedy = Sampling(max_tokens=12, temperature=0.0)
    evaluation: Any = broadcast_object(evaluate(engine, tokenizer, Task(questions, [length], greedy, 0, 3), place))
    results = {
        "same seeds": [c.token_ids for c in completions] == [c.token_ids for c in again],
        "other seeds": [c.token_ids for c in completions] == [c.token_ids for c in others],
        "stopped": [stopped.token_ids, stopped.finish_reason, completions[0].token_ids[:4]],
        "length": completions[0].finish_reason,
        "repeated": [[c.token_ids, c.finish_reason] for c in repeated],
        "cut": check_cut(engine, said[:3]),
        "cached": cached_tokens(engine, said[3], 4),
        "empty": engine.generate([], sampling, []),
        "too long": outcome(lambda: engine.generate([[1] * 121], sampling, [0, 1])),
        "seeds": outcome(lambda: engine.generate([[1]], sampling, [0])),
        "evaluation": dataclasses.asdict(evaluation),  # rank 0 alone has it
        "records": [json.loads(line) for line in (place / "responses.jsonl").read_text().splitlines()],
    }
    engine.close()
    return results


def check_cut(engine: RolloutEngine, said: list[list[int]]) -> list[Any]:
    """Work that has enough with its shortest completion: reasons and tokens, and those of the same without a cut."""

    def drawn(cut: bool) -> list[Any]:
        waiting = [{i: Request(prompt, i, 5 + 10 * i) for i, prompt in enumerate(said)}]
        done: dict[int, Completion] = {}
        feed = lambda room, idle: waiting.pop() if waiting else {}  # noqa: E731
        engine.run(feed, done.__setitem__, Sampling(), lambda: cut and bool(done))
        return [(done[i].finish_reason, done[i].token_ids) for i in range(len(said))]

    return [drawn(True), drawn(False)]


def cached_tokens(engine: RolloutEngine, prompt: list[int], n: int) -> list[int]:
    """Of each of `n` samples of a prompt, tokens that were not computed for it."""
    counts: list[int] = []
    prompt = [(token + 7) % VOCAB for token in prompt[::-1]]  # no request had it before
    step = engine._llm.llm_engine.step

    def stepping() -> Any:
        outputs = step()
        counts.extend(output.num_cached_tokens for output in outputs)
        return outputs

    engine._llm.llm_engine.step = stepping
    engine.generate([prompt], Sampling(n, 4), range(n))
    engine._llm.llm_engine.step = step
    return counts


def check_unfixed_start(directory: Path) -> dict[str, Any]:
    """An engine with neither `CPU_OPTIONS` nor `unbound_memory`. Last: it binds the process's memory."""
    bound = "bind:" in Path("/proc/self/numa_maps").read_text()
    kept = vllm_fixes.CPU_OPTIONS
    vllm_fixes.CPU_OPTIONS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    vllm_fixes.unbound_memory = vllm_fixes.contextlib.nullcontext  # type: ignore[assignment]
    engine = RolloutEngine(
        str(directory / "dense_tied_a"), dtype=torch.float32, max_model_len=128, kv_cache_bytes=32 << 20
    )
    vllm_fixes.CPU_OPTIONS = kept
    return {
        "bound with the fix": bound,
        "bound without": "bind:" in Path("/proc/self/numa_maps").read_text(),
        "chunked prefill": outcome(lambda: engine.generate([[1] * 100], Sampling(max_tokens=2), [0])),
        # The engine is dropped without `close`: torch.distributed must live on.
        "identity": engine._isolated._environment["VLLM_DIST_IDENT"],
    }


def main() -> None:
    directory = Path(sys.argv[1])
    start_distributed()
    rank = dist.get_rank()
    results: dict[str, Any] = {}
    for kind, tensor in ENGINES:
        results[kind] = check_engine(directory, kind, tensor, rank)
    results["sampling"] = check_sampling(directory, rank)
    results["compiled"] = sum(torch._dynamo.utils.counters["frames"].values())
    results["unfixed"] = check_unfixed_start(directory)
    (directory / f"results.{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    if rank == 1:
        raise RuntimeError("failing on purpose")
    dist.barrier()  # for a rank that will not come


if __name__ == "__main__":
    main()
