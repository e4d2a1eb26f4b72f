"""A safety filter as ASGI middleware of vLLM's server: what is asked and what is answered, streams included."""

import asyncio
import json
import os
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from pydantic import Field, PositiveInt

from megatron_posttrain.config.load import load_config
from megatron_posttrain.config.schema import RewardConfig, Section
from megatron_posttrain.rewards import Sample, compute_rewards, load_rewards

FILE = "MEGATRON_POSTTRAIN_FILTER"  # environment variable: vLLM makes the middleware without arguments
Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
# Fields of requests and replies that are no text of a user or a model.
NAMES = {"id", "model", "object", "role", "type", "finish_reason", "system_fingerprint", "item_id", "request_id"}
ANSWER = "the answer was refused by the safety filter"
NO_TEXT = {"token_ids", "prompt_token_ids", "prompt_embeds"}  # what cannot be read is refused


class SafetyFilter(Section):
    patterns: list[re.Pattern[str]] = Field([], description="regular expressions that no text may match")
    classifier: RewardConfig | None = Field(
        None, description="a reward, as {name: unsafe, file: filter.py}: a text that it gives more than 0.5, or fails "
        "on, is refused; it finds the text in `response`, and input or output in `metadata['side']`"
    )  # fmt: skip
    hold: PositiveInt = Field(200, description="characters of a stream that wait for what follows them")


def texts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The texts in a JSON document and where each is; elements of lists count by their `index`, as streams do."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in NAMES or not isinstance(item, str):
                yield from texts(item, (*path, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            index = item.get("index", position) if isinstance(item, dict) else position
            yield from texts(item, (*path, index))


def unreadable(value: Any) -> bool:
    """Whether a request has tokens or embeddings in place of text."""
    if isinstance(value, dict):
        prompt = value.get("prompt")
        numbers = isinstance(prompt, list) and any(not isinstance(item, str) for item in prompt)
        return numbers or any((k in NO_TEXT and bool(v)) or unreadable(v) for k, v in value.items())
    return isinstance(value, list) and any(map(unreadable, value))


class SafetyMiddleware:
    """Answers 400 (in a stream: an event) with the error code `content_filter` where the filter finds something.

    Every POST is looked at whatever its route, so that there is no way round; images and sound are not.
    """

    def __init__(self, app: Any) -> None:
        self._app, self.rules = app, load_config(SafetyFilter, os.environ[FILE])
        self._rewards = load_rewards([self.rules.classifier] if self.rules.classifier else [])

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            asked = json.loads(body) if body else None
        except ValueError:
            return await _refuse(send, "the request is no JSON")
        if unreadable(asked):
            return await _refuse(send, "tokens and embeddings cannot be read by the safety filter; send text")
        if await self.finds("\n".join(text for _, text in texts(asked)), "input"):
            return await _refuse(send, "the request was refused by the safety filter")
        first = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(first, None) or await receive()

        await self._app(scope, again, _Reply(self, send))

    async def finds(self, text: str, side: str) -> bool:
        if any(pattern.search(text) for pattern in self.rules.patterns):
            return True
        if not self._rewards or not text:
            return False
        sample = Sample([], text, metadata={"side": side}, final=text)
        [grade] = await asyncio.to_thread(compute_rewards, [sample], self._rewards)
        return bool(grade.failures) or grade.total > 0.5


class _Reply:
    """`send` of a reply: a whole one waits for its end, a stream's events for `hold` characters after them."""

    def __init__(self, middleware: SafetyMiddleware, send: Send) -> None:
        self._middleware, self._send = middleware, send
        self._start: Message = {}  # until it is sent
        self._rest, self._stream, self._refused = b"", False, False
        self._said: dict[tuple[Any, ...], str] = defaultdict(str)
        self._events: list[tuple[bytes, int]] = []  # that wait, and the characters up to the end of each
        self._length = self._checked = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            self._stream = b"text/event-stream" in dict(message["headers"]).get(b"content-type", b"")
            return
        self._rest += message.get("body", b"")
        last, hold = not message.get("more_body", False), self._middleware.rules.hold
        if self._refused or not (self._stream or last):
            return
        *events, self._rest = self._rest.split(b"\n\n") if self._stream else (self._rest, b"")
        for event in filter(None, [*events, *([self._rest] if last else [])]):
            for path, text in texts(_document(event.partition(b"data:")[2] if self._stream else event)):
                self._said[path] += text
                self._length += len(text)
            self._events.append((event + b"\n\n" if self._stream else event, self._length))
        if not last and self._length < self._checked + 2 * hold:
            return
        self._refused = await self._middleware.finds("\n".join(self._said.values()), "output")
        ready = [event for event, end in self._events if last or end <= self._length - hold]
        self._events, self._checked = self._events[len(ready) :], self._length - hold
        if self._refused and self._start:  # nothing was sent
            return await _refuse(self._send, ANSWER)
        if self._start and (ready or last):
            await self._send(self._start)
            self._start = {}
        if self._refused:
            ready, last = [b"data: " + _error(ANSWER) + b"\n\n"], True
        if ready or last:
            await self._send({"type": "http.response.body", "body": b"".join(ready), "more_body": not last})


def _document(data: bytes) -> Any:
    """What JSON says, else the text; nothing of the mark that ends a stream."""
    try:
        return json.loads(data)
    except ValueError:
        return None if data.strip() == b"[DONE]" else data.decode("utf-8", "replace")


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "content_filter", "code": "content_filter"}}).encode()


async def _refuse(send: Send, message: str) -> None:
    body = _error(message)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
