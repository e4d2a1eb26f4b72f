"""Checks and measures the GPU path on this machine: one line an item, passed, failed or skipped with the reason.

    python tools/gpu_check.py [--output results.json] [--only layer,peaks] [--model HF_DIR] [--toy]
    torchrun --nproc-per-node 8 tools/gpu_check.py [...]      # what a node's ranks do together, and nothing else

Needs torch and megatron-core; what needs Transformer Engine or vLLM is skipped without them. Without a GPU all is
skipped, unless with --toy, whose sizes show only that the code runs: its figures say nothing about speed.
Exit status: 0 nothing failed, 1 something failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_check.harness import FIRST, Outcome, Setting, report, run_all
from megatron_posttrain.errors import UserError, nearest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="JSON file of results (default: none)")
    parser.add_argument(
        "--only", default="", help="run items whose name contains one of these, with commas between (default: all)"
    )
    parser.add_argument("--model", default=None, help="Hugging Face directory for refit GB/s (default: skip it)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on CPU too; not a measurement")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # megatron-core tells what is not installed; the results say it once
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from benchmarks.gpu_check.checks import CHECKS
    from benchmarks.gpu_check.measure import MEASURES
    from benchmarks.gpu_check.memory import MEMORY

    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together:
        from benchmarks.gpu_check.ranks import RANKS
    items = RANKS if together else (*CHECKS, *MEMORY, *MEASURES)
    wanted = options.only.split(",")
    chosen = [(name, check) for name, check in items if any(part in name for part in wanted)]
    try:
        for part in wanted:
            if not any(part in name for name, _ in items):
                raise UserError(f"--only {part}: no item has this in its name{nearest(part, [n for n, _ in items])}")
        if options.model is not None and not (Path(options.model) / "config.json").is_file():
            raise UserError(f"--model {options.model}: not a directory with a config.json")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.toy and FIRST:
        print("toy sizes: shows that the code runs; the figures say nothing about speed")
    setting = Setting(options.toy, options.model)
    outcomes = run_all(chosen, setting)
    if FIRST:
        print(_summary(outcomes))
    if options.output is not None and FIRST:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report(outcomes, setting), indent=1) + "\n")
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _summary(outcomes: list[Outcome]) -> str:
    counts = {status: sum(o.status == status for o in outcomes) for status in ("passed", "failed", "skipped")}
    return ", ".join(f"{n} {status}" for status, n in counts.items())


if __name__ == "__main__":
    sys.exit(main())
