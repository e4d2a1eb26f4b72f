"""A stand-in trainer: counts all-reduced steps, saves each, stops on request. Options as key=value.

steps=N, seconds=S a step, output=DIR, fail=RANK:STEP
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_posttrain.cli.main import process

stop = False


def on_signal(number: int, frame: object) -> None:
    global stop
    stop = True


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, on_signal)
    options = {"steps": "5", "seconds": "0.2", "output": "out", "fail": ""}
    options.update(word.partition("=")[::2] for word in sys.argv[1:] if "=" in word)
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=600))
    rank, world = dist.get_rank(), dist.get_world_size()
    state = output / "state.json"
    step = json.loads(state.read_text())["step"] if state.exists() else 0
    dist.barrier()
    print(f"rank {rank} of {world} on {os.environ.get('SLURMD_NODENAME')} from step {step}", flush=True)
    while step < int(options["steps"]):
        step += 1
        if options["fail"] == f"{rank}:{step}":
            raise ValueError(f"told to fail at step {step}")
        time.sleep(float(options["seconds"]))
        total = torch.tensor([float(rank + 1), float(stop)])
        dist.all_reduce(total)
        assert total[0].item() == world * (world + 1) / 2
        if rank == 0:
            with (output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "world": world}) + "\n")
            state.write_text(json.dumps({"step": step}))
            print(f"step {step}", flush=True)
        if total[1] > 0:
            dist.barrier()
            return 75
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(process(main))
