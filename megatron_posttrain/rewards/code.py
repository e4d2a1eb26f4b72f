"""Code against tests: 1.0 when the response's program passes all of them, judged from outside of it."""

import ast
import builtins
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_posttrain import sandbox
from megatron_posttrain.rewards.registry import GradingError, Sample, Score, reward

_GRADER = Path(__file__).with_name("code_grader.py").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```[ \t]*([\w+.-]*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")
ALLOWED = (
    "metadata.test_list (asserts; MBPP, with test_setup_code), metadata.test with entry_point and prompt (HumanEval), "
    "metadata.tests (asserts, or objects of input and output), metadata.inputs and outputs; or one of them in `answer`"
)


@dataclass(frozen=True)
class Tests:
    """What a program is judged by: asserts, or what it prints for an input."""

    asserts: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()  # stdin, stdout
    setup: str = ""  # executed before the asserts, on their side
    prompt: str = ""  # executed before the program, on its side
    entry_point: str = ""


def program_of(text: str) -> str:
    """The last Python block of `text`, else all of it. A block that was cut off is none."""
    blocks = [code for label, code in _BLOCK.findall(text) if label.lower() in _PYTHON]
    return blocks[-1] if blocks else text


def tests_of(sample: Sample) -> Tests:
    """A row's tests. Raises GradingError where it has none."""
    fields: dict[str, Any] = dict(sample.metadata)
    if sample.answer:
        try:
            answer = json.loads(sample.answer)
        except json.JSONDecodeError:
            answer = {"tests": [sample.answer]} if re.search(r"^\s*assert\b", sample.answer, re.MULTILINE) else {}
        fields |= answer if isinstance(answer, dict) else {"tests": answer}
    if fields.get("entry_point") and "test" in fields:
        entry, prompt = str(fields["entry_point"]), str(fields.get("prompt", ""))
        # The prompt's own helpers are taken from it, not from the program, which could bend them.
        test = f"{fields['test']}\ncheck({entry})\n"
        return Tests((test,), setup=f"{prompt}\n" if prompt else "", prompt=prompt, entry_point=entry)
    tests = fields.get("test_list") or fields.get("tests") or ()
    if "inputs" in fields and "outputs" in fields:
        tests = [{"input": i, "output": o} for i, o in zip(fields["inputs"], fields["outputs"], strict=True)]
    tests = [tests] if isinstance(tests, str | Mapping) else list(tests)
    if tests and all(isinstance(test, str) for test in tests):
        setup = str(fields.get("test_setup_code") or fields.get("setup") or "")
        return Tests(tuple(tests), setup=setup, entry_point=str(fields.get("entry_point") or _hidden_name(tests)))
    if tests and all(isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in tests):
        return Tests(pairs=tuple((_text(test["input"]), _text(test["output"])) for test in tests))
    raise GradingError(f"the row has no tests; allowed: {ALLOWED}")


def _hidden_name(tests: list[str]) -> str:
    """The built-in name that a program redefines: tests that call nothing else would test Python (MBPP 126: sum)."""
    try:
        nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    except SyntaxError as error:
        raise GradingError(f"the row's tests are no Python: {error}") from None
    called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return called[0] if called and all(hasattr(builtins, name) for name in called) else ""


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


@reward("code")
class Code:
    """Runs the last code block of an answer against the row's tests, in the sandbox.

    Asserts are evaluated in a process that the program cannot reach; what a program prints for an input is compared
    here, blanks at the ends of lines and of the text left out. A sandbox that fails is no wrong answer: the
    sample counts as not graded. Raises UserError where programs cannot be isolated here, and `unsafe` is not set.

    Args:
        seconds: for all asserts together, or for one input.
        memory_mib: of the program.
        partial: the share of tests passed instead of all or nothing.
        max_tests: that many of a row's tests at most; null: all.
        unsafe: without isolation.
    """

    def __init__(
        self,
        *,
        seconds: float = 10.0,
        memory_mib: int = 1024,
        partial: bool = False,
        max_tests: int | None = None,
        unsafe: bool = False,
    ) -> None:
        self._seconds, self._memory_mib, self._partial = seconds, memory_mib, partial
        self._max_tests, self._unsafe = max_tests, unsafe
        sandbox.check_isolation("rewards: 'code'", unsafe)

    def __call__(self, sample: Sample) -> Score:
        tests = tests_of(sample)
        program = program_of(sample.final or "")
        if not program.strip():
            return Score(0.0)
        passed, total = (self._passed_pairs if tests.pairs else self._passed_asserts)(program, tests)
        value = passed / total if self._partial else float(passed == total)
        return Score(value, {"tests_passed": passed / total})

    def _passed_asserts(self, program: str, tests: Tests) -> tuple[int, int]:
        asserts = tests.asserts[: self._max_tests]
        whole = re.search(rf"^(?:async )?def {re.escape(tests.entry_point)}\b", program, re.MULTILINE)
        parts = [tests.prompt, program] if whole or not tests.prompt else [tests.prompt + program]
        task = {
            "program": parts, "setup": tests.setup, "tests": asserts, "entry_point": tests.entry_point,
            "partial": self._partial,
        }  # fmt: skip
        result = self._run(_GRADER, json.dumps(task))
        verdicts = result.stdout.splitlines()  # none: it failed before it passed a test
        return (int(json.loads(verdicts[-1])["passed"]) if verdicts else 0), len(asserts)

    def _passed_pairs(self, program: str, tests: Tests) -> tuple[int, int]:
        pairs = tests.pairs[: self._max_tests]
        passed = 0
        for stdin, expected in pairs:
            result = self._run(program, stdin)
            if result.status == "ok" and _lines(result.stdout) == _lines(expected):
                passed += 1
            elif not self._partial:
                break
        return passed, len(pairs)

    def _run(self, program: str, stdin: str) -> sandbox.Result:
        result = sandbox.run(
            program, stdin=stdin, seconds=self._seconds, memory_mib=self._memory_mib, unsafe=self._unsafe
        )
        if result.status == "unavailable":
            raise GradingError(f"the sandbox failed: {result.stderr.strip()}")
        return result


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
