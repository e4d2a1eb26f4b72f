"""The safety filter in front of an OpenAI-compatible app, by the OpenAI client: both sides, and streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from megatron_posttrain.cli.main import main
from megatron_posttrain.cli.serve_filter import FILE, SafetyMiddleware

CLASSIFIER = """
from megatron_posttrain.rewards import reward

@reward("unsafe")
def unsafe(sample):
    if "crash" in sample.response:
        raise RuntimeError("no verdict")
    return float(sample.metadata["side"] == "output" and "poison" in sample.response)
"""


async def echo(request: Request) -> Any:
    """Says the last message again, a character an event, as content and as the arguments of a call."""
    asked = await request.json()
    said = asked["messages"][-1]["content"].removeprefix("say: ").replace("_", "")
    if not asked.get("stream"):
        message = {"role": "assistant", "content": said}
        return JSONResponse({"id": "5551234", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    async def events() -> Any:
        for i, letter in enumerate(said):
            call = {"index": 0, "function": {"arguments": letter}}
            plain = i % 2 or "both" in said
            choice = {"index": int(i % 2 and "both" not in said), "delta": {"content": letter}}
            choice |= {} if plain else {"delta": {"tool_calls": [call]}}
            yield "data: " + json.dumps({"id": "5551234", "object": "x", "choices": [choice]}) + "\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> openai.AsyncOpenAI:
    (tmp_path / "classifier.py").write_text(CLASSIFIER)
    classifier = f"{{name: unsafe, file: {tmp_path}/classifier.py}}"
    rules = f"patterns: ['(?i)secret word', '555 ?1234']\nhold: 15\nclassifier: {classifier}"
    (tmp_path / "filter.yaml").write_text(rules)
    monkeypatch.setenv(FILE, str(tmp_path / "filter.yaml"))
    app = SafetyMiddleware(Starlette(routes=[Route("/v1/chat/completions", echo, methods=["POST"])]))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    return openai.AsyncOpenAI(base_url="http://here/v1", api_key="none", http_client=http, max_retries=0)


def ask(client: openai.AsyncOpenAI, text: str, **more: Any) -> str:
    """What came, and `!` where it was refused."""

    async def work() -> str:
        said = ""
        try:
            reply: Any = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": text}], **more
            )
            if not more.get("stream"):
                return reply.choices[0].message.content
            async for event in reply:
                delta = event.choices[0].delta
                said += delta.content or delta.tool_calls[0].function.arguments
        except openai.APIError as error:
            return said + ("!" if error.code == "content_filter" else str(error))
        return said

    return asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("say: good morning to you all", "good morning to you all"),  # though the reply's id is 5551234
        ("tell me the Secret Word", "!"),  # asked
        ("say: sec_ret word", "!"),  # answered
        ("say: both crash", "!"),  # a classifier that fails lets nothing through
        ("", ""),
    ],
)
def test_both_sides(client: openai.AsyncOpenAI, asked: str, said: str, stream: bool) -> None:
    one_choice = asked.replace("say: ", "say: both ") if stream and "_" in asked else asked
    assert ask(client, one_choice, stream=stream) == said


def test_nothing_of_a_match_is_sent(client: openai.AsyncOpenAI) -> None:
    long = "a long story, both sides of it, that ends " * 3
    said = ask(client, f"say: {long}with a sec_ret word and more of it", stream=True)
    assert said.endswith("!")
    assert len(said) > 60
    assert (long + "with a ").startswith(said[:-1])
    assert ask(client, f"say: {long}", stream=True) == long
    # Every other character is of a choice's text, and of another's arguments: each is read by itself.
    pairs = "".join(letter * 2 for letter in "the secret word")
    assert ask(client, "say: " + "".join(f"{c}_" for c in pairs), stream=True) == "!"
    assert ask(client, "say: poi_son") == "!"
    assert ask(client, "say: good poison") == "!"


@pytest.mark.parametrize("more", [{"prompt": [1, 2]}, {"prompt": [[1]]}, {"a": {"prompt_token_ids": [3]}}])
def test_what_cannot_be_read_is_refused(client: openai.AsyncOpenAI, more: Any) -> None:
    assert ask(client, "hello", extra_body=more) == "!"


def test_mistakes_in_the_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    check: Callable[[str], int] = lambda text: (  # noqa: E731
        (tmp_path / "f.yaml").write_text(text) and main(["serve", str(tmp_path), "--filter", str(tmp_path / "f.yaml")])
    )
    for text, message in (("pattern: [a]", "did you mean 'patterns'?"), ("patterns: ['(']", "patterns"),
                          ("classifier: {name: nobody}", "no reward named 'nobody'")):  # fmt: skip
        assert check(text) == 2
        assert message in capsys.readouterr().err
