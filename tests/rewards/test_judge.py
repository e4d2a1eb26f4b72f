"""A judge behind an OpenAI-compatible address: planted judges on this machine that are honest, biased, fooled, ill."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self

import pytest

from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards import Grade, Sample, compute_rewards, load_rewards

QUESTION = [{"role": "user", "content": "What is {1}?"}]


class Judges:
    """A server whose reply is a function of the prompt: text, a status code, or seconds to wait."""

    def __init__(self) -> None:
        self.reply: Callable[[str], str | int | float] = lambda prompt: "[[1]]"
        self.prompts: list[str] = []
        judges = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                judges.prompts.append(prompt)
                reply = judges.reply(prompt)
                if isinstance(reply, float):
                    time.sleep(reply)
                    reply = "[[10]]"
                status = reply if isinstance(reply, int) else 200
                message = {"role": "assistant", "content": str(reply)}
                text = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
                data = (text if reply != "html" else "<html>").encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json" if reply != "html" else "text/html")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def judges() -> Iterator[Judges]:
    with Judges() as judges:
        yield judges


def grade(judges: Judges, answers: list[str], **args: Any) -> list[Grade]:
    values = {"address": judges.address, "model": "m", "canaries": False, "retries": 0, **args}
    reward = load_rewards([RewardConfig(name="judge", args=values)])
    return compute_rewards([Sample(QUESTION, answer, "one") for answer in answers], reward)


def by_quality(prompt: str) -> str:
    answer = re.search(r"<answer>\n(.*?)\n</answer>", prompt, re.DOTALL)
    assert answer is not None
    return f"Fine. [[{10 if 'good' in answer[1] else 4}]]"


def better(prompt: str) -> str:
    first, second = re.findall(r"<answer_.>\n(.*?)\n</answer_.>", prompt, re.DOTALL)
    return "[[C]]" if ("good" in first) == ("good" in second) else f"[[{'A' if 'good' in first else 'B'}]]"


def test_grades_with_reference_and_rubric(judges: Judges) -> None:
    judges.reply = by_quality
    grades = grade(judges, ["good {x}", "bad", ""], rubric="Be strict.")
    assert [g.total for g in grades] == [1.0, pytest.approx(1 / 3), 0.0]
    assert len(judges.prompts) == 2  # an empty answer is worth nothing
    assert all("user: What is {1}?" in p and "one" in p and "Be strict." in p for p in judges.prompts)
    judges.prompts.clear()
    grade(judges, ["good"], reference=False)
    assert "right_answer" not in judges.prompts[0]


def test_both_orders(judges: Judges) -> None:
    judges.reply = better
    assert [g.total for g in grade(judges, ["good", "bad"], mode="compare")] == [1.0, 0.5]
    judges.reply = lambda prompt: "[[A]]"  # whatever stands first
    [graded] = grade(judges, ["good"], mode="compare")
    assert graded.total == 0.5
    assert graded.metrics["judge/contradiction"] == 1.0


def test_a_judge_that_can_be_fooled_is_warned_of(judges: Judges, caplog: pytest.LogCaptureFixture) -> None:
    judges.reply = lambda prompt: "[[9]]" if "Thought process:" in prompt else by_quality(prompt)
    with caplog.at_level(logging.WARNING):
        grades = grade(judges, ["good", "bad"], canaries=True)
    assert "can be fooled: it gave 0.89 of 1 to the answer 'Thought process:'" in caplog.text
    assert grades[0].metrics["judge/canary"] == pytest.approx(8 / 9)
    caplog.clear()
    judges.reply = by_quality
    grades = grade(judges, ["good"], canaries=True)
    assert "fooled" not in caplog.text
    assert grades[0].metrics["judge/canary"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (500, "InternalServerError"),
        (5.0, "APITimeoutError"),
        ("html", "no chat completion"),
        ("I like it.", "gave no verdict: 'I like it.'"),
        ("[[11]]", "grade is 11; it must be from 1 to 10"),
        ("[[A]] or [[B]]", "gave no verdict"),
    ],
)
def test_an_ill_judge_leaves_samples_ungraded(judges: Judges, reply: str | int | float, words: str) -> None:
    judges.reply = lambda prompt: reply if "bad" in prompt else "[[10]]"
    good, bad = grade(judges, ["good", "bad"], seconds=0.5)
    assert good.total == 1.0
    assert not good.masked
    assert bad.masked
    assert words in bad.failures["judge"]


def test_a_judge_that_is_down(judges: Judges) -> None:
    [graded] = grade(judges, ["good"], address="http://127.0.0.1:9/v1", canaries=True)
    assert "APIConnectionError" in graded.failures["judge"]


def test_retries_cache_and_budget(judges: Judges, tmp_path: Path) -> None:
    replies: list[str | int] = [503, "[[10]]"]
    judges.reply = lambda prompt: replies.pop(0)
    cache = str(tmp_path / "deep" / "cache.db")
    assert grade(judges, ["good"], retries=1, cache=cache)[0].total == 1.0
    assert grade(judges, ["good"], cache=cache)[0].total == 1.0  # nothing is left to reply
    judges.reply = by_quality
    grades = grade(judges, ["good", "good 1", "good 2"], cache=cache, budget=1, concurrency=1)
    assert [g.masked for g in grades] == [False, False, True]
    assert "budget" in grades[2].failures["judge"]


def test_bad_parameters(tmp_path: Path) -> None:
    def load(**args: Any) -> None:
        load_rewards([RewardConfig(name="judge", args={"address": "http://x/v1", "model": "m", **args})])

    with pytest.raises(UserError, match=r"args.rubrik is no parameter of it; did you mean 'rubric'\?"):
        load(rubrik="x")
    with pytest.raises(UserError, match=r"args.mode: input should be 'grade' or 'compare', found 'pair'"):
        load(mode="pair")
    with pytest.raises(UserError, match=r"args\.prompt: KeyError"):
        load(prompt="{question}")
    (tmp_path / "file").write_text("no database" * 100)
    with pytest.raises(UserError, match=r"args.cache: .* not a database"):
        load(cache=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"args.model is missing; its parameters: address, model"):
        load_rewards([RewardConfig(name="judge", args={"address": "http://x/v1"})])
