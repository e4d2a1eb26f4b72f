"""Run on ranks by test_in_flight.py: engines get other weights while they draw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.rollout.engine import RolloutEngine, Sampling
from megatron_posttrain.rollout.handout import Handout
from megatron_posttrain.rollout.in_flight import InFlight
from megatron_posttrain.rollout.refit import Refit
from megatron_posttrain.rollout.turns import Episode, converse
from megatron_posttrain.training.process import finish

STEPS = (9, 60)  # of rank 0's engine, after which there are new weights; at the second one a replica has nothing to do


def draw(engine: RolloutEngine, directory: Path) -> dict[str, Any]:
    """Seven samples of 40 tokens, and how many each had when the weights changed."""
    store, refit, steps = _get_default_store(), Refit(engine), 0
    episodes = [Episode(Prompt(i, [3 + i, 9, 4], "", {}, []), 100 + i) for i in range(7)]
    begins: list[list[int]] = []

    def waiting() -> bool:
        nonlocal steps
        steps += 1
        number = len(begins)
        if dist.get_rank() == 0 and number < len(STEPS) and steps >= STEPS[number]:
            store.set(f"order/{number}", "")
        return bool(store.check([f"order/{number}"]))

    def follow() -> None:
        begins.append([len(e.token_ids) for e in episodes])
        model: Any = AutoModelForCausalLM.from_pretrained(directory / str(len(begins)), dtype=torch.float32)
        refit.update(iter(model.state_dict().items()), len(begins))

    handout, in_flight = Handout(engine, len(episodes), 1), InFlight(engine, waiting, follow)
    facts: Any = engine, AutoTokenizer.from_pretrained(directory / "0"), episodes, Sampling(max_tokens=40)
    own = converse(*facts, handout=handout, in_flight=in_flight)
    dist.barrier()
    handout.forget()
    samples = [[i, e.prompt.token_ids, e.token_ids, e.logprobs, e.version] for i in own for e in [episodes[i]]]
    return {"begins": begins, "samples": samples}


def main() -> None:
    directory, tensor = Path(sys.argv[1]), int(sys.argv[2])
    start_distributed()
    facts: dict[str, Any] = {"dtype": torch.float32, "max_model_len": 128, "tensor": tensor, "max_num_seqs": 3}
    found = draw(RolloutEngine(str(directory / "0"), **facts), directory)
    (directory / f"found.{dist.get_rank()}.json").write_text(json.dumps(found))
    finish()


main()
