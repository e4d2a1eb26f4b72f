"""Rewards of the quickstart's task by algorithm, several seeds each, in one picture.

    bash examples/quickstart.sh                      # its runs/quickstart/sft/hf and assets are where every run begins
    python -m benchmarks.curves RUNS [--seeds 3] [--only grpo ppo ...] [--picture FILE.svg]

Each run is the command that a user runs, one process of one thread, 16 steps of 16 prompts with 8 samples, and is kept
in RUNS/NAME_SEED; what is there already is not run again. `tools`: products with the built-in calculator in two
turns, by a model that calls it in two of five answers and else guesses. `random`: its reward is a coin; plotted is the
share of right answers, as everywhere. `TRL`: its GRPOTrainer on the same model, prompts, rewards and hyper-parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from examples.quickstart.picture import text

STEPS = 16
COMMON = (
    "parallel={}", f"training.steps={STEPS}", "training.global_batch_size=128", "rollout.prompts_per_step=16",
    "logging.tensorboard=false", "rewards=[{name: math}]",
)  # fmt: skip
PRESETS = ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: ("grpo", (f"algorithm.preset={name}",)) for name in PRESETS},
    "ppo": ("ppo", ("critic.lr=1e-3", "algorithm.lambda=1.0")),
    "lora": ("grpo", ("lora.rank=16", "optimizer.lr=3e-3")),
    "ahead": ("grpo", ("rollout.ahead=1", "algorithm.importance_cap=2.0")),
    "random": ("grpo", ("rewards=[{name: math, weight: 0.0}, {name: random}]",)),
}
OTHERS = ("tools", "TRL")
WIDTH, HEIGHT, ACROSS = 210, 120, 5


def run(name: str, seed: int, quickstart: Path, output: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings: Sequence[str] = (
        *COMMON,
        f"model.path={quickstart / 'sft/hf'}",
        f"data.train={quickstart / 'assets/rl.jsonl'}",
    )
    command, config = "grpo", "examples/quickstart/grpo.yaml"
    if name == "TRL":
        line = ["-m", "benchmarks.grpo_peers", "--learn", str(quickstart), "--sides", "trl", "--steps", str(STEPS)]
        line += ["--seed", str(seed), "--output", str(output), "--prompts", "16"]
    else:
        if name == "tools":
            config, settings = make_tools(output.with_suffix(".assets"), seed), ()
        else:
            command, more = VARIANTS[name]
            settings = (*settings, *more)
        line = ["-m", "megatron_posttrain", command, "--config", config]
        line += [*settings, f"training.seed={seed}", f"output={output}"]
    log = output.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *line], env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{name}, seed {seed} exited with {done.returncode}; the end of {log}:\n{log.read_text()[-2000:]}")


def make_tools(directory: Path, seed: int) -> str:
    """A model of two habits, prompts, and the config to train it with."""
    from megatron_posttrain.config.schema import EnvironmentConfig
    from megatron_posttrain.environments import load_environment
    from tests.helpers.tool_models import make_tool_model, sums

    tools = load_environment(EnvironmentConfig(name="calculator")).tools
    make_tool_model(directory / "model", 400, tools, rows=32, guesses=0.6)
    rows = [{"question": question, "answer": answer} for question, answer in sums(2000, 1000 + seed, 9)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"path": str(directory / "model")}, "precision": {"dtype": "fp32"},
        "data": {"train": str(directory / "rows.jsonl"), "sequence_length": 192},
        "optimizer": {"lr": 1e-3, "schedule": "constant", "weight_decay": 0.0},
        "training": {"steps": STEPS, "global_batch_size": 128, "micro_batch_size": 32},
        "rollout": {"prompts_per_step": 16, "samples_per_prompt": 8, "max_tokens": 100},
        "environment": {"name": "calculator", "max_turns": 3},
        "rewards": [{"name": "math"}], "logging": {"tensorboard": False},
    }  # fmt: skip
    (directory / "grpo.json").write_text(json.dumps(config))
    return str(directory / "grpo.json")


def rewards_of(output: Path) -> list[float]:
    """Share of right answers by step."""
    file = next(output.glob("*.jsonl"), output / "metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line.get("reward/math", line["reward"]) for line in lines]


def picture(curves: dict[str, list[list[float]]]) -> str:
    width = 54 + min(ACROSS, len(curves)) * (WIDTH + 34)
    body = text(width / 2, 18, "share of right answers by step, a line for each seed")
    for number, (name, seeds) in enumerate(curves.items()):
        x, y = 44 + number % ACROSS * (WIDTH + 34), 54 + number // ACROSS * (HEIGHT + 56)
        for value in (0.0, 0.5, 1.0):
            at = y + HEIGHT * (1 - value)
            body += f"<line x1='{x}' x2='{x + WIDTH}' y1='{at}' y2='{at}' stroke='#ddd'/>"
            body += text(x - 6, at + 4, f"{value:g}", "end") if number % ACROSS == 0 else ""
        for values in seeds:
            step = WIDTH / max(1, len(values) - 1)
            points = " ".join(f"{x + step * i:.1f},{y + HEIGHT * (1 - v):.1f}" for i, v in enumerate(values))
            body += f"<polyline points='{points}' fill='none' stroke='#4a7fb5' stroke-width='1.5' opacity='0.8'/>"
        body += text(x + WIDTH / 2, y - 10, name) + text(x + WIDTH / 2, y + HEIGHT + 18, f"step 1 to {len(seeds[0])}")
    height = 54 + -(-len(curves) // ACROSS) * (HEIGHT + 56)
    size = f"viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size}><rect width='100%' height='100%' fill='white'/>{body}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    names = (*VARIANTS, *OTHERS)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    curves: dict[str, list[list[float]]] = {}
    for name in args.only:
        for seed in range(args.seeds):
            output = args.runs / f"{name}_{seed}"
            if not output.is_dir():
                run(name, seed, args.quickstart, output)
            curves.setdefault(name, []).append(rewards_of(output))
        first, last = (fmean(fmean(x[part]) for x in curves[name]) for part in (slice(0, 3), slice(-3, None)))
        each = ", ".join(f"{fmean(x[:3]):.2f} -> {fmean(x[-3:]):.2f}" for x in curves[name])
        print(f"{name:20} {first:.3f} -> {last:.3f} in the mean of three steps; by seed {each}", flush=True)
    if args.picture:
        args.picture.write_text(picture(curves))


if __name__ == "__main__":
    main()
