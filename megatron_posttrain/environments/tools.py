"""Environments of tools: a calculator, Python in the sandbox, search over local files; and one of questions."""

import ast
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_posttrain import sandbox
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.messages import Message
from megatron_posttrain.environments.protocol import ERROR, Done, ToolEnvironment, Turn, environment
from megatron_posttrain.errors import UserError

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
LARGEST_BITS = 4096  # of a power


@environment("calculator")
class CalculatorEnvironment(ToolEnvironment):
    def __init__(self) -> None:
        super().__init__(self.calculator)

    def calculator(self, expression: str) -> str:
        """Calculates.

        Args:
            expression: Numbers with + - * / // % ** and parentheses.
        """
        return str(_value(ast.parse(expression.strip(), mode="eval").body))


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left), _value(right)
            if isinstance(op, ast.Pow) and abs(b) * math.log2(abs(a) + 2) > LARGEST_BITS:
                raise ValueError("the result is too large")
            return _OPERATORS[type(op)](a, b)
    raise ValueError(f"{ast.unparse(node)} is not arithmetic")


@environment("python")
class PythonEnvironment(ToolEnvironment):
    """Programs, each in a sandbox of its own, for `seconds` and with `memory_mib` at most."""

    def __init__(self, *, seconds: float = 10.0, memory_mib: int = 1024, unsafe: bool = False) -> None:
        sandbox.check_isolation("environment: 'python'", unsafe)
        self._limits: dict[str, Any] = {"seconds": seconds, "memory_mib": memory_mib, "unsafe": unsafe}
        super().__init__(self.python)

    def python(self, code: str) -> str:
        """Runs a Python program and returns what it prints.

        Args:
            code: The program.
        """
        result = sandbox.run(code, **self._limits)
        if result.status == "ok":
            return result.stdout
        why = result.stderr.strip().splitlines()[-1:] or [result.status]
        return f"{ERROR}{why[0]}" + (f"\nprinted: {result.stdout}" if result.stdout else "")


@environment("search")
class SearchEnvironment(ToolEnvironment):
    """The `results` passages of text `files`, or of all in directories, that suit a query best, by BM25 (Robertson and
    Zaragoza 2009) with k1 1.2 and b 0.75. Passages lie between empty lines."""

    def __init__(self, *, files: list[str], results: int = 3) -> None:
        self.passages = [passage for name in files for passage in _passages(Path(name))]
        if not self.passages:
            raise UserError(f"environment: 'search': args.files {files}: no text in them")
        self._results = results
        self._index: dict[str, list[tuple[int, int]]] = defaultdict(list)  # word -> (passage, times)
        for number, passage in enumerate(self.passages):
            for word, times in Counter(_words(passage)).items():
                self._index[word].append((number, times))
        self._lengths = [len(_words(passage)) for passage in self.passages]
        super().__init__(self.search)

    def search(self, query: str) -> str:
        """Finds passages of text.

        Args:
            query: Words to look for.
        """
        best = sorted(self.scores(query).items(), key=lambda found: (-found[1], found[0]))[: self._results]
        return "\n\n".join(self.passages[number] for number, _ in best) or "nothing found"

    def scores(self, query: str) -> dict[int, float]:
        """By passage, of those that have a word of the query."""
        mean, count = sum(self._lengths) / len(self._lengths), len(self.passages)
        found: dict[int, float] = defaultdict(float)
        for word in _words(query):
            having = self._index.get(word, [])
            rarity = math.log(1 + (count - len(having) + 0.5) / (len(having) + 0.5))
            for number, times in having:
                norm = 1.2 * (0.25 + 0.75 * self._lengths[number] / mean)
                found[number] += rarity * times * 2.2 / (times + norm)
        return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _passages(place: Path) -> list[str]:
    try:
        files = [file for file in sorted(place.rglob("*")) if file.is_file()] if place.is_dir() else [place]
        texts = [file.read_text() for file in files]
    except (OSError, ValueError) as error:
        raise UserError(f"environment: 'search': args.files {place}: {error}") from None
    return [part.strip() for text in texts for part in re.split(r"\n\s*\n", text) if part.strip()]


@environment("questions")
class QuestionsEnvironment:
    """Asks the texts of `metadata.turns` behind the first, which is the prompt, one after the other, whatever is said,
    as MT-Bench does. The reward `environment` is 1 where all were answered."""

    def start(self, prompt: Prompt) -> Any:
        return [str(text) for text in prompt.metadata["turns"][1:]]

    def reply(self, state: Any, turn: Turn) -> list[Message] | Done:
        return [{"role": "user", "content": state.pop(0)}] if state else Done(1.0)
