"""`plan`: the command's output and refusals, the search, and the accuracy against published throughput."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_posttrain.cli.main import main
from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.config.load import load_config
from megatron_posttrain.doctor.job import workload
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.layout_checks import problems
from megatron_posttrain.models.registry import architecture_from_hf
from megatron_posttrain.planning import rollout
from megatron_posttrain.planning.flops import flops_per_token
from megatron_posttrain.planning.gpus import GPUS, SPREADS
from megatron_posttrain.planning.known_models import KNOWN_MODELS, load_architecture, published_name
from megatron_posttrain.planning.layouts import enumerate_layouts, make_layout, parse_layout
from megatron_posttrain.planning.planner import PAGEABLE_BYTES_PER_S, Workload, estimate, plan, plan_layout
from megatron_posttrain.planning.recipe import command_of, config_of
from megatron_posttrain.planning.rollout import GIB, weight_elements
from megatron_posttrain.training.limits import rollout_problems
from megatron_posttrain.training.prepare import batch_problems

ROOT = Path(__file__).parents[2]
USUAL = ["--gpu", "H100", "--gpus", "64", "--sequence-length", "4096", "--global-batch-size", "512"]


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_given_layout_is_one_entry(capsys: pytest.CaptureFixture[str]) -> None:
    layout = "tensor=2,pipeline=1,virtual_pipeline=1,context=1,expert=8"
    status, out, _ = command(
        capsys, "--model", "qwen3-30b-a3b", *USUAL, "--layout", layout, "--micro-batch-size", "1", "--json"
    )
    assert status == 0
    (entry,) = json.loads(out)["layouts"]
    assert {"layout", "micro_batch_size", "step_seconds", "tokens_per_second_per_gpu", "tflops_per_gpu"} <= set(entry)
    assert entry["layout"] == {
        "tensor": 2, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "expert": 8, "expert_tensor": 1
    }  # fmt: skip
    memory = entry["memory_gib"]
    assert memory["total"] == pytest.approx(sum(v for k, v in memory.items() if k != "total"))
    assert entry["step_seconds"] == pytest.approx(sum(entry["time_seconds"].values()))
    assert entry["tokens_per_second_per_gpu"] == pytest.approx(512 * 4096 / 64 / entry["step_seconds"])
    assert isinstance(entry["fits"], bool)
    assert entry["reason"]


def test_a_search_is_sorted_and_gives_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(capsys, "--model", "Qwen/Qwen3-8B", *USUAL, "--json")
    assert status == 0
    found = json.loads(out)["layouts"]
    rates = [e["tokens_per_second_per_gpu"] for e in found if e["fits"]]
    assert rates == sorted(rates, reverse=True)
    assert all(e["reason"] for e in found)
    assert "slower" in found[1]["reason"] or "fits" in found[1]["reason"]


@pytest.mark.parametrize("task", ["pretrain", "sft", "lora", "grpo"])
def test_tables_for_people(capsys: pytest.CaptureFixture[str], task: str) -> None:
    status, out, _ = command(capsys, "--model", "qwen3-8b", *USUAL, "--task", task)
    assert status == 0
    for text in ("activations", "optimizer", "compute"):
        assert text in out
    assert "torchrun" in out
    assert "plan.yaml" in out
    assert ("rollout weights" in out) == (task == "grpo")


def test_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "GB200", "--gpus", "8,64", "--sequence-length", "4096", "--global-batch-size", "256"]
    status, out, _ = command(capsys, "--model", "qwen3-30b-a3b", *arguments, "--json")
    assert status == 0
    assert [e["gpus"] for e in json.loads(out)["layouts"]] == [8, 64]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "qwen3-30b-a4b", *USUAL], "Qwen3-30B-A3B"),
        (["--model", "qwen3-8b", *USUAL, "--gpu", "H10"], "H100"),
        (["--model", "qwen3-8b", *USUAL, "--gpus", "many"], "--gpus many"),
        (["--model", "qwen3-8b", *USUAL, "--layout", "tensr=2"], "'tensor'"),
        (["--model", "qwen3-8b", *USUAL, "--layout", "tensor=none"], "whole numbers"),
        (["--model", "qwen3-8b", *USUAL, "--layout", "tensor=3"], "64 ranks"),
        (["--model", "qwen3-8b", *USUAL, "--layout", "expert=8"], "no experts"),
        (["--model", "qwen3-8b", *USUAL, "--gpu", "A100", "--precision", "fp8"], "A100 has no FP8"),
        (["--model", "qwen3-8b", *USUAL, "--precision", "mxfp8"], "bf16 or fp8"),
        (["--model", "qwen3-8b", *USUAL, "--micro-batch-size", "0"], "--micro-batch-size 0"),
        (["--model", str(ROOT / "tests"), *USUAL], "without config.json"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    status, _, err = command(capsys, *arguments)
    assert status == 2
    assert expected in err


def test_local_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("qwen3", hidden_size=64, num_hidden_layers=2, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    _, arch = load_architecture(str(tmp_path))
    assert (arch.hidden_size, arch.num_layers) == (64, 2)


# What transformers' own defaults and the published configs agree on: an independent source of the shapes.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-0.6B", 0.596), ("Qwen3-4B", 4.02), ("Qwen3-8B", 8.19), ("Qwen3-14B", 14.77), ("Qwen3-32B", 32.76),
        ("Qwen3-30B-A3B", 30.53), ("Qwen3-235B-A22B", 235.1), ("Llama-3-8B", 8.03), ("Llama-3-70B", 70.55),
        ("Llama-3.1-405B", 405.9), ("DeepSeek-V3", 671.0), ("gpt-oss-20b", 20.9), ("gpt-oss-120b", 116.8),
    ],
)  # fmt: skip
def test_known_models_have_their_published_size(name: str, billions: float) -> None:
    assert weight_elements(KNOWN_MODELS[name]) / 1e9 == pytest.approx(billions, rel=0.003)


def test_default_configs_of_transformers_are_the_known_models() -> None:
    transformers = pytest.importorskip("transformers")
    for model_type, name in (("deepseek_v3", "DeepSeek-V3"), ("gpt_oss", "gpt-oss-120b")):
        config = json.loads(transformers.AutoConfig.for_model(model_type).to_json_string(use_diff=False))
        ours, theirs = KNOWN_MODELS[name], architecture_from_hf(config)
        for field in ("num_layers", "hidden_size", "num_heads", "num_query_groups", "vocab_size", "mla"):
            assert getattr(ours, field) == getattr(theirs, field), (name, field)
        assert ours.moe is not None
        assert theirs.moe is not None
        for field in ("num_experts", "top_k", "expert_ffn_size", "shared_ffn_size", "first_dense_layers"):
            assert getattr(ours.moe, field) == getattr(theirs.moe, field), (name, field)
        assert ours.sliding_layers == theirs.sliding_layers


def test_every_searched_layout_is_one_that_training_accepts() -> None:
    arch = KNOWN_MODELS["Qwen3-30B-A3B"]
    found = list(enumerate_layouts(arch, 64, domain=8, global_batch=512, sequence_length=8192))
    assert len(found) > 1000
    for layout, micro_batch in found:
        assert not list(problems(layout, arch))
        assert 512 % (micro_batch * layout.data) == 0


def test_the_winner_is_the_fastest_of_an_exhaustive_search() -> None:
    arch, gpu = KNOWN_MODELS["Qwen3-8B"], GPUS["H100"]
    work = Workload("sft", 4096, 64, recompute="none")
    best = plan(arch, 16, work, gpu)[0]
    cases = enumerate_layouts(arch, 16, domain=8, global_batch=64, sequence_length=4096)
    found = [estimate(arch, layout, micro, "none", work, gpu) for layout, micro in cases]
    assert best.tokens_per_second_per_gpu == max(e.tokens_per_second_per_gpu for e in found if e.fits)


def test_expert_layout_across_nodes_is_warned_of_and_slower() -> None:
    arch, gpu = KNOWN_MODELS["Qwen3-30B-A3B"], GPUS["H100"]
    work = Workload("sft", 4096, 512, micro_batch=1)
    inside, across = (make_layout(64, expert=size) for size in (8, 64))
    a, b = (estimate(arch, layout, 1, "none", work, gpu) for layout in (inside, across))
    assert b.seconds["exposed_communication"] > 2 * a.seconds["exposed_communication"]
    ranked = {str(e.layout): e for e in plan(arch, 64, work, gpu)}
    assert any("cross NVLink domains" in w for w in ranked[str(across)].warnings)
    assert not any("cross" in w for w in ranked[str(inside)].warnings)


def test_bubble_is_that_of_the_interleaved_schedule() -> None:
    """(pipeline - 1) / (chunks x microbatches) of the rest, Narayanan et al. 2021, section 2.2."""
    arch, gpu = KNOWN_MODELS["Llama-3-70B"], GPUS["H100"]
    work = Workload("sft", 4096, 64)
    for chunks in (1, 5):
        e = estimate(arch, parse_layout(f"tensor=4,pipeline=4,virtual_pipeline={chunks}", 32), 1, "none", work, gpu)
        steady = e.seconds["compute"] + e.seconds["exposed_communication"]
        assert e.seconds["bubble"] / steady == pytest.approx(3 / chunks / 32, rel=0.05)


@pytest.mark.parametrize("task", ["sft", "lora", "dpo", "reward-model", "distill", "grpo", "ppo"])
def test_the_recipe_is_a_valid_config(tmp_path: Path, task: str) -> None:
    arch, gpu = KNOWN_MODELS["Qwen3-30B-A3B"], GPUS["H200"]
    teacher = KNOWN_MODELS["Qwen3-32B"] if task == "distill" else None
    work = Workload(task, 4096, 256, beside=teacher, beside_path="Qwen/Qwen3-32B")
    best = plan(arch, 32, work, gpu)[0]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(config_of("model", best, work, gpu)))
    config: Any = load_config(ALGORITHMS[command_of(task)].config, path)
    assert config.parallel.expert == best.layout.expert
    assert config.training.micro_batch_size == best.micro_batch
    assert not list(batch_problems(config, best.layout))
    if task in ("grpo", "ppo"):  # and the doctor, who reads it, finds the same layout and that it fits
        assert not list(rollout_problems(config, arch, "cuda"))
        again = plan_layout(arch, best.layout, workload(config), gpu)
        assert again.fits, again.reason
        assert not any("samples in flight" in warning for warning in again.warnings)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen3-30B-A3B-Base", "Qwen3-30B-A3B"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B"),
        ("Qwen/Qwen3-235B-A22B-Thinking-2507-FP8", "Qwen3-235B-A22B"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "Qwen3-30B-A3B"),
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "Qwen3-4B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3-8B"),
        ("meta-llama/Meta-Llama-3-70B", "Llama-3-70B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama-3-70B"),
        ("meta-llama/Llama-3.1-405B-Instruct-FP8", "Llama-3.1-405B"),
        ("deepseek-ai/DeepSeek-R1-0528", "DeepSeek-V3"),
        ("deepseek-ai/DeepSeek-V3-0324", "DeepSeek-V3"),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "Qwen3-8B"),
        ("moonshotai/Kimi-K2-Instruct-0905", "Kimi-K2"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("llama3-8b", "Llama-3-8B"),
        *((name, name) for name in KNOWN_MODELS),
        *((published_name(name), name) for name in KNOWN_MODELS),
    ],
)
def test_published_names_are_the_models(name: str, known: str) -> None:
    assert load_architecture(name) == (known, KNOWN_MODELS[known])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Qwen/Qwen3-VL-8B-Instruct", "Qwen3-8B"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen3-30B-A3B"),
        ("meta-llama/Llama-3.2-1B", "Llama-3-8B"),
        ("Qwen3-Embedding-8B", "Qwen3-8B"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", ""),
    ],
)
def test_other_models_of_a_family_are_not_taken_for_a_known_one(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{near}") as error:
        load_architecture(name)
    assert "known: Qwen3-0.6B" in str(error.value)


def test_grpo_searches_what_it_may_choose(capsys: pytest.CaptureFixture[str]) -> None:
    """8 H100 and Qwen3-30B-A3B: without offload and recomputation nothing fits, and the rows are different splits."""
    arguments = ["--model", "Qwen/Qwen3-30B-A3B", "--gpu", "H100", "--gpus", "8", "--sequence-length", "5120"]
    arguments += ["--global-batch-size", "256", "--task", "grpo"]
    status, out, _ = command(capsys, *arguments, "--json")
    assert status == 0
    rows = json.loads(out)["layouts"]
    splits = [tuple(v for k, v in row["layout"].items() if k != "virtual_pipeline") for row in rows]
    assert len(set(splits)) == len(rows) == 10
    assert rows[0]["fits"]
    assert rows[0]["rollout"]["offload"]
    assert rows[0]["recompute"] == "full"
    assert all(row["rollout"]["tensor"] > 1 for row in rows)
    _, out, _ = command(capsys, *arguments, "--no-offload", "--json")
    assert not any(row["fits"] for row in json.loads(out)["layouts"])
    _, out, _ = command(capsys, *arguments)
    assert "rollout TP" in out
    assert "published runs of one configuration differ" in out
    assert "path: Qwen/Qwen3-30B-A3B" in out


def test_expandable_segments_are_not_advised_where_vllm_shares_memory() -> None:
    arch, gpu = KNOWN_MODELS["Qwen3-30B-A3B"], GPUS["H100"]
    for task, advised in (("sft", True), ("grpo", False)):
        work = Workload(task, 4096, 64, micro_batch=1, recompute="full", rollout_tensor=8, offload=task == "grpo")
        found = plan_layout(arch, make_layout(8, tensor=4, pipeline=2, virtual_pipeline=11, expert=4), work, gpu)
        (warning,) = (w for w in found.warnings if "memory is left" in w)
        assert ("expandable_segments" in warning) == advised


def test_the_answer_about_a_rollout_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = rollout.layer_weights
    monkeypatch.setattr(rollout, "layer_weights", lambda *a: calls.append(a) or original(*a))
    rollout._active_weights.cache_clear()
    plan(KNOWN_MODELS["Qwen3-8B"], 8, Workload("grpo", 4096, 64), GPUS["H100"])
    assert len(calls) == KNOWN_MODELS["Qwen3-8B"].num_layers


def test_starts_without_torch() -> None:
    code = "import sys, megatron_posttrain.cli.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_published_throughput() -> None:
    """The bounds that the planner promises, over rows with sources; also with a row's model left out of the fit."""
    spec = importlib.util.spec_from_file_location("plan_accuracy", ROOT / "benchmarks" / "plan_accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    accuracy = importlib.util.module_from_spec(spec)
    sys.modules["plan_accuracy"] = accuracy
    spec.loader.exec_module(accuracy)
    rows = accuracy.read_rows()
    assert len(rows) > 140
    signed = accuracy.errors(rows, (accuracy.EFFICIENCIES, accuracy.SUSTAINED))
    for (generation, experts), range_told in SPREADS.items():
        kind = [r.gpu.generation == generation and (r.arch.moe is not None) == experts for r in rows]
        assert np.percentile(1 / (1 + signed[kind]), [10, 90]) == pytest.approx(range_told, abs=0.02)
    error = abs(signed)
    assert np.median(error) <= 0.15
    assert np.percentile(error, 90) <= 0.35


def test_pairs_are_two_sequences_and_a_teacher_is_weights_and_a_pass() -> None:
    arch, gpu = KNOWN_MODELS["Qwen3-8B"], GPUS["H100"]
    layout = parse_layout("tensor=2", 8)
    sft = estimate(arch, layout, 2, "none", Workload("sft", 2048, 128), gpu)
    dpo = estimate(arch, layout, 1, "none", Workload("dpo", 2048, 64), gpu)
    assert dpo.memory_gib == sft.memory_gib  # the reference takes none: its log-probs are kept
    assert dpo.seconds.pop("reference") == pytest.approx(
        sum(sft.seconds[part] for part in ("compute", "exposed_communication", "bubble")) / 3
    )
    assert dpo.seconds == sft.seconds
    teacher = KNOWN_MODELS["Qwen3-32B"]
    alone = estimate(arch, layout, 1, "none", Workload("sft", 2048, 64), gpu)
    taught = estimate(arch, layout, 1, "none", Workload("distill", 2048, 64, beside=teacher), gpu)
    hidden = 64 // 4 * 2048 * teacher.hidden_size * 2 / 2**30  # of a step's tokens on one of 4 replicas
    assert taught.memory_gib["teacher"] == pytest.approx(32.76e9 / 2 * 2 / 2**30 + hidden, rel=0.01)
    assert taught.memory_gib["weights"] == alone.memory_gib["weights"]
    assert 0.9 < taught.seconds["teacher"] / alone.seconds["compute"] < 2  # four times the weights, a third of the work


def test_a_critic_is_a_second_trained_model_with_one_output() -> None:
    arch, gpu = KNOWN_MODELS["Qwen3-8B"], GPUS["H200"]
    layout = parse_layout("tensor=4", 8)
    options: dict[str, Any] = {"rollout_tensor": 4, "offload": False}
    grpo, ppo = (estimate(arch, layout, 1, "full", Workload(t, 4096, 64, **options), gpu) for t in ("grpo", "ppo"))
    head = 151936 * 4096 / 4  # of the policy, on one of 4 tensor ranks; the critic's is not divided
    for name, size in {"weights": 2, "gradients": 4, "optimizer": 12 / 2}.items():
        assert ppo.memory_gib[name] == grpo.memory_gib[name]
        theirs = ppo.memory_gib[f"critic_{name}"]
        assert theirs == pytest.approx(ppo.memory_gib[name] - size * (head - 4096) / GIB, rel=1e-6)
    critic = sum(size for name, size in ppo.memory_gib.items() if name.startswith("critic_"))
    assert ppo.memory_gib["total"] - grpo.memory_gib["total"] == pytest.approx(1.02 * critic)
    assert ppo.memory_gib["activations"] == grpo.memory_gib["activations"]
    steady = grpo.seconds["compute"] + grpo.seconds["exposed_communication"]
    assert 0.8 < ppo.seconds.pop("critic") / steady < 1.1
    assert ppo.seconds == grpo.seconds
    options["offload"] = True  # vLLM is awake without the critic's gradients and states
    moved = estimate(arch, layout, 1, "full", Workload("ppo", 4096, 64, **options), gpu)
    states = ppo.memory_gib["optimizer"] + ppo.memory_gib["critic_optimizer"]
    assert moved.seconds["offload"] * PAGEABLE_BYTES_PER_S / 2 == pytest.approx(states * GIB)
    small = Workload("ppo", 4096, 64, beside=KNOWN_MODELS["Qwen3-0.6B"], **options)
    assert estimate(arch, layout, 1, "full", small, gpu).memory_gib["critic_weights"] < 0.5
    pairs = estimate(arch, layout, 1, "full", Workload("reward-model", 4096, 64), gpu)
    assert pairs.memory_gib["logits"] < 1e-3
    assert pairs.memory_gib["weights"] == ppo.memory_gib["critic_weights"]
    flops = pairs.tflops_per_gpu * 1e12 / pairs.tokens_per_second_per_gpu
    assert flops == pytest.approx(flops_per_token(arch, 4096) - 6 * 4096 * (151936 - 1))


def test_a_teacher_belongs_to_distill(capsys: pytest.CaptureFixture[str]) -> None:
    for extra, said in (
        (["--task", "distill"], "no --teacher"),
        (["--task", "sft", "--teacher", "qwen3-32b"], "no other task has one"),
        (["--task", "grpo", "--critic", "qwen3-8b"], "--critic has an effect with --task ppo only, found grpo"),
        (["--task", "distill", "--teacher", "qwen3-33b"], "--teacher qwen3-33b: neither a known name"),
    ):
        status, out, error = command(capsys, "--model", "qwen3-8b", *USUAL, *extra)
        assert (status, said in out + error) == (2, True), out + error
    status, out, _ = command(capsys, "--model", "qwen3-8b", *USUAL, "--task", "distill", "--teacher", "qwen3-32b")
    assert status == 0
    assert "teacher: {path: Qwen/Qwen3-32B}" in out or "path: Qwen/Qwen3-32B" in out


def test_a_base_in_nf4_is_a_quarter_and_adapters_go_with_preferences_and_teachers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arch, gpu, layout = KNOWN_MODELS["Qwen3-32B"], GPUS["H100"], parse_layout("tensor=2", 8)
    plain, nf4 = (
        estimate(arch, layout, 1, "none", Workload("lora", 2048, 64, quantization=name), gpu).memory_gib
        for name in (None, "nf4")
    )
    linears = 64 * (5120 * (64 + 2 * 8) * 128 + 64 * 128 * 5120 + 3 * 5120 * 25600) / 2  # of one of two tensor ranks
    bytes_each = (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert plain["weights"] - nf4["weights"] == pytest.approx(linears * (2 - bytes_each) / 2**30)
    assert nf4["dequantised"] == pytest.approx(linears / 64 * 2 / 2**30)  # a layer of 64
    pairs = estimate(arch, layout, 1, "none", Workload("dpo", 2048, 64, lora_rank=16), gpu).memory_gib
    assert pairs["optimizer"] == plain["optimizer"]
    usual = ["--model", "qwen3-32b", "--gpu", "H100", "--gpus", "8", "--sequence-length", "2048"]
    for extra, code, said in (
        (["--task", "sft", "--quantization", "nf4"], 2, "are for lora, and with --lora-rank for dpo and distill"),
        (["--task", "dpo", "--lora-rank", "16", "--quantization", "nf4"], 0, "quantization: nf4"),
    ):
        status, out, error = command(capsys, *usual, "--global-batch-size", "64", *extra)
        assert status == code
        assert said in out + error
