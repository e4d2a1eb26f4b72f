#!/usr/bin/env python
"""A model quantised by llm-compressor: a Hugging Face directory in compressed-tensors' format, which vLLM loads.

    .venv/bin/pip install --no-deps --target build/quantize -r requirements/quantize.txt
    python tools/quantize.py --model DIR --output DIR --format fp8
    python tools/quantize.py --model DIR --output DIR --format int4 --data train.jsonl --suite suite.yaml

fp8: weights by output channel, activations by token as they come; no data. int8 (weights and activations, as fp8) and
int4 (weights in groups of 128, or of 64 or 32 where those do not divide a layer's inputs) are rounded by GPTQ
(arXiv 2210.17323), which needs rows of conversations: some hundred of what the model will be used for. Embeddings,
output layer and routers stay as they are. --suite evaluates both directories: tables of sizes, accuracy, perplexity,
and of differences prompt by prompt.
Which formats a device runs is vLLM's matter: on a CPU with AVX2, 0.32 loaded fp8 and int8 of a dense model; it has no
int8 kernel for experts there, and none for int4 without AVX-512.
Exit status: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_posttrain.cli.generation import positive
from megatron_posttrain.errors import UserError

SCHEMES = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "int4": "W4A16"}
# What `evaluate` says of formats that vLLM has no kernel for here, as INT4 on a CPU with AVX2.
UNABLE = re.compile("vLLM does not run this model on this machine|'_C' object has no attribute")
KEPT = ["lm_head", "re:.*mlp.gate$", "re:.*router.*"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face directory")
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    add("--format", choices=tuple(SCHEMES), required=True)
    add("--data", metavar="FILE", help="calibration rows, in a form that `sft` reads; int8 and int4")
    add("--rows", type=positive, default=256, metavar="N", help="of them (default: 256)")
    add("--length", type=positive, default=2048, metavar="N", help="tokens of a row at most (default: 2048)")
    add("--suite", metavar="FILE", help="of `evaluate`, on both directories (default: no evaluation)")
    add("--suite-data", metavar="DIR", help="that its file names start from (default: the suite's own)")
    add("--packages", default="build/quantize", metavar="DIR", help="llm-compressor (default: build/quantize)")
    args = parser.parse_args()
    try:
        check(args)
        sys.path.insert(0, args.packages)
        quantize(args)
        compare(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {args.output} is written, but this failed, see above: {shlex.join(error.cmd)}", file=sys.stderr)
        return 1
    return 0


def check(args: argparse.Namespace) -> None:
    from megatron_posttrain.checkpoint.hf import check_directory

    if not (Path(args.packages) / "llmcompressor").is_dir():
        raise UserError(
            f"--packages {args.packages}: no llmcompressor in it; install it with "
            f"`.venv/bin/pip install --no-deps --target {args.packages} -r requirements/quantize.txt`"
        )
    if args.output.exists():
        raise UserError(f"--output {args.output}: there is something already; name a new directory")
    if (args.format == "fp8") == bool(args.data):
        raise UserError(f"--data: {'would be ignored by' if args.data else 'is needed by'} --format {args.format}")
    if args.suite and not Path(args.suite).is_file():
        raise UserError(f"--suite {args.suite}: no such file")
    check_directory(args.model)


def calibration(args: argparse.Namespace) -> Any:
    import datasets

    from megatron_posttrain.data.rows import read_rows
    from megatron_posttrain.data.template import load_tokenizer
    from megatron_posttrain.data.tokenize import encode_row

    tokenizer = load_tokenizer(args.model)
    encoded = (encode_row(tokenizer, row).token_ids[: args.length] for row in read_rows(args.data))
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in islice(map(list, encoded), args.rows)]
    return datasets.Dataset.from_list(rows)


def quantize(args: argparse.Namespace) -> None:
    data = calibration(args) if args.data else None  # first: what is wrong in a row is told before a model is loaded
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    how: dict[str, Any] = {"targets": "Linear", "ignore": KEPT, "scheme": SCHEMES[args.format]}
    if args.format == "int4":
        linears = [m.in_features for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        size = next((g for g in (128, 64, 32) if all(n % g == 0 for n in linears)), None)
        if size is None:
            raise UserError(f"--format int4: {args.model} has layers whose inputs are not divisible by 32; use int8")
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
        how = {"ignore": KEPT, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    recipe = QuantizationModifier(**how) if data is None else GPTQModifier(**how)
    given = {} if data is None else {"dataset": data, "num_calibration_samples": len(data)}
    oneshot(model=model, recipe=recipe, max_seq_length=args.length, **given)
    part = args.output.with_name(f".{args.output.name}.part")  # what is at --output is whole
    model.save_pretrained(part, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(part)
    part.rename(args.output)


def compare(args: argparse.Namespace) -> None:
    """Sizes of both directories; with --suite what `evaluate` finds, in processes that see vLLM's own packages."""
    directories = (Path(args.model), args.output)
    found = [args.output / "evaluation" / name for name in ("before", "after")]
    start = [sys.executable, "-m", "megatron_posttrain", "evaluate"]
    where = ["--data", args.suite_data] if args.suite_data else []
    for place, output in zip(directories, found, strict=True) if args.suite else ():
        line = [*start, "--model", str(place), "--suite", args.suite, "--output", str(output), *where]
        done = subprocess.run(line, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        if UNABLE.search(done.stderr) and place == args.output:
            why = next(text for text in done.stderr.splitlines() if UNABLE.search(text))
            print(f"{place}: not evaluated, vLLM on this machine does not run --format {args.format}: {why[:200]} ...")
            found.remove(output)
        else:
            done.check_returncode()
    for place in directories:
        size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        print(f"{place}: {size / 1e6:,.2f} MB", flush=True)
    if args.suite:
        subprocess.run([*start, "--leaderboard", *map(str, found)], check=True)
    if len(found) == 2 and any(found[0].glob("*/responses.jsonl")):
        subprocess.run([*start, "--compare", *map(str, found)], check=True)


if __name__ == "__main__":
    sys.exit(main())
