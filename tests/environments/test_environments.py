"""Conversations of several turns: tokens, masks, tools, slow and broken ones, limits of reasoning."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_posttrain import sandbox
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.config.schema import EnvironmentConfig
from megatron_posttrain.environments import Call, Done, Turn, load_environment
from megatron_posttrain.errors import UserError
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.rollout.engine import Sampling
from megatron_posttrain.rollout.turns import Episode, Turns, converse, load_turns
from tests.helpers.chat_tokenizers import CHATML
from tests.helpers.tool_models import CALL, Scripted, prompt_of, tool_tokenizer

END = "<|im_end|>"


@pytest.fixture(autouse=True, scope="module")
def world() -> None:
    start_distributed()


def spec(name: str, file: Path | None = None, **rest: Any) -> EnvironmentConfig:
    return EnvironmentConfig(name=name, file=None if file is None else str(file), **rest)


def talk(environment: Any, say: Any, questions: list[str], limit: int = 400, **rest: Any) -> tuple[Any, list[Episode]]:
    tokenizer = tool_tokenizer()
    engine: Any = Scripted(tokenizer, say)
    turns = Turns(environment, "hermes" if environment.tools else None, **{"max_turns": 4, "seconds": 5.0, **rest})
    prompts = [prompt_of(tokenizer, question, environment.tools) for question in questions]
    ends = (tokenizer.convert_tokens_to_ids(END),)
    sampling = Sampling(max_tokens=limit, stop_token_ids=ends)
    return engine, conversed(engine, tokenizer, prompts, sampling, range(len(prompts)), turns)


def conversed(
    engine: Any, tokenizer: Any, prompts: list[Any], sampling: Any, seeds: Any, turns: Turns
) -> list[Episode]:
    episodes = [Episode(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert converse(engine, tokenizer, episodes, sampling, turns) == list(range(len(episodes)))
    return episodes


def calculating(text: str) -> str:
    """Asks the calculator for the question's sum, and repeats its answer."""
    found = re.search(r"<tool_response>(.*?)</tool_response>", text)
    question = re.search(r"user\n([^<\s]+)", text)
    assert question is not None
    return (f"It is {found[1]}." if found else f"Let me see. {CALL % question[1]}") + END


def test_turns_are_the_templates_and_only_the_models_tokens_count() -> None:
    engine, (short, long) = talk(load_environment(spec("calculator")), calculating, ["2+3", "17*(4+5)"])
    tokenizer = engine.tokenizer
    assert len(engine.asked) == 4  # two turns each
    for episode, result in ((short, "5"), (long, "153")):
        asked = episode.prompt.messages[0]["content"]
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": f"Let me see. {CALL % asked}"},
            {"role": "tool", "name": "calculator", "content": result},
            {"role": "assistant", "content": f"It is {result}."},
        ]
        assert [*episode.prompt.messages, *episode.messages] == messages
        tools = episode.prompt.options["tools"]
        whole = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
        ids = episode.prompt.token_ids + episode.token_ids
        assert ids == whole[: len(ids)]
        assert tokenizer.decode(whole[len(ids) :]) == "\n"  # which templates write behind a turn
        drawn = [token for token, p in zip(episode.token_ids, episode.logprobs, strict=True) if not math.isnan(p)]
        assert tokenizer.decode(drawn) == f"{messages[1]['content']}{END}{messages[3]['content']}{END}"
        assert any(prompt == ids[: len(prompt)] for prompt in engine.asked[2:])  # no token was made anew
        assert episode.metrics["environment/tool_calls"] == 1
    assert short.logprobs[0] != short.logprobs[-1]  # each round has its own seed


def test_a_sample_is_the_same_whatever_is_drawn_beside_it() -> None:
    environment = load_environment(spec("calculator"))
    _, together = talk(environment, calculating, ["2+3", "17*(4+5)"])
    _, alone = talk(environment, calculating, ["2+3"])
    assert str(together[0].logprobs) == str(alone[0].logprobs)
    assert together[0].token_ids == alone[0].token_ids


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('<tool_call>{"name": "calculator", "argum</tool_call>', "a call must be JSON"),
        ('<tool_call>["calculator"]</tool_call>', "a call must be JSON"),
        ('<tool_call>{"name": "calculater", "arguments": {}}</tool_call>', "did you mean 'calculator'"),
        ('<tool_call>{"name": "calculator", "arguments": {"x": 1}}</tool_call>', "expression: Missing"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": [1]}}</tool_call>', "valid string"),
        (CALL % "1/0", "ZeroDivisionError"),
        (CALL % "__import__('os')", "is not arithmetic"),
        (CALL % "9**9**9**9", "too large"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": "1"}}', None),  # not closed: still a call
    ],
)
def test_a_model_is_told_what_was_wrong_with_its_call(said: str, told: str | None) -> None:
    def say(text: str) -> str:
        return ("never mind" if "<tool_response>" in text else said) + END

    _, [episode] = talk(load_environment(spec("calculator")), say, ["?"])
    content = episode.messages[1]["content"]
    assert content == "1" if told is None else content.startswith("error: ") and told in content
    assert episode.metrics["environment/tool_errors"] == (told is not None)
    assert episode.messages[-1]["content"] == "never mind"


MINE = '''
import time
from megatron_posttrain.environments import Done, ToolEnvironment, environment
from megatron_posttrain.rewards import reward


@reward("also here")
def also(sample):
    return 1.0


@environment("slow")
class Slow(ToolEnvironment):
    def __init__(self, *, seconds: float):
        self.wait = seconds
        super().__init__(self.calculator)

    def calculator(self, expression: str) -> str:
        """Waits.

        Args:
            expression: What to say.
        """
        time.sleep(self.wait if "slow" in expression else 0)
        return expression


@environment("game")
class Game:
    def start(self, prompt):
        return {"left": 3}

    def reply(self, state, turn):
        if turn.text == "boom":
            raise ValueError("broken")
        if turn.text == "nonsense":
            return "hello"
        if turn.text == "sleep":
            time.sleep(60)
        state["left"] -= 1
        return [{"role": "user", "content": f"{state['left']} left"}] if state["left"] else Done(reward=0.5)


@environment("half")
class Half:
    def start(self, prompt):
        return None
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_a_slow_tool_holds_up_nobody_else(mine: Path) -> None:
    environment = load_environment(spec("slow", mine, args={"seconds": 1.5}))
    engine, episodes = talk(environment, calculating, ["slow", "quick"])
    assert ["quick" in engine.tokenizer.decode(prompt) for prompt in engine.asked[2:]] == [True, False]
    assert [episode.messages[-1]["content"] for episode in episodes] == ["It is slow.", "It is quick."]


def test_a_tool_that_never_returns_is_an_error_that_the_model_is_told(mine: Path) -> None:
    environment = load_environment(spec("slow", mine, args={"seconds": 100.0}))
    start = time.monotonic()
    _, [episode] = talk(environment, calculating, ["slow"], seconds=0.3)
    assert time.monotonic() - start < 20
    assert episode.messages[1]["content"] == "error: took longer than 0.3 s"
    assert (episode.metrics["environment/late"], episode.metrics["environment/tool_errors"], episode.failure) == (
        1,
        1,
        "",
    )


def test_an_environment_of_plain_turns_and_what_is_wrong_with_its_replies(mine: Path) -> None:
    def say(text: str) -> str:
        return ("go" if "left" in text else re.findall(r"user\n(\S+)<", text)[0]) + END

    environment = load_environment(spec("game", mine))
    engine, episodes = talk(environment, say, ["go", "boom", "nonsense", "sleep"], seconds=0.5)
    assert engine.tokenizer.decode(episodes[0].token_ids) == (
        f"go{END}\n<|im_start|>user\n2 left{END}\n<|im_start|>assistant\ngo{END}\n"
        f"<|im_start|>user\n1 left{END}\n<|im_start|>assistant\ngo{END}"
    )
    assert (episodes[0].reward, episodes[0].failure, episodes[0].turn) == (0.5, "", 3)
    assert [bool(episode.failure) for episode in episodes] == [False, True, True, True]
    assert "ValueError: broken" in episodes[1].failure
    assert "must be a list" in episodes[2].failure
    assert "longer than 0.5 s" in episodes[3].failure
    _, [cut] = talk(environment, say, ["go"], max_turns=2)
    assert (cut.reward, cut.turn, cut.metrics["environment/out_of_turns"], len(cut.messages)) == (0.0, 2, 1, 3)
    _, [full] = talk(environment, say, ["go"], limit=20)  # no room behind the environment's words
    assert (full.finish_reason, full.turn, math.nan in full.logprobs) == ("length", 1, False)


def test_reasoning_is_ended_at_its_limit() -> None:
    def say(text: str) -> str:
        said = text.split("assistant\n")[-1]
        if "quick" in text and "<think>" not in said:
            return f"<think>a</think>{'b' * 30}{END}"
        return ("b" * (29 if "quick" in text else 3) if "</think>" in said else f"<think>{'x' * 90}") + END

    tokenizer = tool_tokenizer()
    engine: Any = Scripted(tokenizer, say)
    prompts = [prompt_of(tokenizer, question, []) for question in ("long", "quick")]
    turns = Turns(thinking_tokens=10, thinking_stop=" stop ")
    sampling = Sampling(max_tokens=60, stop_token_ids=(tokenizer.convert_tokens_to_ids(END),))
    long, quick = conversed(engine, tokenizer, prompts, sampling, [1, 2], turns)
    assert tokenizer.decode(long.token_ids) == f"<think>{'x' * 9} stop </think>\n\nbbb{END}"
    inserted = [token for token, p in zip(long.token_ids, long.logprobs, strict=True) if math.isnan(p)]
    assert tokenizer.decode(inserted) == " stop </think>\n\n"
    assert not any(map(math.isnan, quick.logprobs))  # its reasoning had ended
    assert (long.metrics["thinking_stopped"], quick.metrics["thinking_stopped"]) == (1, 0)
    sampling = Sampling(max_tokens=19, stop_token_ids=sampling.stop_token_ids)
    cut, _ = conversed(engine, tokenizer, prompts, sampling, [1, 2], turns)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 10)


def test_mistakes(mine: Path, tmp_path: Path) -> None:
    for wrong, said in (
        (spec("calculater"), "environment.name: no environment named 'calculater'; did you mean 'calculator'?"),
        (spec("calculator", args={"digits": 3}), "args.digits is no parameter of it"),
        (spec("slow", mine), "args.seconds is missing"),
        (spec("also here", mine), "no environment named 'also here'; allowed: game, half, slow"),
        (spec("half", mine), "has no method reply"),
        (spec("search"), "args.files is missing"),
        (spec("search", args={"files": ["nowhere.txt"]}), "No such file"),
        (spec("game", tmp_path / "none.py"), "no such file (environment 'game')"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            load_environment(wrong)
    values: dict[str, Any] = {"model": {"path": "-"}, "data": {"train": "-"}, "output": "-"}
    config = GrpoConfig.model_validate(values | {"environment": {"name": "calculator"}})
    with pytest.raises(UserError, match="writes tool calls in a form that is not known here"):
        load_turns(config.environment, config.rollout, tool_tokenizer(CHATML))
    assert load_turns(config.environment, config.rollout, tool_tokenizer()).form == "hermes"
    thinking = GrpoConfig.model_validate(values | {"rollout": {"thinking_tokens": 2000}})
    assert any("has no effect beside rollout.max_tokens=1024" in problem for problem in thinking.problems(1))
    graded = GrpoConfig.model_validate(values | {"rewards": [{"name": "environment"}]})
    assert any("set `environment`" in problem for problem in graded.problems(1))


def test_search_ranks_as_the_formula(tmp_path: Path) -> None:
    texts = ["The cat sat on the mat.", "A dog and a cat.", "Dogs bark; the dog barks at the dog.", "Nothing here."]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    environment: Any = load_environment(spec("search", args={"files": [str(tmp_path)], "results": 1}))
    split = [re.findall(r"\w+", text.lower()) for text in texts]
    mean = sum(map(len, split)) / len(split)
    expected = {}
    for i, words in enumerate(split):
        score = 0.0
        for word in ("dog", "cat"):
            n = sum(word in other for other in split)
            f = words.count(word)
            score += math.log(1 + (4 - n + 0.5) / (n + 0.5)) * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words) / mean))
        expected |= {i: score} if score else {}
    assert environment.scores("dog cat") == pytest.approx(expected, abs=1e-12)
    turn = Turn("", "", (Call("search", {"query": "dog cat"}), Call("search", {"query": "zebra"})))
    said = environment.reply(None, turn)
    assert [message["content"] for message in said] == [texts[1], "nothing found"]
    assert environment.reply(None, Turn("", "")) == Done()


@pytest.mark.skipif(sandbox.why_unavailable() is not None, reason="programs cannot be isolated here")
def test_python_runs_in_the_sandbox() -> None:
    environment: Any = load_environment(spec("python", args={"seconds": 2.0}))
    programs = ["print(6 * 7)", "print(1)\n1 / 0", "open('/etc/passwd')", "while True: pass", "print('x' * 9000)"]
    said = environment.reply(None, Turn("", "", tuple(Call("python", {"code": code}) for code in programs)))
    answers = [message["content"] for message in said]
    assert answers[0] == "42\n"
    assert answers[1] == "error: ZeroDivisionError: division by zero\nprinted: 1\n"
    assert answers[2].startswith("error: ")
    assert answers[3] == "error: timeout"
    assert "characters left out" in answers[4]
    assert len(answers[4]) < 4100
