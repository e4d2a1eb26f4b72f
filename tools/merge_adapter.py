#!/usr/bin/env python
"""A PEFT adapter (LoRA) merged into its base: a Hugging Face directory, which transformers and vLLM load.

    python tools/merge_adapter.py --base DIR --adapter DIR --output DIR
    torchrun --nproc-per-node 4 tools/merge_adapter.py --base DIR --adapter DIR --output DIR   (the same bytes, shared)

Products and sums are fp32, rounded once to the base's dtype (or --dtype); one tensor is in memory at a time.
Exit status: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_posttrain.checkpoint import command
from megatron_posttrain.checkpoint.convert import plan_merge


def main() -> int:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="Hugging Face directory that the adapter was trained on")
    add("--adapter", type=Path, required=True, help="directory with adapter_config.json")
    add("--output", type=Path, required=True, help="directory to make")
    command.add_options(parser, shard_size="5GB")
    args = parser.parse_args()
    options = replace(command.options(args), adapter=args.adapter)
    return command.run(args, args.base, args.output, lambda: plan_merge(args.base, options))


if __name__ == "__main__":
    sys.exit(main())
