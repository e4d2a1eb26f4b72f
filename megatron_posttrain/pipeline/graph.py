"""A pipeline's file: stages, what they take from each other, and an order of them."""

import argparse
import re
import shlex
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveInt

from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.config.load import load_config
from megatron_posttrain.config.schema import Config, Section
from megatron_posttrain.errors import UserError, nearest

REFERENCE = re.compile(r"\$\{([^}.]+)(?:\.([^}]+))?\}")  # ${stage}, ${stage.what it leaves}, ${values.name}
VALUES, OWN = "values", "output"  # names in references that are no stages
NAME = re.compile(r"[A-Za-z0-9_-]+")

Parse = Callable[[str, Sequence[str]], argparse.Namespace]  # command, words -> its arguments; UserError


class Gate(Section):
    metric: str = Field(
        description="of the stage: a figure of its JSON files (SET.accuracy, mean.accuracy of a suite) or metrics"
    )
    at_least: float | str | None = Field(None, description="a number, or the stage whose figure must be reached")
    at_most: float | str | None = Field(None, description="a number, or the stage whose figure must not be passed")
    margin: NonNegativeFloat = Field(0.0, description="by which another stage's figure may be missed")
    steps: PositiveInt = Field(1, description="last steps of metrics.jsonl, whose mean counts")

    @property
    def bounds(self) -> list[tuple[str, float | str, int]]:
        """(words, the bound, +1 when larger is better or -1)."""
        both = ("at least", self.at_least, 1), ("at most", self.at_most, -1)
        return [(words, bound, sign) for words, bound, sign in both if bound is not None]


class StageConfig(Section):
    run: str = Field(description="a command with its arguments, or a script; its output is the stage's directory")
    processes: PositiveInt = Field(1, description="on a node; more than one: under torchrun")
    nodes: PositiveInt = Field(1, description="more than one: as a job of launch/nemo_run/run.py")
    time: str | None = Field(None, description="of such a job, as Slurm writes it; null: the cluster's")
    after: list[str] = Field([], description="stages to wait for beside those that it takes something from")
    gates: list[Gate] = Field([], description="what must hold after it, or the pipeline stops")
    needs: str | None = Field(
        None, description="file or directory without which the stage, and what waits for it, is left out"
    )


class PipelineConfig(Section):
    output: str = Field(description="directory; a stage's is NAME in it")
    values: dict[str, Any] = Field(
        {}, description="for ${values.NAME}; a list: several words; null: to be given on the command line"
    )
    stages: dict[str, StageConfig]


@dataclass
class Stage:
    """A checked stage. `words`: the command line after the command, `${stage...}` still in it."""

    name: str
    command: str
    words: tuple[str, ...]
    config: StageConfig
    directory: Path
    after: tuple[str, ...]
    takes: tuple[tuple[str, str], ...]  # (stage, what of it)
    wanted: set[str] = field(default_factory=set)  # what others take of it; "": all of it
    job: Config | None = None  # of a command with a config

    @property
    def is_script(self) -> bool:
        return self.command.endswith(".py")


@dataclass
class Pipeline:
    name: str
    output: Path
    stages: dict[str, Stage]  # each after those that it waits for

    @property
    def left_out(self) -> dict[str, str]:
        """Why a stage does not run here: what it needs is not there, or it waits for one that does not run."""
        found: dict[str, str] = {}
        for name, stage in self.stages.items():
            if (needs := stage.config.needs) and not Path(needs).exists():
                found[name] = f"{needs} is not here"
            elif others := [other for other in stage.after if other in found]:
                found[name] = f"it waits for {', '.join(others)}"
        return found

    def place(self, stage: str, what: str) -> Path:
        return self.stages[stage].directory / what

    def line(self, stage: Stage) -> list[str]:
        """The stage's words as they are run."""
        return [
            REFERENCE.sub(lambda m: str(stage.directory if m[1] == OWN else self.place(m[1], m[2] or "")), word)
            for word in stage.words
        ]


def load(file: str, overrides: Sequence[str], commands: Container[str], parse: Parse) -> Pipeline:
    """Reads and checks a pipeline, and the config or arguments of every stage. Raises UserError."""
    content = load_config(PipelineConfig, file, overrides, resolve=False)
    output = Path(content.output)
    stages = {}
    for name in content.stages:
        if NAME.fullmatch(name) is None or name in (VALUES, OWN, "replaced"):
            raise UserError(f"{file}: stages.{name}: a name has letters, digits, _ and -; {VALUES} and {OWN} are taken")
        stages[name] = _stage(file, name, content, commands)
    pipeline = Pipeline(Path(file).stem, output, _ordered(file, stages))
    for stage in pipeline.stages.values():
        for other, what in stage.takes:
            pipeline.stages[other].wanted.add(what)
        _check_words(file, pipeline, stage, parse)
    return pipeline


def _stage(file: str, name: str, content: PipelineConfig, commands: Any) -> Stage:
    where, config = f"{file}: stages.{name}", content.stages[name]
    takes: list[tuple[str, str]] = []

    def fill(match: re.Match[str]) -> str:
        source, what = match[1], match[2] or ""
        if source == VALUES:
            if content.values.get(what) is None:
                known = f"; give values.{what}=..." if what in content.values else _one_of(what, content.values)
                raise UserError(f"{where}.run: {match[0]} has no value{known}")
            return str(content.values[what])
        if source != OWN:
            _check_stage(f"{where}.run: {match[0]}", source, content.stages)
            takes.append((source, what))
        return match[0]

    try:
        several = {f"${{{VALUES}.{key}}}": value for key, value in content.values.items() if isinstance(value, list)}
        words = [
            REFERENCE.sub(fill, str(part)) for word in shlex.split(config.run) for part in several.get(word, [word])
        ]
    except ValueError as error:
        raise UserError(f"{where}.run: {str(error).lower()}") from None
    if not words:
        raise UserError(f"{where}.run: a command or a script with its arguments is missing")
    if words[0].endswith(".py"):
        if not Path(words[0]).is_file():
            raise UserError(f"{where}.run: no script {words[0]}")
    elif words[0] not in commands:
        raise UserError(f"{where}.run: no command '{words[0]}'{_one_of(words[0], commands)}")
    named = [bound for gate in config.gates for _, bound, _ in gate.bounds if isinstance(bound, str)]
    for kind, others in (("after", config.after), ("gates", named)):
        for other in others:
            _check_stage(f"{where}.{kind}", other, content.stages)
    for number, gate in enumerate(config.gates):
        if not gate.bounds:
            raise UserError(f"{where}.gates.{number}: it asks for nothing: give at_least or at_most")
    after = tuple(dict.fromkeys([*(stage for stage, _ in takes), *config.after, *(n for n in named if n != name)]))
    directory = Path(content.output) / name
    return Stage(name, words[0], tuple(words[1:]), config, directory, after, tuple(dict.fromkeys(takes)))


def _check_stage(where: str, name: str, stages: Mapping[str, StageConfig]) -> None:
    if name not in stages:
        raise UserError(f"{where}: no stage '{name}'{_one_of(name, stages)}")


def _one_of(name: str, known: Any) -> str:
    return f"{nearest(name, known)} (one of {', '.join(known)})"


def _ordered(file: str, stages: dict[str, Stage]) -> dict[str, Stage]:
    done: dict[str, Stage] = {}
    while len(done) < len(stages):
        ready = next((s for s in stages.values() if s.name not in done and done.keys() >= {*s.after}), None)
        if ready is None:
            left = ", ".join(name for name in stages if name not in done)
            raise UserError(f"{file}: these stages wait for each other: {left}")
        done[ready.name] = ready
    return done


def _check_words(file: str, pipeline: Pipeline, stage: Stage, parse: Parse) -> None:
    """Adds where the stage writes to its words; checks them as its command will."""
    if stage.is_script:
        return
    where = f"{file}: stages.{stage.name}.run"
    try:
        args = parse(stage.command, pipeline.line(stage))
        if stage.command in ALGORITHMS:
            if any(word.startswith("output=") for word in stage.words):
                raise UserError("leave `output` out: it is the stage's directory")
            stage.words += (f"output=${{{OWN}}}",)
            overrides = [*args.overrides, f"output={stage.directory}"]
            stage.job = load_config(ALGORITHMS[stage.command].config, args.config, overrides)
            if wrong := "; ".join(stage.job.problems(stage.config.processes * stage.config.nodes)):
                raise UserError(wrong)
        elif hasattr(args, "output") and not any(word.split("=")[0] == "--output" for word in stage.words):
            stage.words += ("--output", f"${{{OWN}}}")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
