"""Directories written as a stream of files: in bounded memory, resumable, by several processes, atomically."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_posttrain.errors import UserError

Files = list["OutputFile"]
Finish = Callable[[Path], None]  # adds to a directory what is not in its files
THREADS = 2  # of a process alone: most of the time is the kernel's copying, for which one core is too slow
STEP_BYTES = 1 << 26  # converted, checked and written at a time
STATE = "plan.json"


@dataclass
class Item:
    """A tensor, or rows of one, whose bytes come from `blocks()`, one after the other."""

    name: str
    dtype: torch.dtype
    nbytes: int
    blocks: Callable[[], Iterable[Tensor]]


@dataclass
class OutputFile:
    name: str
    parts: list[bytes | Item] = field(default_factory=list)
    nbytes: int = 0

    def add(self, part: bytes | Item) -> None:
        self.parts.append(part)
        self.nbytes += len(part) if isinstance(part, bytes) else part.nbytes


@dataclass(frozen=True)
class StreamOptions:
    """How to write."""

    check_finite: bool = False  # refuse tensors with NaN or infinite values
    resume: bool = False  # continue an interrupted run from its finished files
    overwrite: bool = False  # replace an existing directory
    quiet: bool = False  # no progress on stderr


def map_file(path: Path) -> Tensor:
    """The bytes of a file; nothing is read. Copy-on-write, so that torch takes it as writable; nobody writes."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def ranks() -> tuple[int, int]:
    """(rank, processes) of this job: torchrun's, else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def write_stream(
    directory: Path, files: Files, fingerprint: dict[str, Any], finish: Finish, options: StreamOptions
) -> int:
    """Writes `files` and then what `finish` adds; the directory is there only when all of it is.

    Collective over torchrun's processes, which share the files. Returns the bytes that this process wrote.
    `fingerprint`: what has to be the same for a run to be resumed. `UserError` on every process when one
    of them failed; finished files are then kept for `resume`.
    """
    rank, world = ranks()
    if world > 1:
        from megatron_posttrain.parallel.groups import start_distributed

        start_distributed()
    partial = partial_of(directory)
    _together(lambda: _prepare(directory, files, fingerprint, options), rank == 0)
    mine = [file for file in share(files, world)[rank] if not _is_whole(partial, file)]
    total = sum(part.nbytes for file in mine for part in file.parts if isinstance(part, Item))
    every = 2.0 if sys.stderr.isatty() else 30.0  # seconds; on a terminal, in a log
    quiet = options.quiet or rank > 0
    progress = tqdm(total=total, unit="B", unit_scale=True, mininterval=every, maxinterval=every, disable=quiet)

    def work() -> None:
        with progress:
            for file in mine:
                _write_file(partial / file.name, file, options.check_finite, progress, THREADS if world == 1 else 1)

    _together(work)
    _together(lambda: _finish(directory, partial, files, finish), rank == 0)
    return total


def share(files: Files, processes: int) -> list[Files]:
    """The files of each process: the largest first, always to the one with the fewest bytes."""
    shares: list[Files] = [[] for _ in range(processes)]
    loads = [0] * processes
    for file in sorted(files, key=lambda file: (-file.nbytes, file.name)):
        least = loads.index(min(loads))
        shares[least].append(file)
        loads[least] += file.nbytes
    return shares


def check_target(directory: Path, overwrite: bool) -> None:
    """`UserError` for a directory that is in use, and for a file in its place."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: exists and is not a directory")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise UserError(f"{directory}: exists and is not empty (--overwrite replaces it)")


def partial_of(directory: Path) -> Path:
    """Where `directory` is written before it is whole: `put_in_place` renames it."""
    return directory.with_name(f".{directory.name}.partial")


def put_in_place(partial: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    if old.exists():
        shutil.rmtree(old)


def free_bytes(directory: Path) -> int:
    """Free space of the file system that `directory` is, or would be, on."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _together(action: Callable[[], None], here: bool = True) -> None:
    """Waits until all processes (that are to) have done it; raises on all of them what went wrong on one."""
    error = None
    try:
        if here:
            action()
    except UserError as failure:
        error = str(failure)
    except OSError as failure:
        error = f"{failure.filename or ''}: {failure.strerror}"
    errors: list[Any] = [error]
    if (world := ranks()[1]) > 1:
        errors = [None] * world
        torch.distributed.all_gather_object(errors, error)
    if found := next(filter(None, errors), None):
        raise UserError(found)


def _is_whole(partial: Path, file: OutputFile) -> bool:
    path = partial / file.name
    return path.exists() and path.stat().st_size == file.nbytes


def _prepare(directory: Path, files: Files, fingerprint: dict[str, Any], options: StreamOptions) -> None:
    check_target(directory, options.overwrite)
    partial = partial_of(directory)
    plan = {"inputs": fingerprint, "files": {file.name: file.nbytes for file in files}}
    state = partial / STATE
    if options.resume and state.exists():
        before = json.loads(state.read_text())
        if before != json.loads(json.dumps(plan)):
            then, now = before["inputs"], json.loads(json.dumps(fingerprint))
            differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
            raise UserError(f"{partial}: was begun with other {', '.join(differing) or 'files'}; run without --resume")
    else:
        shutil.rmtree(partial, ignore_errors=True)
    needed = sum(file.nbytes for file in files if not _is_whole(partial, file))
    if needed > (free := free_bytes(directory)):
        raise UserError(f"{directory}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")
    partial.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps(plan))


def _write_file(path: Path, file: OutputFile, check_finite: bool, progress: tqdm, threads: int) -> None:
    unfinished = path.with_name(path.name + ".part")

    def write(share: tuple[int, list[bytes | Item]]) -> None:
        start, parts = share
        with unfinished.open("r+b", buffering=0) as out:
            out.seek(start)
            for part in parts:
                if isinstance(part, bytes):
                    write_all(out, memoryview(part))
                    continue
                before = out.tell()
                for block in part.blocks():
                    _write_tensor(out, block, part, check_finite, progress)
                if (written := out.tell() - before) != part.nbytes:
                    raise ValueError(f"tensor '{part.name}': {written} bytes, planned were {part.nbytes}")

    try:
        unfinished.write_bytes(b"")
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, _shares_of(file, threads)))  # raises what a thread raised
        unfinished.rename(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        kept = f"; finished files are kept in {path.parent}, --resume continues"
        raise UserError(f"{path}: {error.strerror}{kept}") from error


def _shares_of(file: OutputFile, threads: int) -> list[tuple[int, list[bytes | Item]]]:
    """The parts in `threads` runs of about equal bytes, each with its first byte's place in the file."""
    shares: list[tuple[int, list[bytes | Item]]] = []
    at = 0
    for part in file.parts:
        if len(shares) <= at * threads // file.nbytes:
            shares.append((at, []))
        shares[-1][1].append(part)
        at += len(part) if isinstance(part, bytes) else part.nbytes
    return shares


def _write_tensor(out: Any, block: Tensor, item: Item, check_finite: bool, progress: tqdm) -> None:
    flat = block.detach().contiguous().view(-1)
    step = STEP_BYTES // item.dtype.itemsize
    for start in range(0, len(flat), step):
        piece = flat[start : start + step].to(item.dtype)
        if check_finite and not is_finite(piece):
            raise UserError(f"tensor '{item.name}' has NaN or infinite values as {item.dtype}")
        write_all(out, memoryview(piece.view(torch.uint8).numpy().data))
        progress.update(piece.nbytes)


def is_finite(tensor: Tensor) -> bool:
    # fp8 has no isfinite; its only non-finite value is NaN
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())


def write_all(out: Any, content: memoryview) -> None:
    """To an unbuffered file."""
    done = 0
    while done < len(content):  # one call writes 2 GiB at most
        done += out.write(content[done:])


def _finish(directory: Path, partial: Path, files: Files, finish: Finish) -> None:
    if missing := [file.name for file in files if not _is_whole(partial, file)]:
        raise UserError(f"{partial / missing[0]}: was not written (is the directory shared by all processes?)")
    finish(partial)
    (partial / STATE).unlink()
    put_in_place(partial, directory)
