"""Runs Python programs that nobody has read, in a process of their own behind the kernel's walls."""

import fcntl
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal

import psutil

from megatron_posttrain.errors import UserError

Status = Literal["ok", "error", "timeout", "memory", "output", "unavailable"]
PROCESSES = 64  # and threads, at a time
FILE_MIB = 64  # of one file, and of all files together
_START_SECONDS = 60.0  # that building the sandbox may take on a busy machine
_LOOK_SECONDS = 0.1  # between looks at the memory of all processes
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")  # what the interpreter needs of the machine
_MEMORY_ERROR = re.compile(r"^[\w.]*MemoryError\b.*\Z", re.MULTILINE)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE if os.name == "posix" else 0


@dataclass(frozen=True)
class Result:
    """How a program ended: `ok` with exit code 0, `error` with another, `timeout`, `memory` or `output` at a limit,
    `unavailable` where it was not run, with the reason in `stderr`."""

    status: Status
    exit_code: int | None  # negative for a signal, None where it was ended from outside or not run
    stdout: str  # up to the limit of output, undecodable bytes replaced; stderr too
    stderr: str
    seconds: float  # of wall time, from the start of the program's process


def run(
    code: str,
    *,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
    seconds: float = 10.0,
    memory_mib: int = 1024,
    output_kib: int = 1024,
    unsafe: bool = False,
) -> Result:
    """Run a Python program.

    It has no network, no file of this machine but the interpreter's and the system's libraries (read-only), none of
    this process's environment and descriptors, and sees no other process. Its directory, /tmp, is private and
    lies in memory. All processes that it leaves behind end with it. Namespaces, a system call filter and resource
    limits see to that (man 7 namespaces, man 2 seccomp).

    Args:
        files: texts by name, written to its directory first.
        seconds: of wall time; also of CPU time, of each process.
        memory_mib: address space of each process, and memory of all of them (looked at ten times a second).
        output_kib: of stdout and stderr together.
        unsafe: without isolation, only with limits and a clean environment; for programs that are trusted.
    """
    python = Path(sys.executable)
    prefixes = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)}
    interpreter = {prefix for prefix in prefixes if not prefix.startswith("/usr/") and prefix not in _SYSTEM}
    job = {
        # The interpreter's directory without links, for that is bound; its own link makes it a venv.
        "command": [str(python.parent.resolve() / python.name), "-s", "-B", "main.py"],
        "environment": _ENVIRONMENT,
        "files": {**(files or {}), "main.py": code},
        "limits": _limits(seconds, memory_mib),
        "isolate": not unsafe,
        "binds": sorted({*filter(os.path.exists, _SYSTEM), *interpreter}),
        "root": tempfile.gettempdir() + "/megatron_posttrain_sandbox",  # a place to mount on; nothing is written there
        "scratch": f"size={FILE_MIB}m,nr_inodes=8192",
        "directory": "/tmp",
    }
    if not sys.platform.startswith("linux"):
        return Result("unavailable", None, "", f"needs Linux, this is {sys.platform}", 0.0)
    if not unsafe:
        Path(str(job["root"])).mkdir(exist_ok=True)
        return _launch(job, stdin, seconds, memory_mib, output_kib)
    with tempfile.TemporaryDirectory() as directory:
        job["directory"] = directory
        return _launch(job, stdin, seconds, memory_mib, output_kib)


@lru_cache(maxsize=1)
def why_unavailable() -> str | None:
    """Why programs cannot be isolated on this machine, None where they can."""
    result = run("print('ready')")
    return None if result.stdout == "ready\n" else result.stderr.strip() or f"a trial ended with {result.status}"


def check_isolation(what: str, unsafe: bool) -> None:
    """Raises UserError that begins with `what` where programs cannot be isolated, and `unsafe` does not allow that."""
    if not unsafe and (reason := why_unavailable()):
        raise UserError(
            f"{what} runs programs that nobody has read, and this machine cannot isolate them: {reason}; "
            "allowed: user namespaces, the right to make namespaces (CAP_SYS_ADMIN), or sandbox.unsafe: true"
        )


def _limits(seconds: float, memory_mib: int) -> dict[str, tuple[int, int]]:
    cpu = math.ceil(seconds)
    fixed = {"NPROC": PROCESSES, "NOFILE": 256, "CORE": 0, "MSGQUEUE": 0, "MEMLOCK": 0, "FSIZE": FILE_MIB << 20}
    return {"CPU": (cpu, cpu + 1), "AS": (memory_mib << 20,) * 2} | {name: (n, n) for name, n in fixed.items()}


def _memory_file(text: str) -> IO[bytes]:
    """An unnamed file that nobody can change any more, whatever descriptor they open it by."""
    descriptor = os.memfd_create("input", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    file = os.fdopen(descriptor, "w+b")
    file.write(text.encode("utf-8", "surrogatepass"))
    file.seek(0)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return file


def _launch(job: dict[str, object], stdin: str, seconds: float, memory_mib: int, output_kib: int) -> Result:
    launcher = str(Path(__file__).with_name("launcher.py"))
    report, reported = os.pipe()
    with _memory_file(json.dumps(job)) as task, _memory_file(stdin) as text, os.fdopen(report, "rb") as reports:
        command = [sys.executable, "-I", "-S", "-B", launcher, str(task.fileno()), str(reported)]
        try:
            process = subprocess.Popen(
                command, stdin=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, close_fds=True,
                pass_fds=(task.fileno(), reported), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(reported)
        watch = _Watch(process, reports, seconds, memory_mib << 20, output_kib << 10)
        with process:
            try:
                watch.until_closed()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # the launcher and process 1, with it all others
        return watch.result()


@dataclass
class _Watch:
    """Reads what a program writes, and ends it at a limit."""

    process: subprocess.Popen[bytes]
    reports: IO[bytes]
    seconds: float
    memory: int  # bytes
    output: int  # bytes
    hit: Status | None = None
    started: float | None = None
    ended: float = 0.0
    texts: dict[str, bytearray] = field(default_factory=lambda: {n: bytearray() for n in ("out", "err", "report")})

    def until_closed(self) -> None:
        """Returns when every writer has ended, or a limit was hit."""
        begun = time.monotonic()
        with selectors.DefaultSelector() as selector:
            streams = (self.process.stdout, self.process.stderr, self.reports)
            for name, stream in zip(self.texts, streams, strict=True):
                assert stream is not None
                selector.register(stream, selectors.EVENT_READ, name)
            look = begun + _LOOK_SECONDS
            while selector.get_map() and self.hit is None:
                deadline = begun + _START_SECONDS if self.started is None else self.started + self.seconds
                now = time.monotonic()
                if now >= deadline:
                    self.hit = "timeout"
                elif now >= look:
                    look = now + _LOOK_SECONDS
                    self.hit = "memory" if self._memory_used() > self.memory else None
                for key, _ in selector.select(max(0.0, min(deadline, look) - now)):
                    self._read(selector, key)
        self.ended = time.monotonic()

    def _read(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        data = os.read(key.fd, 1 << 16)
        self.texts[key.data] += data
        if not data:
            selector.unregister(key.fileobj)
        elif key.data == "report":
            self.started = self.started or time.monotonic()
        elif len(self.texts["out"]) + len(self.texts["err"]) > self.output:
            self.hit = "output"

    def _memory_used(self) -> int:
        """Bytes of all processes together; what they share, counted once, where that decides."""
        try:
            processes = psutil.Process(self.process.pid).children(recursive=True)
            if sum(process.memory_info().rss for process in processes) <= self.memory:
                return 0
            return sum(process.memory_full_info().pss for process in processes)
        except psutil.Error:  # one of them ended; the next look counts the others
            return 0

    def result(self) -> Result:
        report = self.texts["report"].decode(errors="replace")
        out, err = (self.texts[name][: self.output].decode(errors="replace") for name in ("out", "err"))
        seconds = self.ended - (self.started or self.ended)
        failed = re.search(r"^failed (.*)", report, re.MULTILINE)
        code = re.search(r"^exit (-?\d+)$", report, re.MULTILINE)
        if failed or not report:
            return Result("unavailable", None, "", failed[1] if failed else err or "it did not start in time", 0.0)
        if self.hit is not None or code is None:  # without a report: process 1 was ended, as when memory ran out
            return Result(self.hit or "memory", None, out, err, seconds)
        status: Status = "ok" if code[1] == "0" else "error"
        if int(code[1]) == -signal.SIGXCPU:
            status = "timeout"
        elif status == "error" and _MEMORY_ERROR.search(err.rstrip()):
            status = "memory"
        return Result(status, int(code[1]), out, err, seconds)
