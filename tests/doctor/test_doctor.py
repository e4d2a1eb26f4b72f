"""`doctor`: what is right passes, what is wrong fails with what to change, what is elsewhere is marked."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from megatron_posttrain.cli.main import main
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.doctor import machine
from megatron_posttrain.doctor.findings import Findings
from megatron_posttrain.doctor.job import Cluster, fewest_ranks
from megatron_posttrain.errors import UserError
from tests.helpers.launch import EXAMPLES, ranks
from tests.helpers.models import make_assets

ROOT = Path(__file__).resolve().parents[2]
# Rollouts of published length: more at a time than vLLM's cache has room for on any node
WAITING = ("dapo.yaml",)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("doctor"))


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """(exit status, the worst line of each check)."""
    status = main(["doctor", "--json", *arguments])
    captured = capsys.readouterr()
    order = ["fail", "not checked here", "warn", "ok"]
    found = sorted(json.loads(captured.out)["findings"], key=lambda f: -order.index(f["status"]))
    return status, {f["check"]: f for f in found}


def job(assets: Path, tmp_path: Path, **changed: str) -> list[str]:
    file = tmp_path / "job.yaml"
    tree = {
        "model": {"path": str(assets / "model")},
        "data": {"train": str(assets / "train.jsonl"), "sequence_length": 512},
        "training": {"steps": 2, "global_batch_size": 4},
        "output": str(tmp_path / "out"),
    }
    file.write_text(yaml.safe_dump(tree))
    return ["--config", str(file), *(f"{key}={value}" for key, value in changed.items())]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_pass_on_the_cluster_they_are_for(
    capsys: pytest.CaptureFixture[str], example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    small = "quickstart" in example.parts  # four processes, and a model of two layers that is made when it is run
    cluster = "4xH100" if small else "16xH100" if "two nodes" in example.read_text() else "8xH100"
    shapes = {"30b": "Qwen3-30B-A3B", "32b": "Qwen3-32B"}
    name = next((shapes[size] for size in shapes if size in example.name), "Qwen3-8B")
    model = [] if small else ["--model", name]
    status, found = doctor(capsys, "--config", str(example), "--assume", cluster, *model)
    assert status == 0, [f for f in found.values() if f["status"] == "fail"]
    assert found["layout"]["status"] == "ok"
    if small:
        return
    assert found["memory"]["status"] == "ok"
    used, of = re.match(r"([\d.]+) of (\d+) GiB", found["memory"]["found"]).groups()  # type: ignore[union-attr]
    assert float(used) <= 0.9 * float(of), "a tenth of the memory is to be spare"
    assert example.name in WAITING or "plan" not in found, found["plan"]["found"]  # no warning


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("Qwen3-30B-A3B", ["parallel.tensor=2", "parallel.expert=8"]),
        ("Qwen3-32B", ["parallel.tensor=8"]),
        ("Qwen3-32B", ["parallel.tensor=4", "parallel.pipeline=2"]),
    ],
)
def test_grpo_that_fills_one_node_is_warned_of_and_has_room_on_two(
    capsys: pytest.CaptureFixture[str], model: str, layout: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optimizer states are on the device for their step only; with a sleeping vLLM and NCCL 98% of it is taken."""
    monkeypatch.chdir(ROOT)
    arguments = ["--config", "examples/grpo.yaml", "--model", model, "model.recompute=full", "rollout.offload=true"]
    arguments += ["rollout.tensor=4", "rollout.gpu_memory_fraction=0.6", *layout]
    status, found = doctor(capsys, *arguments, "--assume", "8xH100")
    assert status == 0
    used = float(found["memory"]["found"].split()[0])
    assert 0.95 * 78 < used <= 78
    assert found["plan"]["status"] == "warn"
    _, wider = doctor(capsys, *arguments, "--assume", "16xH100")
    assert float(wider["memory"]["found"].split()[0]) < 0.9 * 78


def test_a_cache_smaller_than_the_samples_in_flight_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    usual = ["--config", "examples/qwen3_30b_a3b_grpo.yaml", "--model", "Qwen3-30B-A3B", "--assume", "16xH100"]
    # 28.4 GiB of weights a GPU; 32 x 8 samples on 8 engines, 3,840 tokens of 48 KiB each.
    _, found = doctor(capsys, *usual, "rollout.gpu_memory_fraction=0.45")
    assert "the samples in flight need 5.6" in found["plan"]["found"]
    status, found = doctor(capsys, *usual, "rollout.gpu_memory_fraction=0.4")
    assert status == 2
    assert "one sequence needs" in found["memory"]["fix"] + found["memory"]["found"]


def test_good_job_passes(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    status, found = doctor(capsys, *job(assets, tmp_path))
    assert status == 0, found
    assert "every tensor there" in found["model"]["found"]
    assert "300 conversations" in found["data"]["found"]
    assert found["start of training"]["status"] == "ok"


def test_every_mistake_is_told_at_once(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    arguments = job(assets, tmp_path, **{"parallel.tensor": "3", "data.train": str(tmp_path / "none.jsonl")})
    status, found = doctor(capsys, *arguments)
    assert status == 2
    assert "not divisible by tensor=3" in found["layout"]["found"]
    assert "Nearest layouts" in found["layout"]["found"]
    assert "none.jsonl" in found["data"]["found"]


def test_misshapen_checkpoint(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (assets / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    status, found = doctor(capsys, *job(assets, tmp_path, **{"model.path": str(model)}))
    assert status == 2
    assert "'model.norm.weight' has shape" in found["model"]["found"]


def test_unknown_key_and_absent_model(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    status, found = doctor(capsys, *job(assets, tmp_path, **{"parallel.tensr": "2"}))
    assert status == 2
    assert "did you mean 'tensor'" in found["config"]["found"]
    absent = job(assets, tmp_path, **{"model.path": "Qwen/Qwen3-8B"})
    assert doctor(capsys, *absent)[0] == 2
    status, found = doctor(capsys, *absent, "--assume", "4xH100")
    assert status == 0
    assert found["model"]["status"] == "not checked here"
    assert found["memory"]["status"] == "ok"


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    arguments = job(assets, tmp_path, **{"model.path": "Qwen/Qwen3-32B", "training.global_batch_size": "32"})
    status, found = doctor(capsys, *arguments, "--assume", "16xA100")
    assert status == 2
    assert found["memory"]["status"] == "fail"
    assert found["memory"]["fix"].endswith("fits")
    # What it advises is true: the same job passes with it.
    layout = dict(part.rstrip(",").split("=") for part in found["memory"]["fix"].split() if "=" in part)
    names = {"micro_batch_size": "training.micro_batch_size", "recompute": "model.recompute"}
    layout.pop("data")
    advised = [f"{names.get(key, f'parallel.{key}')}={value}" for key, value in layout.items()]
    status, found = doctor(capsys, *arguments, *advised, "--assume", "16xA100")
    assert status == 0, (advised, found)


def test_port_in_use(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        status, found = doctor(capsys)
    assert status == 0
    assert found["port"]["status"] == "warn"
    assert "--master-port" in found["port"]["fix"]


def test_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton compiles against Python.h while it runs; slim images have neither compiler nor headers."""
    findings = Findings()
    monkeypatch.setattr(machine, "platform", lambda: SimpleNamespace(name="cuda"))
    include = Path(sysconfig.get_paths()["include"])
    if shutil.which("gcc") and (include / "Python.h").exists():
        machine.check_compiler(findings)
        assert findings[-1].status == "ok"
    monkeypatch.setattr(sysconfig, "get_paths", lambda *scheme: {"include": str(tmp_path)})
    if shutil.which("gcc"):
        machine.check_compiler(findings)
        assert findings[-1].status == "fail"
        assert "Python.h" in findings[-1].found
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    machine.check_compiler(findings)
    assert "no C compiler" in findings[-1].found
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert "No such file" in machine.compiler_problem()


def test_lock_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA its own lock; torch may name the CUDA that it was built for."""
    lines = (ROOT / "requirements" / "cuda.lock").read_text().splitlines()
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    installed = {pin.name: str(pin.specifier)[2:] for pin in pins}
    installed |= {"torch": f"{installed['torch']}+cu130", "vllm": "0.31.0"}
    monkeypatch.setattr(machine, "platform", lambda: SimpleNamespace(name="cuda"))
    monkeypatch.setattr(machine, "_version", installed.get)
    findings = Findings()
    machine.check_versions(findings)
    found = next(f for f in findings if f.check == "lock")
    assert found.status == "warn"
    assert found.found == f"1 of {len(pins)} differ: vllm 0.31.0 (lock: 0.32.0)"


def test_cluster_is_parsed() -> None:
    assert Cluster.parse("8xH100").gpus == 8
    assert Cluster.parse("72 x gb200").gpu.name == "GB200"
    for text in ("H100", "0xH100", "8xH1000"):
        with pytest.raises(UserError, match=r"8xH100|did you mean"):
            Cluster.parse(text)


def test_fewest_ranks() -> None:
    tree = {"model": {"path": "x"}, "data": {"train": "x"}, "output": "x"}
    config = SftConfig.model_validate(tree | {"parallel": {"tensor": 2, "pipeline": 2, "expert": 8}})
    assert fewest_ranks(config) == 16


def test_bandwidth_between_ranks() -> None:
    done = ranks(2, "-m", "megatron_posttrain", "doctor", "--bandwidth", "--bandwidth-mib", "2", "--json")
    found = [f for f in json.loads(done.stdout)["findings"] if f["check"] in ("bandwidth", "links")]
    assert [f["check"] for f in found] == ["bandwidth", "bandwidth", "links"]
    assert "2 inside a node" in found[-1]["found"]


def test_bandwidth_alone_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status, found = doctor(capsys, "--bandwidth")
    assert status == 2
    assert "torchrun" in found["bandwidth"]["fix"]
