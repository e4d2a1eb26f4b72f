"""A cluster, as one small YAML file describes it, and the checks made before anything is submitted to it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_posttrain.config.load import load_config
from megatron_posttrain.config.schema import Section
from megatron_posttrain.errors import UserError, nearest

REPOSITORY = Path(__file__).resolve().parent.parent
CLUSTERS = REPOSITORY / "launch" / "clusters"
SLURM_TIME = r"^(\d+-)?\d{1,2}(:\d{2}){1,2}$"


class Tunnel(Section):
    host: str = Field(description="a login node")
    user: str
    port: PositiveInt = 22
    identity: str | None = Field(None, description="private key; null: what ssh takes by itself")

    def command(self) -> list[str]:
        identity = ["-i", str(Path(self.identity).expanduser())] if self.identity else []
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-p", str(self.port)]
        return ["ssh", *options, *identity, f"{self.user}@{self.host}"]


class Container(Section):
    image: str = Field(description="a .sqsh file that all nodes see, or a registry's name")
    mounts: list[str] = Field([], description="HOST_PATH:CONTAINER_PATH")


class Cluster(Section):
    executor: Literal["local", "slurm"]
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = Field(0, description="0: none, or Slurm does not know of them")
    processes_per_node: PositiveInt | None = Field(None, description="workers; null: gpus_per_node, or 1")
    directory: str = Field("runs/jobs", description="for scripts and logs; all nodes see it at this path")
    repository: str | None = Field(
        None, description="a checkout on the cluster; null: this one, or behind a tunnel its last commit, sent"
    )
    work_directory: str | None = Field(None, description="where commands run; null: repository, or directory")
    python: str | None = Field(None, description="null: repository's .venv, or python3")
    environment: dict[str, str | int] = Field({}, description="for the workers, beside launch/environment.sh")
    account: str | None = None
    partition: str | None = Field(None, description="null: Slurm's default")
    time: Annotated[str, Field(pattern=SLURM_TIME, description="[D-]HH:MM:SS")] = "04:00:00"
    tunnel: Tunnel | None = Field(None, description="null: jobs are submitted on this machine")
    container: Container | None = Field(None, description="started by pyxis; null: none")
    sbatch: dict[str, str | int | bool] = Field({}, description="further options of sbatch")

    @property
    def workers(self) -> int:
        """Worker processes on each node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def place(self) -> str:
        return self.tunnel.host if self.tunnel else "this machine"

    def shell(self, command: str) -> subprocess.CompletedProcess:
        """Runs `command` where jobs are submitted."""
        line = [*self.tunnel.command(), command] if self.tunnel else ["bash", "-c", command]
        return subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def load(name: str, overrides: Sequence[str] = ()) -> tuple[Cluster, Path]:
    """The cluster described by a file, or by the name of one in `launch/clusters/`, and that file."""
    file, known = Path(name), sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
    if name in known:
        file = CLUSTERS / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"no cluster file '{name}'{nearest(name, known)} (a path, or one of {', '.join(known)})")
    cluster = load_config(Cluster, file, overrides)  # type: ignore[type-var]
    if cluster.executor == "local":
        for key in ("tunnel", "container", "partition", "account", "sbatch"):
            if getattr(cluster, key):
                raise UserError(f"{file}: '{key}' is for executor: slurm; leave it out, or change 'executor'")
        if cluster.nodes != 1:
            raise UserError(f"{file}: nodes is {cluster.nodes}, but executor: local has this machine only: give 1")
    paths = {}
    if cluster.tunnel is None:
        paths["directory"] = str(Path(cluster.directory).expanduser().resolve())
        paths["repository"] = cluster.repository or str(REPOSITORY)
    cluster = cluster.model_copy(update=paths)
    for key in ("directory", "repository", "work_directory", "python"):
        path = getattr(cluster, key)
        if path and not path.startswith("/"):
            raise UserError(f"{file}: {key} is '{path}': give an absolute path on {cluster.place}")
        if path and "/nemo_run" in path:
            raise UserError(f"{file}: {key} is '{path}', but NeMo-Run replaces '/nemo_run' wherever it stands: rename")
    return cluster, file


def check(cluster: Cluster, file: Path) -> None:
    """Looks at the cluster before anything is submitted.

    Raises:
        UserError: an unreachable host; a partition, repository, interpreter or image that is not there; more
            nodes or GPUs than there are.
    """
    if cluster.tunnel:
        answer = cluster.shell("true")
        if answer.returncode:
            said = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
            raise UserError(
                f"{file}: cannot reach {cluster.tunnel.user}@{cluster.tunnel.host} ({said}): check tunnel.host, "
                "tunnel.port, tunnel.user and tunnel.identity"
            )
    if not cluster.container:
        for key, needed in {"repository": "/launch/node.sh", "python": "", "work_directory": ""}.items():
            path = getattr(cluster, key)
            if path and cluster.shell(f"test -e {shlex.quote(path + needed)}").returncode:
                raise UserError(f"{file}: {key} is {path}, but there is no {path}{needed} on {cluster.place}")
    if cluster.executor == "slurm":
        check_partition(cluster, file)
        if cluster.container:
            check_container(cluster, cluster.container, file)


def check_partition(cluster: Cluster, file: Path) -> None:
    listing = cluster.shell("sinfo --noheader --format '%R|%D|%G'")
    if listing.returncode:
        said = (listing.stderr.strip().splitlines() or ["no sinfo"])[-1]
        raise UserError(f"{file}: Slurm does not answer on {cluster.place} ({said}): is it a login node?")
    nodes: dict[str, int] = {}
    gpus: set[str] = set()
    for line in listing.stdout.split():
        name, count, resources = line.split("|")
        nodes[name] = nodes.get(name, 0) + int(count)
        if "gpu" in resources:
            gpus.add(name)
    name = cluster.partition
    if name is not None and name not in nodes:
        raise UserError(
            f"{file}: there is no partition '{name}' on {cluster.place}{nearest(name, nodes)} "
            f"(one of {', '.join(nodes)})"
        )
    largest = nodes[name] if name else max(nodes.values())
    if cluster.nodes > largest:
        raise UserError(f"{file}: nodes is {cluster.nodes}, but partition '{name}' has {largest}: lower nodes")
    if cluster.gpus_per_node and name and name not in gpus:
        with_gpus = f"one of {', '.join(sorted(gpus))}" if gpus else "no partition has"
        raise UserError(
            f"{file}: gpus_per_node is {cluster.gpus_per_node}, but partition '{name}' declares no GPUs ({with_gpus}); "
            "set it to 0 if its nodes have GPUs that Slurm does not know of"
        )


def check_container(cluster: Cluster, container: Container, file: Path) -> None:
    if "--container-image" not in cluster.shell("srun --help").stdout:
        raise UserError(f"{file}: Slurm on {cluster.place} cannot start containers (no pyxis): remove 'container'")
    is_file = container.image.startswith("/") or container.image.endswith(".sqsh")
    if is_file and cluster.shell(f"test -f {shlex.quote(container.image)}").returncode:
        raise UserError(
            f"{file}: container.image is {container.image}, but there is no such file on {cluster.place}: correct it, "
            "or make it there, for example with 'enroot import -o FILE docker://IMAGE'"
        )
