"""`plan`: memory and step time of a model on a cluster, the best layouts, and how to run the winner. Needs no GPU."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import LAYOUT_KEYS
from megatron_posttrain.planning.flops import flops_per_token
from megatron_posttrain.planning.gpus import GPUS, Gpu, find_gpu, spread_of
from megatron_posttrain.planning.known_models import KNOWN_MODELS, load_architecture, published_name
from megatron_posttrain.planning.layouts import parse_layout
from megatron_posttrain.planning.planner import Estimate, plan, plan_layout, scaling
from megatron_posttrain.planning.recipe import config_of, launch_of, rollout_of
from megatron_posttrain.planning.rollout import weight_elements
from megatron_posttrain.planning.workload import Workload

WIDE = 1.5  # highest / lowest published throughput from which a range is told
FILE_WIDTH = 130  # columns, where the output is no terminal
LABELS = dict(zip(LAYOUT_KEYS, ("TP", "PP", "VP", "CP", "EP", "ETP"), strict=True))
TASKS = ("pretrain", "sft", "lora", "dpo", "reward-model", "distill", "grpo", "ppo")
LAYOUT_HELP = "tensor=2,pipeline=1,virtual_pipeline=1,context=1,expert=8,expert_tensor=1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--model", required=True, help=f"a directory or config.json, or one of {', '.join(KNOWN_MODELS)}")
    add("--gpu", required=True, help=f"one of {', '.join(GPUS)}")
    add("--gpus", required=True, help="how many, or several counts for a scaling table: 8,64,512")
    add("--sequence-length", type=int, required=True,
        help="tokens of a row; pairs: of a conversation; RL: of the longest sample")  # fmt: skip
    add("--global-batch-size", type=int, required=True, help="rows an optimizer step; or pairs; RL: samples")
    add("--micro-batch-size", type=int, help="rows a forward pass of one replica; left out: the best of 1, 2, 4, 8")
    add("--precision", choices=("bf16", "fp8", "mxfp8"), default="bf16", help="of matrix multiplications")
    add("--task", choices=TASKS, default="sft", help="what is run")
    add("--teacher", help="distill: as --model; frozen, in the student's layout")
    add("--critic", help="ppo: as --model; left out: as the policy")
    add("--layout", help=f"one layout instead of a search; sizes left out are 1: {LAYOUT_HELP}")
    add("--recompute", choices=("auto", "none", "selective", "full"), default="auto",
        help="of activations; auto: none, and full where the search finds that nothing else fits")  # fmt: skip
    add("--routing", choices=("auto", "balanced", "natural"), default="auto", help="how tokens fall on experts: "
        "balanced by force or by dropping some; auto: so for pretrain, natural else")  # fmt: skip
    add("--lora-rank", type=int, help="of adapters; left out: 16 for lora, no adapters for other tasks")
    add("--quantization", choices=("nf4",), help="of the frozen base beside adapters; left out: bf16")
    add("--mean-length", type=int, help="RL: mean tokens of a sample with its prompt; left out: 3/4 of the longest")
    add("--rollout-tensor", type=int, help="RL: GPUs of a vLLM engine; left out: the best")
    add("--offload", action=argparse.BooleanOptionalAction, default=None,
        help="RL: optimizer states in host memory while vLLM is awake; left out: the better")  # fmt: skip
    add("--domain", type=int, help="GPUs that share NVLink; left out: the GPU's usual system")
    add("--nvlink-gb-per-s", type=float, help="GB/s a GPU and direction inside it")
    add("--network-gb-per-s", type=float, help="GB/s a GPU and direction between them")
    add("--memory-gib", type=float, help="GiB of a GPU that may be used")
    add("--grow-batch", action="store_true", help="several --gpus: the batch, given for the first, grows with them")
    add("--top", type=int, default=10, help="layouts to show")
    add("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    name, arch = load_architecture(args.model)
    _check(args)
    of_gpu = {name: getattr(args, name) for name in ("domain", "nvlink_gb_per_s", "network_gb_per_s", "memory_gib")}
    gpu = replace(find_gpu(args.gpu), **{name: value for name, value in of_gpu.items() if value is not None})
    counts = _counts(args.gpus)
    work = Workload(
        args.task, args.sequence_length, args.global_batch_size, args.precision, args.micro_batch_size or 0,
        args.recompute, args.routing, args.lora_rank, args.quantization, args.mean_length, args.rollout_tensor,
        args.offload,
    )  # fmt: skip
    option = "critic" if args.critic else "teacher"
    if (other := args.critic or args.teacher) is not None:
        try:
            name_of_other, beside = load_architecture(other)
        except UserError as error:
            raise UserError(str(error).replace("--model", f"--{option}", 1)) from None
        work = replace(work, beside=beside, beside_path=other if "/" in other else published_name(name_of_other))
    if len(counts) > 1 and args.layout:
        raise UserError("--layout: one layout belongs to one number of --gpus")
    considered = 1
    if args.layout:
        found = [plan_layout(arch, parse_layout(args.layout, counts[0]), work, gpu)]
    elif len(counts) > 1:
        found = scaling(arch, counts, work, gpu, args.grow_batch)
        considered = len(found)
    else:
        everything = plan(arch, counts[0], work, gpu)
        considered, found = len(everything), everything[: args.top]
    if args.json:
        print(json.dumps({"layouts": [entry(e, arch, gpu) for e in found]}, indent=1))
    else:
        _print(args.model, name, arch, gpu, work, found, considered, len(counts) > 1)
    return 0


def _check(args: argparse.Namespace) -> None:
    for option, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise UserError(f"--{option.replace('_', '-')} {value}: must be more than 0")
    if args.mean_length is not None and args.mean_length > args.sequence_length:
        raise UserError(f"--mean-length {args.mean_length}: longer than --sequence-length {args.sequence_length}")
    if args.task == "grpo" and args.global_batch_size < 2:
        raise UserError("--global-batch-size 1: grpo compares samples of a prompt, so at least 2")
    if (args.teacher is not None) != (args.task == "distill"):
        found = "no --teacher" if args.teacher is None else f"--teacher {args.teacher}"
        raise UserError(f"--task {args.task}: {found}; distill needs one, and no other task has one")
    adapters = args.task == "lora" or (args.lora_rank is not None and args.task in ("dpo", "distill"))
    if (args.lora_rank or args.quantization) and not adapters:
        raise UserError(
            f"--task {args.task}: --lora-rank and --quantization are for lora, and with --lora-rank for dpo and distill"
        )
    only = dict.fromkeys(("mean_length", "rollout_tensor", "offload"), ("grpo", "ppo")) | {"critic": ("ppo",)}
    for option, tasks in only.items():
        if getattr(args, option) is not None and args.task not in tasks:
            asked = f"--{option.replace('_', '-')} has an effect with --task {' or '.join(tasks)} only"
            raise UserError(f"{asked}, found {args.task}")


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--gpus {text}: whole numbers of at least 1, with commas between them")
    return [int(part) for part in parts]


def entry(e: Estimate, arch: Architecture, gpu: Gpu) -> dict[str, Any]:
    """One layout of the JSON output: sizes are GPUs, memory GiB of the fullest rank, times seconds of a step."""
    return {
        "layout": e.layout.sizes,
        "gpus": e.layout.world_size,
        "micro_batch_size": e.micro_batch,
        "recompute": e.recompute,
        "step_seconds": e.step_seconds,
        "step_seconds_range": _range(e, arch, gpu),
        "tokens_per_second_per_gpu": e.tokens_per_second_per_gpu,
        "tflops_per_gpu": e.tflops_per_gpu,
        "memory_gib": e.memory_gib,
        "time_seconds": e.seconds,
        "fits": e.fits,
        "reason": e.reason,
        "warnings": e.warnings,
    } | ({"rollout": rollout_of(e, gpu)} if e.rollout else {})


def _range(e: Estimate, arch: Architecture, gpu: Gpu) -> list[float]:
    """Seconds of a step, from the fastest to the slowest that published runs of such a configuration have been."""
    low, high = spread_of(gpu, arch.moe is not None)
    return [e.step_seconds / high, e.step_seconds / low]


def _print(
    model: str, name: str, arch: Architecture, gpu: Gpu, work: Workload, found: Sequence[Estimate], considered: int,
    several: bool,
) -> None:  # fmt: skip
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    size, active = weight_elements(arch) / 1e9, flops_per_token(arch, 1) / 6e9
    console.print(
        f"[bold]{name}[/]: {size:.2f}B parameters, {active:.2f}B used by a token, "
        f"{flops_per_token(arch, work.sequence_length) / 1e9:.1f} GFLOP a token at {work.sequence_length} tokens"
    )
    console.print(
        f"{gpu.name}: {gpu.memory_gib:.0f} GiB, NVLink among {gpu.domain} at {gpu.nvlink_gb_per_s:.0f} GB/s, "
        f"network {gpu.network_gb_per_s:.0f} GB/s a GPU; {work.task}, {work.precision}, "
        f"global batch {work.global_batch} x {work.row_length} tokens\n"
    )
    if several:
        console.print(_scaling_table(found))
        return
    best = found[0]
    if considered > 1:
        console.print(_ranking(found, considered))
    console.print(_split("Memory of the fullest rank, GiB", {k: v for k, v in best.memory_gib.items() if k != "total"}))
    console.print(_split("Time of a step, seconds", best.seconds))
    console.print(f"{best.layout}: {best.reason}")
    fast, slow = _range(best, arch, gpu)
    if slow / fast > WIDE:
        console.print(f"published runs of one configuration differ: a step of {fast:.2f} to {slow:.2f} seconds")
    for warning in best.warnings:
        console.print(f"[yellow]warning:[/] {warning}")
    if best.fits:
        import yaml

        path = model if "/" in model else published_name(name) if name in KNOWN_MODELS else name
        console.print("\n[bold]plan.yaml[/]")
        print(yaml.safe_dump(config_of(path, best, work, gpu), sort_keys=False), end="")
        console.print("\n[bold]on every node[/]")
        print(launch_of(work.task, best.layout.world_size, gpu))


def _table(title: str, columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("layout", "reason", "part") else "right")
    return table


def _row(e: Estimate) -> list[str]:
    sizes = [f"{LABELS[key]}{size}" for key, size in e.layout.sizes.items() if size > 1]
    chosen = [] if e.recompute == "none" else [f"{e.recompute} recompute"]
    if e.rollout is not None:
        chosen += [f"rollout TP{e.rollout.tensor}", *(["offload"] if e.offload else [])]
    return [
        " ".join([*sizes, f"DP{e.layout.data}", *chosen]),
        f"{e.micro_batch}",
        f"{e.step_seconds:.2f}",
        f"{e.tokens_per_second_per_gpu:,.0f}",
        f"{e.tflops_per_gpu:.0f}",
        f"{e.memory_gib['total']:.1f}",
    ]


def _ranking(found: Sequence[Estimate], considered: int) -> Any:
    columns = ["layout", "micro", "step s", "tokens/s/GPU", "TFLOP/s", "GiB", "reason"]
    table = _table(f"The best {len(found)} of {considered} layouts", columns)
    for e in found:
        table.add_row(*_row(e), e.reason, style=None if e.fits else "dim")
    return table


def _scaling_table(found: Sequence[Estimate]) -> Any:
    columns = ["GPUs", "layout", "micro", "step s", "tokens/s/GPU", "TFLOP/s", "GiB", "tokens/s", "efficiency"]
    table = _table("Scaling: the best layout at each size", columns)
    first = next((e for e in found if e.fits), found[0]).tokens_per_second_per_gpu
    for e in found:
        gpus = e.layout.world_size
        rate = e.tokens_per_second_per_gpu
        table.add_row(str(gpus), *_row(e), f"{rate * gpus:,.0f}", f"{rate / first:.0%}" if e.fits else "does not fit")
    return table


def _split(title: str, parts: dict[str, float]) -> Any:
    table = _table(title, ["part", "amount", "share"])
    total = sum(parts.values())
    for name, value in parts.items():
        if value > 0:
            table.add_row(name.replace("_", " "), f"{value:.2f}", f"{value / total:.0%}")
    return table
