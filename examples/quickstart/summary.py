"""Prints what the quickstart achieved: held-out accuracies, and one conversation from transformers and vLLM."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

STAGES = {"before": "before SFT", "sft": "after SFT", "grpo": "after GRPO"}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def transformers_response(directory: Path, messages: list[dict[str, str]]) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the quickstart's output directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, help="time taken so far, to print")
    args = parser.parse_args()
    console = Console()

    responses = read_lines(args.run / "evaluation" / "grpo" / "responses.jsonl")
    shown = next((r for r in responses if r["reward"] > 0), responses[0])
    console.print(f"\n[bold]user[/]          {shown['messages'][-1]['content']}", highlight=False)
    text = transformers_response(args.run / "grpo" / "hf", shown["messages"])
    console.print(f"[bold]transformers[/]  {text}", highlight=False)
    console.print(f"[bold]vLLM[/]          {shown['response']}\n", highlight=False)

    rewards = [line["reward"] for line in read_lines(args.run / "grpo" / "metrics.jsonl")]
    table = Table(title=f"two-digit addition, held-out problems, greedy (seed {args.seed})")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("95% interval", justify="right")
    table.add_column("tokens a response", justify="right")
    for name, label in STAGES.items():
        result = json.loads((args.run / "evaluation" / name / "evaluation.json").read_text())
        low, high = result["accuracy_low"], result["accuracy_high"]
        length = result["response_length"]
        table.add_row(label, f"{result['accuracy']:.3f}", f"{low:.3f} to {high:.3f}", f"{length:.1f}")
    console.print(table)
    first, last = statistics.mean(rewards[:2]), statistics.mean(rewards[-2:])
    console.print(f"sampled accuracy during GRPO: {first:.3f} in its first two steps, {last:.3f} in its last two")
    if args.seconds is not None:
        console.print(f"{args.seconds // 60} min {args.seconds % 60} s; everything is under {args.run}")


if __name__ == "__main__":
    main()
