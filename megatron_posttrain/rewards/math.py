"""Exact-answer mathematics: 1.0 when the final answer equals the expected one, else 0.0."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.registry import Sample, reward

TIME_LIMIT = 3.0  # CPU seconds for one comparison; after them the answers count as different
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,99}(?:\.[0-9]{0,99})?|\.[0-9]{1,99})(?:/[0-9]{1,99})?")


@reward("math")
def math_reward(sample: Sample) -> float:
    """Compare what follows `</think>` (the whole response where there is none) with `sample.answer`.

    The last `\\boxed{}` is the answer where there is one. Equal strings after normalising are equal, plain
    numbers are compared as fractions, and all else goes to math-verify for mathematical equivalence.
    """
    if sample.answer is None:
        raise UserError("the reward 'math' needs rows with an `answer`")
    text = final_text(sample.response)
    text = boxed(text) or text
    answer = boxed(sample.answer) or sample.answer
    found, expected = normalize(text), normalize(answer)
    if found == expected:
        return float(found != "")
    if NUMBER.fullmatch(found) and NUMBER.fullmatch(expected):
        return float(_fraction(found) == _fraction(expected))
    if not re.search(r"[\w\\]", text):
        return 0.0
    return float(_worker.equivalent(answer, text))


def final_text(response: str) -> str:
    """What follows the reasoning: nothing when it was begun and never closed."""
    _, closed, final = response.rpartition("</think>")
    return final.strip() if closed or "<think>" not in response else ""


def boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` whose braces are closed."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[match.end() : end]
    return None


def normalize(answer: str) -> str:
    """Without what does not change an answer: dollar signs, spacing, thousands separators, a final period."""
    answer = re.sub(r"\\(?:left|right|[,;:!]|\s)|\$|\\[()\[\]]", "", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", answer))
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
    return re.sub(r"\s+", "", answer).rstrip(".")


def _fraction(number: str) -> Fraction | None:
    numerator, _, denominator = number.partition("/")
    divisor = int(denominator or 1)
    return Fraction(numerator) / divisor if divisor else None


class _Worker:
    """A process that runs math-verify.

    A hostile answer (9^9^9^9) can hold Python's global lock for hours inside one big-integer operation, out
    of reach of a timeout in any thread. The process ends itself by a timer; a new one takes its place.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equivalent(self, expected: str, response: str) -> bool:
        """False as well when the comparison took too long or too much memory."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = self._start()
            print(json.dumps([expected, response]), file=process.stdin, flush=True)
            line = process.stdout.readline() if process.stdout else ""
            if not line:  # ended by its timer, or out of memory
                process.wait()
            return line == "true\n"

    def _start(self) -> subprocess.Popen[str]:
        # -P: else this directory's math.py would hide the standard library's.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(self._seconds)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise RuntimeError("the math-verify worker did not start; its error is above")
        return process


_worker = _Worker(TIME_LIMIT)
