"""What kernels that are made at run time need: a C compiler and Python's headers."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from megatron_posttrain.doctor.findings import Findings
from megatron_posttrain.platform import platform

SOURCE = "#include <Python.h>\nPyObject *answer(void) { return PyLong_FromLong(42); }\n"
FIX = "on every node: install gcc and the headers of this Python (Debian: apt-get install gcc python3-dev), or set CC"


def check_compiler(findings: Findings) -> None:
    """On CUDA, where Triton compiles a launcher for every kernel, in training and in vLLM; on CPU nothing does."""
    if platform().name != "cuda":
        return
    if problem := compiler_problem():
        findings.add("fail", "compiler", problem, FIX)
    else:
        findings.add("ok", "compiler", "compiles against Python.h")


def compiler_problem() -> str:
    """Why a C file that includes Python.h does not compile; empty when it does. Looks where Triton looks."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return (
            "no C compiler: CC is not set, and neither gcc nor clang is on PATH; Triton's kernels need one at run time"
        )
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
