"""NeMo-Run through an ssh tunnel: the last commit is sent, runs on two nodes, and its log comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT
from tests.slurm.conftest import Slurm, free_ports

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def login_node(slurm: Slurm, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment in which ssh finds a server on this machine, and the cluster file that names it."""
    port = free_ports(1)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    kind, key, *_ = (tmp_path / "host.pub").read_text().split()
    (tmp_path / "known_hosts").write_text(f"[localhost]:{port} {kind} {key}\n")
    # OpenSSH takes its files from the user's real home whatever HOME says, so ssh itself is wrapped.
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -o UserKnownHostsFile={tmp_path}/known_hosts "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "cluster.yaml").write_text(
        f"executor: slurm\npartition: cpu\nnodes: 2\npython: {sys.executable}\ndirectory: {tmp_path}/remote\n"
        f"tunnel: {{host: localhost, port: {port}, user: me, identity: {tmp_path}/user}}\n"
    )
    line = [sys.executable, "tests/slurm/ssh_server.py", str(port), str(tmp_path / "host"), str(tmp_path / "user.pub")]
    server = subprocess.Popen(line, cwd=ROOT, env=slurm.environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    assert server.stdout.readline() == "listening\n"
    yield slurm.environment | {"PATH": f"{wrapper.parent}:{os.environ['PATH']}", "NEMORUN_HOME": f"{tmp_path}/home"}
    server.kill()
    server.wait()


def test_ssh_tunnel(login_node: dict[str, str], tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    line = ["--cluster", f"{tmp_path}/cluster.yaml", "tests/slurm/counter.py", f"output={tmp_path}/out", "steps=3"]
    command = [sys.executable, "launch/nemo_run/run.py", *line]
    done = subprocess.run(command, cwd=clone, env=login_node, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "counter/0 [rank 0] step 3" in done.stdout
    assert f"launch: counter: SUCCEEDED; logs in {tmp_path}/remote/counter/" in done.stdout
    assert len(list((tmp_path / "remote").glob("counter/*/counter/logs/attempt_0/rank_0000*.out"))) == 2
    (clone / "README.md").write_text("changed")
    done = subprocess.run(command, cwd=clone, env=login_node, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2
    assert "1 uncommitted files would not be sent (README.md, ...)" in done.stderr
