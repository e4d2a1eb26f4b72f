"""What the two conversion tools share: options, the plan that --dry-run prints, exit statuses."""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_posttrain.checkpoint.convert import FIXED_BYTES, Conversion, ConvertOptions, check_paths
from megatron_posttrain.checkpoint.stream import StreamOptions, free_bytes, ranks
from megatron_posttrain.errors import UserError
from megatron_posttrain.models import registry

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parser(text: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_size(text: str) -> int:
    """Bytes: 500MB, 5GB, 1GiB, 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    if not match or not (size := int(float(match[1]) * UNITS[match[2]])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; allowed: bytes, or a number with KB, MB, GB, GiB")
    return size


def add_options(parser: argparse.ArgumentParser, shard_size: str) -> None:
    add = parser.add_argument
    size = "largest file, e.g. 500MB, 5GB (default: %(default)s)"
    add("--shard-size", type=parse_size, default=shard_size, help=size)
    add("--dtype", choices=tuple(DTYPES), help="of the tensors written; default: as they are (FP8 becomes bf16)")
    add("--mtp", choices=("keep", "drop"), default="keep", help="multi-token-prediction layers (default: %(default)s)")
    add("--check-finite", action="store_true", help="refuse NaN and infinite values (default: off)")
    add("--custom-code", action="store_true", help="carry Python files and auto_map along (default: off)")
    add("--resume", action="store_true", help="continue an interrupted run from its finished files (default: off)")
    add("--overwrite", action="store_true", help="replace an existing directory (default: off)")
    add("--dry-run", action="store_true", help="print tensors, bytes, memory and free disk; write nothing")
    add("--quiet", action="store_true", help="no progress on stderr (default: off)")


def options(args: argparse.Namespace) -> ConvertOptions:
    experts = getattr(args, "experts", None)
    return ConvertOptions(
        dtype=DTYPES.get(args.dtype),
        shard_bytes=args.shard_size,
        fused=None if experts is None else experts == "fused",
        keep_mtp=args.mtp == "keep",
        custom_code=args.custom_code,
        quantize=getattr(args, "quantize", None) is not None,
        adapter=getattr(args, "merge_adapter", None),
        source=getattr(args, "source", None),
    )


def run(args: argparse.Namespace, source: Path, target: Path, plan: Callable[[], Conversion]) -> int:
    """Plans, and converts unless --dry-run. Exit status: 0 done, 2 bad input."""

    def work() -> int:
        check_paths(source, target, args.overwrite or args.dry_run)
        conversion = plan()
        if args.dry_run:
            print(describe(conversion, target))
            return 0
        start = time.monotonic()
        conversion.run(target, StreamOptions(args.check_finite, args.resume, args.overwrite, args.quiet))
        seconds = time.monotonic() - start
        if ranks()[0] == 0:
            size = conversion.bytes_out / 1e9
            print(f"{target}: {size:.2f} GB in {seconds:.1f} s, {size / max(seconds, 1e-9):.3f} GB/s")
            for name in conversion.left_behind:
                print(f"{name}: custom code, left behind (--custom-code carries it)")
        return 0

    return guarded(work)


def guarded(work: Callable[[], int]) -> int:
    """The exit status of `work`; a user's mistake is one message on stderr (of one process) and status 2."""
    torch.set_num_threads(1)  # the work is copying
    try:
        return work()
    except UserError as error:
        if ranks()[0] == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def describe(conversion: Conversion, target: Path) -> str:
    """The plan in words and numbers."""
    arch, free = conversion.arch, free_bytes(target)
    names = sum(len(plan.hf) for plan in registry.tensors(arch))
    fits = "enough" if free >= conversion.bytes_out else "NOT enough"
    rows = [
        ("model", f"{arch.family}, {arch.num_layers} layers, {registry.parameter_count(arch) / 1e9:.3f} G parameters"),
        ("tensors", f"{names} of Hugging Face, {len(registry.tensors(arch))} of Megatron (experts counted singly)"),
        ("read", f"{conversion.bytes_in / 1e9:.2f} GB"),
        ("written", f"{conversion.bytes_out / 1e9:.2f} GB in {len(conversion.files)} files"),
        ("largest tensor", f"{conversion.largest / 1e9:.3f} GB"),
        ("anonymous memory", f"at most {(FIXED_BYTES + 3 * conversion.largest) / 1e9:.2f} GB a process"),
        ("free disk", f"{free / 1e9:.2f} GB, {fits}"),
    ]
    if conversion.left_behind:
        rows.append(("left behind", f"{', '.join(conversion.left_behind)} (--custom-code carries custom code)"))
    return "\n".join(f"{label:18}{value}" for label, value in rows)
