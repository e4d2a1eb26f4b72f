"""Generation with uneven lengths over engines: handed out as they have room, against equal shares.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.handout [--samples 256] [--at-once 8] [--seconds 0.01]

Stand-ins for engines, which sleep `--seconds` a step: what is measured is who draws what, where four real engines would
share two cores. Lengths are log-normal by prompt, as hard prompts have long responses, and again by sample; both ways,
in turns, A B A B, have the same. `best` is what no hand-out can beat: tokens spread evenly at full batches, or the
longest sample. A draw whose longest samples come last may be slower handed out; the average over draws counts.
"""

import argparse
import time
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.rollout.engine import Completion, Request, Sampling
from megatron_posttrain.rollout.handout import Handout
from megatron_posttrain.rollout.turns import Episode, converse
from tests.helpers.stand_in import StandIn

GROUP = 8  # samples a prompt


class Sleeping(StandIn):
    def __init__(self, lengths: list[int], at_once: int, seconds: float) -> None:
        self.lengths, self.at_once, self.seconds = lengths, at_once, seconds
        self.replica, self.replicas = dist.get_rank(), dist.get_world_size()

    def answer(self, request: Request, sampling: Sampling) -> Completion:
        count = self.lengths[request.seed]
        return Completion([1] * count, [0.0] * count, "stop")

    def wait(self, running: int) -> None:
        time.sleep(self.seconds)


def generate(engine: Sleeping, *, equal: bool) -> tuple[float, float, int]:
    """Wall seconds of the slowest, CPU seconds of all ranks, and most tokens of an engine."""
    dist.barrier()
    episodes = [Episode(Prompt(i, [1], None, {}, []), i) for i in range(len(engine.lengths))]
    start, cpu = time.perf_counter(), time.process_time()
    with patch.object(engine, "at_once", len(episodes) if equal else engine.at_once):
        handout = Handout(engine, len(episodes), 1)  # type: ignore[arg-type]  # with room for all: equal shares
    own = converse(engine, None, episodes, Sampling(), handout=handout)  # type: ignore[arg-type]
    tokens = sum(engine.lengths[i] for i in own)
    facts = torch.tensor([time.perf_counter() - start, tokens], dtype=torch.float64)
    used = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
    dist.all_reduce(facts, op=dist.ReduceOp.MAX)
    dist.all_reduce(used)
    return float(facts[0]), float(used), int(facts[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=8, help="samples that an engine runs")
    parser.add_argument("--draws", type=int, default=20, help="of lengths")
    parser.add_argument("--seconds", type=float, default=0.01, help="of a step")
    args = parser.parse_args()
    start_distributed()
    walls: dict[str, list[float]] = {"equal shares": [], "handed out": []}
    for draw in range(args.draws):
        random = np.random.default_rng(draw)
        by_prompt = np.repeat(random.lognormal(3.5, 0.8, -(-args.samples // GROUP)), GROUP)[: args.samples]
        lengths = (by_prompt * random.lognormal(0, 0.3, args.samples)).clip(4, 400).astype(int).tolist()
        engine = Sleeping(lengths, args.at_once, args.seconds)
        best = max(sum(lengths) / dist.get_world_size() / args.at_once, max(lengths)) * args.seconds
        for way, found in walls.items():
            wall, cpu, most = generate(engine, equal=way == "equal shares")
            found.append(wall)
            if dist.get_rank() == 0:
                share = most / sum(lengths) * dist.get_world_size()
                told = f"{wall:6.2f} s, {cpu:5.2f} s of CPU, fullest engine {share:.2f} x the mean; best {best:.2f} s"
                print(f"{draw} {way:13} {told}")
    if dist.get_rank() == 0:
        print(*(f"{way}: {sum(found) / len(found):.2f} s on average" for way, found in walls.items()), sep="; ")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
