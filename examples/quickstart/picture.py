"""Draws a quickstart run as an SVG: loss of SFT, reward of GRPO, held-out accuracies.

python examples/quickstart/picture.py RUN_DIR picture.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, TOP, LEFT = 280, 150, 34, 44
STYLE = "font-family='system-ui, sans-serif' font-size='12' fill='#333'"


def read(path: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {STYLE}>{content}</text>"


def frame(x: float, title: str, top: float, under: str) -> str:
    """Axes of a panel at `x`, whose values go from 0 to `top`."""
    lines = "".join(
        f"<line x1='{x}' x2='{x + WIDTH}' y1='{y}' y2='{y}' stroke='#ddd'/>" + text(x - 6, y + 4, f"{value:g}", "end")
        for value, y in ((v, TOP + HEIGHT * (1 - v / top)) for v in (0.0, top / 2, top))
    )
    return lines + text(x + WIDTH / 2, TOP - 14, title) + text(x + WIDTH / 2, TOP + HEIGHT + 32, under)


def curve(x: float, values: Sequence[float], top: float, color: str) -> str:
    points = " ".join(
        f"{x + WIDTH * i / max(1, len(values) - 1):.1f},{TOP + HEIGHT * (1 - min(v, top) / top):.1f}"
        for i, v in enumerate(values)
    )
    last = f"1 to {len(values)}"
    label = text(x, TOP + HEIGHT + 15, "1") + text(x + WIDTH, TOP + HEIGHT + 15, last.split()[-1])
    return f"<polyline points='{points}' fill='none' stroke='{color}' stroke-width='2'/>" + label


def bars(x: float, values: dict[str, float]) -> str:
    parts = []
    for i, (name, value) in enumerate(values.items()):
        middle = x + WIDTH * (i + 0.5) / len(values)
        y = TOP + HEIGHT * (1 - value)
        parts.append(f"<rect x='{middle - 28}' y='{y:.1f}' width='56' height='{HEIGHT * value:.1f}' fill='#4a7fb5'/>")
        parts.append(text(middle, y - 5, f"{value:.2f}") + text(middle, TOP + HEIGHT + 15, name))
    return "".join(parts)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    names = {"before": "before SFT", "sft": "after SFT", "grpo": "after GRPO"}
    accuracy = {
        label: json.loads((run / "evaluation" / name / "evaluation.json").read_text())["accuracy"]
        for name, label in names.items()
    }
    loss = read(run / "sft" / "metrics.jsonl", "loss")
    reward = read(run / "grpo" / "metrics.jsonl", "reward")
    panels = [LEFT, 2 * LEFT + WIDTH + 10, 3 * LEFT + 2 * WIDTH + 20]
    body = frame(panels[0], "SFT: loss", 4.0, "step") + curve(panels[0], loss, 4.0, "#b5564a")
    body += frame(panels[1], "GRPO: share of sampled answers that are right", 1.0, "step")
    body += curve(panels[1], reward, 1.0, "#4a9a5f")
    body += frame(panels[2], "held-out accuracy, greedy", 1.0, "") + bars(panels[2], accuracy)
    width, height = panels[2] + WIDTH + 20, TOP + HEIGHT + 44
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>"
        f"<rect width='100%' height='100%' fill='white'/>{body}</svg>\n"
    )


if __name__ == "__main__":
    main()
