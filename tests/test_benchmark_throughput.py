"""The throughput tool: what it measures adds up, what it compares is judged as statistics says."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core.pipeline_parallel.schedules as schedules
import pytest
import torch
import torch.distributed as dist
import yaml

from benchmarks.throughput import grpo as grpo_benchmark
from benchmarks.throughput.compare import bootstrap_ratio, plot_scaling, scaling_points
from benchmarks.throughput.phases import Profile, spread
from benchmarks.throughput.sft import Options, row_lengths, stragglers
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.training import heartbeat
from megatron_posttrain.training.run import Run
from tests.helpers.launch import ranks
from tests.helpers.models import make_assets
from tools.benchmark_throughput import main

HF_CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
TREE: dict[str, Any] = {
    "precision": {"dtype": "fp32"},
    "data": {"train": "not-read.jsonl", "sequence_length": 64},
    "training": {"global_batch_size": 4},
    "output": "not-written",
}


def result(seconds: list[float], ranks: int = 2, tokens: int = 1000) -> dict[str, Any]:
    rate = tokens / statistics.fmean(seconds)
    return {
        "command": "sft",
        "world_size": ranks,
        "layout": {"tensor": 1, "pipeline": 1},
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "sequence_length": 64,
        "mean_length": None,
        "tokens_per_step": tokens,
        "step_seconds": seconds,
        "tokens_per_second": rate,
        "tokens_per_second_per_gpu": rate / ranks,
    }


def write(path: Path, *results: dict[str, Any]) -> str:
    machine = {"device": {"name": "CPU"}, "versions": {}, "hosts": ["one"]}
    config = {"model": {"path": path.parent.name}}
    path.write_text(json.dumps({"config": config, "machine": machine, "results": results}))
    return str(path)


def draws(mean: float, count: int, seed: int) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(mean, 0.05 * mean) for _ in range(count)]


def test_measured_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    config, output = tmp_path / "bench.yaml", tmp_path / "out" / "result.json"
    config.write_text(yaml.safe_dump(TREE | {"model": {"path": str(tmp_path)}}))
    options = ["--config", str(config), "--steps", "2", "--warmup", "1", "--output", str(output)]
    done = ranks(2, "tools/benchmark_throughput.py", *options, "--sweep", "tensor=2;pipeline=2;context=2")
    assert "slowest rank" in done.stdout
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 100
    tree = json.loads(output.read_text())
    assert tree["machine"]["versions"]["megatron-core"].startswith("0.16")
    assert [r["layout"]["tensor"] for r in tree["results"]] == [2, 1, 1]
    # Gradients are averaged over context ranks too; the sum of the loss's parts goes to every pipeline stage.
    assert [kinds(r) for r in tree["results"]] == [
        {"tensor", "other"},
        {"pipeline", "other"},
        {"context", "data", "other"},
    ]
    for r in tree["results"]:
        mean = statistics.fmean(r["step_seconds"])
        assert len(r["step_seconds"]) == 2
        assert r["tokens_per_step"] == 4 * 64
        assert r["tokens_per_second"] == pytest.approx(4 * 64 / mean)
        # 6 FLOPs a weight and token, 12 an attention pair and head dimension, by hand from the config.
        weights = 2 * (64 * 32 * (4 + 2 * 2) + 4 * 32 * 64 + 3 * 64 * 128) + 64 * 301
        pairs = 4 * 64 * 65 / 2
        flops = 6 * weights * 256 + 2 * 12 * pairs * 4 * 32
        assert r["tflops_per_gpu"] == pytest.approx(flops / mean / 2 / 1e12)
        assert r["mfu"] == pytest.approx(r["tflops_per_gpu"] / r["peak_tflops"])
        assert r["peak_source"].startswith("measured")
        for rank in r["ranks"]:
            assert sum(rank["phase_seconds"].values()) <= mean * 1.001
            assert min(rank["phase_seconds"].values()) >= 0


def kinds(result: dict[str, Any]) -> set[str]:
    return {kind.split()[0] for kind in result["profile"]["communication"]}


def test_profile_of_a_mixture_of_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | EXPERTS))
    config, output = tmp_path / "bench.yaml", tmp_path / "result.json"
    config.write_text(yaml.safe_dump(TREE | {"model": {"path": str(tmp_path)}}))
    options = ["--config", str(config), "--steps", "2", "--warmup", "1", "--output", str(output)]
    sweep = "tensor=2,pipeline=2,expert=2;tensor=2,expert=2"
    done = ranks(4, "tools/benchmark_throughput.py", *options, "--sweep", sweep)
    assert "nothing\noverlaps" in done.stdout
    assert "forward: rank" in done.stdout
    staged, flat = json.loads(output.read_text())["results"]
    assert kinds(staged) == {"tensor", "pipeline", "expert", "other"}
    assert kinds(flat) == {"tensor", "expert", "data", "other"}

    # Micro-batches of 64 tokens: 4 through two stages of a layer each; or 2 on each of two data parallel ranks.
    message = 64 // 2 * 64 * 4  # bytes: a tensor rank's half of the sequence, hidden size, fp32
    sent = [of(rank, "pipeline parallel send/receive") for rank in staged["profile"]["ranks"]]
    assert sum(figures["calls"] for figures in sent) == 2 * (4 * (2 - 1) * 2)  # tensor ranks x (forward, backward)
    assert all(figures["bytes"] == 4 * (message + 3 * 8) for figures in sent)  # after the sizes, [3] int64
    assert staged["profile"]["communication"]["pipeline parallel send/receive"]["gb_per_second"] is None
    for result, micro_batches, layers in ((staged, 4, 1), (flat, 2, 2)):
        for number, rank in enumerate(result["profile"]["ranks"]):
            # Tokens and their gates to the experts, results back, and the gradient of each.
            assert of(rank, "expert parallel all-to-all")["calls"] == micro_batches * layers * (3 + 3)
            # Sequence parallelism (arXiv 2205.05198): attention's output in forward, its input in backward; so the
            # embedding's output. Gathers are the other way round, and once more for the weights' gradients of what was
            # gathered or is gathered again; the head's input is gathered once, to choose the tokens that count, whose
            # gradient is then summed among ranks instead of scattered.
            first, last = (number < 2, number >= 2) if result is staged else (True, True)
            scatters = micro_batches * (2 * layers + first)
            gathers = micro_batches * (3 * layers + first + last)
            figures = of(rank, "tensor parallel reduce-scatter")
            assert figures["calls"] == scatters
            assert figures["bytes"] == scatters * message  # half of a whole message, 2 x `message`
            assert of(rank, "tensor parallel all-gather")["calls"] == gathers
            seconds = rank["phase_seconds"]
            assert seconds["forward"] > 0
            assert seconds["backward"] > 0
            assert min(seconds.values()) > -1e-9
            assert sum(seconds.values()) == pytest.approx(rank["step_seconds"])
    for rank in flat["profile"]["ranks"]:
        assert of(rank, "data parallel reduce-scatter")["calls"] == 2  # experts' gradients have a group of their own


def of(rank: dict[str, Any], kind: str) -> dict[str, float]:
    figures: dict[str, float] = rank["communication"][kind]
    return figures


def wrapped() -> list[Any]:
    group = [value for _, value in sorted(vars(dist.ProcessGroup).items()) if callable(value)]
    return [*group, schedules.forward_step, schedules.backward_step, heartbeat.enter, heartbeat.leave]


def test_originals_are_restored() -> None:
    before = wrapped()
    start_distributed()
    profile = Profile()
    with profile.recording():
        assert sum(a is not b for a, b in zip(before, wrapped(), strict=True)) >= 4 + 15
        dist.all_reduce(torch.ones(3))
    assert not profile.traffic  # nobody to talk to
    with pytest.raises(ZeroDivisionError), profile.recording():
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(before, wrapped(), strict=True))


def test_grpo_is_profiled_after_its_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    start_distributed()
    before = wrapped()
    recorder = grpo_benchmark.Recorder(Options(steps=2, warmup=1, profiled=1))
    recorded = []
    run: Any = SimpleNamespace(_record=SimpleNamespace(log=lambda step, metrics: None))
    with recorder.listening():
        for step in range(1, 5):
            Run.log(run, step, {"step_seconds": float(step)})
            recorded.append(heartbeat.enter is not before[-2])
    assert recorded == [False, False, True, False]
    assert [s["step_seconds"] for s in recorder.steps] == [1.0, 2.0, 3.0, 4.0]
    assert all(a is b for a, b in zip(before, wrapped(), strict=True))


@pytest.mark.slow
def test_grpo_tells_of_every_rank(tmp_path: Path) -> None:
    assets, config, output = make_assets(tmp_path), tmp_path / "grpo.yaml", tmp_path / "result.json"
    tree = {
        "model": {"path": str(assets / "model")},
        "parallel": {"tensor": 2},
        "data": {"train": "not-read.jsonl", "sequence_length": 96},
        "training": {"global_batch_size": 16, "micro_batch_size": 8},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 16},
        "rewards": [{"name": "math", "weight": 1.0}],
    }
    config.write_text(yaml.safe_dump(TREE | tree))
    options = ["--config", str(config), "--steps", "2", "--warmup", "1", "--output", str(output)]
    ranks(2, "tools/benchmark_throughput.py", *options, rollout=True)
    (found,) = json.loads(output.read_text())["results"]
    for rank in found["ranks"]:
        assert set(rank["phase_seconds"]) == {"rollout", "train", "refit", "other"}
        assert rank["peak_memory_gib"] > 0.1
    assert set(found["profile"]["spread"]) == {"rollout", "forward", "backward"}
    for rank in found["profile"]["ranks"]:
        assert min(rank["phase_seconds"][p] for p in ("rollout", "forward", "backward", "optimizer", "refit")) > 0
        assert sum(rank["phase_seconds"].values()) == pytest.approx(rank["step_seconds"])


def test_rows_are_full() -> None:
    config = SftConfig.model_validate(TREE | {"model": {"path": "x"}})
    assert row_lengths(config, None) == [[64]] * 4
    rows = row_lengths(config, 10)
    assert {sum(row) for row in rows} == {64}
    assert all(n >= 2 for row in rows for n in row)
    assert rows == row_lengths(config, 10)


def test_straggler_is_named() -> None:
    found = stragglers([2.0, 2.0, 1.5, 2.0], ["a", "a", "b", "b"])
    assert found == {"slowest_rank": 2, "host": "b", "behind_median": 0.25}
    found = spread([1.0, 2.0, 4.0, 8.0], stages=[0, 0, 1, 1])
    assert found == {"max_over_median": 8 / 3, "slowest_rank": 3, "within_stage": 8 / 6}


def test_interval_is_that_of_the_delta_method() -> None:
    a, b = draws(1.0, 200, 1), draws(1.25, 200, 2)
    ratio, low, high = bootstrap_ratio(a, b)
    error = math.hypot(*(statistics.stdev(x) / math.sqrt(len(x)) / statistics.fmean(x) for x in (a, b)))
    assert ratio == pytest.approx(statistics.fmean(a) / statistics.fmean(b))
    assert low == pytest.approx(ratio * (1 - 1.96 * error), rel=2e-3)
    assert high == pytest.approx(ratio * (1 + 1.96 * error), rel=2e-3)


def test_exit_status_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.json", result(draws(1.0, 30, 1)))
    same = write(tmp_path / "same.json", result(draws(1.0, 30, 2)))
    slow = write(tmp_path / "slow.json", result(draws(1.2, 30, 3)))
    assert main(["--compare", a, same]) == 0
    assert main(["--compare", a, slow]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert main(["--compare", slow, a]) == 0
    assert "faster" in capsys.readouterr().out
    assert main(["--compare", a, slow, "--tolerance", "0.5"]) == 0
    # Two noisy steps each are no evidence.
    few = write(tmp_path / "few.json", result([0.7, 1.6]))
    assert main(["--compare", write(tmp_path / "b.json", result([0.6, 1.5])), few]) == 0


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.json", result([1.0, 1.0]))
    assert main(["--compare", a, str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("[1]")
    assert main(["--compare", a, str(tmp_path / "bad.json")]) == 2
    assert main([]) == 2
    config = tmp_path / "bench.yaml"
    config.write_text(yaml.safe_dump(TREE | {"model": {"path": "Qwen3-0.6B"}}))
    assert main(["--config", str(config), "--sweep", "tensor=3"]) == 2
    assert "Nearest layouts" in capsys.readouterr().err


def test_scaling_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{n}.json", result([2.0 / n, 2.2 / n], ranks=n)) for n in (4, 1, 2)]
    slower = write(tmp_path / "slower.json", result([9.0, 9.0], ranks=2))
    points = scaling_points([*files, slower])
    assert [p.ranks for p in points] == [1, 2, 4]
    assert [p.efficiency for p in points] == pytest.approx([1, 1, 1])
    page = tmp_path / "scaling.html"
    assert main(["--scaling", *files, "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "100%" in said
    assert "not the same" not in said
    longer = write(tmp_path / "longer.json", result([0.5, 0.6], ranks=8) | {"sequence_length": 128})
    assert main(["--scaling", *files, longer]) == 0
    assert "not the same in all results: sequence_length\n" in capsys.readouterr().out
    assert "src=" not in page.read_text()[:2000]  # the plot needs no network
    plot_scaling(points[:1], tmp_path / "one.html")
