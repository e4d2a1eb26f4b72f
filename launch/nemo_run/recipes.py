"""What is run: one command of this package, or a chain of them from a YAML file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from cluster import REPOSITORY
from pydantic import Field, PositiveInt

from megatron_posttrain.cli.main import commands
from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.config.load import load_config
from megatron_posttrain.config.schema import Section
from megatron_posttrain.errors import UserError, nearest


@dataclass(frozen=True)
class Stage:
    """`words`: the command line after `launch/node.sh`. `after`: stages that must have succeeded."""

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()
    nodes: int | None = None
    processes_per_node: int | None = None
    time: str | None = None


class StageEntry(Section):
    run: str
    after: list[str] = Field([])
    nodes: PositiveInt | None = None
    processes_per_node: PositiveInt | None = None
    time: str | None = None


class ChainFile(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    values: dict[str, str | int | None] = Field({})
    stages: dict[str, StageEntry]


def single(words: Sequence[str]) -> list[Stage]:
    """One command: `["sft", "--config", "examples/sft.yaml", "key=value"]`."""
    checked(words)
    return [Stage(Path(words[0]).stem, tuple(words))]


def chain(file: Path, values: Mapping[str, str]) -> tuple[str, list[Stage]]:
    """The name and stages of a chain file, in an order that respects `after`."""
    content = load_config(ChainFile, file)  # type: ignore[type-var]
    for name in values:
        if name not in content.values:
            known = ", ".join(content.values)
            raise UserError(f"{file}: no value '{name}'{nearest(name, content.values)} (one of {known})")
    merged = {**content.values, **values}
    absent = [name for name, value in merged.items() if value is None]
    if absent:
        raise UserError(f"{file}: give {' '.join(f'{name}=...' for name in absent)} on the command line")
    stages = []
    for name, entry in content.stages.items():
        try:
            words = shlex.split(Template(entry.run).substitute(merged))
        except (KeyError, ValueError) as error:
            raise UserError(f"{file}: stages.{name}.run: {error} is not among 'values'") from None
        checked(words, f"{file}: stages.{name}.run: ")
        stages.append(Stage(name, tuple(words), tuple(entry.after), entry.nodes, entry.processes_per_node, entry.time))
    return content.name, ordered(stages, file)


def pipeline(file: str, overrides: Sequence[str]) -> tuple[str, list[Stage]]:
    """The stages of a pipeline that are not done, each a job in which `pipeline` runs it alone on its first node.

    One of several nodes has three: its beginning, itself on all of its nodes, and its end with the gates.
    """
    from megatron_posttrain.cli.pipeline import read
    from megatron_posttrain.pipeline.hashes import Hashes
    from megatron_posttrain.pipeline.run import RESULT, depends_on, reason_to_run
    from megatron_posttrain.report.collect import read_json

    found, jobs = read(file, overrides), dict[str, str]()  # stage: its last job
    hashes, stages = Hashes(found.output / ".hashes.json"), list[Stage]()
    for stage in found.stages.values():
        result, after = read_json(stage.directory / RESULT), tuple(jobs[o] for o in stage.after if o in jobs)
        ran = not after and result and not reason_to_run(stage, depends_on(found, stage, hashes), result, hashes)
        if ran and result["status"] == "done":
            continue
        name, time, nodes = stage.name, stage.config.time, stage.config.nodes
        alone = ("pipeline", file, *overrides, "--only", name)
        if nodes == 1 or ran:  # what ran and stopped at a gate is only looked at again
            stages.append(Stage(name, alone, after, 1, 1, time))
        else:
            words = (stage.command, *found.line(stage))
            stages.append(Stage(f"{name}-begin", (*alone, "--part", "begin"), after, 1, 1))
            stages.append(Stage(name, words, (f"{name}-begin",), nodes, stage.config.processes, time))
            stages.append(Stage(f"{name}-end", (*alone, "--part", "end"), (name,), 1, 1))
        jobs[name] = stages[-1].name
    return found.name, stages


def ordered(stages: Sequence[Stage], file: Path) -> list[Stage]:
    names = [stage.name for stage in stages]
    for stage in stages:
        for other in stage.after:
            if other not in names:
                near = nearest(other, names)
                raise UserError(
                    f"{file}: stages.{stage.name}.after: no stage '{other}'{near} (one of {', '.join(names)})"
                )
    done: list[Stage] = []
    while len(done) < len(stages):
        ready = [s for s in stages if s not in done and {*s.after} <= {d.name for d in done}]
        if not ready:
            left = ", ".join(stage.name for stage in stages if stage not in done)
            raise UserError(f"{file}: the stages {left} wait for each other: correct their 'after'")
        done.append(ready[0])
    return done


def checked(words: Sequence[str], where: str = "") -> None:
    """Refuses now what the cluster would refuse after hours in a queue: no such command, file or key."""
    if not words:
        raise UserError(f"{where}nothing to run")
    name = words[0]
    if name.endswith(".py"):
        if not (REPOSITORY / name).is_file():
            raise UserError(f"{where}no script {name} in {REPOSITORY}")
    elif name not in (known := commands()):
        raise UserError(f"{where}no command '{name}'{nearest(name, known)} (one of {', '.join(known)})")
    if name in ALGORITHMS and "--config" in words[1:-1]:
        file = words[words.index("--config") + 1]
        overrides = [word for word in words[1:] if "=" in word and not word.startswith("-")]
        load_config(ALGORITHMS[name].config, REPOSITORY / file, overrides)


def on_cluster(words: Sequence[str], code: str) -> list[str]:
    """The words with scripts and configs of this repository as they are called on the cluster."""
    return [f"{code}/{word}" if is_ours(word) else word for word in words]


def is_ours(word: str) -> bool:
    path = Path(word)
    return path.suffix in (".py", ".yaml", ".yml") and not path.is_absolute() and (REPOSITORY / path).is_file()
