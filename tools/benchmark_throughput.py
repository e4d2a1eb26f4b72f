"""Throughput of a config on synthetic data, comparison of two results, and scaling over several.

    torchrun --nproc-per-node 8 tools/benchmark_throughput.py --config F [key=value...] --output a.json
    torchrun --nproc-per-node 8 tools/benchmark_throughput.py --config F --sweep 'tensor=1;tensor=2,pipeline=2'
    python tools/benchmark_throughput.py --compare a.json b.json
    python tools/benchmark_throughput.py --scaling n1.json n2.json n4.json --html scaling.html

On many nodes the same under `torchrun` on each, or under launch/node.sh. SFT needs the model's config only (or a
well-known name), GRPO its weights. TFLOP/s are the model's: see megatron_posttrain/planning/flops.py. After the timed
steps a few more are profiled: seconds of forward, backward and every kind of communication, see
benchmarks/throughput/phases.py. Exit status: 0 done (--compare: no regression), 1 regression, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_posttrain.cli.main import process
from megatron_posttrain.config.algorithms import ALGORITHMS, GrpoConfig
from megatron_posttrain.errors import UserError

FILE_WIDTH = 100  # columns, where the output is no terminal


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", metavar="FILE", help="what is measured; its data is not read")
    add("--command", choices=tuple(ALGORITHMS), help="whose config it is (default: found by its keys)")
    add("--steps", type=int, default=10, help="timed steps (default: 10)")
    add("--warmup", type=int, default=3, help="steps before them (default: 3)")
    add("--profiled-steps", type=int, default=2, help="steps after them, for the profile (default: 2; 0: none)")
    add("--mean-length", type=int, help="mean tokens of a packed sequence (default: one sequence fills a row)")
    add(
        "--sweep", metavar="LAYOUTS", help="layouts with ; between them, such as 'tensor=2;tensor=2,expert=4', or `all`"
    )
    add("--output", metavar="FILE", help="write the results as JSON")
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="is B slower than A?")
    add("--tolerance", type=float, default=0.02, help="share by which B may be slower (default: 0.02)")
    add("--scaling", nargs="+", metavar="FILE", help="table of result files by number of ranks")
    add("--html", metavar="FILE", help="with --scaling: also a plot")
    add("overrides", nargs="*", metavar="key.sub=value", help="of the config")
    args = parser.parse_args(argv)
    if sum(bool(given) for given in (args.config, args.compare, args.scaling)) != 1:
        raise UserError("give one of --config FILE, --compare A.json B.json, --scaling FILE...")
    if (
        args.steps < 2
        or min(args.warmup, args.profiled_steps) < 0
        or (args.mean_length is not None and args.mean_length < 2)
    ):
        raise UserError("--steps and --mean-length must be 2 or more, --warmup and --profiled-steps 0 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        if args.compare:
            return show_comparison(args.compare[0], args.compare[1], args.tolerance)
        if args.scaling:
            return show_scaling(args.scaling, args.html)
        return benchmark(args)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


# Measuring


def benchmark(args: argparse.Namespace) -> int:
    from megatron_posttrain.training.process import finish, quiet_libraries

    quiet_libraries()
    from benchmarks.throughput.sft import Options, machine
    from megatron_posttrain.doctor.job import read_config

    options = Options(args.steps, args.warmup, args.profiled_steps, args.mean_length)
    _, config = read_config(args.command, args.config, args.overrides)
    if isinstance(config, GrpoConfig):
        if args.sweep:
            raise UserError("--sweep: vLLM can be started once in a process, so GRPO takes one layout at a time")
        from benchmarks.throughput.grpo import measure_grpo

        result = measure_grpo(config, options)
        results = [result] if result is not None else []
    else:
        results = measure_sft(config, args.sweep, options)
    if results and os.environ.get("RANK", "0") == "0":
        hosts = [rank["host"] for rank in results[0].get("ranks", [])]
        tree = {"config": config.model_dump(mode="json"), "machine": machine(hosts), "results": results}
        show_results(results)
        if args.output:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(tree, indent=1) + "\n")
    finish()
    return 0


def measure_sft(config: Any, sweep: str | None, options: Any) -> list[dict[str, Any]]:
    from benchmarks.throughput.sft import measure
    from megatron_posttrain.parallel.groups import start_distributed
    from megatron_posttrain.planning.known_models import load_architecture
    from megatron_posttrain.training.prepare import model_directory

    try:
        place = str(model_directory(config.model.path))
    except UserError:
        place = config.model.path  # a well-known name has no directory here
    arch = load_architecture(place)[1]
    layouts = list(chosen_layouts(config, arch, sweep))
    start_distributed()
    results = []
    for number, layout in enumerate(layouts):
        if os.environ["RANK"] == "0":
            print(f"layout {number + 1} of {len(layouts)}: {layout}", file=sys.stderr, flush=True)
        results.append(measure(config, arch, layout, options))
    return results


def chosen_layouts(config: Any, arch: Any, sweep: str | None) -> Iterator[Any]:
    from megatron_posttrain.models.layout_checks import check_layout, problems
    from megatron_posttrain.parallel.layout import Layout, batch_problem
    from megatron_posttrain.planning.layouts import enumerate_layouts, parse_layout

    world, training = int(os.environ.get("WORLD_SIZE", "1")), config.training
    if sweep == "all":
        found = enumerate_layouts(
            arch, world, domain=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), global_batch=training.global_batch_size,
            sequence_length=config.data.sequence_length, micro_batches=(training.micro_batch_size,),
        )  # fmt: skip
        yield from (layout for layout, _ in found if next(problems(layout, arch), None) is None)
        return
    parts = sweep.split(";") if sweep else []
    for layout in [parse_layout(part, world) for part in parts] or [Layout.from_config(config.parallel, world)]:
        check_layout(layout, arch)
        problem = batch_problem(layout, training.global_batch_size, training.micro_batch_size)
        if problem is not None:
            raise UserError(f"{layout}: {problem}")
        yield layout


# Showing


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_results(results: list[dict[str, Any]]) -> None:
    from benchmarks.throughput.compare import name_of

    results = sorted(results, key=lambda r: -r["tokens_per_second"])
    rows = [
        [
            name_of(r), f"{r['tokens_per_second']:,.0f}", f"{r['tokens_per_second_per_gpu']:,.0f}",
            f"{r['tflops_per_gpu']:.4g}", f"{r['mfu']:.1%}" if "mfu" in r else "-", f"{r['mean_step_seconds']:.3f}",
            f"{r['peak_memory_gib']:.2f}",
        ]
        for r in results
    ]  # fmt: skip
    columns = ["layout", "tokens/s", "of a rank", "TFLOP/s", "MFU", "step s", "peak GiB"]
    show_table("Throughput of timed steps; TFLOP/s and peak memory of a rank", columns, rows)
    show_phases("Phases of timed steps, seconds, mean of the ranks", results, results)
    best = results[0]
    if "mfu" in best:
        print(f"MFU against {best['peak_tflops']:.4g} TFLOP/s a rank ({best['peak_source']})")
    late = best["stragglers"]
    print(
        f"slowest rank by its own matrix multiplications: {late['slowest_rank']} on {late['host']}, "
        f"{late['behind_median']:.1%} behind the median"
    )
    if best["profile"] is not None:
        show_profile(results)


def show_phases(title: str, results: list[dict[str, Any]], sources: list[dict[str, Any]]) -> None:
    from benchmarks.throughput.compare import name_of

    phases = max((list(source["phase_seconds"]) for source in sources), key=len)
    rows = [
        [name_of(r), *(f"{source['phase_seconds'].get(phase, 0.0):.3f}" for phase in phases)]
        for r, source in zip(results, sources, strict=True)
    ]
    show_table(title, ["layout", *(phase.replace("_", "-") for phase in phases)], rows)


def show_profile(results: list[dict[str, Any]]) -> None:
    from benchmarks.throughput.compare import name_of
    from benchmarks.throughput.phases import PIPELINE

    best = results[0]["profile"]  # of the fastest layout
    print("\n" + textwrap.fill(f"What follows is {best['note']}.", FILE_WIDTH) + "\n")
    profiles = [r["profile"] for r in results]
    bubble = "; pipeline: messages and bubble" if any("pipeline" in p["phase_seconds"] for p in profiles) else ""
    show_phases(f"Phases of profiled steps, seconds, mean of the ranks{bubble}", results, profiles)
    if not best["communication"]:
        return
    rows = [
        [kind, f"{c['ranks']}", f"{c['calls']:g}", f"{c['bytes'] / 1e6:,.3f}", f"{c['seconds'] * 1e3:,.2f}",
         f"{c['max_seconds'] * 1e3:,.2f}", "" if kind == PIPELINE else f"{c['waiting_seconds'] * 1e3:,.2f}",
         "" if c["gb_per_second"] is None else f"{c['gb_per_second']:,.3f}"]
        for kind, c in best["communication"].items()
    ]  # fmt: skip
    columns = ["communication", "ranks", "calls", "MB sent", "ms", "slowest", "waiting", "GB/s"]
    show_table(f"Communication of a rank in a step of {name_of(results[0])}", columns, rows)
    print("other: gradient norm, balance of experts, what is logged")
    print("Ranks' own computation, without communication and waiting:")
    for phase, s in best["spread"].items():
        staged = f", {s['within_stage']:.2f} x that of its stage's ranks" if "pipeline" in best["phase_seconds"] else ""
        print(f"  {phase}: rank {s['slowest_rank']} is slowest, {s['max_over_median']:.2f} x the median{staged}")


def show_comparison(a: str, b: str, tolerance: float) -> int:
    from benchmarks.throughput.compare import CONFIDENCE, compare

    found = compare(a, b)
    rows, regressed = [], False
    for c in found:
        slower = c.regressed(tolerance)
        regressed |= slower
        verdict = "REGRESSION" if slower else "faster" if c.low > 1 else "no regression"
        rows.append([c.name, f"{c.ratio:.3f}", f"{c.low:.3f} to {c.high:.3f}", verdict])
    show_table(f"Tokens/s of {b} over {a}", ["result", "ratio", f"{CONFIDENCE:.0%} interval", ""], rows)
    different = sorted({key for c in found for key in c.different})
    if different:
        print(f"not the same in both files: {', '.join(different)}")
    return 1 if regressed else 0


def show_scaling(files: list[str], html: str | None) -> int:
    from benchmarks.throughput.compare import mixed_settings, plot_scaling, scaling_points

    points = scaling_points(files)
    rows = [
        [p.name, str(p.ranks), f"{p.tokens_per_second:,.0f}", f"{p.per_rank:,.0f}", f"{p.efficiency:.0%}"]
        for p in points
    ]
    show_table(
        "Scaling: the fastest layout at each size", ["layout", "ranks", "tokens/s", "a rank", "efficiency"], rows
    )
    different = mixed_settings(files)
    if different:
        print(f"not the same in all results: {', '.join(different)}")
    if html:
        plot_scaling(points, Path(html))
        print(f"wrote {html}")
    return 0


if __name__ == "__main__":
    sys.exit(process(main))
