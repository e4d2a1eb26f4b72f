#!/usr/bin/env python
"""Compares two checkpoints tensor by tensor: Hugging Face or Megatron directories, in any combination.

    python tools/compare_checkpoints.py A B [--tolerance 1e-6]

Exit status: 0 every tensor is on both sides and equal, 1 something differs, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_posttrain.checkpoint import command
from megatron_posttrain.checkpoint.compare import Difference, compare


def main() -> int:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("a", metavar="A", type=Path, help="directory")
    add("b", metavar="B", type=Path, help="directory")
    add("--tolerance", type=float, help="largest absolute difference; dtypes may differ then (default: equal bits)")
    add("--source", type=Path, help="Hugging Face directory of a Megatron checkpoint that has no config of its own")
    add("--rows", type=int, default=20, help="differences to show (default: %(default)s)")
    args = parser.parse_args()
    return command.guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    equal, differences = 0, 0
    for found in compare(args.a, args.b, args.tolerance, args.source):
        if isinstance(found, str):
            equal += 1
            continue
        differences += 1
        if differences <= args.rows:
            print(row(found), flush=True)
    if not equal and not differences:
        print("no tensors to compare")
        return 1
    print(f"{equal} equal, {differences} different" + (f" ({args.rows} shown)" if differences > args.rows else ""))
    return 1 if differences else 0


def row(found: Difference) -> str:
    largest = f"{found.largest:.3e}" if found.kind == "values" else ""
    return f"{found.kind:13} {found.name:70} {largest:10} {found.detail}"


if __name__ == "__main__":
    sys.exit(main())
