"""Rewards: exact-answer mathematics, users' files, weighted totals."""

import math
import re
import threading
import time

import numpy as np
import pytest
import torch

from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards import Grade, Reward, Sample, compute_rewards, load_rewards
from megatron_posttrain.rewards.math import _Worker, boxed
from megatron_posttrain.rewards.response import split_reasoning


def spec(name, weight=1.0, file=None):
    return RewardConfig(name=name, weight=weight, file=file and str(file))


def grade(response, answer):
    [graded] = compute_rewards([Sample([], response, answer)], load_rewards([spec("math")]))
    return graded.rewards["math"]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("812", "812"),
        ("<think>7+5=12;3+5=8</think>812", "812"),
        ("<think>a</think>1<think>b</think> 812.\n", "812"),
        ("The answer is \\boxed{812}, not 5.", "812"),
        ("first \\boxed{1}, then \\boxed{\\frac{1}{2}}", "\\frac12"),
        ("\\boxed{\\dfrac{3}{4}}", "0.75"),
        ("1,234", "1234"),
        ("12.0", "12"),
        ("+5", "5"),
        ("2/4", "1/2"),
        ("\\text{ yes }", "yes"),
        ("So $x = \\sqrt{8}$.", "2\\sqrt{2}"),
        ("\\boxed{x^2+2x+1}", "(x+1)^2"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("\\boxed{ (1, 2) }", "(1,2)"),
        ("It is 812", "\\boxed{812}"),
    ],
)
def test_equal_answers(response, answer):
    assert grade(response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("813", "812"),
        ("<think>812", "812"),  # reasoning that never ends gives no answer
        ("<think>812</think>", "812"),
        ("<think>812</think>811", "812"),
        ("\\boxed{811} or rather 812", "812"),
        ("", "812"),
        ("...", "812"),
        ("1/0", "5"),
        ("\\boxed{B}", "A"),
        ("\\boxed{x^2+1}", "(x+1)^2"),
        ("9" * 5000, "812"),
    ],
)
def test_different_answers(response, answer):
    assert grade(response, answer) == 0.0


def test_hostile_answer_ends_and_the_next_is_graded():
    """Evaluating the tower would hold Python's global lock for ever."""
    worker = _Worker(seconds=0.5)
    assert not worker.equivalent("812", "9^{9^{9^{9}}}")
    assert worker.equivalent("0.5", "\\frac{2}{4}")


@pytest.mark.parametrize(
    ("response", "opened", "parts"),
    [
        ("no tags", "", ("", "no tags")),
        ("<think>a</think>\n\nb", "", ("a", "b")),
        ("a</think>b", "<think>", ("a", "b")),
        ("a</think>b", "", ("a", "b")),
        ("I guess 42, but", "<think>", ("I guess 42, but", "")),
        ("<think>42", "", ("42", "")),
        ("<think>a</think>1<think>b", "", ("a</think>1<think>b", "")),
        ("a</think>b</think>c", "<think>", ("a</think>b", "c")),
        ("[THINK]a[/THINK]b", "", ("a", "b")),
    ],
)
def test_reasoning_and_answer(response, opened, parts):
    assert split_reasoning(response, opened) == parts
    if not opened:
        sample = Sample([], response)
        assert (sample.reasoning, sample.final) == parts


def test_boxed():
    assert boxed("\\boxed{a{b}c} d") == "a{b}c"
    assert boxed("\\boxed{a} \\boxed{b") == "a"
    assert boxed("\\boxed{\\{1\\}}") == "\\{1\\}"
    assert boxed("none") is None
    assert boxed("\\boxed{\\boxed{1}}") == "\\boxed{1}"
    assert boxed("\\boxed{a\\boxed{b}") == "b"
    assert boxed("\\boxed{3} and \\boxed{-3}") == "3, -3"
    assert boxed("\\boxed{3}, so \\boxed{4}") == "4"


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed{1}, ", "(", "$", "1,", "answer is ", "\\frac", "<<", "1 ", "\\( ", "**"]
)
def test_degenerate_responses_take_bounded_time(piece):
    start = time.monotonic()
    assert grade(piece * (140_000 // len(piece)), "812") == 0.0
    assert grade("812", "812") == 1.0
    assert time.monotonic() - start < 60  # CPU limit of a comparison: 3 s; the rest is for a loaded machine


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)])
def test_scalars_of_numpy_and_torch(value):
    [graded] = compute_rewards([Sample([], "")], [Reward("mine", 2.0, lambda sample: value)])
    assert graded == Grade({"mine": 0.5}, 1.0)


@pytest.mark.parametrize(
    "value",
    [None, [1.0], float("nan"), np.float32("nan"), torch.tensor(float("inf")), np.array([1.0]), "1", 1j, np.array("1")],
)
def test_refused_values(value):
    [graded] = compute_rewards([Sample([], "")], [Reward("mine", 1.0, lambda sample: value)])
    assert graded.masked
    assert "must return a finite number" in graded.failures["mine"]


def test_math_needs_an_answer():
    [graded] = compute_rewards([Sample([], "812")], load_rewards([spec("math")]))
    assert "needs rows with an `answer`" in graded.failures["math"]


MINE = """
from megatron_posttrain.rewards import reward

@reward("short")
def short(sample):
    return -len(sample.response) / sample.metadata["unit"]

@reward("threads")
def threads(sample):
    import threading
    return threading.current_thread() is not threading.main_thread()
"""


def test_users_file_and_totals(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    rewards = load_rewards([spec("math", 2.0), spec("short", 0.5, file), spec("threads", 0.0, file)])
    samples = [Sample([], "812", "812", {"unit": 1}), Sample([], "8", "9", {"unit": 2})]
    grades = compute_rewards(samples, rewards)
    assert [graded.rewards for graded in grades] == [
        {"math": 1.0, "short": -3.0, "threads": 1.0},
        {"math": 0.0, "short": -0.5, "threads": 1.0},
    ]
    assert [graded.total for graded in grades] == [0.5, -0.25]


def test_rewards_run_side_by_side(tmp_path):
    file = tmp_path / "together.py"
    file.write_text(
        "import threading\nfrom megatron_posttrain.rewards import reward\nbarrier = threading.Barrier(4)\n"
        '@reward("together")\ndef together(sample):\n    return float(barrier.wait(timeout=30) >= 0)\n'
    )
    grades = compute_rewards([Sample([], "")] * 4, load_rewards([spec("together", file=file)]), threads=4)
    assert [graded.total for graded in grades] == [1.0] * 4
    assert threading.active_count() < 50


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        (MINE, "shrot", ["no reward named 'shrot'", "did you mean 'short'", "allowed: short, threads"]),
        ("x = 1", "mine", ["no reward named 'mine'", "the file has no @reward(name)"]),
        ("def broken(:", "mine", ["SyntaxError", "bad.py:1"]),
        ("x = 1\ny = 1 / 0", "mine", ["ZeroDivisionError", "bad.py:2"]),
        (MINE + MINE, "short", ["'short' is defined twice"]),
    ],
)
def test_bad_file(tmp_path, source, name, words):
    file = tmp_path / "bad.py"
    file.write_text(source)
    with pytest.raises(UserError) as error:
        load_rewards([spec(name, file=file)])
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_bad_names_and_values(tmp_path):
    with pytest.raises(UserError, match=r"no reward named 'maths'; did you mean 'math'\?"):
        load_rewards([spec("maths")])
    with pytest.raises(UserError, match=r"nowhere\.py: no such file"):
        load_rewards([spec("mine", file=tmp_path / "nowhere.py")])
    with pytest.raises(UserError, match="'math' is there twice"):
        load_rewards([spec("math"), spec("math")])
    file = tmp_path / "values.py"
    file.write_text(
        "from megatron_posttrain.rewards import reward\n"
        '@reward("nan")\ndef nan(sample):\n    return float("nan")\n'
        '@reward("fails")\ndef fails(sample):\n    return sample.metadata["level"]\n'
    )
    [graded] = compute_rewards([Sample([], "")], load_rewards([spec("nan", file=file), spec("fails", file=file)]))
    assert graded.failures["nan"] == "returned nan; it must return a finite number"
    assert re.fullmatch(r"KeyError: 'level' \(.*values.py:7\)", graded.failures["fails"])
    assert math.isfinite(grade("812", "812"))
