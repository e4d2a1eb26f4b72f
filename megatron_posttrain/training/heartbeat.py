"""Signs of life: every rank tells its step and phase; a rank that hangs is named, with its stack, and the job ends.

Each rank writes `heartbeats/rank_N.json` as its phase changes. When a phase lasts far longer than steps did, the
rank that notices first makes a file `hang`; every rank that can then writes its stack beside its heartbeat, the
first one puts them together in `hang.txt` and on stderr, and all leave with status 1. No collective is needed for
it, since the collectives are what hangs.
"""

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_posttrain.output import write_whole

FACTOR, FLOOR = 20.0, 600.0  # a phase may take so many times the longest recent step, and at least so many seconds
UNKNOWN = 1500.0  # seconds for first steps, checkpoints and exports; below torch.distributed's own 30 minutes
WRITE_EVERY = 0.5  # seconds; quick steps would otherwise load a shared file system
WRITES_PER_S = 400  # of all ranks together
ERROR = "error"  # made by the first rank that ends with an error
TORCH_FRAMES = ("/torch/", "typing_extensions.py", "__torch_function__")
FRAMES, GROUPS = 6, 4  # of the diagnosis: it should fit the end of a log


class Heartbeat:
    """One rank's. `hang_seconds`: what a phase may take, whatever it is; None: judged by how long steps took."""

    def __init__(
        self, directory: Path, rank: int, ranks: int, step: int = 1, *, hang_seconds: float | None = None
    ) -> None:
        self.directory, self.rank, self.ranks, self.current_step = directory, rank, ranks, step
        self.hang_seconds = hang_seconds
        self._write_every = max(WRITE_EVERY, ranks / WRITES_PER_S)
        self._poll = max(min(1.0, (hang_seconds or FLOOR) / 4), ranks / WRITES_PER_S)
        self._phases: list[str] = []
        self._failed = False
        self._changes = 0
        self._durations: deque[float] = deque(maxlen=20)
        self._step_started: float | None = None
        self._since = time.monotonic()
        self._written = self._armed = 0.0
        self._lock, self._ended = threading.Lock(), threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("hang", "hang.txt", ERROR) if rank == 0 else ():  # of an earlier run
            (directory / name).unlink(missing_ok=True)
        self._stack = (directory / f"rank_{rank}.stack").open("w")
        self._write()
        self._watcher = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins the watch, and makes this the one that the functions `enter` and `leave` tell; when every rank
        has made its Heartbeat, so that no `hang` of an earlier run is left."""
        global _current
        _current = self
        self._changed()
        self._watcher.start()

    def enter(self, phase: str) -> None:
        self._phases.append(phase)
        self._failed = False
        self._changed()

    def fail(self) -> None:
        """An error leaves the present phase, and those around it: where it began is what is told."""
        if not self._failed:
            self._failed = True
            self._write()

    def leave(self) -> None:
        self._phases.pop()
        self._changed()

    def step(self, number: int) -> None:
        """Step `number` begins. How long steps took sets the limit; the first call's does not, since it warms up."""
        now = time.monotonic()
        if self._step_started is not None:
            self._durations.append(now - self._step_started)
        self.current_step, self._step_started = number, now
        self._changed()

    def stop(self) -> None:
        global _current
        _current = None
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self._phases = ["done"]
        self._write()
        if self._watcher.is_alive():
            self._watcher.join()
        self._stack.close()

    @property
    def limit(self) -> float:
        """Seconds that the current phase may take."""
        if self.hang_seconds is not None:
            return self.hang_seconds
        known = len(self._durations) >= 3 and self._phases
        return max(FLOOR if known else UNKNOWN, FACTOR * max(self._durations, default=0.0))

    @property
    def _place(self) -> str:
        return "/".join(self._phases) or "between phases"

    # ---- telling ---------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        now = self._since = time.monotonic()
        self._changes += 1
        if now - self._written > self._write_every:
            self._write()
        if now - self._armed > 1.0:
            # A thread of C, which writes the stack even where this interpreter's lock is held for ever.
            faulthandler.dump_traceback_later(self.limit + 2.0, file=self._stack)
            self._armed = now

    def _write(self) -> None:
        with self._lock:
            self._written = time.monotonic()
            facts = {
                "rank": self.rank,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "step": self.current_step,
                "phase": self._place,
                "changes": self._changes,
                "time": time.time() - (self._written - self._since),
                "thread": f"0x{threading.main_thread().ident:016x}",
            }
            write_whole(self.directory / f"rank_{self.rank}.json", json.dumps(facts))

    # ---- watching --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        asked = time.monotonic()
        while not self._ended.wait(self._poll):
            now, asked_before = time.monotonic(), asked
            asked = now
            if now - asked_before > 4 * self._poll + 10:
                self._since = now  # this process was suspended: nobody's fault
            if self._written < self._since:
                self._write()
            if (self.directory / "hang").exists():
                self._follow()
            elif now - self._since > self.limit:
                self._report()

    def _dump(self) -> None:
        faulthandler.dump_traceback(file=self._stack)
        self._stack.flush()

    def _report(self) -> None:
        try:
            (self.directory / "hang").open("x").close()
        except FileExistsError:
            self._follow()
        spent = time.monotonic() - self._since
        self._dump()
        deadline = time.monotonic() + 2 * self._poll + 2
        while time.monotonic() < deadline and not all(stack_of(self.directory, r) for r in range(self.ranks)):
            time.sleep(0.2)
        usual = f"{max(self._durations):.1f} s at most" if self._durations else "not known yet"
        text = (
            f"HANG: rank {self.rank} has been in step {self.current_step}, {self._place}, for {spent:.0f} s "
            f"(steps took {usual}; allowed {self.limit:.0f} s)\n{diagnosis(self.directory, self.ranks)}"
        )
        write_whole(self.directory / "hang.txt", text)
        self._end(text)

    def _follow(self) -> None:
        """Another rank has noticed: give it this one's stack, and leave when it has spoken."""
        self._dump()
        said = self.directory / "hang.txt"
        deadline = time.monotonic() + 2 * self._poll + 30
        while time.monotonic() < deadline and not said.exists():
            time.sleep(0.2)
        # Rank 0's stream is the one that a person reads.
        self._end(said.read_text() if self.rank == 0 and said.exists() else f"rank {self.rank}: ended, see {said}")

    def _end(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        os._exit(1)  # the main thread hangs, and would wait for ever in an orderly end


def diagnosis(directory: Path, ranks: int, *, stacks: bool = True) -> str:
    """Where every rank is: those that do not run, then those that are behind, then the rest, alike ones together.
    `stacks=False` where nobody was asked for one: a rank without is not taken to be frozen then."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for rank in range(ranks):
        beat, frames = read_beat(directory, rank), stack_of(directory, rank)
        where = f"step {beat['step']}, {beat['phase']}" if beat else "no heartbeat in this directory"
        runs = not beat or not stacks or bool(frames)
        if not runs:
            where += "; it does not run (frozen, killed, or its machine is lost)"
        groups.setdefault((runs, beat["changes"] if beat else 0, where, frames), []).append(rank)
    ordered = sorted(groups.items(), key=lambda item: (item[0][:2], len(item[1])))
    lines = []
    for (_, _, where, frames), members in ordered[:GROUPS]:
        beat = read_beat(directory, members[0])
        host = f" on {beat['host']}" if beat is not None and len(members) == 1 else ""
        lines += [f"  {'rank' if len(members) == 1 else 'ranks'} {spans(members)}{host}: {where}"]
        lines += [f"      {frame}" for frame in frames]
    rest = [rank for _, members in ordered[GROUPS:] for rank in members]
    return "\n".join([*lines, *([f"  ranks {spans(sorted(rest))}: elsewhere"] if rest else [])])


def last_words(directory: Path, rank: int, ranks: int) -> str:
    """What a rank that ends with an error says of the others: often a collective that timed out or lost a peer, and
    where the others are says why. The first one looks for all; else every rank would read what every rank wrote."""
    try:
        with (directory / ERROR).open("x") as file:
            file.write(f"{rank}\n")
    except FileExistsError:
        return f"rank {rank} ends with an error, too; see rank {(directory / ERROR).read_text().strip()}"
    where = diagnosis(directory, ranks, stacks=False)
    return f"rank {rank} ends with an error; ranks when they were last heard of:\n{where}"


def read_beat(directory: Path, rank: int) -> dict[str, Any] | None:
    file = directory / f"rank_{rank}.json"
    return json.loads(file.read_text()) if file.exists() else None


def stack_of(directory: Path, rank: int) -> tuple[str, ...]:
    """The innermost frames of a rank's main thread; none when it wrote no stack."""
    file, beat = directory / f"rank_{rank}.stack", read_beat(directory, rank)
    if beat is None or not file.exists():
        return ()
    frames: list[str] = []
    inside = False
    for line in file.read_text(errors="replace").splitlines():
        if not line.startswith("  "):
            if line.strip():
                inside = beat["thread"] in line
                frames = [] if inside else frames  # the last of several dumps
        elif inside:
            frames.append(line.strip())
    # Of torch's many frames the innermost is kept: what called it says more.
    kept = [f for n, f in enumerate(frames) if n == 0 or not any(part in f for part in TORCH_FRAMES)]
    return tuple(re.sub(r'".*/site-packages/', '"', frame) for frame in kept[:FRAMES])


def spans(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> '0-2,5'."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


_current: Heartbeat | None = None


def enter(phase: str) -> None:
    """Tells this process's heartbeat, if there is one, that `phase` begins."""
    if _current is not None:
        _current.enter(phase)


def fail() -> None:
    """That an error ends it."""
    if _current is not None:
        _current.fail()


def leave() -> None:
    """And that it ends."""
    if _current is not None:
        _current.leave()
