"""Many rows to the first batch: seconds and peak memory of a first and of a second start.

    python -m benchmarks.data_scale DATA OUTPUT [--rows 1000000] [--tokenizer DIR]

DATA has the public rows and tokenizers of the tests: Alpaca rows and GSM8K, repeated under another number until there
are enough. Each start is a process of its own that does what `sft` does before the model: tokenizer, rows, packing, a
batch of 64 rows. Memory is the peak of the process (mapped files that it touched included) and of its largest worker.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.cache import ABOUT, ARRAYS, Encoder
from megatron_posttrain.data.dataset import read_conversations
from megatron_posttrain.data.tokenize import load_tokenizer


def make_rows(data: Path, file: Path, count: int) -> None:
    with gzip.open(data / "datasets/llamafactory_demo/alpaca_en_demo.json.gz") as stream:
        rows = [("\n\n".join(filter(None, (r["instruction"], r["input"]))), r["output"]) for r in json.load(stream)]
    with gzip.open(data / "datasets/gsm8k/train.jsonl.gz") as stream:
        rows += [(row["question"], row["answer"]) for row in map(json.loads, stream)]
    with file.open("w") as out:
        for i in range(count):
            asked, said = rows[i % len(rows)]
            turns = [{"role": "user", "content": f"{i}. {asked}"}, {"role": "assistant", "content": said}]
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def unpack(source: Path, folder: Path) -> Path:
    """A tokenizer directory whose files are under gzip."""
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".gz":
            (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            shutil.copy(file, folder)
    return folder


def repeat(cache: Path, key: str, rows: int, count: int) -> None:
    """An entry of `count` rows under `key`: the arrays of the only entry, which has `rows`, again and again."""
    (source,) = (folder for folder in cache.iterdir() if not folder.name.startswith("."))
    target = cache / key
    target.mkdir()
    about = json.loads((source / ABOUT).read_text())
    for name in about["digests"]:
        content = (source / name).read_bytes()
        (target / name).write_bytes(content * (count // rows) if name in ARRAYS else content)
        with (target / name).open("rb") as stream:
            about["digests"][name] = hashlib.file_digest(stream, "sha256").hexdigest()
    (target / ABOUT).write_text(json.dumps(about))


def start(file: Path, tokenizer_directory: Path, cache: Path) -> None:
    """Prints what one start takes."""
    began = time.monotonic()
    tokenizer = load_tokenizer(tokenizer_directory)
    loaded = time.monotonic()
    config = Config.model_validate(
        {"model": {"path": str(tokenizer_directory)}, "data": {"train": str(file)}, "output": str(file.parent / "run")}
    )
    dataset = read_conversations(config, tokenizer, cache)
    read = time.monotonic()
    batch = dataset.batch(0, 64)
    figures = {
        "tokenizer_seconds": round(loaded - began, 2),
        "rows_seconds": round(read - loaded, 2),
        "batch_seconds": round(time.monotonic() - read, 3),
        "cpu_seconds": round(sum(os.times()[:4]), 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "peak_of_a_worker_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10,
        "conversations_of_the_batch": sum(map(len, batch)),
    }
    print(json.dumps(figures), flush=True)
    print(dataset.message, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", type=Path, help="default: Qwen3's, in DATA")
    parser.add_argument("--opened", type=int, help="also open as many, a multiple of --rows, without tokenising them")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    file, cache = args.output / f"rows_{args.rows}.jsonl", args.output / "cache"
    if args.start:
        start(file, args.tokenizer, cache)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = args.tokenizer or unpack(args.data / "tokenizers/qwen3", args.output / "tokenizer")
    make_rows(args.data, file, args.rows)
    print(f"{args.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB, {len(os.sched_getaffinity(0))} cores")
    command = [sys.executable, "-m", "benchmarks.data_scale", args.data, args.output, "--rows", str(args.rows)]
    for name in ("first", "second"):
        began = time.monotonic()
        print(f"{name} start, load average {os.getloadavg()[0]:.1f}:", flush=True)
        subprocess.run([*map(str, command), "--tokenizer", str(tokenizer), "--start"], check=True)
        print(f"{name} start: {time.monotonic() - began:.1f} s with imports", flush=True)
    if args.opened:
        many = args.output / f"rows_{args.opened}.jsonl"
        make_rows(args.data, many, args.opened)
        repeat(
            cache,
            Encoder(load_tokenizer(tokenizer), {}, "refuse", "all-assistant").key(str(many)),
            args.rows,
            args.opened,
        )
        print(
            f"second start with {args.opened:,} rows, whose arrays are those of the others again and again:", flush=True
        )
        command[-1] = str(args.opened)
        subprocess.run([*map(str, command), "--tokenizer", str(tokenizer), "--start"], check=True)
    size = sum(part.stat().st_size for part in cache.rglob("*") if part.is_file())
    print(f"cache: {size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
