"""The best step and early stop, traces, and trackers, of whole runs; a resumed run is the run that was not stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_posttrain.cli.main import main
from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.config.load import load_config
from megatron_posttrain.config.schema import CheckpointConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.training.held_out import Best
from megatron_posttrain.training.prepare import prepare
from megatron_posttrain.training.record import Record
from tests.helpers.launch import ranks
from tests.helpers.models import make_assets
from tests.training.test_resume import metrics


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_assets(tmp_path_factory.mktemp("assets"))
    rows = (directory / "train.jsonl").read_text().splitlines(keepends=True)
    (directory / "few.jsonl").write_text("".join(rows[:8]))
    return directory


def line(assets: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}", f"output={output}",
        f"data.validation={assets / 'few.jsonl'}", "precision.dtype=fp32", "data.sequence_length=64",
        "training.global_batch_size=2", "optimizer.lr=1e-3", "optimizer.schedule=constant", "logging.tensorboard=false",
        *more,
    ]  # fmt: skip


def sft(assets: Path, output: Path, *more: str) -> str:
    return ranks(1, "-m", "megatron_posttrain", "sft", *line(assets, output, *more)).stdout


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def exported(run: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted((run / "hf").glob("*.safetensors")))


@pytest.mark.timeout(900)
def test_best_step_and_early_stop_survive_a_restart(assets: Path, tmp_path: Path) -> None:
    """A falling loss that should be high: the first step is the best, and patience ends after four more."""
    best = ["checkpoint.best=validation_loss", "checkpoint.best_is=higher", "checkpoint.export=best"]
    best += ["training.validate_every=1", "training.patience=4", "checkpoint.keep=1", "checkpoint.every=2"]
    whole, parts, first = tmp_path / "whole", tmp_path / "parts", tmp_path / "first"
    said = sft(assets, whole, "training.steps=50", *best, "--profile", "2", "checkpoint.asynchronous=true")
    assert "stopped early after step 5: no better validation_loss in 4 looks" in said
    assert [line["step"] for line in metrics(whole) if "validation_loss" in line] == [1, 2, 3, 4, 5]
    assert steps(whole) == ["step_000001", "step_000005"]
    sft(assets, parts, "training.steps=3", *best)
    assert steps(parts) == ["step_000001", "step_000003"]
    sft(assets, parts, "training.steps=50", *best)
    sft(assets, first, "training.steps=1")
    assert metrics(parts) == metrics(whole)
    assert exported(parts) == exported(whole) == exported(first)
    assert "stopped early after step 5" in sft(assets, parts, "training.steps=50", *best)  # and trains no more
    assert len(metrics(parts)) == 5
    trace = json.loads((whole / "profile" / "rank_0.json").read_text())
    assert {"ProfilerStep#1", "ProfilerStep#2"} <= {event["name"] for event in trace["traceEvents"]}


def test_best_is_the_highest_or_the_lowest() -> None:
    values = [3.0, float("nan"), 2.0, 2.0, 4.0]
    for name, better in {"validation_loss": [1, 0, 1, 0, 0], "validation_accuracy": [1, 0, 0, 0, 1]}.items():
        best = Best(CheckpointConfig(best=name))
        assert [best.look(i, {name: value}) for i, value in enumerate(values, 1)] == better
        other = Best(CheckpointConfig(best=name))
        other.load(best.state())
        assert other.state() == best.state()
    assert not best.look(6, {"loss": 9.0})
    assert best.looks == 0  # no look at held-out rows


@pytest.mark.parametrize(
    ("command", "setting", "said"),
    [
        ("sft", ["checkpoint.best=validation_los"], "is no figure of held-out rows; did you mean 'validation_loss'?"),
        ("sft", ["checkpoint.best=validation_loss", "data.validation=null"], "needs data.validation"),
        ("sft", ["training.validate_every=2", "data.validation=null"], "training.validate_every=2 needs data"),
        ("sft", ["training.patience=2"], "training.patience=2 needs checkpoint.best"),
        ("sft", ["checkpoint.export=best"], "checkpoint.export=best needs checkpoint.best"),
        (
            "grpo",
            ["training.validate_every=2", "data.validation=null"],
            "training.validate_every=2 needs data.validation",
        ),
        ("sft", ["optimizer.decay_steps=2"], "has no effect on schedule=constant; allowed: null, or wsd"),
        ("sft", ["logging.wandb=mine"], "logging.wandb=mine needs the package wandb: pip install wandb"),
        ("sft", ["logging.mlflow=mine"], "logging.mlflow=mine needs the package mlflow: pip install mlflow"),
        ("sft", ["training.ema=1"], "key 'training.ema': input should be less than 1, found 1"),
    ],
)
def test_mistakes(assets: Path, tmp_path: Path, command: str, setting: list[str], said: str) -> None:
    given = line(assets, tmp_path, "training.steps=1", *setting)
    with pytest.raises(UserError) as caught:
        prepare(load_config(ALGORITHMS[command].config, None, given), world_size=1)
    assert said in str(caught.value)


def test_keys_that_score_would_ignore(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *line(assets, tmp_path, "data.validation=null", "training.ema=0.5")]) == 2
    assert "key 'training.ema' would be ignored: `score` does not train" in capsys.readouterr().err


class Service:
    """Of the shape of `wandb` and `mlflow`; remembers what it was told."""

    def __init__(self, known: str) -> None:
        self.known, self.told = known, []  # type: ignore[var-annotated]

    def module(self) -> Any:
        def tell(name: str, answer: Any = None) -> Any:
            return lambda *args, **kwargs: (self.told.append((name, args, kwargs)), answer)[1]

        run = SimpleNamespace(id=self.known, info=SimpleNamespace(run_id=self.known))
        run.log, run.finish = tell("log"), tell("finish")
        names = ("set_experiment", "log_dict", "log_metrics", "end_run")
        return SimpleNamespace(
            init=tell("init", run), start_run=tell("start_run", run), **{name: tell(name) for name in names}
        )


def test_trackers_are_told(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the main rank: the config, each step's finite figures, the end; another attempt goes on with the same run."""
    services = {name: Service(f"{name}-1") for name in ("wandb", "mlflow")}
    for name, service in services.items():
        monkeypatch.setitem(sys.modules, name, service.module())
    config = load_config(
        ALGORITHMS["sft"].config, None, line(assets, tmp_path / "run", "logging.wandb=mine", "logging.mlflow=ours")
    )
    prepare(config, world_size=1)
    start_distributed()
    for first, error in ((0, None), (1, ValueError())):
        record = Record(config, 2, first)
        record.log(first + 1, {"loss": 0.5, "odd": float("nan"), "step_seconds": 1.0})
        record.close(error)
    (_, _, init), log, finish, (_, _, again), _, failed = services["wandb"].told
    assert (init["project"], init["id"], init["resume"]) == ("mine", None, "allow")
    assert init["config"]["optimizer"]["lr"] == 1e-3
    assert log == ("log", ({"loss": 0.5, "step_seconds": 1.0},), {"step": 1})
    assert (finish[2], failed[2], again["id"]) == ({"exit_code": 0}, {"exit_code": 1}, "wandb-1")
    told = services["mlflow"].told
    assert [name for name, _, _ in told] == ["set_experiment", "start_run", "log_dict", "log_metrics", "end_run"] * 2
    assert [told[i][2]["run_id"] for i in (1, 6)] == [None, "mlflow-1"]
    assert [told[i][1] for i in (0, 4, 9)] == [("ours",), ("FINISHED",), ("FAILED",)]
    assert told[3][1:] == (({"loss": 0.5, "step_seconds": 1.0},), {"step": 1})
