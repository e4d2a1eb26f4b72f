"""Programs that nobody has read: none escapes, none passes tests that it does not meet, honest ones pass."""

from __future__ import annotations

import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_posttrain import sandbox
from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.rewards import Sample, compute_rewards, load_rewards
from tests.helpers.hostile import BOMBS, CHEATS, ESCAPES, SOLVE

WHY = sandbox.why_unavailable()
pytestmark = pytest.mark.skipif(WHY is not None, reason=f"no sandbox: {WHY}")
TESTS = ["assert add(2, 3) == 5", "assert all(map(lambda n: add(n, 1) == n + 1, [1, 2]))", "assert {add(1, 1)} == {2}"]


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    secret = tmp_path_factory.mktemp("parent") / "secret"
    secret.write_text("CANARY")
    os.environ["CANARY_TOKEN"] = "CANARY"
    listener = socket.create_server(("127.0.0.1", 0))
    port = str(listener.getsockname()[1])
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0mp_test_{port}")
    abstract.listen()
    keep.extend((listener, abstract))
    mark = f"/tmp/mp_mark_{port}"
    return {"SECRET": str(secret), "PARENT": str(os.getpid()), "PORT": port, "MARK": mark}


keep: list[socket.socket] = []


def attempt(name: str, surroundings: dict[str, str], unsafe: bool = False) -> sandbox.Result:
    code = ESCAPES[name]
    for word, value in surroundings.items():
        code = code.replace(word, value)
    return sandbox.run(code, seconds=20, memory_mib=256, unsafe=unsafe)


@pytest.mark.parametrize("name", ["read a file", "read it through a link", "connect to the parent", "abstract socket"])
def test_attempts_succeed_without_the_sandbox(surroundings: dict[str, str], name: str) -> None:
    assert "escaped" in attempt(name, surroundings, unsafe=True).stdout


def test_no_escape(surroundings: dict[str, str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(ESCAPES, pool.map(lambda name: attempt(name, surroundings), ESCAPES), strict=True))
    assert {name: r for name, r in results.items() if "escaped" in r.stdout or r.status == "unavailable"} == {}
    assert results["write a file"].stdout == "written\n"  # into its own /tmp
    assert not Path(surroundings["MARK"]).exists()


def test_bombs_end_at_their_limits() -> None:
    before = {p.pid for p in psutil.process_iter()}
    found = {}
    for name, (code, status) in BOMBS.items():
        result = sandbox.run(code, seconds=2.0 if status == "timeout" else 20.0, memory_mib=256, output_kib=64)
        found[name] = (result.status, status)
        assert len(result.stdout) + len(result.stderr) <= 64 << 10
    assert [name for name, (status, expected) in found.items() if status != expected] == [], found
    assert [p for p in psutil.process_iter() if p.pid not in before and _runs(p) and _uid(p) > 1 << 24] == []


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended: with `--cpu` this process adopts those that have."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _uid(process: psutil.Process) -> int:
    try:
        return process.uids().real
    except psutil.Error:
        return 0


def test_processes_left_behind_end_with_the_program(tmp_path: Path) -> None:
    code = (
        "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            time.sleep(77.125)\n        os._exit(0)\nprint('done')"
    )
    result = sandbox.run(code)
    assert (result.status, result.stdout) == ("ok", "done\n")
    assert result.seconds < 60
    assert not [p for p in psutil.process_iter(["cmdline"]) if "main.py" in (p.info["cmdline"] or ())]


def test_result() -> None:
    result = sandbox.run(
        "import sys, helper\nprint(helper.double(input()), input(), end='')\nprint('e', file=sys.stderr)\nsys.exit(3)",
        stdin="a\nü", files={"helper.py": "def double(x): return 2 * x", "deep/er.txt": "x"},
    )  # fmt: skip
    assert (result.status, result.exit_code, result.stdout, result.stderr) == ("error", 3, "aa ü", "e\n")
    assert 0 < result.seconds < 10
    assert sandbox.run("import os\nos.kill(os.getpid(), 11)").exit_code == -11
    assert sandbox.run("import os\nos.write(1, b'\\xff')").stdout == "�"
    unsafe = sandbox.run("import os\nprint(os.getcwd(), sorted(os.environ))", unsafe=True)
    assert unsafe.status == "ok"
    assert "CANARY" not in unsafe.stdout


def test_what_programs_read_may_lie_below_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a virtual environment's interpreter; it stays read-only."""
    tmp_path.chmod(0o755)
    (tmp_path / "there").write_text("7")
    module = sys.modules["megatron_posttrain.sandbox.run"]
    monkeypatch.setattr(module, "_SYSTEM", (*module._SYSTEM, str(tmp_path)))  # type: ignore[attr-defined]
    code = f"print(open('{tmp_path}/there').read())\nopen('/tmp/own', 'w')\nopen('{tmp_path}/there', 'w')"
    result = sandbox.run(code)
    assert (result.status, result.stdout) == ("error", "7\n")
    assert "Read-only file system" in result.stderr


def test_a_machine_that_cannot_isolate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["megatron_posttrain.sandbox.run"], "why_unavailable", lambda: "no namespaces")
    with pytest.raises(Exception, match=r"cannot isolate them: no namespaces; allowed: .*sandbox.unsafe: true"):
        load_rewards([RewardConfig(name="code")])
    assert load_rewards([RewardConfig(name="code")], unsafe=True)


def grade(programs: list[str], metadata: dict[str, object], **args: object) -> list[float | str]:
    samples = [Sample([], f"Well:\n```python\n{code}\n```", None, metadata) for code in programs]
    grades = compute_rewards(samples, load_rewards([RewardConfig(name="code", args=args)]), threads=2)
    return [g.failures.get("code") or g.rewards["code"] for g in grades]


def test_no_cheat_passes() -> None:
    programs = [*CHEATS.values(), SOLVE]
    values = grade(programs, {"test_list": TESTS}, seconds=20)
    assert dict(zip([*CHEATS, "honest"], values, strict=True)) == dict.fromkeys(CHEATS, 0.0) | {"honest": 1.0}


def test_standard_input_and_output() -> None:
    metadata = {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]}
    right = "print(sum(map(int, input().split())), ' ')"
    assert grade([right, "print(3)", "print(3); 1 / 0", ""], metadata) == [1.0, 0.0, 0.0, 0.0]
    assert grade([right, "print(3)"], metadata, partial=True) == [1.0, 0.5]


def test_a_sandbox_that_fails_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load_rewards([RewardConfig(name="code")])
    failed = sandbox.Result("unavailable", None, "", "no memory", 0.0)
    monkeypatch.setattr(sandbox, "run", lambda *args, **kwargs: failed)
    [graded] = compute_rewards([Sample([], SOLVE, None, {"test_list": TESTS})], reward)
    assert graded.masked
    assert graded.failures == {"code": "the sandbox failed: no memory"}
    [graded] = compute_rewards([Sample([], SOLVE)], reward)
    assert "the row has no tests; allowed: metadata.test_list" in graded.failures["code"]


def test_runs_side_by_side() -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: sandbox.run(f"print({n})").stdout, range(12)))
    assert results == [f"{n}\n" for n in range(12)]
    assert threading.active_count() < 50
