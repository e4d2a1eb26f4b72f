"""Learning, not only running: adapters, preferences, rewards and distillation on real weights and real rows.

Each part runs the commands that a user runs, one process of one thread, and prints figures on rows that no step saw:
shares of right answers with their 95% Wilson interval.

    python -m benchmarks.learning PART DATA OUTPUT [--model DIR] [key.sub=value ...]

DATA has the public rows and models of the tests. PART:
    lora     Alpaca rows, adapters (--model: what examples/smollm2_from_gguf.py wrote); validation loss before and after
    dpo      hh-rlhf pairs; held-out accuracy of the implicit reward
    reward   the same pairs; held-out accuracy of the scalar reward
    distill  stories260K teaches a student of 2 layers on its own samples; against SFT on the same samples, 3 seeds
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_posttrain.data.pairs import PreferenceDataset
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.data.tokenize import load_tokenizer
from megatron_posttrain.evaluation.evaluate import wilson_interval

# Turns as text: the small model has no template, and no tokens for roles.
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
)


def run(command: str, output: Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of every step."""
    shutil.rmtree(output, ignore_errors=True)
    settings = [f"output={output}", "precision.dtype=fp32", "logging.tensorboard=false", "optimizer.weight_decay=0"]
    subprocess.run([sys.executable, "-m", "megatron_posttrain", command, *settings, *options], check=True)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def split(rows: list[dict[str, Any]], held_out: int, folder: Path) -> list[str]:
    """Options for a training and a validation file."""
    random.Random(0).shuffle(rows)
    parts = {"train": rows[held_out:], "validation": rows[:held_out]}
    return [f"data.{name}={write(folder / f'{name}.jsonl', part)}" for name, part in parts.items()]


def small_model(data: Path, folder: Path, layers: int | None = None, seed: int = 0) -> Path:
    """stories260K with `CHAT`; with `layers` as many of them from random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = data / "models" / "stories260K"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(CHAT)
    if layers is not None:
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, num_hidden_layers=layers)).save_pretrained(
            folder
        )
    return folder


def validation(figures: list[dict[str, Any]], name: str) -> list[float]:
    return [step[name] for step in figures if name in step]


def lora(data: Path, output: Path, model: Path | None, options: list[str]) -> None:
    with gzip.open(data / "datasets/llamafactory_demo/alpaca_en_demo.json.gz") as file:
        rows = split(json.load(file), 64, output)
    common = [f"model.path={model or small_model(data, output / 'model')}", *rows, "data.sequence_length=512",
              "lora={rank: 16, alpha: 32}", "training.global_batch_size=2"]  # fmt: skip
    before = run("sft", output / "before", [*common, "training.steps=1", "optimizer.lr=1e-30", *options])
    after = run("sft", output / "after", [*common, "training.steps=60", "checkpoint.every=20", "optimizer.lr=3e-4",
                                          "optimizer.warmup_steps=5", *options])  # fmt: skip
    losses = validation(before, "validation_loss") + validation(after, "validation_loss")
    print(f"lora: validation loss before and at each look {[round(x, 4) for x in losses]}; {len(after)} steps, "
          f"{sum(step['loss_tokens'] for step in after):,.0f} tokens with loss")  # fmt: skip


def preferences(command: str, data: Path, output: Path, model: Path | None, options: list[str]) -> None:
    with gzip.open(data / "datasets/hh_rlhf_harmless/test_2000.jsonl.gz") as file:
        pairs = split([json.loads(line) for line in file], 500, output)
    common = [f"model.path={model or small_model(data, output / 'model')}", *pairs, "data.sequence_length=512",
              "training.global_batch_size=32", "training.micro_batch_size=8", "training.epochs=3",
              "checkpoint.every=40", "optimizer.warmup_steps=5"]  # fmt: skip
    figures = run(command, output / "run", [*common, *options])
    rows = read_rows(output / "validation.jsonl", use="preference")
    held_out = len(PreferenceDataset(rows, load_tokenizer(model or output / "model"), 512))
    for step in figures:
        if (accuracy := step.get("validation_accuracy")) is not None:
            low, high = wilson_interval(accuracy, held_out)
            print(f"{command}: step {step['step']}, accuracy on {held_out} held-out pairs {accuracy:.4f} ({low:.3f} to "
                  f"{high:.3f}), loss {step['validation_loss']:.4f}", flush=True)  # fmt: skip


def sample_stories(model: Path, count: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """At temperature 1 from the beginning of a sequence, each with an empty question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    rows = []
    for _ in range(0, count, 100):
        begin = torch.full((100, 1), tokenizer.bos_token_id)
        found = teacher.generate(begin, do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=2)
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        rows += [{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": x}]} for x in texts]
    return rows


def distill(data: Path, output: Path, model: Path | None, options: list[str]) -> None:
    """80 samples, of which SFT sees one token at a place and distillation the teacher's whole distribution."""
    teacher = model or small_model(data, output / "teacher")
    rows = split(sample_stories(teacher, 200, 200, 0)[:180], 100, output)
    for seed in range(3):
        student = small_model(data, output / f"student_{seed}", layers=2, seed=seed)
        common = [*rows, "data.sequence_length=256", "training.global_batch_size=4", "training.micro_batch_size=4",
                  f"training.seed={seed}"]  # fmt: skip
        trained = [f"model.path={student}", "training.steps=300", "checkpoint.every=100", "optimizer.lr=3e-3",
                   "optimizer.warmup_steps=10", *options]  # fmt: skip
        sft = run("sft", output / f"sft_{seed}", [*common, *trained])
        kl = run("distill", output / f"distill_{seed}", [*common, *trained, f"teacher.path={teacher}"])
        # The same measure of both: -log p of the held-out samples, without training.
        exported = f"model.path={output / f'distill_{seed}' / 'hf'}"
        looked = run("sft", output / f"look_{seed}", [*common, exported, "training.steps=1", "optimizer.lr=1e-30"])
        losses = [[round(x, 4) for x in validation(figures, "validation_loss")] for figures in (sft, looked, kl)]
        print(
            "distill: seed {}: held-out -log p of SFT {}, of distillation {}; KL {}".format(seed, *losses), flush=True
        )


PARTS = {"lora": lora, "distill": distill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("lora", "dpo", "reward", "distill"))
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("options", nargs="*", metavar="key.sub=value")
    args = parser.parse_args()
    started = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.part in PARTS:
        PARTS[args.part](args.data, args.output, args.model, args.options)
    else:
        command = {"dpo": "dpo", "reward": "reward-model"}[args.part]
        preferences(command, args.data, args.output, args.model, args.options)
    print(f"{args.part}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
