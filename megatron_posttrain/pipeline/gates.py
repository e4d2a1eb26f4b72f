"""Figures that a stage left, and whether they are good enough to go on."""

from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_posttrain.config.load import flat
from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.pipeline.graph import Gate, Pipeline, Stage
from megatron_posttrain.report.collect import EVALUATION, METRICS, json_lines, read_json

ROUNDING = 1e-9  # 0.7466... - 0.1 is more than 0.6466...
NO_FIGURES = ("result.json", "environment.json")


def figures(directory: Path, steps: int = 1) -> dict[str, float]:
    """Numbers of a stage: of its JSON files, `a.b` for nested ones and for those of a suite's set `a`, `mean.accuracy`
    of its sets, and means of the last `steps` of its metrics."""
    found: dict[str, float] = {}
    for file in [*sorted(directory.glob("*.json")), *sorted(directory.glob(f"*/{EVALUATION}"))]:
        content = read_json(file) if file.name not in NO_FIGURES else {}
        numbers = (
            flat(content, f"{file.parent.name}." * (file.parent != directory)) if isinstance(content, dict) else {}
        )
        found |= {k: v for k, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    if len(of_sets := [value for name, value in found.items() if name.endswith(".accuracy")]) > 1:
        found["mean.accuracy"] = fmean(of_sets)
    lines = list(json_lines(directory / METRICS))[-steps:]
    for name in dict.fromkeys(name for line in lines for name in line):
        if values := [line[name] for line in lines if line.get(name) is not None]:
            found[name] = fmean(values)
    return found


def check(pipeline: Pipeline, stage: Stage) -> list[dict[str, Any]]:
    """{"text", "passed"} of every bound. Raises UserError for a figure that is not there."""
    return [_check(pipeline, stage, gate, *bound) for gate in stage.config.gates for bound in gate.bounds]


def _check(pipeline: Pipeline, stage: Stage, gate: Gate, words: str, bound: float | str, sign: int) -> dict[str, Any]:
    value, text = _figure(stage, gate), ""
    if isinstance(bound, str):
        other = _figure(pipeline.stages[bound], gate)
        text, bound = f" ({bound} has {other:.4g}, margin {gate.margin:g})", other - sign * gate.margin
    passed = sign * (value - bound) >= -ROUNDING
    return {"text": f"{gate.metric} {value:.4g}, {words} {bound:.4g}{text}", "passed": passed}


def _figure(stage: Stage, gate: Gate) -> float:
    found = figures(stage.directory, gate.steps)
    if gate.metric not in found:
        known = f"{nearest(gate.metric, found)} (one of {', '.join(sorted(found))})" if found else ", nor any other"
        raise UserError(f"stage {stage.name} has no figure '{gate.metric}'{known}")
    return found[gate.metric]
