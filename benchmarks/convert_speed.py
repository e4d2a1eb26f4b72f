"""Speed and memory of the conversions beside `cp`: real shapes of Qwen3-30B-A3B, cut to 3 layers, random weights.

Makes about 5 GB in a temporary directory, converts it to Megatron and back in processes of their own, in turns
with `cp` of the same files, and prints JSON: GB/s (1e9 bytes, of files written, until the disk has them), the
median ratio to the copies before and after, the peak of anonymous memory (RssAnon in /proc) and its bound of
1.5 GB + 3 x the largest tensor. Everything is deleted afterwards; three times the checkpoint has to be free.

    python benchmarks/convert_speed.py [--layers 3] [--rounds 3] [--directory DIR]

Exit status: 0 within the bound and both directions at least 0.6 x cp, 1 not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_posttrain.checkpoint.compare import compare
from megatron_posttrain.checkpoint.hf_files import HfWriter
from megatron_posttrain.models import registry

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.6
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "dtype": "bfloat16",
}


def make_checkpoint(directory: Path, layers: int) -> int:
    """Random bits that are finite bf16 numbers; returns the bytes of the largest tensor."""
    config = CONFIG | {"num_hidden_layers": layers}
    shapes = registry.layout(registry.architecture_from_hf(config)).shapes
    tensors = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    with HfWriter(directory, tensors, config, shard_bytes=2_000_000_000) as writer:
        for name, shape in shapes.items():
            bits = torch.empty(shape, dtype=torch.int16).random_(generator=generator)
            writer.write(name, bits.bitwise_and_(0x3FFF).view(torch.bfloat16))
    return max(2 * torch.Size(shape).numel() for shape in shapes.values())


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds of a process until the disk has what it wrote, and its peak of anonymous memory in bytes."""
    os.sync()
    start, peak = time.monotonic(), 0
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = status.read_text().splitlines() if status.exists() else []
            anonymous = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            peak = max([peak, *(kib * 1024 for kib in anonymous)])
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    os.sync()
    return time.monotonic() - start, peak


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def direction(source: Path, target: Path, command: list[str], copy: Path, bound: int, rounds: int) -> dict[str, Any]:
    """`cp` of the source and the conversion in turns; each ratio is to the mean of the copies before and after."""
    copies, conversions, peak = [], [], 0

    def copy_once() -> None:
        copies.append(size_of(source) / 1e9 / measure(["cp", "-r", str(source), str(copy)])[0])
        shutil.rmtree(copy)

    copy_once()
    for _ in range(rounds):
        shutil.rmtree(target, ignore_errors=True)
        seconds, used = measure(command)
        conversions.append(size_of(target) / 1e9 / seconds)
        peak = max(peak, used)
        copy_once()
    ratios = [2 * speed / (a + b) for speed, a, b in zip(conversions, copies, copies[1:], strict=False)]
    return {
        "gb_per_second": [round(value, 3) for value in conversions],
        "cp_gb_per_second": [round(value, 3) for value in copies],
        "ratio_to_cp": {"median": round(statistics.median(ratios), 3), "all": [round(ratio, 3) for ratio in ratios]},
        "peak_anonymous_gb": round(peak / 1e9, 3),
        "memory_bound_gb": round(bound / 1e9, 3),
        "passes": statistics.median(ratios) >= GOAL and peak <= bound,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="of 48 (default: %(default)s, about 5 GB)")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured (default: the temporary directory)")
    parser.add_argument("--rounds", type=int, default=3, help="conversions in each direction (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        home = Path(name)
        source, middle, back, copy = (home / part for part in ("hf", "megatron", "back", "copy"))
        largest = make_checkpoint(source, args.layers)
        bound = 1_500_000_000 + 3 * largest
        there = [sys.executable, "tools/convert_hf_to_megatron.py", "--hf", str(source), "--megatron", str(middle)]
        home_again = [sys.executable, "tools/convert_megatron_to_hf.py", "--megatron", str(middle), "--hf", str(back)]
        result: dict[str, Any] = {"checkpoint_gb": round(size_of(source) / 1e9, 3), "largest_tensor_gb": largest / 1e9}
        result["hf_to_megatron"] = direction(source, middle, there, copy, bound, args.rounds)
        result["megatron_to_hf"] = direction(middle, back, home_again, copy, bound, args.rounds)
        result["round_trip_equal"] = all(isinstance(found, str) for found in compare(source, back))
    print(json.dumps(result, indent=1))
    ways = [result["hf_to_megatron"], result["megatron_to_hf"]]
    return 0 if result["round_trip_equal"] and all(way["passes"] for way in ways) else 1


if __name__ == "__main__":
    sys.exit(main())
