"""The report's page holds what the run's files say, asks nothing of the network, and opens in a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_posttrain.cli.main import main
from megatron_posttrain.report import samples

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


def make_runs(root: Path) -> Path:
    """Two training runs, one with rollouts, an evaluation, and a pipeline of them."""
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        run = root / name
        (run / "hf").mkdir(parents=True)
        lines = [{"step": s, "reward": 1 / s, "loss": None if s == 2 else 3.3333333333 / s, "step_seconds": 2.0,
                  "train_seconds": 1.5, "train_memory_gib": 0.5, "tokens": 100} for s in (1, 2, 3)]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
        load = {"step": 3, "load": {"2": [0.5, 1.5]}}
        (run / "expert_load.json").write_text(json.dumps(load if name == "a" else {}))
        (run / "config.yaml").write_text(f"model: {{path: x}}\noptimizer: {{lr: {lr}}}\n")
        (run / "environment.json").write_text(
            '{"command": "grpo", "versions": {"torch": "2"}, "data": "9 rows; 3 dropped"}'
        )
    (root / "a/rollouts").mkdir()
    for step in (1, 2):
        with (root / f"a/rollouts/step_{step:06d}.jsonl").open("w") as file:
            for k in range(8):
                record: dict[str, Any] = {
                    "index": k // 2,
                    "prompt": [{"role": "user", "content": f"<b>{k // 2}</b> +1?"}],
                }
                record |= {"answer": "7", "response": f"it is {k} </script>", "token_ids": [5, k], "advantage": -1.5}
                record |= {"reward": k / 4, "rewards": {"math": k / 8, "format": None}, "finish_reason": "length"}
                record |= {"logprobs": [-0.25, -k], "logprob_difference": 0.5}
                file.write(json.dumps(record) + "\n")
    (root / "eval").mkdir()
    (root / "rows").mkdir()
    (root / "rows/curation.json").write_text('{"rows": 9, "dropped": {"exact duplicate": 3}}')
    figures = {"model": "x", "accuracy": 0.5, "accuracy_low": 0.3, "accuracy_high": 0.7, "prompts": 4, "samples": 1}
    (root / "eval/evaluation.json").write_text(json.dumps(figures | {"reward": 0.5, "response_length": 3.0}))
    stages = [{"name": "a", "run": "grpo", "after": []}, {"name": "eval", "run": "evaluate", "after": ["a"]}]
    (root / "pipeline.json").write_text(json.dumps({"name": "p", "stages": stages}))
    result = {"status": "gate", "seconds": 3.0, "gates": [{"text": "accuracy 0.5, at least 0.6", "passed": False}]}
    (root / "eval/result.json").write_text(json.dumps(result))
    return root


def unpack(page: str, number: int) -> Any:
    packed = re.search(rf'id="data-{number}">([^<]*)<', page)
    assert packed is not None
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_runs(tmp_path_factory.mktemp("report") / "runs")
    file = root.parent / "page.html"
    assert main(["report", str(root), "--output", str(file)]) == 0
    return file


def test_data_is_what_the_files_say(page: Path) -> None:
    data = unpack(page.read_text(), 0)
    assert [run["name"] for run in data["runs"]] == ["runs/a", "runs/b"]
    for run in data["runs"]:
        lines = (page.parent / run["name"] / "metrics.jsonl").read_text().splitlines()[:3]
        for k, line in enumerate(map(json.loads, lines)):
            for name, value in line.items():
                found = run["metrics"][name][k]
                assert found == (None if value is None else pytest.approx(value, rel=1e-6))
        assert run["environment"] == {"command": "grpo", "versions.torch": "2", "data": "9 rows; 3 dropped"}
    assert [run["config"]["optimizer.lr"] for run in data["runs"]] == ["0.001", "0.002"]
    assert data["evaluations"][0]["accuracy_low"] == 0.3
    assert [stage["status"] for stage in data["pipelines"][0]["stages"]] == ["not started", "gate"]


def test_samples_are_what_the_rollouts_say(page: Path) -> None:
    run = unpack(page.read_text(), 0)["runs"][0]
    found = unpack(page.read_text(), run["chunk"])

    def column(name: str) -> list[float]:
        return np.frombuffer(base64.b64decode(found["columns"][name]), "<f4").tolist()

    assert found["count"] == 16
    assert column("step") == [1] * 8 + [2] * 8
    assert column("reward") == [k / 4 for k in range(8)] * 2
    assert column("reward/math") == [k / 8 for k in range(8)] * 2
    assert np.isnan(column("reward/format")).all()
    assert found["prompts"] == [f"user: <b>{k}</b> +1?" for k in range(4)]
    assert [text["r"] for text in found["texts"]] == [f"it is {k} </script>" for k in range(8)] * 2
    assert np.frombuffer(base64.b64decode(found["texts"][3]["logprobs"]), "<i2").tolist() == [-25, -300]


def test_texts_have_a_limit(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "TEXT_BYTES", 2 * 60)
    found = samples.read(page.parent / "runs/a")
    assert found is not None
    assert found["count"] == 16
    assert [text["k"] for text in found["texts"]] == [0, 1, 8, 9]  # the first prompt of each step, whole


def test_page_is_complete_in_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", re.sub(r'id="data-\d+">[^<]*<', "<", text))
    assert not re.search(r"\b(src|href)=[\"'](?!#|data:)", text)
    assert "default-src 'none'" in text


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert main(["report", str(tmp_path / "rum")]) == 2
    assert "rum: does not exist; did you mean 'run'?" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "nothing to report" in capsys.readouterr().err


def test_opens_in_a_browser(page: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is here")
    options = ["--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/profile", "--window-size=1200,6000"]
    line = [browser, *options, "--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True)
    assert 'data-ready="yes"' in done.stdout
    assert "CONSOLE" not in done.stderr
    body = done.stdout.split("</script>")[-1] + done.stdout.split("<main")[1].split("</main>")[0]
    for shown in (
        "accuracy 0.5, at least 0.6",
        "0.500 (0.300 to 0.700)",
        "optimizer.lr",
        "16 of 16 samples",
        "<div>3 dropped</div>",
        "dropped.exact duplicate",
        'data-at="layer 2, expert 1: &lt;b&gt;1.500&lt;/b&gt;"',
    ):
        assert shown in body
    assert "it is 7 &lt;/script&gt;" in body
