"""Steps of `sft` with LoRA and of `dpo` beside TRL's SFTTrainer with PEFT and DPOTrainer, in turns: CPU seconds a step.

    python -m benchmarks.adapter_peers lora [--steps 8]
    python -m benchmarks.adapter_peers dpo [--experts] [--beta 0.1]

Every side is a process of one thread that waits for its turn before each step. Same model (random), rows, batches,
learning rate and optimizer, fp32. A step has 8 answers (pairs) of 32 to 160 tokens, two a micro-batch: we pack those,
TRL pads them. LoRA: rank 8 on all linear layers of a dense model (PEFT has no adapters for transformers' experts). DPO:
`trl` computes the reference in every step, its default; `trl-cached` beforehand, as we do. Prints each side's median
and quartiles, the ratio of every turn to ours, the losses, and what our reference cost before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.grpo_peers import WARM_UP, in_turns, show

SIDES = {"lora": ("ours", "trl"), "dpo": ("ours", "trl", "trl-cached")}
BATCH, PROMPT = 8, 48
RANK = 8
Turn = Callable[[float | None], None]


def make_job(directory: Path, task: str, experts: bool, beta: float, steps: int) -> dict[str, Any]:
    from benchmarks.sft_vs_transformers import make_model
    from examples.quickstart.make_assets import make_tokenizer

    make_model(directory / "model", not experts)
    make_tokenizer().save_pretrained(directory / "model")
    draw = random.Random(0)

    def said(role: str, length: int) -> list[dict[str, str]]:
        return [{"role": role, "content": "".join(draw.choices("0123456789", k=length))}]

    def answer() -> list[dict[str, str]]:
        return said("assistant", draw.randint(32, 160))

    rows: list[dict[str, Any]] = [{"prompt": said("user", PROMPT)} for _ in range(steps * BATCH)]
    for row in rows:
        row |= {"completion": answer()} if task == "lora" else {"chosen": answer(), "rejected": answer()}
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job: dict[str, Any] = {
        "model": {"path": str(directory / "model")},
        "precision": {"dtype": "fp32"},
        "data": {"train": str(directory / "rows.jsonl"), "sequence_length": 256, "packing": False},
        "optimizer": {"lr": 1e-4, "schedule": "constant", "beta2": 0.999, "weight_decay": 0.0},
        "training": {"global_batch_size": BATCH, "micro_batch_size": 2, "steps": steps, "seed": 0},
    }
    if task == "lora":
        job["lora"] = {"rank": RANK, "alpha": 2 * RANK, "dropout": 0.0, "targets": "all-linear"}
        return job
    return job | {"algorithm": {"loss": "sigmoid", "beta": beta}}


def ours(task: str, job: dict[str, Any], turn: Turn) -> None:
    from megatron_posttrain.algorithms.dpo import ReferenceLogprobs, dpo
    from megatron_posttrain.algorithms.sft import sft
    from megatron_posttrain.config.algorithms import DpoConfig, SftConfig
    from megatron_posttrain.training.run import listening

    compute = ReferenceLogprobs.compute

    def timed(*args: Any) -> None:
        began = time.process_time()
        compute(*args)
        print(f"reference: {time.process_time() - began:.2f} CPU s before the first step", flush=True)

    ReferenceLogprobs.compute = timed  # type: ignore[assignment, method-assign]
    with listening(lambda number, metrics: turn(metrics["loss"])):
        sft(SftConfig.model_validate(job)) if task == "lora" else dpo(DpoConfig.model_validate(job))


def trl(task: str, job: dict[str, Any], turn: Turn, cached: bool) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(1)

    class Turns(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **unused: Any) -> None:
            if "loss" in logs:
                turn(logs["loss"])

    optimizer, path = job["optimizer"], job["model"]["path"]
    options: dict[str, Any] = {
        "output_dir": job["output"], "use_cpu": True, "bf16": False, "fp16": False, "report_to": [],
        "save_strategy": "no", "logging_strategy": "steps", "logging_steps": 1, "disable_tqdm": True,
        "gradient_checkpointing": False, "dataloader_pin_memory": False, "learning_rate": optimizer["lr"],
        "adam_beta2": optimizer["beta2"], "weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "max_steps": job["training"]["steps"], "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": BATCH // 2, "max_length": job["data"]["sequence_length"], "seed": 0,
    }  # fmt: skip
    common: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        "train_dataset": Dataset.from_list(
            [json.loads(line) for line in Path(job["data"]["train"]).read_text().splitlines()]
        ),
        "processing_class": AutoTokenizer.from_pretrained(path),
        "callbacks": [Turns()],
    }
    if task == "lora":
        adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        SFTTrainer(args=SFTConfig(completion_only_loss=True, **options), peft_config=adapter, **common).train()
    else:
        config = DPOConfig(beta=job["algorithm"]["beta"], precompute_ref_log_probs=cached, **options)
        DPOTrainer(args=config, **common).train()


def side(name: str, file: str) -> None:
    """A child: a step after each line that it reads, its figures as a line on file descriptor 3."""
    job, out = json.loads(Path(file).read_text()), os.fdopen(3, "w", buffering=1)
    task, began = job.pop("task"), [0.0, 0.0]

    def turn(loss: float | None) -> None:
        cpu, wall = time.process_time() - began[0], time.perf_counter() - began[1]
        out.write(json.dumps({"reward": loss, "cpu": cpu, "wall": wall}) + "\n")
        sys.stdin.readline()
        began[:] = time.process_time(), time.perf_counter()

    job["output"] = str(Path(file).parent / name)
    ours(task, job, turn) if name == "ours" else trl(task, job, turn, cached=name == "trl-cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=SIDES, nargs="?")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each side; two more come before them")
    parser.add_argument("--experts", action="store_true", help="dpo: a mixture of experts instead of a dense model")
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()
    if args.side:
        return side(*args.side)
    if args.task is None or (args.experts and args.task == "lora"):
        parser.error("a task is needed: dpo, or lora without --experts")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        job = make_job(directory, args.task, args.experts, args.beta, args.steps + WARM_UP)
        (directory / "job.json").write_text(json.dumps(job | {"task": args.task}))
        steps = in_turns(SIDES[args.task], directory, job["training"]["steps"], "benchmarks.adapter_peers")
        print(*(x for x in (directory / "ours.log").read_text().splitlines() if x.startswith("reference:")), sep="\n")
    show(steps, "loss")


if __name__ == "__main__":
    main()
