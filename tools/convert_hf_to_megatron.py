#!/usr/bin/env python
"""Hugging Face safetensors to a Megatron distributed checkpoint (torch_dist), one tensor in memory at a time.

    python tools/convert_hf_to_megatron.py --hf DIR --megatron DIR
    torchrun --nproc-per-node 4 tools/convert_hf_to_megatron.py --hf DIR --megatron DIR     (the same bytes, shared)

The config, tokenizer and chat template go along, in DIR/hf. Exit status: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_posttrain.checkpoint import command
from megatron_posttrain.checkpoint.convert import plan_hf_to_megatron


def main() -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="source; with --dry-run its config.json is enough")
    parser.add_argument("--megatron", type=Path, required=True, help="directory to make")
    command.add_options(parser, shard_size="2GB")
    args = parser.parse_args()
    return command.run(args, args.hf, args.megatron, lambda: plan(args))


def plan(args: argparse.Namespace) -> command.Conversion:
    weights = not args.dry_run or (args.hf.is_dir() and any(args.hf.glob("*.safetensors")))
    return plan_hf_to_megatron(args.hf, command.options(args), weights)


if __name__ == "__main__":
    sys.exit(main())
