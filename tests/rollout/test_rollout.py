"""vLLM in every rank: log-probs against transformers, refit, its proof, and the defects of vLLM worked around."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_posttrain.rollout.engine import Completion
from megatron_posttrain.rollout.refit import _compare
from megatron_posttrain.rollout.text import response_text, stop_token_ids
from tests.helpers.launch import ranks
from tests.helpers.rollout_checks import CORRUPTIONS, ENGINES
from tests.helpers.rollout_models import KINDS, make_model, make_tokenizer

TOLERANCE = 1e-4
KIND_NAMES = [kind for kind, _ in ENGINES]
SCRIPT = Path(__file__).parents[1] / "helpers" / "rollout_checks.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rollout")
    for kind in KINDS:
        make_model(path / f"{kind}_a", kind, seed=0)
        make_model(path / f"{kind}_b", kind, seed=1)
    return path


@pytest.fixture(scope="module")
def job(directory: Path) -> subprocess.CompletedProcess[str]:
    """The one job that measures all; its rank 1 fails in the end while rank 0 waits for it."""
    return ranks(2, str(SCRIPT), str(directory), check=False, rollout=True)


@pytest.fixture(scope="module", params=[0, 1], ids=["rank0", "rank1"])
def results(request: pytest.FixtureRequest, directory: Path, job: Any) -> dict[str, Any]:
    path = directory / f"results.{request.param}.json"
    assert path.exists(), job.stderr[-4000:]
    return json.loads(path.read_text())


def test_a_failing_rank_ends_the_job(job: subprocess.CompletedProcess[str]) -> None:
    assert job.returncode == 1
    assert "failing on purpose" in job.stderr


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_logprobs_are_those_of_transformers(results: dict[str, Any], kind: str) -> None:
    assert results[kind]["before"] < TOLERANCE
    assert results[kind]["greedy"] == 0


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_logprobs_after_a_refit_to_other_weights(results: dict[str, Any], kind: str) -> None:
    assert results[kind]["after"] < TOLERANCE


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_trainer_is_left_as_it_was(results: dict[str, Any], kind: str) -> None:
    assert results[kind]["start untouched"]
    assert results[kind]["untouched"]
    assert results[kind]["distributed lives"]


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_proof_accepts_the_right_weights(results: dict[str, Any], kind: str) -> None:
    assert results[kind]["proof"] < TOLERANCE
    assert results[kind]["restored"] < TOLERANCE


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("what", ["stale", *(f"corrupt {name}" for name in CORRUPTIONS)])
def test_proof_refuses_wrong_weights(results: dict[str, Any], kind: str, what: str) -> None:
    if what == "corrupt expert" and not KINDS[kind][0]:
        assert what not in results[kind]
        return
    message = results[kind][what]
    assert message.startswith("RefitError: ")
    assert all(part in message for part in ("canary prompt", "position", "engine", "trainer", "tolerance 0.001"))


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_an_engine_that_loaded_nothing_says_the_same_after_a_refit(results: dict[str, Any], kind: str) -> None:
    assert "does not hold the trainer's weights" in results[kind]["unloaded, unrefitted"]
    assert results[kind]["unloaded, proof"] < 1e-3
    assert results[kind]["unloaded, same"]


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_incomplete_update_is_refused(results: dict[str, Any], kind: str) -> None:
    missing = "experts" if KINDS[kind][0] else "layers.1.self_attn"
    assert results[kind]["incomplete"].startswith("RefitError: refit 4: weight update lacks tensors")
    assert missing in results[kind]["incomplete"]


@pytest.mark.parametrize(("kind", "tensor"), ENGINES)
def test_ranks_of_a_replica_must_agree(results: dict[str, Any], kind: str, tensor: int) -> None:
    if tensor > 1:
        assert results[kind]["disagree"].startswith("RuntimeError: the ranks of rollout replica 0")


def test_nothing_is_compiled(results: dict[str, Any]) -> None:
    """It would take seconds, and a C++ compiler, which not every machine has."""
    assert results["compiled"] == 0


def test_sampling(results: dict[str, Any]) -> None:
    found = results["sampling"]
    assert found["same seeds"]
    assert not found["other seeds"]
    token_ids, reason, unstopped = found["stopped"]
    assert (token_ids, reason) == (unstopped, "stop")
    assert found["length"] == "length"
    assert found["empty"] == []
    assert found["too long"].startswith("ValueError: prompt 0 has 121 tokens")
    assert found["seeds"].startswith("ValueError: 1 seeds for 1 prompts x 2 completions")


def test_repeated_cut_off_and_cached(results: dict[str, Any]) -> None:
    found = results["sampling"]
    (short, *cut), (same, *whole) = found["cut"]
    assert short == same
    assert short[0] == "length"
    for (reason, ids), (_, all_ids) in zip(cut, whole, strict=True):
        assert reason == "cut"
        assert ids == all_ids[: len(ids)]
        assert 0 < len(ids) < len(all_ids)
    repeated = [ids for ids, reason in found["repeated"] if reason == "repetition"]
    assert repeated
    for ids in repeated:
        assert any(ids[-k:] == ids[-2 * k : -k] == ids[-3 * k : -2 * k] for k in range(1, 34))
        assert len(ids) < 100
    assert found["cached"] == [0, 64, 64, 64]  # whole blocks of 32 of a prompt of 70 tokens are computed once


def test_evaluation_on_two_replicas(results: dict[str, Any], directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer(directory / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(directory / "moe_tied_a", dtype=torch.float32)
    odd = 0
    assert len(results["sampling"]["records"]) == 5
    for i, record in enumerate(results["sampling"]["records"]):
        messages = [{"role": "user", "content": f"{i} + {i}"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        # transformers' greedy generation, token by token
        for _ in range(12):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = tokenizer.decode(ids[0, -12:], skip_special_tokens=True)
        assert (record["index"], record["sample"], record["tokens"]) == (i, 0, 12)
        assert record["response"] == expected
        assert record["answer"] == str(2 * i)
        odd += len(expected) % 2
    summary = results["sampling"]["evaluation"]
    assert summary["prompts"] == 5
    assert summary["accuracy"] == pytest.approx(odd / 5)
    assert summary["truncated_fraction"] == 1.0


# ---- vLLM's defects: each test fails once vLLM has mended one and its fix can go ---------------------------


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_vllm_packs_experts_only_once(results: dict[str, Any], kind: str) -> None:
    wrong = results[kind]["without forget_packed_experts"].startswith("RefitError")
    assert wrong == KINDS[kind][0]


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_vllm_keeps_a_stale_tied_head(results: dict[str, Any], kind: str) -> None:
    wrong = results[kind]["without repack_tied_heads"].startswith("RefitError")
    assert wrong == KINDS[kind][1]


def test_vllm_dies_of_a_seeded_request_with_chunked_prefill(results: dict[str, Any]) -> None:
    assert results["unfixed"]["chunked prefill"].startswith("RuntimeError")


def test_vllm_names_shared_memory_by_ranks_alone(results: dict[str, Any]) -> None:
    assert results["unfixed"]["identity"] == "//"  # of every job under an external launcher
    assert all(results[kind].get("shared memory", []) == [] for kind in KIND_NAMES)  # ours leaves no names


def test_vllm_binds_the_memory_of_the_process(results: dict[str, Any]) -> None:
    assert results["unfixed"]["bound without"]
    assert not results["unfixed"]["bound with the fix"]


# ---- without an engine ---------------------------------------------------------------------------------------


def engine(dtype: torch.dtype) -> Any:
    return SimpleNamespace(dtype=dtype, replica=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_proof_refuses_what_is_not_finite(bad: float) -> None:
    completion = Completion([3, 4, 5], [-1.0, -2.0], "length")
    for dtype in (torch.float32, torch.bfloat16):
        statistic, message = _compare(engine(dtype), [completion], [torch.tensor([-1.0, bad])], 0.1)
        assert not statistic <= 0.1
        assert "position 2 (token 5)" in message


def test_bf16_is_judged_by_the_mean() -> None:
    completion = Completion([3, 4, 5], [-1.0, -2.0], "length")
    statistic, message = _compare(engine(torch.bfloat16), [completion], [torch.tensor([-1.0, -2.5])], 0.1)
    assert statistic == pytest.approx(0.25)
    assert "mean difference" in message


def test_text_of_a_response(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    turn, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert set(stop_token_ids(tokenizer)) == {turn, end}
    ids = tokenizer("<think>1+1</think>2", add_special_tokens=False)["input_ids"]
    assert response_text(tokenizer, [*ids, turn]) == "<think>1+1</think>2"
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>"]}, replace_extra_special_tokens=False
    )
    assert response_text(tokenizer, [*ids, turn]) == "<think>1+1</think>2"
