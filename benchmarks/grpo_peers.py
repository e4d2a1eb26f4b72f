"""GRPO steps of this trainer and of TRL's GRPOTrainer, in turns: CPU seconds a step, and what each has learned.

    python -m benchmarks.grpo_peers [--steps 6] [--dense]                      # speed, on a random model
    python -m benchmarks.grpo_peers --learn runs/quickstart --steps 16 --output DIR   # rewards of the quickstart's task

Every side is a process of one thread that waits for its turn before each step: `ours` (refit into vLLM, its proof
and vLLM's sampling included), `trl` (transformers generates) and `trl-vllm` (its colocated vLLM). Same model, prompts,
rewards, samples a step, response tokens and optimizer, fp32, one update a rollout, no reference model. Prints each
side's median and quartiles, and the ratio of every turn to ours. Speed: 8 prompts of 24 tokens, 8 samples each,
--response tokens each. Learning: the quickstart's own GRPO config, its `sft/hf` and prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIDES = ("ours", "trl", "trl-vllm")
PROMPT, PROMPTS, SAMPLES = 24, 8, 8
WARM_UP = 2
# Figures go through a descriptor of their own: libraries write to the others.
CHILD = """import os, runpy, sys
os.dup2(int(sys.argv.pop()), 3)
runpy.run_module(sys.argv.pop(), run_name="__main__", alter_sys=True)"""
REWARD = """from megatron_posttrain.rewards import reward


@reward("digits")
def digits(sample):
    return sum(letter.isdigit() for letter in sample.response) / 8
"""


def make_job(directory: Path, dense: bool, response: int, seed: int) -> dict[str, Any]:
    """A random model, the quickstart's tokenizer, prompts of digits and a reward, as our config; the others read it."""
    from benchmarks.sft_vs_transformers import make_model
    from examples.quickstart.make_assets import make_tokenizer

    make_model(directory / "model", dense)
    make_tokenizer().save_pretrained(directory / "model")
    draw = random.Random(seed)
    asked = ["".join(draw.choices("0123456789", k=PROMPT - 8)) for _ in range(PROMPTS * 16)]
    rows = [{"messages": [{"role": "user", "content": digits}], "answer": "-"} for digits in asked]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "reward.py").write_text(REWARD)
    return {
        "model": {"path": str(directory / "model")},
        "precision": {"dtype": "fp32"},
        "data": {"train": str(directory / "rows.jsonl"), "sequence_length": PROMPT + response},
        "optimizer": {"lr": 1e-4, "schedule": "constant", "beta2": 0.999, "weight_decay": 0.0},
        "training": {"global_batch_size": PROMPTS * SAMPLES, "micro_batch_size": PROMPTS * SAMPLES, "seed": seed},
        "rollout": {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_tokens": response},
        "rewards": [{"name": "digits", "file": str(directory / "reward.py")}],
    }


def quickstart_job(run: Path, seed: int, prompts: int | None) -> dict[str, Any]:
    import yaml

    job: dict[str, Any] = yaml.safe_load(Path("examples/quickstart/grpo.yaml").read_text())
    job["parallel"] = {}
    job["model"]["path"], job["data"]["train"] = str(run / "sft" / "hf"), str(run / "assets" / "rl.jsonl")
    job["training"]["seed"] = seed
    if prompts is not None:
        job["rollout"]["prompts_per_step"] = prompts
        job["training"]["global_batch_size"] = prompts * job["rollout"]["samples_per_prompt"]
    return job


def ours(job: dict[str, Any], turn: Callable[[float | None], None]) -> None:
    import megatron_posttrain.rollout  # noqa: F401 - before torch: it sets what vLLM reads from the environment

    # isort: split
    from megatron_posttrain.algorithms.grpo import grpo
    from megatron_posttrain.config.algorithms import GrpoConfig
    from megatron_posttrain.training.run import listening

    with listening(lambda number, metrics: turn(metrics["reward"])):
        grpo(GrpoConfig.model_validate(job))


def trl(job: dict[str, Any], turn: Callable[[float | None], None], use_vllm: bool) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from megatron_posttrain.config.schema import RewardConfig
    from megatron_posttrain.rewards import load_rewards
    from megatron_posttrain.rewards.grading import compute_rewards
    from megatron_posttrain.rewards.registry import Sample

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in Path(job["data"]["train"]).read_text().splitlines()]
    (grader,) = load_rewards([RewardConfig(**entry) for entry in job["rewards"]])
    optimizer, rollout, steps = job["optimizer"], job["rollout"], job["training"]["steps"]
    means: list[float] = []

    def graded(completions: list[Any], answer: list[str], **unused: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        finals = [text.rpartition("</think>")[2] for text in texts]
        each = zip(texts, finals, answer, strict=True)
        said = [Sample([], text, key, {}, "", final, 0, False, 0.0) for text, final, key in each]
        values = [grade.total for grade in compute_rewards(said, [grader])]
        means.append(statistics.fmean(values))
        return values

    class Turns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            turn(means[-1])

    count = rollout["prompts_per_step"] * rollout["samples_per_prompt"]
    config = GRPOConfig(
        output_dir=job["output"], use_cpu=True, bf16=False, fp16=False, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=False,
        learning_rate=float(optimizer["lr"]), adam_beta2=optimizer["beta2"], weight_decay=optimizer["weight_decay"],
        lr_scheduler_type=optimizer["schedule"], warmup_steps=optimizer.get("warmup_steps", 0), max_grad_norm=1.0,
        max_steps=steps, per_device_train_batch_size=count, num_generations=rollout["samples_per_prompt"],
        max_completion_length=rollout["max_tokens"], temperature=1.0, beta=0.0, loss_type="dapo", epsilon=0.2,
        seed=job["training"]["seed"], use_vllm=use_vllm, vllm_mode="colocate", vllm_max_model_length=256,
    )  # fmt: skip
    path = job["model"]["path"]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["messages"][:1], "answer": row["answer"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(path),
        reward_funcs=graded,
        callbacks=[Turns()],
    )
    trainer.train()


def side(name: str, file: str) -> None:
    """A child: a step after each line that it reads, its figures as a line on file descriptor 3."""
    job, out = json.loads(Path(file).read_text()), os.fdopen(3, "w", buffering=1)
    began = [0.0, 0.0]

    def turn(reward: float | None) -> None:
        cpu, wall = time.process_time() - began[0], time.perf_counter() - began[1]
        out.write(json.dumps({"reward": reward, "cpu": cpu, "wall": wall}) + "\n")
        sys.stdin.readline()
        began[:] = time.process_time(), time.perf_counter()

    job["output"] = str(Path(file).parent / name)
    if name == "ours":
        ours(job, turn)
    else:
        trl(job, turn, use_vllm=name == "trl-vllm")


class Side:
    def __init__(self, name: str, file: Path, log: Path, module: str) -> None:
        self.log, (read, write) = log, os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, "--side", name, str(file), module, str(write)],
            stdin=subprocess.PIPE, stdout=log.open("w"), stderr=subprocess.STDOUT, pass_fds=[write],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        os.close(write)
        self.answers = os.fdopen(read)

    def step(self, first: bool) -> dict[str, float] | None:
        """Its next step's figures; None when it has ended, with its log's last lines where it failed."""
        assert self.process.stdin is not None
        if not first:
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        if line := self.answers.readline():
            found: dict[str, float] = json.loads(line)
            return found
        if self.process.wait():
            print("\n".join(self.log.read_text().splitlines()[-15:]), file=sys.stderr)
        return None


def in_turns(names: Sequence[str], directory: Path, count: int, module: str) -> dict[str, list[dict[str, float]]]:
    """Steps of every side, a child each that runs `module` on `directory`'s job; one that fails is left alone."""
    sides = {name: Side(name, directory / "job.json", directory / f"{name}.log", module) for name in names}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(count):
        for name, child in sides.items():
            if len(steps[name]) == number and (found := child.step(first=number == 0)):
                steps[name].append(found)
    for child in sides.values():
        child.process.kill()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each side; two more come before them")
    parser.add_argument("--dense", action="store_true", help="a dense model instead of a mixture of experts")
    parser.add_argument("--response", type=int, default=8, metavar="TOKENS", help="of a response (default: 8)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learn", type=Path, metavar="RUN", help="a quickstart's directory: its task, all steps kept")
    parser.add_argument("--prompts", type=int, help="a step's, with --learn (default: the config's)")
    parser.add_argument("--output", type=Path, help="keep the steps here, a JSON line each")
    args = parser.parse_args()
    if args.side:
        return side(*args.side)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        job = (
            quickstart_job(args.learn, args.seed, args.prompts)
            if args.learn
            else make_job(directory, args.dense, args.response, args.seed)
        )
        job["training"]["steps"] = args.steps + (0 if args.learn else WARM_UP)
        (directory / "job.json").write_text(json.dumps(job))
        steps = in_turns(args.sides, directory, job["training"]["steps"], "benchmarks.grpo_peers")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, lines in steps.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (args.output / f"{name}_seed{args.seed}.jsonl").write_text(text)
    show(steps)


def show(steps: dict[str, list[dict[str, float]]], figure: str = "reward") -> None:
    for name, lines in steps.items():
        timed = lines[WARM_UP:]
        if len(timed) < 2:
            print(f"{name:9} failed")
            continue
        pairs = zip(timed, steps.get("ours", lines)[WARM_UP:], strict=False)
        low, middle, high = statistics.quantiles([x["cpu"] / own["cpu"] for x, own in pairs], n=4)
        cpu, wall = (statistics.median(line[kind] for line in timed) for kind in ("cpu", "wall"))
        ratio = f"{middle:.2f} of ours ({low:.2f} to {high:.2f})"
        rewards = f"{figure} {lines[0]['reward']:.3f} -> {lines[-1]['reward']:.3f}"
        print(f"{name:9} {cpu:.3f} CPU s a step ({wall:.3f} s), {ratio}; {rewards}")


if __name__ == "__main__":
    main()
