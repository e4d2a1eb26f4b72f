#!/usr/bin/env python
"""A Megatron distributed checkpoint to a Hugging Face directory, which transformers and vLLM load.

    python tools/convert_megatron_to_hf.py --megatron DIR --hf DIR
    python tools/convert_megatron_to_hf.py --megatron RUN/checkpoints/step_000100 --hf DIR
    torchrun --nproc-per-node 4 tools/convert_megatron_to_hf.py --megatron DIR --hf DIR     (the same bytes, shared)

Exit status: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_posttrain.checkpoint import command
from megatron_posttrain.checkpoint.convert import plan_megatron_to_hf


def main() -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--megatron", type=Path, required=True, help="source: converted, or a trainer's step_N")
    parser.add_argument("--hf", type=Path, required=True, help="directory to make")
    command.add_options(parser, shard_size="5GB")
    add = parser.add_argument
    add(
        "--source",
        type=Path,
        help="Hugging Face directory with config, tokenizer and template; default: DIR/hf, else model.path of the run",
    )
    add("--experts", choices=("separate", "fused"), help="layout of experts; default: the source's")
    add("--quantize", choices=("fp8-block",), help="write linear layers in FP8 with a scale per 128 x 128 block")
    add("--merge-adapter", type=Path, metavar="PEFT_DIR", help="LoRA to merge into the weights")
    args = parser.parse_args()
    return command.run(args, args.megatron, args.hf, lambda: plan_megatron_to_hf(args.megatron, command.options(args)))


if __name__ == "__main__":
    sys.exit(main())
