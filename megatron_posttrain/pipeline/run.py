"""Runs a pipeline's stages one after the other; what has not changed since it was done is left as it is."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_posttrain.config.load import flat
from megatron_posttrain.errors import UserError, nearest_file
from megatron_posttrain.failure import die_with_parent
from megatron_posttrain.output import check_output, write_whole
from megatron_posttrain.pipeline.gates import check, figures
from megatron_posttrain.pipeline.graph import Pipeline, Stage
from megatron_posttrain.pipeline.hashes import Hashes
from megatron_posttrain.report.collect import PIPELINE, read_json

RESULT, LOG, REPLACED = "result.json", "log.txt", "replaced"
FINISHED = ("done", "gate")
STOPPED = 75  # of a stage that saved and wants to be run again, and then of the pipeline


class Stop:
    """SIGTERM, SIGINT or SIGUSR1 asks the stage in work to save and end; a second one kills it."""

    def __init__(self) -> None:
        self.asked = 0
        self.stage: Stage | None = None
        self.child: subprocess.Popen[str] | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.child is None or self.stage is None:
            return
        if self.asked > 1:
            os.killpg(self.child.pid, signal.SIGKILL)
        elif self.by_file:
            (self.stage.directory / ".stop").touch()
        else:
            self.child.terminate()

    @property
    def by_file(self) -> bool:
        """torchrun passes SIGTERM on to its workers and kills them 30 s later, in the middle of a step or a save."""
        return self.stage is not None and self.stage.job is not None and self.stage.config.processes > 1


def run(pipeline: Pipeline, only: str | None = None, part: str | None = None) -> int:
    """Exit status: 0 done, 75 stopped and saved, else that of the stage that failed; 1 for a gate.

    Args:
        only: one stage, when those that it waits for are done; None: all of them.
        part: of that stage, when a job of its own runs it: `begin` before that job, `end` after it.
    """
    root = pipeline.output
    check_output(root, files=(PIPELINE,))
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root, shared=only is not None):
        left_out = pipeline.left_out
        about = [
            {"name": s.name, "run": s.config.run, "after": s.after}
            | ({"status": "left out", "reason": left_out[s.name]} if s.name in left_out else {})
            for s in pipeline.stages.values()
        ]
        write_whole(root / PIPELINE, json.dumps({"name": pipeline.name, "stages": about}, indent=1))
        hashes, stop = Hashes(root / ".hashes.json"), Stop()
        for stage in [pipeline.stages[only]] if only else pipeline.stages.values():
            if stage.name in left_out:
                _say(stage, f"left out: {left_out[stage.name]}")
                continue
            status = _finish(pipeline, stage, hashes, stop, part)
            hashes.save()
            if status or stop.asked:
                return status or STOPPED
    without = f" without {', '.join(left_out)}" if left_out else ""
    print(f"pipeline {pipeline.name}: {f'stage {only} ' if only else ''}done{without}; `report {root}` shows it")
    return 0


def _finish(pipeline: Pipeline, stage: Stage, hashes: Hashes, stop: Stop, part: str | None) -> int:
    """Runs a stage unless it is done, then its gates."""
    file = stage.directory / RESULT
    if waits := [o for o in stage.after if read_json(pipeline.stages[o].directory / RESULT).get("status") != "done"]:
        raise UserError(f"stage {stage.name} waits for {', '.join(waits)}, not done yet")
    result = read_json(file) if part == "end" else _begin(pipeline, stage, hashes, part)
    if not result:
        raise UserError(f"stage {stage.name} has not begun: --part begin comes before --part end")
    if part == "begin":
        return 0
    if result["status"] in FINISHED:
        _say(stage, "done before, and nothing that it depends on has changed")
    else:
        if part is None and (status := _execute(pipeline, stage, result, stop)):
            return status
        result |= {"status": "done", "outputs": {}, "figures": figures(stage.directory)}
    there = [name for name in sorted(stage.wanted) if (stage.directory / name).exists()]
    result["outputs"] = {name: hashes.of(stage.directory / name) for name in there}
    write_whole(file, json.dumps(result, indent=1))
    if missing := next((stage.directory / name for name in sorted(stage.wanted) if name not in there), None):
        raise UserError(f"stage {stage.name} left no {missing}, which another one takes{nearest_file(missing)}")
    result["gates"] = check(pipeline, stage)
    failed = [gate["text"] for gate in result["gates"] if not gate["passed"]]
    result |= {"status": "gate" if failed else "done", "reason": "; ".join(failed)}
    write_whole(file, json.dumps(result, indent=1))
    for gate in result["gates"]:
        _say(stage, f"gate {'passed' if gate['passed'] else 'NOT PASSED'}: {gate['text']}")
    return 1 if failed else 0


def _begin(pipeline: Pipeline, stage: Stage, hashes: Hashes, part: str | None) -> dict[str, Any]:
    """The stage's result; `started` where it has to run, with what is not wanted any more put aside."""
    file = stage.directory / RESULT
    sources, result = depends_on(pipeline, stage, hashes), read_json(file)
    why = reason_to_run(stage, sources, result, hashes)
    if not why:
        return result
    if stage.config.nodes > 1 and part is None:
        raise UserError(
            f"stages.{stage.name}.nodes={stage.config.nodes}: this machine is one; allowed here: 1; "
            "`launch/nemo_run/run.py --cluster CLUSTER pipeline FILE` runs stages as jobs"
        )
    _say(stage, why)
    if result and (result["sources"] != sources or result["status"] in FINISHED):
        place = pipeline.output / REPLACED / stage.name
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        stage.directory.rename(place)
        _say(stage, f"what it made before is in {place}")
        result = {}
    result = {"seconds": 0.0, "attempts": 0} | result | {"status": "started", "sources": sources, "reason": ""}
    result["attempts"] += 1
    write_whole(file, json.dumps(result, indent=1))
    return result


def depends_on(pipeline: Pipeline, stage: Stage, hashes: Hashes) -> dict[str, str]:
    """What decides about the stage's result: its words and config, and what the files named there hold.

    Paths below the pipeline's output are told by stage, so that the directory can be moved.
    """
    found = {"command": stage.command, "processes": str(stage.config.processes)}
    named = [stage.command] if stage.is_script else []
    if stage.job is None:
        found["arguments"] = " ".join(stage.words)
        named += [part for word in stage.words for part in (word, word.split("=", 1)[-1])]
    else:
        # Without defaults, so that a version with further keys repeats nothing.
        keys = flat(stage.job.model_dump(mode="json", exclude={"output", "logging"}, exclude_defaults=True))
        found |= {key: json.dumps(value).replace(str(pipeline.output), "${output}") for key, value in keys.items()}
        named += list(_texts(keys))
    for name in dict.fromkeys(named):
        path, output = Path(name), pipeline.output
        if not name or "${" in name or not path.exists() or path.absolute().is_relative_to(output.absolute()):
            continue
        if not output.resolve().is_relative_to(path.resolve()):  # what holds the output changes with every stage
            found[f"content of {name}"] = hashes.of(path)
    for other, what in stage.takes:
        found[f"content of ${{{other}{'.' * bool(what)}{what}}}"] = hashes.of(pipeline.place(other, what))
    return found


def reason_to_run(stage: Stage, sources: dict[str, str], result: dict[str, Any], hashes: Hashes) -> str:
    """Empty where the stage is done."""
    if not result:
        return "starts"
    before = result["sources"]
    if changed := [name for name in {**before, **sources} if before.get(name) != sources.get(name)]:
        return f"runs again, since this changed: {', '.join(changed)}"
    if result["status"] not in FINISHED:
        return f"goes on after attempt {result['attempts']}"
    for name, value in result["outputs"].items():
        if name in stage.wanted and hashes.of(stage.directory / name) != value:
            return f"runs again, since its {name or 'output'} is no longer what it made"
    return ""


def _execute(pipeline: Pipeline, stage: Stage, result: dict[str, Any], stop: Stop) -> int:
    """Runs the command, its output to the log and to this one's; the exit status for this process."""
    file, start, cpu_start = stage.directory / RESULT, time.monotonic(), sum(os.times()[2:4])
    words, last = command_line(stage, pipeline.line(stage)), ""
    with (stage.directory / LOG).open("a", encoding="utf-8") as log:
        child = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a ^C reaches this process alone
            preexec_fn=die_with_parent,
        )
        stop.stage, stop.child = stage, child
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
            last = line.strip() or last
            if stop.asked and stop.by_file:
                (stage.directory / ".stop").touch()  # a run that only now begins removes what is there
        status = child.wait()
        stop.child = None
    result["seconds"] += time.monotonic() - start
    # Of all processes that this one started and that have ended, and of theirs
    result["cpu_seconds"] = result.get("cpu_seconds", 0.0) + sum(os.times()[2:4]) - cpu_start
    if not status:
        return 0
    # A training stage that saved says 75; any other that was asked to end has nothing to say.
    stopped = status == STOPPED or (stop.asked > 0 and (stage.job is None or status < 0))
    result |= {"status": "stopped" if stopped else "failed", "reason": f"status {status}: {last}"}
    write_whole(file, json.dumps(result, indent=1))
    _say(stage, f"{result['status']} with status {status}; its log is {stage.directory / LOG}")
    return STOPPED if stopped else max(status, 1)


def command_line(stage: Stage, words: Sequence[str]) -> list[str]:
    what = [stage.command, *words] if stage.is_script else ["-m", "megatron_posttrain", stage.command, *words]
    if stage.config.processes == 1:
        return [sys.executable, *what]
    options = ["--standalone", "--nproc-per-node", str(stage.config.processes)]
    return [sys.executable, "-m", "megatron_posttrain.pipeline.launch", *options, *what]


@contextmanager
def _alone(root: Path, shared: bool) -> Iterator[None]:
    """`shared`: beside others that run one stage each, as jobs do."""
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output={root}: another pipeline is at work there") from None
        yield


def _say(stage: Stage, text: str) -> None:
    print(f"== stage {stage.name}: {text}", flush=True)


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, list | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)
