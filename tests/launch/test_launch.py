"""The launchers without Slurm: nodes that agree, that do not, that die; clusters and chains as files."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_posttrain.errors import UserError
from tests.helpers.launch import ROOT

sys.path[1:1] = [str(ROOT / "launch"), str(ROOT / "launch" / "nemo_run")]
import cluster  # noqa: E402
import recipes  # noqa: E402
import roll_call  # noqa: E402

NODE = [sys.executable, "launch/node.py"]
COUNTER = "tests/slurm/counter.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHON": sys.executable}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(line: Sequence[str], host: str = "here", **environment: str) -> subprocess.Popen[str]:
    """A launcher; `host` is what it takes for its node's name."""
    settings = ENVIRONMENT | {"SLURMD_NODENAME": host} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=ROOT, env=settings, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def two_nodes(folder: Path, *options: str, counter: Sequence[str] = ()) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    common = ["--nnodes=2", "--master-port", port, "--log-dir", f"{folder}/logs", *options]
    words = [COUNTER, f"output={folder}", *counter]
    return [start([*NODE, f"--node-rank={rank}", *common, *words], f"node{rank}") for rank in (0, 1)]


def wait_for_step(folder: Path, count: int = 1) -> None:
    deadline = time.monotonic() + 100
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def finish(process: subprocess.Popen[str], status: int, timeout: float = 100) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == status, output
    return output


# One node and two


def test_one_node_stops_on_request_and_goes_on(tmp_path: Path) -> None:
    line = ["bash", "launch/node.sh", "--nproc-per-node=2", "--log-dir", f"{tmp_path}/logs", COUNTER]
    first = start([*line, f"output={tmp_path}", "steps=500"])
    wait_for_step(tmp_path, 2)
    first.terminate()
    assert "asked to stop: the workers finish their step" in finish(first, 75)
    reached = int((tmp_path / "metrics.jsonl").read_text().splitlines()[-1].split(":")[1].split(",")[0])
    output = finish(start([*line, f"output={tmp_path}", f"steps={reached + 2}"]), 0)
    assert f"[rank 0] rank 0 of 2 on here from step {reached}\n" in output
    assert "rank 1 of 2" not in output  # one readable stream; the other has a file of its own
    assert "rank 1 of 2" in (tmp_path / "logs" / "attempt_0" / "rank_00001.out").read_text()


def test_a_rank_that_fails_is_named_by_the_head(tmp_path: Path) -> None:
    """Under c10d, where nodes are numbered as they come: the first is the head, the second has rank 1."""
    line = ["bash", "launch/many_nodes.sh", "c10d", f"localhost:{free_port()}", "2", "--log-dir", f"{tmp_path}/logs"]
    words = [COUNTER, f"output={tmp_path}", "steps=100", "fail=1:2"]
    nodes = [start([*line, *words], f"node{i}") for i in (0, 1)]
    outputs = [finish(node, 1) for node in nodes]
    text = "".join(outputs)
    found = re.search(
        r"FAILED(?: because|:) rank 1 on (node[01]) ended with status 1; its log: \S*rank_00001.err", text
    )
    assert found, text
    assert "ValueError: told to fail at step 2" in text


def test_workers_find_the_environment_and_caches_of_their_node(tmp_path: Path) -> None:
    """The interpreter is a link, as in a virtual environment; ninja lies beside it, the CUDA below its packages."""
    programs, packages = tmp_path / "venv" / "bin", tmp_path / "packages"
    programs.mkdir(parents=True)
    (packages / "nvidia" / "cu13").mkdir(parents=True)
    python = programs / "python"
    python.write_text(f"#!/bin/bash\n[[ $1 == -c ]] && {{ echo {packages}; exit; }}\nenv\n")
    python.chmod(0o755)
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE")
    own = {"PYTHON": str(python), "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin", "VLLM_CACHE_ROOT": "/elsewhere"}
    settings = {k: v for k, v in os.environ.items() if k not in (*names, "CUDA_HOME")} | own
    done = subprocess.run(["bash", "launch/node.sh", "x"], cwd=ROOT, env=settings, capture_output=True, text=True)
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert found["PATH"].split(":")[0] == str(programs)
    assert found["CUDA_HOME"] == str(packages / "nvidia" / "cu13")
    assert found["VLLM_CACHE_ROOT"] == "/elsewhere"
    assert all(found[name].startswith(f"{tmp_path}/posttrain-caches-") for name in names if name != "VLLM_CACHE_ROOT")


FAILING = """
import atexit, os, sys
import torch.distributed as dist
from megatron_posttrain.cli.main import process

def work():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("joined")
    raise ValueError("told to fail")

atexit.register(os.abort)  # as gloo's threads do when Python's clean-up meets them at a bad moment
sys.exit(process(work))
"""


def test_a_failing_rank_keeps_its_status_and_its_words() -> None:
    done = subprocess.run([sys.executable, "-c", FAILING], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "joined\n")
    assert done.stderr.rstrip().endswith("ValueError: told to fail")


def test_a_frozen_node_ends_the_job_by_name(tmp_path: Path) -> None:
    """Its connections stay open, as those of a machine without power: only silence tells."""
    nodes = two_nodes(tmp_path, "--node-timeout=5", counter=["steps=500"])
    wait_for_step(tmp_path)
    launcher = psutil.Process(nodes[1].pid)
    frozen = [launcher, *launcher.children()]
    for process in frozen:
        process.suspend()
    try:
        output = finish(nodes[0], 1)
    finally:
        for process in frozen:
            process.kill()
    assert "launch [node0]: ENDING: node1 (node rank 1) did not answer for 5 s: it died, froze or lost" in output
    nodes[1].communicate()


@pytest.mark.slow
def test_a_stop_file_stops_all_nodes(tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path, counter=["steps=500"])
    wait_for_step(tmp_path)
    (tmp_path / "logs" / "attempt_0" / "stop").touch()
    for node in nodes:
        finish(node, 75)


@pytest.mark.slow
def test_a_killed_head_is_named(tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path, counter=["steps=500"])
    wait_for_step(tmp_path)
    launcher = psutil.Process(nodes[0].pid)
    for process in [launcher, *launcher.children()]:
        process.kill()
    assert "FAILED because the head node node0 (node rank 0) is gone" in finish(nodes[1], 1)
    nodes[0].communicate()


# Nodes that do not find each other


def card(**changes: Any) -> roll_call.Card:
    facts: dict[str, Any] = {
        "host": "a",
        "rank": 0,
        "run_id": "x",
        "nodes": 2,
        "processes": 8,
        "command": "sft",
        "versions": "v",
    }
    return roll_call.Card(**(facts | changes))


def sign_in(cards: Sequence[roll_call.Card], port: int, timeout: float = 3.0) -> list[str]:
    """What each node is told; empty where it is let in."""
    said = [""] * len(cards)
    joined = []  # kept until all are done: the head's store ends with the head's object

    def join(i: int) -> None:
        try:
            joined.append(roll_call.RollCall(cards[i], "localhost", port, join_timeout=timeout, stopped=lambda: False))
        except UserError as error:
            said[i] = str(error)

    threads = [threading.Thread(target=join, args=(i,)) for i in range(len(cards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_nodes_that_agree_are_let_in() -> None:
    assert sign_in([card(), card(host="b", rank=1)], free_port()) == ["", ""]
    # Numbered as they come, the second on the same machine as the head.
    assert sign_in([card(rank=-1), card(host="b", rank=-1)], free_port()) == ["", ""]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"rank": 1, "nodes": 3}, "the nodes differ in nodes: '2' on a (node rank 0), '3' on b (node rank 1)"),
        ({"rank": 1, "processes": 4}, "the nodes differ in processes: '8' on a (node rank 0), '4' on b"),
        ({"rank": 1, "versions": "w"}, "the nodes differ in versions: 'v' on a (node rank 0), 'w' on b"),
        ({"rank": 2}, "b has node rank 2, but with 2 nodes they go from 0 to 1"),
    ],
)
def test_nodes_that_differ_are_told_how(second: dict[str, Any], said: str) -> None:
    told = sign_in([card(), card(host="b", **second)], free_port())
    assert said in told[0]
    assert told[0] == told[1]


def test_a_missing_node_is_named() -> None:
    (told,) = sign_in([card(nodes=3)], free_port(), timeout=0.5)
    assert told.startswith("1 of 3 nodes came within 0 s: a (node rank 0); missing: node rank 1, 2. Start those")


def test_port_in_use() -> None:
    with socket.create_server(("", 0)) as other:
        (told,) = sign_in([card()], other.getsockname()[1])
    assert "cannot be opened (Address already in use): choose another port" in told


def test_head_that_is_not_there() -> None:
    port = free_port()
    (told,) = sign_in([card(rank=1)], port, timeout=0.5)
    assert f"could not reach the head node localhost:{port}" in told
    assert "check that the head runs there" in told
    with pytest.raises(UserError, match=r"the head node 'no.such.host.invalid' is not known to"):
        roll_call.RollCall(card(rank=1), "no.such.host.invalid", port, join_timeout=1, stopped=lambda: False)


def test_another_jobs_port() -> None:
    head = roll_call.RollCall(card(nodes=1), "localhost", port := free_port(), join_timeout=3, stopped=lambda: False)
    (told,) = sign_in([card(rank=1, run_id="y")], port)
    assert head.serves
    assert f"localhost:{port} serves the run 'x', not 'y': choose another port" in told


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["stf"], "no command 'stf'; did you mean 'sft'?"),
        (["--nnodes=1:4", "sft"], "--nnodes is '1:4'; a parallel layout needs one number of nodes"),
        (["--nnodes=2", "--rdzv-backend=c10d", "sft"], "needs --rdzv-endpoint HOST:PORT"),
        (["--chdir=/nowhere", "sft"], "--chdir is /nowhere: No such file or directory"),
        (["--slurm", "sft"], "start this with srun inside a Slurm job"),
    ],
)
def test_arguments_are_checked(
    line: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import node

    monkeypatch.setattr(sys, "argv", ["node.py", *line])
    with pytest.raises(UserError, match=re.escape(said)):
        node.parse_arguments(line)


def test_slurms_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import node

    slurm = {"JOB_ID": "70123", "STEP_NUM_NODES": "4", "STEP_NUM_TASKS": "4", "NODEID": "2", "GPUS_ON_NODE": "8"}
    for name, value in {**slurm, "LAUNCH_NODE_IPADDR": "10.0.0.7", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    args = node.parse_arguments(["--slurm", "sft", "--config", "f"])
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("4", 2, "8")
    assert (args.master_addr, args.master_port, args.rdzv_id) == ("10.0.0.7", 20123, "slurm-70123-1")
    assert (args.module, args.training_script, args.training_script_args[0]) == (True, "megatron_posttrain", "sft")
    with pytest.raises(UserError, match="--nnodes is 3, but Slurm gave 4 nodes"):
        node.parse_arguments(["--slurm", "--nnodes=3", "sft"])


# Scripts


def test_shellcheck() -> None:
    scripts = [path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) >= 5
    shellcheck = [str(Path(sys.executable).parent / "shellcheck"), *map(str, scripts)]
    done = subprocess.run(
        [*shellcheck, str(ROOT / "tests/slurm/cluster.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    for script in scripts:
        assert not re.search(r"\bpkill|killall\b", script.read_text())


# Clusters and chains


def test_the_cluster_files_here_are_valid() -> None:
    files = sorted((ROOT / "launch" / "clusters").glob("*.yaml"))
    assert {cluster.load(str(file))[0].executor for file in files} == {"local", "slurm"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["nodez=2"], "unknown key 'nodez'; did you mean 'nodes'?"),
        (["executor=k8s"], "key 'executor': input should be 'local' or 'slurm', found 'k8s'"),
        (["nodes=2"], "nodes is 2, but executor: local has this machine only: give 1"),
        (["partition=gpu"], "'partition' is for executor: slurm; leave it out, or change 'executor'"),
        (["executor=slurm", "time=soon"], "key 'time': string should match pattern"),
        (["executor=slurm", "tunnel={host: a}"], "key 'tunnel.user' is missing"),
        (["executor=slurm", "tunnel={host: a, user: b}"], "directory is 'runs/jobs': give an absolute path on a"),
        (["executor=slurm", "directory=/x/nemo_run"], "NeMo-Run replaces '/nemo_run' wherever it stands"),
    ],
)
def test_a_wrong_cluster_file_is_explained(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        cluster.load("local", settings)


CHAIN = """
name: two
values: {output: null}
stages:
  second: {run: "grpo --config examples/grpo.yaml model.path=$output/first/hf output=$output/second", after: [first]}
  first: {run: "sft --config examples/sft.yaml 'output=$output/first'", nodes: 1}
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[first]", "[frist]", "stages.second.after: no stage 'frist'; did you mean 'first'?"),
        ("nodes: 1", "after: [second]", "the stages second, first wait for each other"),
        ("$output/second", "$out", "stages.second.run: 'out' is not among 'values'"),
        ("examples/sft", "examples/stf", "examples/stf.yaml does not exist"),
        ("'output=$output/first'", "trainig.steps=1", "unknown key 'trainig'; did you mean 'training'?"),
        ("sft --", "stf --", "no command 'stf'; did you mean 'sft'?"),
        ("values", "value", "unknown key 'value'; did you mean 'values'?"),
    ],
)
def test_a_wrong_chain_is_explained(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text(CHAIN)
    name, stages = recipes.chain(file, {"output": "a b"})
    assert (name, [stage.name for stage in stages]) == ("two", ["first", "second"])
    assert stages[0].words[-1] == "output=a b/first"
    with pytest.raises(UserError, match=r"give output=\.\.\. on the command line"):
        recipes.chain(file, {})
    file.write_text(CHAIN.replace(old, new))
    with pytest.raises(UserError, match=re.escape(said)):
        recipes.chain(file, {"output": "x"})


def test_a_pipeline_as_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file, values = "examples/recipes/qwen3/many_nodes.yaml", [f"output={tmp_path}/out"]
    name, stages = recipes.pipeline(file, values)
    jobs = {stage.name: stage for stage in stages}
    assert name == "many_nodes"
    assert jobs["cold_rows"].words == ("pipeline", file, *values, "--only", "cold_rows")
    assert (jobs["cold_rows"].after, jobs["cold_rows"].nodes) == (("candidates-end",), 1)
    begin, sft, end = (jobs[f"cold_start{part}"] for part in ("-begin", "", "-end"))
    assert begin.words == ("pipeline", file, *values, "--only", "cold_start", "--part", "begin")
    assert (sft.words[0], sft.nodes, sft.processes_per_node) == ("sft", 4, 8)
    assert f"output={tmp_path}/out/cold_start" in sft.words
    assert (begin.after, sft.after, end.after) == (("cold_rows",), ("cold_start-begin",), ("cold_start",))


# NeMo-Run


def nemo_run(*line: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"NEMORUN_HOME": str(home), "COLUMNS": "200"}
    command = [sys.executable, "launch/nemo_run/run.py", *line]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)


def test_dry_run_prints_the_scripts(tmp_path: Path) -> None:
    settings = ["--set", "repository=/lustre/code", "--set", "environment={A: b c}"]
    chain = ["chain", "launch/chains/sft_then_grpo.yaml", "hf=/lustre/hf", "problems=/lustre/p.jsonl"]
    done = nemo_run("--cluster", "slurm_h100_container", *settings, "--dry-run", *chain, home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("convert", "sft", "grpo", "evaluate"):
        assert f"# ---- {name}: {name}_sbatch.sh" in done.stdout
    for line in (
        "#SBATCH --account=my_account",
        "#SBATCH --exclusive",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --mem=0",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --signal=B:USR1@120",
        "export A='b c'",
    ):
        assert f"\n{line}\n" in done.stdout
    assert "--container-image /lustre/me/images/megatron_posttrain.sqsh --container-mounts " in done.stdout
    assert "--kill-on-bad-exit=1" in done.stdout
    sft = "sft --config /lustre/code/examples/sft.yaml model.path=/lustre/hf output=runs/chain/sft\n"
    launch = r"exec bash /lustre/code/launch/node.sh --slurm --nproc-per-node 8 --log-dir \S+/sft/logs --chdir \S+ "
    assert re.search(launch + re.escape(sft), done.stdout)
    assert not list(tmp_path.glob("experiments/*/*"))


def test_a_failed_stage_stops_a_local_chain(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(
        "name: broken\nvalues: {output: null}\nstages:\n"
        f"  first: {{run: '{COUNTER} output=$output/first fail=0:1', processes_per_node: 1}}\n"
        f"  second: {{run: '{COUNTER} output=$output/second', after: [first]}}\n"
    )
    line = ["--cluster", "local", "--set", f"directory={tmp_path}/jobs", "chain", f"{tmp_path}/chain.yaml"]
    done = nemo_run(*line, f"output={tmp_path}/out", home=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "launch: first: FAILED; logs in" in done.stdout
    assert not (tmp_path / "out" / "second").exists()
    (error,) = (tmp_path / "jobs").glob("experiments/broken/*/first/logs/attempt_0/rank_00000.err")
    assert "told to fail at step 1" in error.read_text()


def test_stand_in_for_leptonai(tmp_path: Path) -> None:
    """NeMo-Run's import works without leptonai, its Lepton executor says why it does not, and where leptonai
    has what NeMo-Run wants, it is left alone."""
    script = """
import importlib.machinery, sys
class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ("leptonai", "ray") else super().find_spec(name, path, target)
sys.meta_path = [Hiding if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, "launch/nemo_run")
import without_lepton; without_lepton.install()
import nemo_run; nemo_run.SlurmExecutor(account="a"); print("imported")
from leptonai.api.v2.client import APIClient
try: APIClient()
except RuntimeError as error: print(error)
"""
    package = tmp_path / "leptonai" / "api" / "v1"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("real = True")
    real = (
        "import sys; sys.path.insert(0, 'launch/nemo_run'); import without_lepton; without_lepton.install()\n"
        "import leptonai.api.v1; print(leptonai.api.v1.real)\n"
    )
    environment = ENVIRONMENT | {"NEMORUN_HOME": str(tmp_path)}
    for text, path, said in (
        (script, "", "imported\nnot in the installed leptonai, if any: NeMo-Run's Lepton executor cannot be used\n"),
        (real, str(tmp_path), "True\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", text],
            cwd=ROOT, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout == said, done.stderr


def test_interrupted_while_waiting_for_nodes(tmp_path: Path) -> None:
    port = free_port()
    process = start([*NODE, "--nnodes=2", "--master-port", str(port), "--log-dir", str(tmp_path), COUNTER])
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert "asked to stop before all nodes had come" in finish(process, 75)
