"""What may change between attempts, what is damaged, and what cannot be written: told, and nothing is lost."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.training import disk
from megatron_posttrain.training.checkpoints import damage
from megatron_posttrain.training.resume import Origin, fingerprint_of_weights
from tests.helpers.launch import ROOT, Done, cold, environment, ranks
from tests.helpers.models import make_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def trained(assets: Path) -> Path:
    """A run of two steps on two ranks, with a checkpoint of each."""
    output = assets / "trained"
    train(assets, output, "training.steps=2", "checkpoint.every=1", processes=2)
    return output


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def arguments(assets: Path, output: Path, *more: str) -> list[str]:
    return [
        "sft", f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}",
        f"output={output}", "precision.dtype=fp32", "data.sequence_length=64", "training.global_batch_size=4",
        "training.micro_batch_size=2",
        "optimizer.schedule=constant", "logging.tensorboard=false", *more,
    ]  # fmt: skip


def train(assets: Path, output: Path, *more: str, processes: int = 1, check: bool = True) -> Done:
    line = ["-m", "megatron_posttrain", *arguments(assets, output, *more)]
    return ranks(processes, *line, check=check, timeout=300)


def saved(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def groups_of(checkpoint: Path) -> set[tuple[float, ...]]:
    """Hyper-parameters of the optimizer as a checkpoint has them."""
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    found: set[tuple[float, ...]] = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if "eps" in node and "betas" in node:
                found.add((node["weight_decay"], *node["betas"], node["eps"]))
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(common)
    return found


def test_hyper_parameters_are_those_of_the_config(assets: Path, run: Path) -> None:
    assert groups_of(run / "checkpoints" / "step_000002") == {(0.0, 0.9, 0.95, 1e-8), (0.1, 0.9, 0.95, 1e-8)}
    changed = ["optimizer.weight_decay=0.5", "optimizer.beta1=0.5", "optimizer.epsilon=1e-3"]
    done = train(assets, run, "training.steps=3", "checkpoint.every=1", *changed)
    assert "changed from step 3 on: optimizer.weight_decay 0.1 -> 0.5, " in done.stdout
    assert groups_of(run / "checkpoints" / "step_000003") == {(0.0, 0.5, 0.95, 1e-3), (0.5, 0.5, 0.95, 1e-3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.global_batch_size=8", "training.global_batch_size=8 differs from its 4"),
        ("training.seed=1", "training.seed=1 differs from its 0"),
        ("precision.dtype=bf16", "precision.dtype=bf16 differs from its fp32"),
        ("lora.rank=4", 'lora={"rank": 4, "alpha": 32.0,'),
        ("data.train={assets}/fewer.jsonl", "the rows of data.train="),
        ("model.path={assets}/other", "the weights or config of model.path="),
    ],
)
def test_another_run_is_refused_before_a_model_is_built(assets: Path, run: Path, change: str, said: str) -> None:
    if not (assets / "other").exists():
        shutil.copytree(assets / "model", assets / "other")
        file = assets / "other" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
    shorter(assets)
    done = train(assets, run, "training.steps=3", change.format(assets=assets), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {run / 'checkpoints' / 'step_000002'} cannot be gone on from, after 8 rows")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "checkpoint.resume=never" in done.stderr


def test_fewer_steps_than_were_trained_are_refused(assets: Path, run: Path) -> None:
    done = train(assets, run, "training.steps=1", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {run} has trained 2 steps, this config asks for 1; ")
    assert saved(run) == ["step_000001", "step_000002"]


def test_to_train_anew_leaves_no_checkpoint_of_the_run_before(assets: Path, run: Path) -> None:
    train(assets, run, "training.steps=1", "training.seed=1", "checkpoint.every=1", "checkpoint.resume=never")
    assert saved(run) == ["step_000001"]


def test_a_checkpoint_of_an_older_version_is_resumed_from(assets: Path, run: Path) -> None:
    for state in run.glob("checkpoints/*/trainer_state.json"):
        state.write_text(json.dumps({"step": json.loads(state.read_text())["step"]}))
    assert "resumed after step 2" in train(assets, run, "training.steps=3").stdout


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("pattern", "harm"),
    [
        ("*_0.distcp", cut), ("*_0.distcp", zero), ("*_0.distcp", Path.unlink), (".metadata", cut),
        ("common.pt", zero), ("trainer_state.json", cut), ("trainer_state.json", Path.unlink),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    assets: Path, run: Path, pattern: str, harm: Any
) -> None:
    newest = run / "checkpoints" / "step_000002"
    harm(sorted(newest.glob(pattern))[0])
    done = train(assets, run, "training.steps=3", "checkpoint.every=1", processes=2)
    if not (pattern == "trainer_state.json" and harm is Path.unlink):  # that is a save which was cut short
        assert f"warning: {newest} cannot be read: " in done.stdout
    assert "resumed after step 1" in done.stdout
    assert damage(newest) is None  # it was written again


def test_no_readable_checkpoint_is_one_message(assets: Path, run: Path) -> None:
    for file in run.glob("checkpoints/*/*_0.distcp"):
        cut(file)
    done = train(assets, run, "training.steps=3", check=False)
    assert done.returncode == 2
    assert "step_000002 cannot be read" in done.stderr
    assert "step_000001 cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(saved(run)) == 2


def test_an_export_that_fails_does_not_lose_the_run(assets: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / ".hf.partial").write_text("in the way")
    done = train(assets, output, "training.steps=2", processes=2, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"{output / 'hf'} could not be written: File exists" in last
    assert "step_000002 is whole" in last
    assert "Traceback" not in done.stderr
    (output / ".hf.partial").unlink()
    again = train(assets, output, "training.steps=2")
    assert "resumed after step 2" in again.stdout
    assert (output / "hf" / "model.safetensors").exists()
    assert not (output / "checkpoints").exists()


def test_a_save_that_finds_the_disk_full_names_it(assets: Path, run: Path) -> None:
    line = [sys.executable, "-m", "megatron_posttrain"]
    line += arguments(assets, run, "training.steps=3", "checkpoint.every=1")
    size = 200_000
    done = subprocess.run(
        line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {run / 'checkpoints' / 'step_000003'} could not be written: File too large")
    assert last.endswith(f"{run / 'checkpoints' / 'step_000002'} is whole, the same command goes on from it")
    assert "Traceback" not in done.stderr
    assert saved(run) == ["step_000001", "step_000002"]


def config(output: Path, **more: Any) -> SftConfig:
    return SftConfig.model_validate(
        {"model": {"path": "m"}, "data": {"train": "d"}, "output": str(output), "checkpoint": {"every": 1}} | more
    )


def test_no_room_is_told_before_training(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_posttrain.checkpoint.hf import check_directory

    arch = check_directory(assets / "model")[1]
    disk.check_disk(config(tmp_path / "a" / "b"), arch)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"0\.0 MiB are free there, the export takes .* and a checkpoint takes"):
        disk.check_disk(config(tmp_path / "a"), arch)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, so no directory can be made there"):
        disk.check_disk(config(tmp_path / "file" / "run"), arch)


def test_fingerprint_of_weights_is_of_their_content(assets: Path, tmp_path: Path) -> None:
    before = fingerprint_of_weights(assets / "model")
    copy = Path(shutil.copytree(assets / "model", tmp_path / "copy", copy_function=shutil.copyfile))
    assert fingerprint_of_weights(copy) == before
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint_of_weights(copy) != before


def test_what_another_version_had_not_is_not_compared() -> None:
    now = Origin({"training.seed": 0, "data.new": 1, "optimizer.lr": 2.0, "command": "sft"}, "d", "m", 4)
    state = {"step": 1, "rows": 4, "data": "d", "model": "m"}
    old = {"training.seed": 0, "optimizer.lr": 1.0, "gone": 3}
    assert now.changes(Path("c"), state | {"config": old}) == ["optimizer.lr 1.0 -> 2.0"]
    with pytest.raises(UserError, match=r"training\.seed=0 differs from its 5"):
        now.changes(Path("c"), state | {"config": old | {"training.seed": 5}})


def test_a_template_that_writes_the_date_keeps_that_of_the_first_attempt(assets: Path, tmp_path: Path) -> None:
    dated, output = Path(shutil.copytree(assets / "model", tmp_path / "dated")), tmp_path / "run"
    (template,) = [file for file in dated.iterdir() if file.name == "chat_template.jinja"]
    template.write_text("{{ strftime_now('%S%f') }}" + template.read_text())  # another "date" every microsecond
    line = [f"model.path={dated}", "checkpoint.every=1"]
    train(assets, output, *line, "training.steps=1")
    # A process of its own: those of `train` are forks of one, and so of one moment.
    again = cold("-m", "megatron_posttrain", *arguments(assets, output, *line, "training.steps=2"))
    assert "resumed after step 1" in again.stdout
    refused = train(assets, output, *line, "training.steps=3", "data.train=" + str(shorter(assets)), check=False)
    assert "the rows of data.train=" in refused.stderr


def shorter(assets: Path) -> Path:
    """The rows without the last."""
    lines = (assets / "train.jsonl").read_text().splitlines(keepends=True)
    file = assets / "fewer.jsonl"
    file.write_text("".join(lines[:-1]))
    return file
