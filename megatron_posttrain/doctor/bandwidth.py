"""Bandwidth between ranks: collectives over all of them, and every link of the ring by itself."""

import os
import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_posttrain.doctor.findings import Findings
from megatron_posttrain.parallel.exchange import gathered
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.platform import platform

REPEATS = 5
SLOW = 0.5  # a link with less than this share of its fellows' median is named


def check_bandwidth(findings: Findings, largest_mib: int) -> None:
    """Collective: every rank calls it. Adds what was measured; warns of links far slower than their fellows."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        findings.add("fail", "bandwidth", "one rank has nobody to send to",
                     "start with torchrun: torchrun --nproc-per-node N -m megatron_posttrain doctor ...")  # fmt: skip
        return
    start_distributed()
    ranks, hosts = dist.get_world_size(), gathered(socket.gethostname())
    for mib in sorted({1, largest_mib}):
        bus = collectives(mib * 2**20)
        text = ", ".join(f"{name} {rate:.2f} GB/s" for name, rate in bus.items())
        findings.add("ok", "bandwidth", f"{ranks} ranks, {mib} MiB messages, bus: {text}")
    _report_links(findings, links(largest_mib * 2**20), hosts)


def collectives(size: int) -> dict[str, float]:
    """GB/s a rank's link carries (NCCL-tests' bus bandwidth) in collectives over `size` bytes."""
    n, device = dist.get_world_size(), platform().device
    elements = size // 4 // n * n
    whole, part = torch.ones(elements, device=device), torch.ones(elements // n, device=device)
    seconds = {
        "all-reduce": _time(lambda: dist.all_reduce(whole)),
        "all-gather": _time(lambda: dist.all_gather(list(whole.chunk(n)), part)),
    }
    factors = {"all-reduce": 2 * (n - 1) / n, "all-gather": (n - 1) / n}
    return {name: factors[name] * elements * 4 / spent / 1e9 for name, spent in seconds.items()}


def links(size: int) -> list[float]:
    """GB/s from rank i to rank i + 1, one link at a time, [ranks], known to all."""
    rank, n = dist.get_rank(), dist.get_world_size()
    message = torch.ones(size // 4, device=platform().device)
    rates = torch.zeros(n, dtype=torch.float64, device=platform().device)
    for source in range(n):
        target = (source + 1) % n

        def send(source: int = source, target: int = target) -> None:
            if rank == source:
                dist.send(message, target)
            elif rank == target:
                dist.recv(message, source)

        spent = _time(send)
        if rank == target:  # the sender may be done when its message is only buffered
            rates[source] = size / spent / 1e9
    dist.all_reduce(rates)
    return rates.tolist()


def _time(operation: Callable[[], object]) -> float:
    """Median seconds of an operation that all ranks start together."""
    operation()
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        platform().synchronize()
        start = time.perf_counter()
        operation()
        platform().synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _report_links(findings: Findings, rates: list[float], hosts: list[str]) -> None:
    n = len(rates)
    for kind, inside in (("inside a node", True), ("between nodes", False)):
        chosen = [i for i in range(n) if (hosts[i] == hosts[(i + 1) % n]) == inside]
        if not chosen:
            continue
        middle = statistics.median(rates[i] for i in chosen)
        slow = [i for i in chosen if rates[i] < SLOW * middle]
        names = [f"{i} ({hosts[i]}) -> {(i + 1) % n} ({hosts[(i + 1) % n]}) {rates[i]:.2f}" for i in slow]
        worst = min(rates[i] for i in chosen)
        shown = f"{len(chosen)} {kind}: median {middle:.2f} GB/s, slowest {worst:.2f}"
        wrong = [f"{shown}: {'; '.join(names)}"] if slow else []
        findings.verdict("links", wrong, shown, "look at these devices, cables and adapters", "warn")
