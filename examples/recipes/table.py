"""Print a pipeline's evaluations: a row a stage, a column a set, accuracies with 95% intervals; and what it cost.

python examples/recipes/table.py OUT_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def cell(evaluation: dict[str, Any]) -> str:
    return "{accuracy:.3f} ({accuracy_low:.2f} to {accuracy_high:.2f})".format(**evaluation)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    out = Path(sys.argv[1])
    rows: dict[str, dict[str, str]] = {}
    seconds = cpu = 0.0
    for stage in json.loads((out / "pipeline.json").read_text())["stages"]:
        directory = out / stage["name"]
        if (directory / "result.json").is_file():
            result = json.loads((directory / "result.json").read_text())
            seconds, cpu = seconds + result["seconds"], cpu + result.get("cpu_seconds", 0.0)
        for file in sorted([*directory.glob("*/evaluation.json"), *directory.glob("evaluation.json")]):
            found = rows.setdefault(stage["name"].removeprefix("evaluate_"), {})
            found[file.parent.name if file.parent != directory else "accuracy"] = cell(json.loads(file.read_text()))
    sets = list(dict.fromkeys(name for found in rows.values() for name in found))
    if rows:
        print(f"| after | {' | '.join(sets)} |\n|---|{'---|' * len(sets)}")
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(found.get(s, '-') for s in sets)} |")
    print(f"\nstages: {seconds / 60:.1f} min, {cpu / 60:.1f} CPU min")


if __name__ == "__main__":
    main()
