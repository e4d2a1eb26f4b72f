"""The throughput tool: what it measures adds up, what it compares is judged as statistics says."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.throughput.compare import bootstrap_ratio, plot_scaling, scaling_points
from benchmarks.throughput.sft import row_lengths, stragglers
from megatron_posttrain.config.schema import SftConfig
from tests.launch import torchrun
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
    path.write_text(json.dumps({"machine": machine, "results": results}))
    return str(path)


def draws(mean: float, count: int, seed: int) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(mean, 0.05 * mean) for _ in range(count)]


def test_measured_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    config, output = tmp_path / "bench.yaml", tmp_path / "out" / "result.json"
    config.write_text(yaml.safe_dump(TREE | {"model": {"path": str(tmp_path)}}))
    options = ["--config", str(config), "--steps", "2", "--warmup", "1", "--output", str(output)]
    done = torchrun(2, "tools/benchmark_throughput.py", *options, "--sweep", "tensor=2;pipeline=2")
    assert "slowest rank" in done.stdout
    tree = json.loads(output.read_text())
    assert tree["machine"]["versions"]["megatron-core"].startswith("0.16")
    assert [r["layout"]["tensor"] for r in tree["results"]] == [2, 1]
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
    assert "100%" in capsys.readouterr().out
    assert "src=" not in page.read_text()[:2000]  # the plot needs no network
    plot_scaling(points[:1], tmp_path / "one.html")
