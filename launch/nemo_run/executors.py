"""Stages as NeMo-Run jobs: its executor for this machine, and the one for Slurm.

What NeMo-Run does by itself and is undone or avoided here (0.11.1): it runs srun in the foreground, where
bash cannot act on a signal; it neither quotes environment values nor keeps their case; a job whose
dependency failed stays queued for ever; its torchrun launcher has one port for all jobs and counts tasks as
workers. So a job is an inline script that starts `launch/node.sh`, once per node, on our own terms.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import without_lepton
from cluster import REPOSITORY, Cluster
from recipes import Stage, on_cluster

from megatron_posttrain.errors import UserError


def nemo_run(cluster: Cluster) -> Any:
    """The library. Late, because it reads its home from the environment when it is imported."""
    if cluster.tunnel is None:
        # Its local tunnel works only with job folders inside its home.
        os.environ["NEMORUN_HOME"] = cluster.directory
    without_lepton.install()
    try:
        import nemo_run
    except ModuleNotFoundError as error:
        raise UserError(
            f"NeMo-Run cannot be imported ({error.name} is missing): pip install nemo-run==0.11.1"
        ) from None
    return nemo_run


def executor(run: Any, cluster: Cluster, stage: Stage) -> Any:
    if cluster.executor == "local":
        return run.LocalExecutor(launcher=None)
    if cluster.tunnel:
        tunnel = run.SSHTunnel(
            host=cluster.tunnel.host,
            user=cluster.tunnel.user,
            port=cluster.tunnel.port,
            identity=cluster.tunnel.identity and str(Path(cluster.tunnel.identity).expanduser()),
            job_dir=cluster.directory,
        )
    else:
        tunnel = run.LocalTunnel(job_dir="")
    further = {"kill_on_invalid_dep": "yes", **cluster.sbatch}
    mounts = [f"{path}:{path}" for path in (cluster.directory, cluster.repository, cluster.work_directory) if path]
    return run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        job_name_prefix="posttrain.",
        nodes=stage.nodes or cluster.nodes,
        ntasks_per_node=1,
        gpus_per_node=cluster.gpus_per_node or None,
        time=stage.time or cluster.time,
        signal="B:USR1@120",
        container_image=cluster.container.image if cluster.container else None,
        container_mounts=[*dict.fromkeys(mounts), *cluster.container.mounts] if cluster.container else [],
        tunnel=tunnel,
        packager=run.Packager() if cluster.repository else packager(run),
        launcher=None,
        additional_parameters=further,
        poll_estimated_start_time=False,
    )


def packager(run: Any) -> Any:
    """Sends the last commit, and only that: so there must be nothing else."""
    status = subprocess.run(
        ["git", "-C", str(REPOSITORY), "status", "--porcelain"], capture_output=True, text=True, check=False
    )
    if status.returncode:
        raise UserError(f"{REPOSITORY} is no git checkout, so it cannot be sent: set 'repository' in the cluster file")
    if changed := status.stdout.splitlines():
        raise UserError(
            f"{len(changed)} uncommitted files would not be sent ({changed[0][3:]}, ...): commit them, or set "
            "'repository' in the cluster file to a checkout on the cluster"
        )
    os.chdir(REPOSITORY)  # it looks for the checkout from the current directory too
    return run.GitArchivePackager()


def script(cluster: Cluster, stage: Stage, folder: str) -> str:
    """The text that every node runs. `folder`: the job's, as the nodes see it."""
    code = cluster.repository or f"{folder}/code"
    processes = stage.processes_per_node or cluster.workers
    words = [
        *(["--slurm"] if cluster.executor == "slurm" else []),
        *("--nproc-per-node", str(processes)),
        *("--log-dir", f"{folder}/logs"),
        *("--chdir", cluster.work_directory or cluster.repository or cluster.directory),
        *on_cluster(stage.words, code),
    ]
    environment = dict(cluster.environment)
    if cluster.python:
        environment["PYTHON"] = cluster.python
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in environment.items()]
    return "\n".join([*exports, f"exec bash {code}/launch/node.sh {shlex.join(words)}", ""])


def batch_lines(folder: str) -> str:
    """What the batch script needs before srun: saving before the time limit, and requeueing."""
    job = (REPOSITORY / "launch" / "slurm" / "job.sh").read_text().partition("\n\n")[2]
    return f"set +evx\nlogs={shlex.quote(folder)}/logs\n{job}"
