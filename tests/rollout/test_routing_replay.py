"""Experts that were chosen before, in training: against transformers with the same choice, and under every layout."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.config.load import load_config
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from megatron_posttrain.training.limits import rollout_problems
from tests.helpers.launch import ranks
from tests.helpers.models import EXPERTS, SIZES, make_qwen3
from tests.helpers.routing_worker import sequences

ONE: list[dict[str, Any]] = [{"layout": {}, "recompute": "none", "action": a} for a in ("replay", "record", None)]
TWO: list[dict[str, Any]] = [
    {"layout": {"tensor": 2}, "recompute": "none", "action": "replay"},
    {"layout": {"context": 2}, "recompute": "none", "action": "replay"},
    {"layout": {"expert": 2}, "recompute": "full", "action": "replay"},
    {"layout": {"pipeline": 2, "virtual_pipeline": 2}, "recompute": "full", "action": "replay"},
    {"layout": {"tensor": 2, "expert": 2}, "recompute": "full", "action": "record"},
    {"layout": {"pipeline": 2}, "recompute": "full", "action": "record"},
]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("routing")
    found: dict[str, Any] = {"model": make_qwen3(place, "moe")}
    for processes, jobs in ((1, ONE), (2, TWO)):
        outs = [place / f"{processes}_{i}.json" for i in range(len(jobs))]
        file = place / f"jobs_{processes}.json"
        file.write_text(
            json.dumps([job | {"model": found["model"], "out": str(out)} for job, out in zip(jobs, outs, strict=True)])
        )
        ranks(processes, "-m", "tests.helpers.routing_worker", str(file), timeout=300)
        found[str(processes)] = [json.loads(out.read_text()) for out in outs]
    return found


def test_given_choices_are_replayed_as_transformers_would(
    facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3MoeForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    model: Any = Qwen3MoeForCausalLM.from_pretrained(facts["model"], dtype=torch.float32)
    top_k, given = EXPERTS["num_experts_per_tok"], sequences(SIZES["num_hidden_layers"], 8, 2)
    chosen: list[torch.Tensor] = []  # of each layer that is still to come

    def forced(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden.reshape(-1, self.hidden_dim) @ self.weight.T
        indices = chosen.pop(0)
        return logits, logits.gather(1, indices).softmax(-1), indices

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", forced)
    for sequence, found in zip(given, facts["1"][0]["first"], strict=True):
        last = np.arange(top_k)[None, None].repeat(sequence.experts.shape[1], 1)
        chosen += torch.from_numpy(np.concatenate([sequence.experts, last])).long().unbind(1)
        ids = torch.from_numpy(sequence.token_ids).long()[None]
        with torch.no_grad():
            wanted = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert torch.tensor(found) == pytest.approx(wanted, abs=2e-5)
    own = facts["1"][2]["first"]
    assert (
        max(abs(a - b) for x, y in zip(own, facts["1"][0]["first"], strict=True) for a, b in zip(x, y, strict=True)) > 1
    )


def test_every_layout_replays_the_same(facts: dict[str, Any]) -> None:
    replayed, recorded, free = facts["1"]
    for job, found in zip(TWO, facts["2"], strict=True):
        wanted = replayed if job["action"] == "replay" else recorded
        assert np.array(found["losses"]) == pytest.approx(np.array(wanted["losses"]), rel=1e-4), job
    assert recorded["losses"][0] == pytest.approx(free["losses"][0], rel=1e-5)  # nothing has changed yet
    assert abs(recorded["losses"][2][0] - free["losses"][2][0]) > 1e-3  # now routers would choose others


def test_load_is_that_of_the_tokens_that_are_trained_on(facts: dict[str, Any]) -> None:
    """Whatever the layout, with recomputation too; padding and a look at log-probs do not count."""
    layers, experts, top_k = SIZES["num_hidden_layers"], EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"]
    last = np.arange(top_k)[None, None].repeat(layers, 1)  # of a sequence's last token, which has no choice given
    chosen = np.concatenate([np.concatenate([s.experts, last]) for s in sequences(layers, experts, top_k)])
    wanted = {str(n + 1): np.bincount(chosen[:, n].ravel(), minlength=experts) for n in range(layers)}
    for job, found in zip([ONE[0], *TWO], [facts["1"][0], *facts["2"]], strict=True):
        if job["action"] == "replay":
            assert found["load"].keys() == wanted.keys()
            assert all(found["load"][n] == pytest.approx(c / c.mean(), abs=1e-4) for n, c in wanted.items()), job


def test_routers_learn_what_weight_a_choice_has(facts: dict[str, Any]) -> None:
    assert all(moved > 1e-3 for moved in (*facts["1"][0]["moved"], *facts["2"][3]["moved"]))


def test_what_has_no_effect_is_refused() -> None:
    def problems(*overrides: str, model: str = "Qwen3-30B-A3B") -> str:
        config = load_config(GrpoConfig, None, ["model.path=x", "data.train=x", "output=x", *overrides])
        found = [*config.problems(1), *rollout_problems(config, KNOWN_MODELS[model], "cuda")]
        return "; ".join(found)

    size = "training.global_batch_size"
    assert not problems("algorithm.routing_replay=old", f"{size}=128")
    assert problems("algorithm.routing_replay=rollout", f"{size}=256", model="Qwen3-8B") == (
        "algorithm.routing_replay=rollout: the model has no experts; allowed: none"
    )
    for overrides, said in (
        (["algorithm.routing_replay=old"], "routing_replay=old has no effect with one update a step"),
        (["algorithm.routing_replay=rollout", "rollout.replay=runs"], "logged samples have no experts"),
        (["data.validation=x", "rollout.replay=runs"], "no engine to answer data.validation"),
        (["rollout.validation_samples=4"], "rollout.validation_samples=4 needs data.validation"),
    ):
        assert said in problems(f"{size}=256", *overrides)


def test_log_probs_are_as_near_to_the_engine_as_a_dense_models() -> None:
    sizes = ["--dtypes", "bf16", "--prompts", "8", "--tokens", "32"]
    said = ranks(1, "-m", "benchmarks.routing_replay", *sizes, rollout=True).stdout
    rows = [line.split("|") for line in said.splitlines() if "bf16" in line]
    mean = {(name.strip(), routed.strip()): float(mean) for _, name, _, routed, mean, *_ in rows}
    assert mean["experts", "replay"] < mean["dense", "own"] < mean["experts", "own"]
