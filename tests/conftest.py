"""Files that take longest come first, so that no process is left with one of them when the others are done.

`PYTEST_ADDOPTS=--cpu bash tests/run.sh` prints CPU seconds by file, with those of all processes that it started: what a
change costs, on a machine that others use too.
"""

import contextlib
import ctypes
from collections.abc import Generator
from typing import Any

import psutil
import pytest

LONGEST_FIRST = (
    "slurm", "lora", "layouts", "rollout", "families_layouts", "transformer_engine", "grpo", "preferences", "distill",
    "routing_replay", "launch", "resume", "pipeline", "tool_training", "checkpoints", "not_finite", "optimization",
    "resume_changes", "uneven_pipeline", "ppo", "refit", "gpu_path", "cuda_defaults", "failure", "evaluate",
    "perplexity", "qlora", "shipped_adapters", "held_out", "toy_algorithm", "convert", "heads", "sample",
)  # fmt: skip
SHOWN = 5  # CPU seconds of a test that has a line of its own
ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER of prctl(2): daemons stay below this process, and are counted


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", action="store_true", help="print CPU seconds by file, children's included")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("cpu"):
        config.pluginmanager.register(CpuSeconds(), "cpu seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


class CpuSeconds:
    """By file and test, with the fixtures that the test was the first to need."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
        self.before = 0.0
        self.spent: dict[str, float] = {}

    def add(self, name: str) -> None:
        now = 0.0
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it is counted with its parent from now on
                now += sum(process.cpu_times()[:4])  # the last two are those of children that it has waited for
        self.spent[name] = self.spent.get(name, 0.0) + now - self.before
        self.before = now

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        if not self.spent:
            self.add("start and collection")
        result = yield
        self.add(item.nodeid)
        return result

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cpu"] = self.spent

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of xdist has ended."""
        for name, seconds in getattr(node, "workeroutput", {}).get("cpu", {}).items():
            self.spent[name] = self.spent.get(name, 0.0) + seconds

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: dict[str, dict[str, float]] = {}
        for name, seconds in self.spent.items():
            files.setdefault(name.partition("::")[0], {})[name] = seconds
        terminalreporter.section(f"{sum(self.spent.values()):.0f} CPU seconds")
        for file, tests in sorted(files.items(), key=lambda entry: -sum(entry[1].values())):
            terminalreporter.write_line(f"{sum(tests.values()):7.1f}  {file}")
            for name, seconds in sorted(tests.items(), key=lambda entry: -entry[1]):
                if "::" in name and seconds > SHOWN:
                    terminalreporter.write_line(f"{seconds:7.1f}      {name.partition('::')[2]}")
