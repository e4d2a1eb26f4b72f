"""How many statements two algorithm files have in common, as a share of the smaller one's: what a copy would show.

python -m benchmarks.shared_statements
"""

import ast
import itertools
from collections import Counter
from pathlib import Path

ALGORITHMS = Path(__file__).resolve().parent.parent / "megatron_posttrain" / "algorithms"
NAMES = ("sft", "dpo", "reward_model", "distill", "grpo", "ppo", "score")


def statements(file: Path) -> Counter[str]:
    """Every statement but imports and docstrings; of a compound one its first line."""
    found: Counter[str] = Counter()
    for node in ast.walk(ast.parse(file.read_text())):
        string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not string and not isinstance(node, ast.Import | ast.ImportFrom):
            found[ast.unparse(node).splitlines()[0]] += 1
    return found


def main() -> None:
    of = {name: statements(ALGORITHMS / f"{name}.py") for name in NAMES}
    for first, second in itertools.combinations(NAMES, 2):
        smaller, common = min(of[first].total(), of[second].total()), of[first] & of[second]
        print(f"{first:13} {second:13} {common.total():3} of {smaller:3}  {common.total() / smaller:.0%}")


if __name__ == "__main__":
    main()
