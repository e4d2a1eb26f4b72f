"""Conversations of several turns: the engine's tokens and an environment's, one behind the other.

A conversation whose environment has answered joins those that the engine runs, so that none holds up the others. Tokens
of the model are the engine's own and are never made anew from text.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_posttrain.config.schema import EnvironmentConfig, RolloutConfig
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.messages import BadRow, Message
from megatron_posttrain.environments.dialogue import CallForm, check_dialogue, following_tokens, read_calls
from megatron_posttrain.environments.protocol import ERROR, Done, Environment, Turn, load_environment, tool_messages
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.grading import in_thread
from megatron_posttrain.rewards.registry import last_line
from megatron_posttrain.rewards.response import REASONING
from megatron_posttrain.rollout.engine import Completion, Request, RolloutEngine, Sampling
from megatron_posttrain.rollout.handout import Handout
from megatron_posttrain.rollout.in_flight import InFlight
from megatron_posttrain.rollout.text import response_text, split_response, stop_token_ids


@dataclass(frozen=True)
class Turns:
    """How conversations go on after a completion; these: not at all. `seconds`: that an environment may take;
    `thinking_tokens`: of a turn, after which its reasoning is ended with `thinking_stop`."""

    environment: Environment | None = None
    form: CallForm | None = None
    max_turns: int = 1
    seconds: float = math.inf
    thinking_tokens: int | None = None
    thinking_stop: str = ""
    repetitions: int | None = None  # of the same tokens that end a turn

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [] if self.environment is None else self.environment.tools

    @property
    def metrics(self) -> list[str]:
        """Names of what episodes count."""
        counted = ("turns", "tool_calls", "tool_errors", "late", "out_of_turns", "failed") if self.environment else ()
        stopped = {"thinking_stopped": self.thinking_tokens, "repetition_stopped": self.repetitions}
        return [*(name for name, limit in stopped.items() if limit), *(f"environment/{name}" for name in counted)]


ONE_TURN = Turns()
Answer = tuple[list[int], list[Message], float, str]  # tokens and messages (none: it is over), reward, failure


@dataclass
class Episode:
    """A sample: what follows a prompt, of the model and of the environment."""

    prompt: Prompt
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # the engine's; NaN of a token that the model did not draw
    experts: list[NDArray[Any]] = field(default_factory=list)  # of the tokens that each round computed first
    finish_reason: Literal["stop", "length", "cut"] = "cut"  # cut: it has no end yet
    messages: list[Message] = field(default_factory=list)  # on the first rank of a replica, with an environment
    reward: float = 0.0
    failure: str = ""  # of the environment: the sample must not train
    metrics: Counter[str] = field(default_factory=Counter)
    state: Any = None
    version: int = sys.maxsize  # of the oldest weights that drew a token of it
    begun: int = 0  # where in `token_ids` the model's present turn begins
    turn: int = 1
    rounds: int = 0
    thinks: bool = True  # the present turn may yet come to the limit of its reasoning

    @property
    def asked(self) -> list[int]:
        """Tokens before the present turn."""
        return self.prompt.token_ids + self.token_ids[: self.begun]

    @property
    def said(self) -> list[int]:
        """Tokens of the present turn."""
        return self.token_ids[self.begun :]

    def next_seed(self) -> int:
        """It depends on the sample's seed and the round alone."""
        self.rounds += 1
        later = np.random.SeedSequence([self.seed, self.rounds]).generate_state(1)
        return self.seed if self.rounds == 1 else int(later[0]) >> 1

    def insert(self, tokens: Sequence[int], limit: int) -> bool:
        """Tokens that the model did not draw. False, and the sample is cut off, where they leave no room behind."""
        if len(self.token_ids) + len(tokens) >= limit:
            self.finish_reason = "length"
            return False
        self.token_ids += tokens
        self.logprobs += [math.nan] * len(tokens)
        return True


def converse(
    rollout: RolloutEngine,
    tokenizer: Any,
    episodes: Sequence[Episode],
    sampling: Sampling,
    turns: Turns = ONE_TURN,
    handout: Handout | None = None,
    ended: Callable[[int], None] = lambda number: None,
    in_flight: InFlight | None = None,
) -> list[int]:
    """Collective over a replica: carries `episodes` on to their ends; `sampling.max_tokens` bounds all turns of one.

    `handout`: which of them are this replica's; None: an equal share, and of what is left as many as it has room for.
    `ended` is told the number of each that has come to its end, while others go on. `in_flight`: orders that are
    followed meanwhile. Returns numbers of the episodes that it has had, in their order. Some were cut off where the
    handout had enough.
    """
    handout = handout or Handout(rollout, len(episodes), 1)
    conversations = _Conversations(rollout, tokenizer, episodes, sampling, turns, handout, ended)
    if in_flight is None:
        rollout.run(conversations.feed, conversations.take, sampling, handout.enough)
    else:
        going, stops = True, lambda: handout.enough() or in_flight.due()
        while going:
            rollout.run(conversations.feed, conversations.take, sampling, stops)
            going = in_flight.go_on()
    return sorted(conversations.own)


@dataclass
class _Conversations:
    """The work of an engine: conversations that it draws the next turn of, or that wait for their environment."""

    rollout: RolloutEngine
    tokenizer: Any
    episodes: Sequence[Episode]
    sampling: Sampling
    turns: Turns
    handout: Handout
    ended: Callable[[int], None]
    own: list[int] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    pending: dict[int, Future[Any] | None] = field(default_factory=dict)  # a future on the first rank of the replica

    def feed(self, room: int, idle: bool) -> dict[int, Request]:
        while taken := self.handout.take(room - len(self.ready)):
            self.own += taken
            for i in taken:
                if self.episodes[i].finish_reason == "cut":
                    self.ready.append(i)
                else:  # it has ended in an earlier step, as the rest of its prompt had not
                    self.end(i)
        while self.pending:
            self._hear(wait_for_one=idle and not self.ready)
            if self.ready or not idle:
                break
        now, self.ready = self.ready[:room], self.ready[room:]
        return {i: self._request(self.episodes[i]) for i in now}

    def take(self, name: int, completion: Completion) -> None:
        e = self.episodes[name]
        e.token_ids += completion.token_ids
        e.logprobs += completion.logprobs
        e.version = min(e.version, self.rollout.version)
        if completion.experts is not None:
            e.experts.append(completion.experts[sum(map(len, e.experts)) :])
        repeats = completion.finish_reason == "repetition"
        e.metrics["repetition_stopped"] += repeats
        e.finish_reason = "length" if completion.finish_reason == "repetition" else completion.finish_reason
        if e.finish_reason == "stop" and self.turns.environment is not None:
            self.pending[name] = self.ask(e) if dist.get_rank() % self.rollout.tensor == 0 else None
        elif e.finish_reason == "cut" or (e.finish_reason == "length" and not repeats and self.stop_thinking(e)):
            self.ready.append(name)
        else:
            self.end(name)

    def end(self, number: int) -> None:
        self.handout.complete(number)
        self.ended(number)

    def _request(self, e: Episode) -> Request:
        left, thinking = self.sampling.max_tokens - len(e.token_ids), self.turns.thinking_tokens
        limit = min(left, max(1, thinking - len(e.said))) if thinking and e.thinks else left
        return Request(e.prompt.token_ids + e.token_ids, e.next_seed(), limit)

    def _hear(self, *, wait_for_one: bool) -> None:
        """What environments have answered; conversations that wait for theirs hold up no others."""
        first = dist.get_rank() % self.rollout.tensor == 0
        if wait_for_one and first:
            wait(set(self.pending.values()), return_when=FIRST_COMPLETED)  # type: ignore[arg-type]
        done = {i: future for i, future in self.pending.items() if future is not None and future.done()}
        answers = self.rollout.share({i: self.answer(self.episodes[i], future) for i, future in sorted(done.items())})
        for i, answer in answers.items():
            del self.pending[i]
            if self.go_on(self.episodes[i], *answer):
                self.ready.append(i)
            else:
                self.end(i)

    def stop_thinking(self, e: Episode) -> bool:
        """Ends the reasoning of a turn that is at its limit; whether the turn goes on."""
        if self.turns.thinking_tokens is None or not e.thinks:
            return False
        e.thinks = False
        asked = response_text(self.tokenizer, e.asked[-32:]).rstrip()
        text = response_text(self.tokenizer, e.said)
        opened = (begin + text if asked.endswith(begin) else text for begin, _ in REASONING)
        pairs = zip(opened, REASONING, strict=True)
        tag = next((end for said, (begin, end) in pairs if begin in said and end not in said), "")
        words = f"{self.turns.thinking_stop}{tag}\n\n" if tag else ""
        e.metrics["thinking_stopped"] += bool(tag)
        return e.insert(self.tokenizer(words, add_special_tokens=False)["input_ids"], self.sampling.max_tokens)

    def ask(self, e: Episode) -> Future[Any]:
        """The environment's reply to the present turn, in a thread."""
        environment, text = self.turns.environment, response_text(self.tokenizer, e.said)
        assert environment is not None
        final = split_response(self.tokenizer, e.asked, e.said, text)[1]
        turn = Turn(text, final, read_calls(self.turns.form, final))
        e.messages.append({"role": "assistant", "content": text})
        e.metrics.update({"environment/turns": 1, "environment/tool_calls": len(turn.calls)})

        def reply(turn: Turn) -> list[Message] | Done:
            e.state = environment.start(e.prompt) if e.turn == 1 else e.state
            return environment.reply(e.state, turn)

        return in_thread(reply, turn, self.turns.seconds)

    def answer(self, e: Episode, future: Future[Any]) -> Answer:
        try:
            reply = future.result()
        except TimeoutError:
            e.metrics["environment/late"] += 1
            why = f"took longer than {self.turns.seconds:g} s"
            calls = read_calls(self.turns.form, e.messages[-1]["content"])
            reply = tool_messages(calls, [ERROR + why] * len(calls))
            if not calls:
                return [], [], 0.0, why
        except Exception as error:
            return [], [], 0.0, last_line(error)
        if isinstance(reply, Done):
            return [], [], float(reply.reward), ""
        ends, prompt = self.sampling.stop_token_ids, e.prompt
        try:
            return following_tokens(self.tokenizer, prompt.options, prompt.messages, reply, ends), reply, 0.0, ""
        except BadRow as error:
            return [], [], 0.0, str(error)

    def go_on(self, e: Episode, tokens: list[int], messages: list[Message], reward: float, failure: str) -> bool:
        """Whether the model has another turn."""
        e.reward, e.failure = reward, failure
        errors = sum(m["role"] == "tool" and str(m["content"]).startswith(ERROR) for m in messages)
        out_of_turns = bool(messages) and e.turn == self.turns.max_turns
        e.metrics["environment/tool_errors"] += errors
        e.metrics["environment/out_of_turns"] += out_of_turns
        e.metrics["environment/failed"] += bool(failure)
        if not messages or out_of_turns or not e.insert(tokens, self.sampling.max_tokens):
            return False
        e.messages += messages
        e.begun, e.turn, e.thinks = len(e.token_ids), e.turn + 1, True
        return True


def load_turns(
    spec: EnvironmentConfig | None, rollout: RolloutConfig, tokenizer: Any, *, unsafe: bool = False
) -> Turns:
    """As the config says. Raises UserError for an environment that cannot be made or that the template cannot carry."""
    limit, stop = rollout.thinking_tokens, rollout.thinking_stop
    known = f"{tokenizer.chat_template} {' '.join(tokenizer.get_added_vocab())}"
    if limit is not None and not any(begin in known for begin, _ in REASONING):
        raise UserError(
            f"rollout.thinking_tokens={limit}: neither the chat template nor the tokens of {tokenizer.name_or_path} "
            f"begin reasoning; known: {', '.join(begin for begin, _ in REASONING)}"
        )
    if spec is None:
        return Turns(thinking_tokens=limit, thinking_stop=stop, repetitions=rollout.repetitions)
    environment = load_environment(spec, unsafe=unsafe)
    form = check_dialogue(tokenizer, environment, stop_token_ids(tokenizer))
    return Turns(environment, form, spec.max_turns, spec.seconds, limit, stop, rollout.repetitions)
