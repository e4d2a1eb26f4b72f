"""Seconds a step: two ranks that both train and generate, against one that trains beside one that generates.

    python -m benchmarks.rollout_ranks [--steps 12] [--rounds 2]

`rollout.ahead: 1` on both sides, which in turns train the quickstart's small model on the same prompts; the first two
steps of a run warm up. A side's line is of its median step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tests.helpers.launch import torchrun
from tests.helpers.models import make_assets

SIDES: dict[str, list[str]] = {"both do both": [], "1 + rollout.ranks=1": ["rollout.ranks=1"]}
PHASES = ("wait_seconds", "refit_seconds", "rollout_seconds", "train_seconds", "rollout_idle_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        assets = make_assets(Path(directory))
        line = [
            "-m", "megatron_posttrain", "grpo", f"model.path={assets / 'model'}", f"data.train={assets / 'rl.jsonl'}",
            "precision.dtype=fp32", "data.sequence_length=96", "rollout.prompts_per_step=8", "rollout.max_tokens=64",
            "rollout.samples_per_prompt=8", "rollout.ahead=1", "training.global_batch_size=64",
            "training.micro_batch_size=4", f"training.steps={args.steps}", "logging.tensorboard=false",
        ]  # fmt: skip
        found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        for number in range(args.rounds):
            for name, more in SIDES.items():
                run = Path(directory, f"{number} {name}")
                torchrun(2, *line, *more, f"output={run}", timeout=1800)
                found[name] += [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[2:]]
        for name, steps in found.items():
            median = sorted(steps, key=lambda step: step["step_seconds"])[len(steps) // 2]
            spread = statistics.quantiles([step["step_seconds"] for step in steps], n=4)
            phases = "  ".join(f"{phase} {median[phase]:.2f}" for phase in PHASES if phase in median)
            print(f"{name:20}  {median['step_seconds']:.2f} s (quartiles {spread[0]:.2f} to {spread[2]:.2f})  {phases}")


if __name__ == "__main__":
    main()
