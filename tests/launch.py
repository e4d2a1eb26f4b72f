"""Starts torchrun for a test and shows what it said when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def torchrun(
    processes: int, *arguments: str, check: bool = True, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node N ARGUMENTS` in the repository's root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return execute([*command, *arguments], check=check, timeout=timeout)


def command(*arguments: str, check: bool = True, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """`megatron-posttrain ARGUMENTS` as one process."""
    return execute([sys.executable, "-m", "megatron_posttrain", *arguments], check=check, timeout=timeout)


def execute(line: list[str], *, check: bool, timeout: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # of a test that made itself a world of one
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        tail = "\n".join([line for line in lines if "[rank" in line][-30:] or lines[-60:])
        raise AssertionError(f"{' '.join(line)} exited with {done.returncode}:\n{tail}")
    return done
