"""`sample`: N graded responses a prompt, alone or under `torchrun`; a run that was killed goes on where it was."""

import argparse
from pathlib import Path

from megatron_posttrain.cli.generation import add_arguments as add_common
from megatron_posttrain.cli.generation import prepare, set_of, start_engine
from megatron_posttrain.errors import UserError
from megatron_posttrain.output import check_output

FILES = ("responses.jsonl", "sample.json", "sft.jsonl", "dpo.jsonl", "grpo.jsonl")
KEEP = ("correct", "shortest-correct", "best", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, max_tokens=1024, samples=8, temperature=1.0)
    add = parser.add_argument
    add("--keep", choices=KEEP, default="correct", help="responses that become rows of sft.jsonl: all correct ones, "
        "the shortest correct one, the one of the highest reward, or all (default: correct)")  # fmt: skip
    add("--mixed-only", action="store_true", help="no rows in sft.jsonl for prompts of which all or no responses "
        "are correct; dpo.jsonl and grpo.jsonl never have any")  # fmt: skip
    add("--output", default="runs/samples", metavar="DIR", help="responses.jsonl, and from it sft.jsonl, dpo.jsonl "
        "(best and worst response), grpo.jsonl (prompts with their difficulty) (default: runs/samples)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    # First, before torch: it sets what vLLM and OpenMP read from the environment at their import.
    from megatron_posttrain.rollout import RolloutEngine  # noqa: F401

    # isort: split
    import torch.distributed as dist

    from megatron_posttrain.evaluation.responses import begin, other_settings, respond
    from megatron_posttrain.evaluation.sample import write_rows

    output = Path(args.output)
    check_output(output, "--output", FILES)
    job = prepare(args, {"sample": set_of(args)})
    [task] = job.tasks
    if (output / "responses.jsonl").exists() and (told := other_settings(output, task.settings)):
        raise UserError(
            f"--output {output}: the responses in it were sampled with {told}; choose another directory, or remove it"
        )
    engine = start_engine(args, job)
    if dist.get_rank() == 0:
        begin(output, task.settings)
    respond(engine, job.tokenizer, task, output)
    if dist.get_rank() == 0:
        counts = write_rows(output, task.rows, args.keep, args.mixed_only)
        print(
            f"{counts['prompts']:,} prompts, {counts['correct']:.1%} of responses correct; all correct for "
            f"{counts['all_correct']:,} prompts, none for {counts['none_correct']:,}\n"
            f"written to {output}: rows for sft: {counts['sft']:,}, dpo: {counts['dpo']:,}, grpo: {counts['grpo']:,}"
        )
    engine.close()
    dist.destroy_process_group()
    return 0
