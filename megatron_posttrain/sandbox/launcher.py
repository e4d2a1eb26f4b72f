"""Program to run, with nothing but the standard library: isolates itself, then executes the job's program.

    launcher.py JOB REPORT        # file descriptors; see `run`

Three processes: this one, in the host's process namespace; process 1 of a new one, with whose end all others in it
end; the program, which holds no descriptor but its standard ones. What is reported, a line each: `started`, then
`exit CODE` (negative: a signal), or `failed REASON` where the program could not be isolated or executed.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))  # executed by its path, without the package, which imports much
from seccomp import install  # type: ignore[import-not-found]

_libc = ctypes.CDLL(None, use_errno=True)
_NEW_NS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_NAMESPACES = _NEW_NS | _NEW_CGROUP | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE, _DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_DEVICES = ("null", "zero", "full", "random", "urandom")


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def main(job_descriptor: int, report: int) -> None:
    os.set_inheritable(report, False)
    with os.fdopen(job_descriptor) as file:
        job = json.load(file)
    _end_with_parent()
    Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go where memory runs out
    user = _enter_namespaces() if job["isolate"] else None
    init = os.fork()
    if init == 0:
        _guarded(report, _init, job, user, report)
    os.waitpid(init, 0)


def _guarded(report: int, function: Callable[..., None], *arguments: Any) -> None:
    """Reports what fails, and ends the process."""
    try:
        function(*arguments)
    except BaseException as error:
        os.write(report, f"failed {error or type(error).__name__}\n".encode())
        os._exit(1)


def _end_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _enter_namespaces() -> int | None:
    """A user id to change to, or None where a user namespace holds this process already."""
    if _libc.unshare(_NAMESPACES) == 0:  # root of this machine, or of its container
        inside, _, count = map(int, Path("/proc/self/uid_map").read_text().splitlines()[-1].split())
        if count < 65536:
            raise OSError("no user id without rights is mapped in this container (/proc/self/uid_map)")
        # One of its own, so that the limit of processes counts this sandbox's only.
        return inside + count - 2 - os.getpid() % min(count // 2, 1 << 22)
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:  # in a user namespace it would still own root's files, and the limit of processes exempts it
        raise OSError("root without the right to make namespaces (CAP_SYS_ADMIN)")
    _check(_libc.unshare(_NEW_USER | _NAMESPACES), "user namespaces are not allowed here")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    return None


def _init(job: dict[str, Any], user: int | None, report: int) -> NoReturn:
    """Process 1: builds the root, starts the program, reports its end. All other processes end with it."""
    if job["isolate"]:
        _build_root(job, os.getuid() if user is None else user)
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
    os.chdir(job["directory"])
    for name, text in job["files"].items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    _end_with_parent()  # after the change of user, which undoes it
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")  # out of the program's reach, as is /proc/1/fd
    os.write(report, b"started\n")
    program = os.fork()
    if program == 0:
        _guarded(report, _execute, job)
    while True:
        ended, status = os.wait()
        if ended == program:
            os.write(report, f"exit {os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)


def _execute(job: dict[str, Any]) -> NoReturn:
    os.setsid()  # signals to its process group reach none of ours
    for name, limit in job["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), tuple(limit))
    if job["isolate"]:
        install(_libc)
    os.execve(job["command"][0], job["command"], job["environment"])


def _build_root(job: dict[str, Any], owner: int) -> None:
    """A root in memory with the interpreter and the system's libraries, read-only, and an empty /tmp."""
    root = job["root"]
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    Path(root, "tmp").mkdir()
    # Before the binds: what they take may lie below /tmp itself, such as a virtual environment.
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, f"{job['scratch']},mode=700,uid={owner}")
    for path in job["binds"]:
        source, target = Path(path), Path(root + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
            continue
        if source.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        _mount(path, str(target), None, _BIND | _REC)
        _restrict(str(target), _AT_RECURSIVE, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for name in ("proc", "dev"):
        Path(root, name).mkdir()
    Path(root, "dev/shm").symlink_to("/tmp")
    for name in _DEVICES:
        Path(root, "dev", name).touch()
        _mount(f"/dev/{name}", f"{root}/dev/{name}", None, _BIND)
    _mount("proc", f"{root}/proc", "proc", _NOSUID | _NODEV | _NOEXEC, "subset=pid")
    os.chdir(root)
    _check(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")
    _restrict("/", 0, _ATTR_RDONLY)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    name, form = (None if text is None else text.encode() for text in (source, kind))
    _check(_libc.mount(name, target.encode(), form, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _restrict(target: str, recursive: int, attributes: int) -> None:
    settings = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    _check(
        _libc.syscall(
            _SYS_MOUNT_SETATTR, _AT_FDCWD, target.encode(), recursive, ctypes.byref(settings),
            ctypes.c_size_t(ctypes.sizeof(settings)),
        ),
        f"mount_setattr {target}",
    )  # fmt: skip


if __name__ == "__main__":
    _guarded(int(sys.argv[2]), main, int(sys.argv[1]), int(sys.argv[2]))
