"""`judge` against planted models and judges of known faults, served in this process."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_posttrain.cli.main import main
from megatron_posttrain.evaluation.judge import fit, read_answers
from tests.rewards.test_judge import Judges

PROMPTS = 15


@pytest.fixture
def judges() -> Iterator[Judges]:
    with Judges() as judges:
        yield judges


def answers(place: Path, name: str, quality: int, words: int = 5) -> str:
    """Of a model whose answers say how good they are."""
    rows = [{"prompt": f"Question {i}?", "response": f"<think>x</think>quality {quality}" + " and" * words} for i in range(PROMPTS)]  # fmt: skip # noqa: E501
    (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{name}={place / name}.jsonl"


def shown(prompt: str) -> list[tuple[int, int]]:
    """Quality and length of both answers; those that say nothing have none."""
    found = re.findall(r"<answer_.>\n(.*?)\n</answer_.>", prompt, re.DOTALL)
    return [(int((re.findall(r"quality (\d+)", text) or ["0"])[0]), len(text)) for text in found]


def honest(prompt: str) -> str:
    (one, _), (two, _) = shown(prompt)
    return "[[C]]" if one == two else "[[A]]" if one > two else "[[B]]"


def reliable(prompt: str) -> str:
    """Right in 90% of its verdicts."""
    verdict = honest(prompt)
    chance = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) / 2**32
    return verdict if chance < 0.9 else {"[[A]]": "[[B]]", "[[B]]": "[[A]]"}.get(verdict, verdict)


def run(judges: Judges, output: Path, *files: str, status: int = 0, **args: Any) -> dict[str, Any]:
    given = json.dumps({"retries": 2, "seconds": 30.0, "concurrency": 4, **args})
    line = [
        "judge",
        *files,
        "--address",
        judges.address,
        "--judge",
        "m",
        "--judge-args",
        given,
        "--output",
        str(output),
    ]
    assert main(line) == status
    return json.loads((output / "judge.json").read_text()) if (output / "judge.json").exists() else {}


def test_five_planted_models_are_ranked(judges: Judges, tmp_path: Path) -> None:
    judges.reply = reliable
    files = [answers(tmp_path, f"m{q}", q, words=10 - q) for q in (3, 1, 5, 2, 4)]
    found = run(judges, tmp_path / "out", *files)
    assert [m["model"] for m in found["models"]] == ["m5", "m4", "m3", "m2", "m1"]
    assert all(m["low"] < m["rating"] < m["high"] for m in found["models"])
    assert sum(m["rating"] for m in found["models"]) / 5 == pytest.approx(1000)
    assert len(found["pairs"]) == 10
    assert found["judge"]["verdicts"] == 10 * PROMPTS
    assert 0.1 < found["judge"]["contradictory"] < 0.26  # 2 x 0.9 x 0.1
    assert "<think>" not in "".join(judges.prompts)
    asked = len(judges.prompts)
    assert run(judges, tmp_path / "out", *files) == found
    assert len(judges.prompts) == asked  # all from the cache


def test_biases_are_reported(judges: Judges, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [answers(tmp_path, "good", 3, words=2), answers(tmp_path, "long", 3, words=80)]
    judges.reply = lambda prompt: "[[A]]"
    found = run(judges, tmp_path / "place", *files)
    assert (found["judge"]["shown_first"], found["judge"]["contradictory"]) == (1.0, 1.0)
    assert found["pairs"][0]["win_rate"] == 0.5
    judges.reply = lambda prompt: "[[A]]" if shown(prompt)[0][1] > shown(prompt)[1][1] else "[[B]]"
    found = run(judges, tmp_path / "length", *files)
    assert found["judge"]["longer"] == 1.0
    assert found["pairs"][0]["win_rate"] == 0
    judges.reply = lambda prompt: "[[A]]" if "Thought process:" in prompt.split("answer_B")[0] else "[[B]]"
    assert run(judges, tmp_path / "null", *files)["judge"]["canary"] == 1
    assert "it can be fooled: an answer that says nothing got 1.00 of 1" in capsys.readouterr().out
    judges.reply = honest
    assert run(judges, tmp_path / "honest", *files)["judge"]["canary"] == 0


def test_an_empty_answer_loses_unasked(judges: Judges, tmp_path: Path) -> None:
    judges.reply = lambda prompt: "[[A]]"
    files = [answers(tmp_path, "good", 3), answers(tmp_path, "empty", 3)]
    text = (tmp_path / "empty.jsonl").read_text()
    (tmp_path / "empty.jsonl").write_text(re.sub(r"quality 3[ and]*", "", text))
    found = run(judges, tmp_path / "out", *files)
    assert found["pairs"][0]["wins"] == PROMPTS
    assert judges.prompts == []


def test_length_control_recovers_quality(judges: Judges, tmp_path: Path) -> None:
    """The judge's odds are exp(quality) x exp(2 tanh(length)); equal models whose lengths differ are equal after it."""
    random = np.random.default_rng(0)
    n = 20_000
    longer = random.normal(300, 300, n)
    x = np.tanh(longer / np.sqrt(np.mean(longer**2)))
    values = random.binomial(1, 1 / (1 + np.exp(-(0.4 + 2 * x)))).astype(float)
    sides = np.tile([1.0, -1.0], (n, 1))
    found = fit(np.column_stack([sides, x]), values, np.ones(n))
    assert found[0] - found[1] == pytest.approx(0.4, abs=0.1)
    assert found[2] == pytest.approx(2, abs=0.1)
    assert values.mean() > 0.75


def test_bradley_terry_solves_its_equations() -> None:
    """Expected wins equal wins (Bradley and Terry 1952), where the ridge is small beside the number of games."""
    wins = np.array([[0, 70, 90], [30, 0, 60], [10, 40, 0]]) * 1000.0
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    sides = np.array([[(k == i) - float(k == j) for k in range(3)] for i, j in pairs])
    theta = fit(sides, np.ones(len(pairs)), np.array([wins[i, j] for i, j in pairs]))
    for i in range(3):
        expected = sum((wins[i, j] + wins[j, i]) / (1 + np.exp(theta[j] - theta[i])) for j in range(3) if j != i)
        assert expected == pytest.approx(wins[i].sum(), rel=1e-4)


def test_two_turns_are_graded(judges: Judges, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows in MT-Bench's form as `evaluate` leaves them; the second answer is judged behind the first."""
    questions = [(f"Question {i}?", "And then?", ("writing", "math")[i % 2], i) for i in range(4)]

    def responses(name: str, first: int, second: int) -> str:
        lines = []
        for one, two, category, number in questions:
            asked, answer = [{"role": "user", "content": one}], f"<think>x</think>quality {first}"
            turns = [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": two},
                {"role": "assistant", "content": f"quality {second}" if number or name == "b" else ""},
            ]
            facts = {"metadata": {"category": category, "question_id": number}}
            lines.append(json.dumps({"messages": asked, "response": turns[-1]["content"], "turns": turns, **facts}))
        (tmp_path / name).write_text("\n".join(lines))
        return f"{name}={tmp_path / name}"

    def reply(prompt: str) -> str:
        asked, answer = re.findall(r"<(?:request|answer)>\n(.*?)\n</(?:request|answer)>", prompt, re.DOTALL)
        said = re.findall(r"quality (\d+)", answer)
        if "And then?" in asked:
            assert re.search(r"user: Question \d\?\n\nassistant: quality \d\n\nuser: And then\?", asked)
        assert ("right_answer>\n" in prompt) == ("Question 3" in asked)
        assert ("second right" in prompt) == ("Question 3" in asked and "And then?" in asked)
        return f"Hm. [[{said[0] if said else 1}]]"

    judges.reply = reply
    reference = {"question_id": 3, "choices": [{"index": 0, "turns": ["first right", "second right"]}]}
    (tmp_path / "right.jsonl").write_text(json.dumps(reference))
    line = ["--grade", "--references", str(tmp_path / "right.jsonl")]
    files = [responses("a", 8, 5), responses("b", 9, 9)]
    found = run(judges, tmp_path / "out", *files, *line)
    rows = {(row["model"], row["category"]): row for row in found["models"]}
    assert [*rows] == [(m, c) for m in "ab" for c in ("all", "writing", "math")]
    a, b = rows["a", "all"], rows["b", "all"]
    assert (a["answers"], a["turns"]) == (8, {"1": 8, "2": 4})  # an empty answer has the lowest grade, unasked
    assert (b["grade"], b["low"], b["high"]) == (9, 9, 9)
    # Means of the prompts: 6.5 three times, 4.5 of the empty one; 1.96 standard errors.
    assert a["grade"] == pytest.approx(6)
    assert a["high"] - a["grade"] == pytest.approx(1.96 * np.std([6.5, 6.5, 6.5, 4.5], ddof=1) / 2)
    assert rows["a", "math"]["turns"] == {"1": 8, "2": 5}
    assert (found["judge"]["low"], found["judge"]["high"], found["judge"]["canary"]) == (1, 10, 0)
    said = capsys.readouterr().out
    assert re.search(r"^a +writing +4 +5\.50 +3\.54 to +7\.46 +8\.00 +3\.00$", said, re.MULTILINE)
    asked = len(judges.prompts)
    judges.reply = lambda prompt: 500
    assert run(judges, tmp_path / "out", *files, *line, retries=0) == found
    assert len(judges.prompts) == asked  # all from the cache
    (tmp_path / "right.jsonl").write_text('{"question_id": 3, "choices": []}')
    assert (
        main(["judge", *files, *line, "--address", "http://x/v1", "--judge", "m", "--output", str(tmp_path / "o")]) == 2
    )
    assert "right.jsonl:1: data.columns.turns: no column choices.0.turns" in capsys.readouterr().err


def test_conversations_are_graded_by_turn(tmp_path: Path) -> None:
    row = [("system", "s"), ("user", "a"), ("assistant", "1"), ("user", "b"), ("assistant", "2")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}))
    found = list(read_answers(str(tmp_path / "rows.jsonl"), every=True).items())
    assert [(len(json.loads(before)), answer.text, answer.turn) for before, answer in found] == [
        (2, "1", 1),
        (4, "2", 2),
    ]
    assert found[0][1].prompt == found[1][1].prompt
    [(before, answer)] = read_answers(str(tmp_path / "rows.jsonl")).items()
    assert (len(json.loads(before)), answer.text) == (4, "2")


@pytest.mark.parametrize(
    ("reply", "why"), [(500, "InternalServerError"), (3.0, "APITimeoutError"), ("I like both.", "gave no verdict")]
)
def test_an_ill_judge_loses_nothing(
    judges: Judges, reply: str | int | float, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [answers(tmp_path, "one", 3), answers(tmp_path, "two", 2)]
    judges.reply = lambda prompt: reply if "Question 7?" in prompt else honest(prompt)
    found = run(judges, tmp_path / "out", *files, status=1, retries=0, seconds=2.0 if reply == 3.0 else 30.0)
    assert found["judge"]["verdicts"] == PROMPTS - 1
    assert f"1 of {PROMPTS} verdicts are missing" in (said := capsys.readouterr().err)
    assert why in said
    judges.prompts.clear()
    judges.reply = honest
    found = run(judges, tmp_path / "out", *files)
    assert found["judge"]["verdicts"] == PROMPTS
    assert len(judges.prompts) == 2  # both orders of what was missing


def test_a_judge_that_is_down(judges: Judges, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judges.address = "http://127.0.0.1:9/v1"
    files = [answers(tmp_path, "one", 3), answers(tmp_path, "two", 2)]
    assert run(judges, tmp_path / "out", *files, status=1, retries=0) == {}
    assert f"{PROMPTS} of {PROMPTS} verdicts are missing" in (said := capsys.readouterr().err)
    assert "APIConnectionError" in said


@pytest.mark.parametrize(
    ("files", "message"),
    [(["a={a}"], "two or more files"), (["{a}", "{a}"], "of different names"), (["{a}", "{b}"], "no answer")],
)
def test_bad_arguments(files: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers(tmp_path, "a", 1)
    (tmp_path / "b.jsonl").write_text('{"prompt": "?", "answer": "1"}')
    places = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
    line = [text.format(**places) for text in files]
    assert main(["judge", *line, "--address", "http://x/v1", "--judge", "m", "--output", str(tmp_path / "o")]) == 2
    assert message in capsys.readouterr().err
