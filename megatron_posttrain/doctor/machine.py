"""The machine: versions, device, disk, shared memory, compiler, ports."""

import os
import re
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from megatron_posttrain.doctor.findings import Findings
from megatron_posttrain.output import check_output
from megatron_posttrain.parallel.network import check_interfaces
from megatron_posttrain.platform import platform
from megatron_posttrain.platform.describe import describe_device, gpu_without_cuda

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_PORT = 29500  # torchrun's
SHARED_MEMORY_GIB = 1.0  # NCCL and vLLM exchange through /dev/shm


def check_versions(findings: Findings) -> None:
    """Installed packages against pyproject.toml's ranges and the exact versions of this device's lock."""
    wrong, requirements = [], list(_requirements(platform().name))
    for requirement in requirements:
        found = _version(requirement.name)
        if found is None:
            wrong.append(f"{requirement.name} is not installed (needs {requirement.specifier or 'any version'})")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found}, needs {requirement.specifier}")
    repair = "run `bash tools/setup.sh`, which installs the pinned set"
    shown = ", ".join(f"{name} {_version(name)}" for name in ("torch", "megatron-core", "transformers"))
    told = ["; ".join(wrong)] if wrong else []
    findings.verdict("versions", told, f"{len(requirements)} requirements hold: {shown}", repair)
    _check_lock(findings, repair)


def _requirements(device: str) -> Iterator[Requirement]:
    """The package's own, and those of this device's extra; from the source tree where there is one."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        lines = [*project["dependencies"], *project["optional-dependencies"][device]]
        yield from map(Requirement, lines)
        return
    for line in metadata.requires("megatron-posttrain") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": device}):
            yield requirement


def _check_lock(findings: Findings, repair: str) -> None:
    lock = ROOT / "requirements" / f"{platform().name}.lock"
    if not lock.is_file():
        return
    lines = (line for line in lock.read_text().splitlines() if re.match(r"[\w.-]+==", line))
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    found = {pin.name: _version(pin.name) for pin in pins}
    # A build for a certain CUDA may say so after a +, which the lock leaves out and == then does not ask for.
    wrong = [pin for pin in pins if (at := found[pin.name]) is None or not pin.specifier.contains(at, prereleases=True)]
    differ = [f"{pin.name} {found[pin.name] or 'absent'} (lock: {str(pin.specifier)[2:]})" for pin in wrong]
    more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
    told = [f"{len(differ)} of {len(pins)} differ: {', '.join(differ[:4])}{more}"] if differ else []
    findings.verdict("lock", told, f"all {len(pins)} packages as in requirements/{lock.name}", repair, "warn")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_device(findings: Findings) -> None:
    facts = describe_device()
    shown = f"{facts['count']} x {facts['name']}, {facts['memory_gib']} GiB"
    if platform().name == "cpu":
        shown = f"no GPU: {facts['count']} CPU cores, {facts['memory_gib']} GiB"
        wrong = [f"{unused} is there, but this torch cannot use it"] if (unused := gpu_without_cuda()) else []
        findings.verdict("device", wrong, shown, "install torch for CUDA (`bash tools/setup.sh`), or update the driver")
        return
    shown += f"; driver {facts['driver']}, CUDA {facts['cuda']}, NCCL {facts['nccl']}"
    wrong = [] if facts["supported"] else [f"{shown}; this torch has no kernels for it"]
    findings.verdict("device", wrong, shown, "install a newer torch for CUDA")
    if not platform().has_transformer_engine():
        findings.add("warn", "Transformer Engine", "not installed: torch's own layers, no FP8",
                     "install the extra `cuda`")  # fmt: skip


def check_disk(findings: Findings, output: Path, needed_gib: float | None) -> None:
    """Room for the checkpoints and the export at `output`, and for messages between processes."""
    place = findings.attempt("output", lambda: check_output(output))
    if place is None:
        return
    free = shutil.disk_usage(place).free / 2**30
    shown = f"{free:,.0f} GiB free for {output}"
    lacks = needed_gib is not None and needed_gib > free
    wrong = [f"{shown}, about {needed_gib:,.1f} GiB needed"] if lacks else []
    shown += f", about {needed_gib:,.1f} needed" if needed_gib is not None else ""
    findings.verdict("disk", wrong, shown, "free space, lower checkpoint.keep, or set another `output`")
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total / 2**30) < SHARED_MEMORY_GIB:
        findings.add("warn", "shared memory", f"/dev/shm has {size:.2f} GiB",
                     "start the container with --shm-size=16g or --ipc=host")  # fmt: skip


SOURCE = "#include <Python.h>\nPyObject *answer(void) { return PyLong_FromLong(42); }\n"


def check_compiler(findings: Findings) -> None:
    """On CUDA, where Triton compiles a launcher for every kernel, in training and in vLLM; on CPU nothing does."""
    if platform().name != "cuda":
        return
    fix = (
        "on every node: install gcc and the headers of this Python (Debian: apt-get install gcc python3-dev), or set CC"
    )
    findings.verdict("compiler", filter(None, [compiler_problem()]), "compiles against Python.h", fix)


def compiler_problem() -> str:
    """Why a C file that includes Python.h does not compile; empty when it does. Looks where Triton looks."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        missing = "no C compiler: CC is not set, and neither gcc nor clang is on PATH"
        return f"{missing}; Triton's kernels need one at run time"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text(SOURCE)
        line = [compiler, str(source), "-shared", "-fPIC", f"-I{headers}", "-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        except OSError as error:
            return f"CC={compiler}: {error.strerror}"
    said = next((text for text in done.stderr.splitlines() if "error" in text), done.stderr[:200])
    return f"{compiler} does not compile a file that includes Python.h: {said.strip()}" if done.returncode else ""


def check_network(findings: Findings) -> None:
    """The interfaces that the environment names."""
    findings.attempt(
        "network",
        check_interfaces,
        lambda used: f"interfaces: {', '.join(used) or 'chosen by gloo and NCCL'}",
        "name one of this host's in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or unset them",
    )


def check_ports(findings: Findings) -> None:
    """The rendezvous port and this host's name. Under torchrun both are in use already."""
    if "RANK" in os.environ:
        return
    port = int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
    try:
        socket.create_server(("", port)).close()
        findings.add("ok", "port", f"{port} is free")
    except OSError as error:
        findings.add("warn", "port", f"{port} cannot be opened ({error.strerror})",
                     "another job runs here? choose one: torchrun --master-port N, or --standalone")  # fmt: skip
    name = socket.gethostname()
    try:
        socket.gethostbyname(name)
    except OSError:
        findings.add("warn", "host name", f"'{name}' has no address",
                     "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")  # fmt: skip
