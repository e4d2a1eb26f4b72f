"""Two result files against each other, and several as a scaling table and plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_posttrain.errors import UserError

RESAMPLES = 10_000
CONFIDENCE = 0.95
SETTINGS = (
    "command",
    "world_size",
    "layout",
    "micro_batch_size",
    "global_batch_size",
    "sequence_length",
    "mean_length",
)
NEEDED = (*SETTINGS, "step_seconds", "tokens_per_step", "tokens_per_second", "tokens_per_second_per_gpu")


@dataclass(frozen=True)
class Comparison:
    """Throughput of B over that of A, with its confidence interval."""

    name: str
    ratio: float
    low: float
    high: float
    different: tuple[str, ...]  # settings that are not the same, told and not judged

    def regressed(self, tolerance: float) -> bool:
        """B is slower by more than `tolerance`, and chance does not explain it."""
        return self.high < 1 - tolerance


def read_results(path: str | Path) -> dict[str, Any]:
    """A result file. Raises UserError for one that is none."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file")
    try:
        tree = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    results = tree.get("results") if isinstance(tree, dict) and {"config", "machine"} <= tree.keys() else None
    if not results or any(key not in result for result in results for key in NEEDED):
        raise UserError(f"{path}: not a result file of benchmark_throughput.py")
    return tree


def bootstrap_ratio(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(ratio, low, high) of mean(a) / mean(b) by the percentile bootstrap (Efron 1979), steps drawn independently."""
    random = np.random.default_rng(seed)

    def means(seconds: Sequence[float]) -> Any:
        values = np.asarray(seconds, dtype=np.float64)
        return random.choice(values, (RESAMPLES, len(values))).mean(axis=1)

    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means(a) / means(b), [tail, 1 - tail])
    return float(np.mean(a) / np.mean(b)), float(low), float(high)


def compare(path_a: str | Path, path_b: str | Path) -> list[Comparison]:
    """Results of both files with the same settings; two single results are compared whatever theirs are."""
    a, b = read_results(path_a), read_results(path_b)
    pairs = [(x, y) for x in a["results"] for y in b["results"] if not _different(x, y)]
    if not pairs and len(a["results"]) == len(b["results"]) == 1:
        pairs = [(a["results"][0], b["results"][0])]
    if not pairs:
        raise UserError(f"{path_a} and {path_b} have no result with the same settings ({', '.join(SETTINGS)})")
    machines = tuple(key for key in ("device", "versions", "hosts") if a["machine"][key] != b["machine"][key])
    found = []
    for x, y in pairs:
        per_token_a = [s / x["tokens_per_step"] for s in x["step_seconds"]]
        per_token_b = [s / y["tokens_per_step"] for s in y["step_seconds"]]
        ratio, low, high = bootstrap_ratio(per_token_a, per_token_b)
        found.append(Comparison(name_of(x), ratio, low, high, (*_different(x, y), *machines)))
    return found


def _different(x: dict[str, Any], y: dict[str, Any]) -> tuple[str, ...]:
    return tuple(key for key in SETTINGS if x[key] != y[key])


def name_of(result: dict[str, Any]) -> str:
    """Such as `sft on 8: tensor=2 expert=4`."""
    sizes = " ".join(f"{key}={size}" for key, size in result["layout"].items() if size > 1)
    return f"{result['command']} on {result['world_size']}{': ' if sizes else ''}{sizes}"


@dataclass(frozen=True)
class Point:
    """The fastest result at a number of ranks."""

    ranks: int
    name: str
    tokens_per_second: float
    per_rank: float
    efficiency: float  # tokens/s/rank against the smallest number of ranks


def scaling_points(paths: Sequence[str | Path]) -> list[Point]:
    """One point a number of ranks, ascending."""
    best: dict[int, dict[str, Any]] = {}
    for path in paths:
        for result in read_results(path)["results"]:
            old = best.get(result["world_size"])
            if old is None or result["tokens_per_second"] > old["tokens_per_second"]:
                best[result["world_size"]] = result
    ordered = [best[ranks] for ranks in sorted(best)]
    first = ordered[0]["tokens_per_second_per_gpu"]
    return [
        Point(r["world_size"], name_of(r), r["tokens_per_second"], r["tokens_per_second_per_gpu"],
              r["tokens_per_second_per_gpu"] / first)
        for r in ordered
    ]  # fmt: skip


def mixed_settings(paths: Sequence[str | Path]) -> list[str]:
    """What is not the same in all results, sizes and layouts apart."""
    found: dict[str, set[str]] = {}
    for path in paths:
        tree = read_results(path)
        own = {"model": tree["config"]["model"]["path"], "device": tree["machine"]["device"]["name"]}
        for result in tree["results"]:
            for key in {*own, *SETTINGS} - {"world_size", "layout"}:
                found.setdefault(key, set()).add(str((result | own)[key]))
    return sorted(key for key, values in found.items() if len(values) > 1)


def plot_scaling(points: Sequence[Point], file: Path) -> None:
    """One self-contained HTML file: tokens/s against ranks, beside the line of perfect scaling."""
    import plotly.graph_objects as go

    ranks = [p.ranks for p in points]
    ideal = [points[0].per_rank * n for n in ranks]
    text = [f"{p.name}<br>{p.per_rank:,.0f} tokens/s a rank, {p.efficiency:.0%}" for p in points]
    figure = go.Figure()
    figure.add_scatter(x=ranks, y=ideal, mode="lines", name="perfect scaling", line={"dash": "dot", "color": "#888"})
    figure.add_scatter(
        x=ranks, y=[p.tokens_per_second for p in points], mode="lines+markers", name="measured", text=text,
        hovertemplate="%{x} ranks: %{y:,.0f} tokens/s<br>%{text}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="ranks", type="log", dtick="D1" if len(ranks) < 2 else None, tickvals=ranks)
    figure.update_yaxes(title="tokens/s", type="log")
    figure.update_layout(title="Throughput by number of ranks", template="plotly_white")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(file, include_plotlyjs=True, full_html=True)
