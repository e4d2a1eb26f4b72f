"""What the directories of runs, evaluations and pipelines hold, as plain data for the page."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from megatron_posttrain.config.load import flat
from megatron_posttrain.errors import UserError, nearest_file

METRICS, EVALUATION, CURATION, PIPELINE = "metrics.jsonl", "evaluation.json", "curation.json", "pipeline.json"
EXPERT_LOAD = "expert_load.json"
CLOSED = ("checkpoints", "hf", "adapter", "critic", "heartbeats", "tensorboard", "rollouts", "profile", "replaced")
DIGITS = 7  # of a figure: more than fp32 has


def find(roots: Sequence[Path]) -> list[Path]:
    """The directories to tell about: each root that is one, and those below it. Raises UserError."""
    found: list[Path] = []
    for root in roots:
        if not root.is_dir():
            what = "is a file, not a run's directory" if root.exists() else f"does not exist{nearest_file(root)}"
            raise UserError(f"{root}: {what}")
        here = list(_below(root))
        if not here:
            raise UserError(f"{root}: nothing to report: neither it nor a directory below it has {', '.join(MARKS)}")
        found += here
    return list(dict.fromkeys(found))


def _below(root: Path) -> Iterator[Path]:
    for place, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in CLOSED and not name.startswith("."))
        if any(mark in files for mark in MARKS):
            yield Path(place)


def label(directories: Sequence[Path]) -> list[str]:
    """Names of directories without the part of the path that all have in common."""
    places = [directory.absolute() for directory in directories]
    common = Path(os.path.commonpath(places))
    common = common.parent if common in places else common
    return [place.relative_to(common).as_posix() for place in places]


def run(directory: Path) -> dict[str, Any]:
    """A training run: `metrics` as columns, its flat config, its environment. None where a step has no such figure."""
    lines = list(json_lines(directory / METRICS))
    names = dict.fromkeys(name for line in lines for name in line)
    config = flat(read_yaml(directory / "config.yaml"))
    return {
        "metrics": {name: [_short(line.get(name)) for line in lines] for name in names},
        "config": {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()},
        "environment": flat(read_json(directory / "environment.json")),
        "expert_load": read_json(directory / EXPERT_LOAD),
        "exported": (directory / "hf").is_dir(),
    }


def pipeline(directory: Path) -> dict[str, Any]:
    """The stages of a pipeline in order, each with what it left in `result.json`."""
    plan = read_json(directory / PIPELINE)
    results = {stage["name"]: read_json(directory / stage["name"] / "result.json") for stage in plan["stages"]}
    return plan | {"stages": [{"status": "not started"} | s | results[s["name"]] for s in plan["stages"]]}


# A directory with one of these files is told about: under which heading, and what of it.
MARKS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    METRICS: ("runs", run),
    EVALUATION: ("evaluations", lambda directory: flat(read_json(directory / EVALUATION))),
    CURATION: ("curations", lambda directory: flat(read_json(directory / CURATION))),
    PIPELINE: ("pipelines", pipeline),
}


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file; a last line that a running job has not finished is left out."""
    if not file.is_file():
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield from_json(line)
            except ValueError as error:
                raise UserError(f"{file}:{number}: no JSON: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: no JSON: {error}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    try:
        return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
