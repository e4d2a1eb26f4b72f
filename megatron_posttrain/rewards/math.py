"""Exact-answer mathematics: 1.0 when the final answer equals the expected one, else 0.0."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.extract import boxed
from megatron_posttrain.rewards.registry import Sample, reward

__all__ = ["boxed", "math_reward"]
TIME_LIMIT = 3.0  # CPU seconds for one comparison; after them the answers count as different


@reward("math", needs_answer=True)
def math_reward(sample: Sample) -> float:
    """Compare the answer that follows the reasoning with `sample.answer`.

    The last `\\boxed{}` is the answer where there is one, else what follows `####` or `the answer is`, else the
    text's last expression; see `final_answer`. Equal texts after normalising are equal, numbers are compared as
    fractions, lists by element, and all else goes to math-verify for mathematical equivalence.
    """
    if sample.answer is None:
        raise UserError("the reward 'math' needs rows with an `answer`")
    return float(_worker.equivalent(sample.answer, sample.final or ""))


class _Worker:
    """A process that grades.

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
        root = str(Path(__file__).parents[2])  # this package, wherever the parent found it
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-P", "-m", "megatron_posttrain.rewards.math_worker", str(self._seconds)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise RuntimeError("the grading worker did not start; its error is above")
        return process


_worker = _Worker(TIME_LIMIT)
