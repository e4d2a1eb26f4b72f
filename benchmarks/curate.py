"""`curate` on synthetic rows: seconds and memory of each number of rows, on one core.

    python -m benchmarks.curate [--rows 100000 1000000] [--directory DIR]

A row has 30 to 200 words drawn from 50,000 by Zipf's law; 5% repeat an earlier row with one word in fifty changed, 1%
hold one of 2,000 evaluation prompts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def make_rows(count: int, rows: Path, evaluation: Path) -> None:
    random = np.random.default_rng(0)
    vocabulary = np.array([f"{random.bytes(2).hex()}{i:x}"[: 3 + i % 6] + f"{i % 97:x}" for i in range(50_000)])
    weights = 1 / np.arange(3, 50_003)
    stock = vocabulary[random.choice(50_000, 20_000_000, p=weights / weights.sum())]

    def text(low: int, high: int) -> list[str]:
        start = int(random.integers(0, len(stock) - high))
        return random.permutation(stock[start : start + int(random.integers(low, high))]).tolist()

    prompts = [" ".join(text(20, 60)) for _ in range(2_000)]
    evaluation.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts))
    earlier: list[list[str]] = []
    with rows.open("w") as file:
        for i in range(count):
            words = text(30, 200)
            if i % 20 == 1:
                words = list(earlier[int(random.integers(len(earlier)))])
                words[:: max(50, len(words) // 2)] = ["changed"] * len(words[:: max(50, len(words) // 2)])
            elif i % 100 == 2:
                words += prompts[i % 2_000].split()
            elif len(earlier) < 1_000:
                earlier.append(words)
            half = len(words) // 3
            row = {"prompt": " ".join(words[:half]), "response": " ".join(words[half:])}
            file.write(json.dumps(row) + "\n")


def measure(rows: Path, evaluation: Path, output: Path, language: bool) -> None:
    from megatron_posttrain.cli.main import main

    start = time.perf_counter()
    extra = ["--language", "en", "--language-share", "0"] if language else []
    if main(["curate", str(rows), "--against", str(evaluation), "--output", str(output), *extra]):
        sys.exit("curate failed")
    cpu = time.process_time()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    peak = int(line.split()[1]) / 2**20
    size, seconds = rows.stat().st_size / 1e6, time.perf_counter() - start
    print(f"{rows.stem} rows, {size:,.0f} MB: {seconds:.1f} s ({cpu:.1f} of CPU), {peak:.2f} GiB at most\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--language", action="store_true", help="with the language rule as well")
    parser.add_argument("--directory", type=Path, help="for the rows (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as place:
        for count in args.rows:
            rows, evaluation = Path(place) / f"{count}.jsonl", Path(place) / "evaluation.jsonl"
            make_rows(count, rows, evaluation)
            # A process of its own, whose memory is curate's alone.
            process = multiprocessing.get_context("spawn").Process(
                target=measure, args=(rows, evaluation, Path(place) / "out", args.language)
            )
            process.start()
            process.join()


if __name__ == "__main__":
    main()
