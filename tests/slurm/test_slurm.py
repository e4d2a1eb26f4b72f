"""Jobs on a real two-node Slurm: finished, preempted, and robbed of a node."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_posttrain.errors import UserError
from tests.helpers.models import make_assets

from tests.slurm.conftest import CLUSTER, Slurm, wait_until  # isort: skip

import cluster  # isort: skip

# The first test's time includes installing Slurm, where it is missing.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 8
BATCH = "launch/slurm/train.sbatch"
COUNTER = "tests/slurm/counter.py"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("assets"))


def sft(assets: Path, output: Path, *more: str) -> list[str]:
    """A run of two ranks, one on each node, that share every layer."""
    return [
        "sft", f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}", f"output={output}",
        "precision.dtype=fp32", "parallel.tensor=2", "parallel.expert=2", "data.sequence_length=64",
        "training.global_batch_size=4", f"training.steps={STEPS}", "optimizer.lr=1e-3",
        "optimizer.schedule=constant", "checkpoint.every=3", "logging.tensorboard=false", *more,
    ]  # fmt: skip


def lines(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def metrics(run: Path) -> list[dict[str, Any]]:
    return [{k: line[k] for k in ("step", "loss", "grad_norm", "learning_rate", "tokens")} for line in lines(run)]


@pytest.fixture(scope="module")
def uninterrupted(slurm: Slurm, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of the run that `sbatch` starts and nothing disturbs."""
    folder = tmp_path_factory.mktemp("sbatch")
    options = ["--nodes", "2", "--output", f"{folder}/job.out"]
    job = slurm.submit(*options, BATCH, "--logs", f"{folder}/logs", *sft(assets, folder / "run"))
    state = slurm.wait(job, 120)
    log = (folder / "job.out").read_text()
    assert state == "COMPLETED", log
    assert "launch [node1]: 2 nodes: node1 (node rank 0), node2 (node rank 1)" in log
    assert f"[rank 0] step {STEPS}/{STEPS}" in log
    assert "rank 1]" not in log  # one readable stream
    assert sorted(file.name for file in (folder / "logs" / "attempt_0").iterdir()) == [
        "rank_00000.err", "rank_00000.out", "rank_00001.err", "rank_00001.out", "status",
    ]  # fmt: skip
    return metrics(folder / "run")


def test_sbatch(uninterrupted: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in uninterrupted] == list(range(1, STEPS + 1))


def by_nemo_run(slurm: Slurm, directory: Path, name: str, *program: str) -> None:
    done = slurm.python("launch/nemo_run/run.py", "--cluster", "slurm_cpu", "--set", f"directory={directory}", *program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}/0 [rank 0] step {STEPS}" in done.stdout
    assert f"launch: {name}: SUCCEEDED" in done.stdout


def test_nemo_run(slurm: Slurm, tmp_path: Path) -> None:
    by_nemo_run(slurm, tmp_path / "jobs", "counter", COUNTER, f"output={tmp_path / 'run'}", f"steps={STEPS}")
    assert [(line["step"], line["world"]) for line in lines(tmp_path / "run")] == [(n, 2) for n in range(1, STEPS + 1)]


@pytest.mark.slow
def test_nemo_run_trains(slurm: Slurm, assets: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    by_nemo_run(slurm, tmp_path / "jobs", "sft", *sft(assets, tmp_path / "run"))
    assert metrics(tmp_path / "run") == uninterrupted


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in lines(run)]


def interrupt_twice(slurm: Slurm, tmp_path: Path, *program: str) -> None:
    """`program`, which writes into `tmp_path / "run"`, as a job that meets its time limit, then preemption."""
    line = [f"--output={tmp_path}/job.out", BATCH, "--logs", f"{tmp_path}/logs", *program]
    job = slurm.submit("--nodes=2", *line)
    wait_until(100, "step 1", lambda: str(steps_of(tmp_path / "run") or ""))
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 sends near the time limit
    status = tmp_path / "logs" / "attempt_0" / "status"
    wait_until(60, "the first attempt to end", lambda: status.read_text() if status.exists() else "")
    first = steps_of(tmp_path / "run")
    wait_until(100, "a step of the second attempt", lambda: "yes" if steps_of(tmp_path / "run") > first else "")
    slurm.run("scontrol", "requeue", job)
    state = slurm.wait(job, 150)
    log = (tmp_path / "job.out").read_text()
    assert state == "COMPLETED", log
    assert "launch: a checkpoint is saved, the job goes back to the queue" in log
    assert "DUE TO JOB REQUEUE" in log
    assert f"launch: job {job} on node[1-2]; logs in" in log
    assert sorted(folder.name for folder in (tmp_path / "logs").iterdir()) == ["attempt_0", "attempt_1", "attempt_2"]
    # Saved where they were asked to stop, not thrown back to the last regular checkpoint.
    shown = [line.split()[3].partition("/")[0] for line in log.splitlines() if line.startswith("[rank 0] step ")]
    assert [int(step) for step in shown] == steps_of(tmp_path / "run") == list(range(1, STEPS + 1))


def test_time_limit_and_preemption_lose_nothing(slurm: Slurm, tmp_path: Path) -> None:
    interrupt_twice(slurm, tmp_path, COUNTER, f"output={tmp_path / 'run'}", f"steps={STEPS}", "seconds=1")


@pytest.mark.slow
def test_training_loses_nothing(
    slurm: Slurm, assets: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    interrupt_twice(slurm, tmp_path, *sft(assets, tmp_path / "run"))
    assert metrics(tmp_path / "run") == uninterrupted


def test_killed_node_ends_the_job_by_name(slurm: Slurm, tmp_path: Path) -> None:
    options = ["--nodes=2", "--no-requeue", f"--output={tmp_path}/job.out"]
    run = [COUNTER, f"output={tmp_path / 'run'}", "steps=4000"]
    job = slurm.submit(*options, BATCH, "--logs", f"{tmp_path}/logs", *run)
    wait_until(100, "step 2", lambda: "yes" if len(steps_of(tmp_path / "run")) >= 2 else "")
    slurm.kill_node(job, "node2")
    try:
        state = slurm.wait(job, 100)
    finally:
        slurm.run(str(CLUSTER), "revive", "2")
    log = (tmp_path / "job.out").read_text()
    assert state in ("NODE_FAIL", "FAILED"), log
    assert "launch [node1]: FAILED because node2 (node rank 1) died, froze or lost its network" in log
    assert "Node failure on node2" in log
    assert (tmp_path / "logs" / "attempt_0" / "status").read_text() == "1\n"


def test_failed_stage_ends_the_chain(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(
        "name: broken\nvalues: {output: null}\nstages:\n"
        f"  second: {{run: '{COUNTER} output=$output/second', after: [first], nodes: 1}}\n"
        f"  first: {{run: '{COUNTER} output=$output/first fail=0:2', nodes: 1}}\n"
    )
    line = ["--cluster", "slurm_cpu", "--set", f"directory={tmp_path}/jobs", "chain", f"{tmp_path}/chain.yaml"]
    done = slurm.python("launch/nemo_run/run.py", *line, f"output={tmp_path}/out")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "launch: first: FAILED; logs in" in done.stdout
    assert "launch: second: CANCELLED" in done.stdout
    assert not (tmp_path / "out" / "second").exists()


def test_a_pipeline_is_a_job_a_stage(slurm: Slurm, tmp_path: Path) -> None:
    """One of a node, one of two with a gate that does not hold, and one that is then not begun."""
    gate = {"metric": "world", "at_least": 3}
    stages = {
        "first": {
            "run": f"{COUNTER} output=${{output}}",
            "processes": 2,
            "gates": [{"metric": "world", "at_least": 2}],
        },
        "second": {"run": f"{COUNTER} output=${{output}} from=${{first}}", "nodes": 2, "gates": [gate]},
        "third": {"run": f"{COUNTER} output=${{output}}", "after": ["second"]},
    }
    file, out = tmp_path / "stages.yaml", tmp_path / "out"
    file.write_text(json.dumps({"output": str(out), "stages": stages}))
    line = ["--cluster", "slurm_cpu", "--set", f"directory={tmp_path}/jobs", "pipeline", str(file)]
    done = slurm.python("launch/nemo_run/run.py", *line, timeout=400)
    assert done.returncode == 1, done.stdout + done.stderr
    for stage, state in (
        ("first", "SUCCEEDED"),
        ("second", "SUCCEEDED"),
        ("second-end", "FAILED"),
        ("third", "CANCELLED"),
    ):
        assert f"launch: {stage}: {state}" in done.stdout
    results = {name: json.loads((out / name / "result.json").read_text()) for name in ("first", "second")}
    assert [result["status"] for result in results.values()] == ["done", "gate"]
    assert results["second"]["gates"][0]["text"] == "world 2, at least 3"
    assert not (out / "third").exists()

    gate["at_least"] = 2
    stages["third"]["run"] = "data " + str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    file.write_text(json.dumps({"output": str(out), "stages": stages}))
    done = slurm.python("launch/nemo_run/run.py", *line, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launch: third: SUCCEEDED" in done.stdout
    assert "launch: first" not in done.stdout  # it was done


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["partition=gpu"], "there is no partition 'gpu' on this machine; did you mean 'cpu'? (one of cpu)"),
        (["nodes=3"], "nodes is 3, but partition 'cpu' has 2: lower nodes"),
        (["gpus_per_node=8"], "partition 'cpu' declares no GPUs"),
        (["container={image: /images/none.sqsh}"], "cannot start containers (no pyxis): remove 'container'"),
        (["repository=/nowhere"], "there is no /nowhere/launch/node.sh on this machine"),
        (["tunnel={host: localhost, port: 1, user: nobody}", "directory=/tmp/x"], "cannot reach nobody@localhost"),
    ],
)
def test_what_is_wrong_with_the_cluster_is_said(
    slurm: Slurm, settings: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    described, file = cluster.load("slurm_cpu", settings)
    with pytest.raises(UserError, match=re.escape(said)):
        cluster.check(described, file)


@pytest.mark.parametrize("script", ["launch/slurm/submit.py", "launch/nemo_run/run.py"])
def test_it_is_said_before_anything_is_submitted(slurm: Slurm, script: str) -> None:
    done = slurm.python(script, "--cluster", "slurm_cpu", "--set", "partition=gpu", COUNTER)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "there is no partition 'gpu'" in done.stderr


def test_two_tasks_on_a_node_are_refused(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit("--nodes=1", "--ntasks-per-node=2", f"--output={tmp_path}/job.out", BATCH, COUNTER)
    assert slurm.wait(job, 60) == "FAILED"
    assert "srun started 2 tasks on 1 nodes; it must be one per node" in (tmp_path / "job.out").read_text()
