"""Results of several models on the same prompts, and whether they differ."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from megatron_posttrain.errors import UserError
from megatron_posttrain.evaluation.evaluate import CORRECT, EVALUATION
from megatron_posttrain.evaluation.responses import RESPONSES, read_responses
from megatron_posttrain.evaluation.statistics import paired_difference
from megatron_posttrain.output import columns

Shares = Mapping[str, Mapping[str, float]]  # set -> prompt -> share of correct responses
ALL = "all sets"


def _files(directory: Path, name: str) -> dict[str, Path]:
    """By set, "" where `evaluate` ran without --suite. Raises UserError where there is none."""
    found = [directory / name] if (directory / name).is_file() else sorted(directory.glob(f"*/{name}"))
    if not found:
        raise UserError(f"{directory}: no {name} in it or in a directory of it; `evaluate` writes one")
    return {"" if file.parent == directory else file.parent.name: file for file in found}


def read_results(directory: Path) -> Shares:
    """Of a directory that `evaluate` wrote; of a suite its sets, and all of them together."""
    found = {}
    for name, file in _files(directory, RESPONSES).items():
        found[name] = {
            json.dumps([group[0]["messages"], group[0]["answer"]]): fmean(r["reward"] > CORRECT for r in group)
            for group in read_responses(file.parent)
        }
    every = {f"{name} {key}": share for name, prompts in found.items() for key, share in prompts.items()}
    return found | ({ALL: every} if len(found) > 1 else {})


def compare(results: Sequence[Shares], names: Sequence[str]) -> str:
    """A table: each of the others against the first, on the prompts that both answered."""
    head = f"set|against {names[0]}|prompts|first|second|difference|95% interval|p|smallest to be seen"
    lines, left = [head.split("|")], 0
    for name, others in zip(names[1:], results[1:], strict=True):
        for set_ in results[0]:
            first, second = results[0][set_], others.get(set_, {})
            if not (common := [key for key in first if key in second]):
                raise UserError(f"{names[0]} and {name} have no prompt of set {set_ or 'evaluation'!r} in common")
            d = paired_difference([first[key] for key in common], [second[key] for key in common])
            found = f"{d.first:.3f}", f"{d.second:.3f}", f"{d.difference:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}"
            lines.append([set_, name, str(d.prompts), *found, f"{d.p_value:.4f}", f"{d.detectable:.3f}"])
            left += (set_ != ALL) * (len(first) + len(second) - 2 * len(common))
    return columns(lines) + (f"\n{left} prompts are in one of them only, and were left out" if left else "")


def leaderboard(names: Sequence[str]) -> str:
    """A table: a line per directory that `evaluate` wrote, a column per set: accuracy and half its 95% interval, or
    perplexity."""
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for name, row in found.items():
        for set_, file in _files(Path(name), EVALUATION).items():
            e = json.loads(file.read_text(encoding="utf-8"))
            half = (e.get("accuracy_high", 0) - e.get("accuracy_low", 0)) / 2
            figure = f"{e['accuracy']:.3f} +- {half:.3f}" if "accuracy" in e else f"{e['perplexity']:.3f} (perplexity)"
            row[set_ or Path(e["data"]).name] = figure
    sets = list(dict.fromkeys(key for row in found.values() for key in row))
    rows = [["run", *sets], *([name, *(row.get(key, "-") for key in sets)] for name, row in found.items())]
    return columns(rows)
