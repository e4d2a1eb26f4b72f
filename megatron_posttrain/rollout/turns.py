"""Conversations of several turns: the engine's tokens and an environment's, one behind the other.

A round generates for all conversations whose environment has answered. Those that wait for it join a later one, so
that none holds up the others. Tokens of the model are the engine's own and are never made anew from text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch.distributed as dist

from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.messages import BadRow, Message
from megatron_posttrain.environments.dialogue import CallForm, check_dialogue, following_tokens, read_calls
from megatron_posttrain.environments.protocol import ERROR, Done, Environment, Turn, load_environment, tool_messages
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.grading import in_thread
from megatron_posttrain.rewards.registry import last_line
from megatron_posttrain.rewards.response import REASONING
from megatron_posttrain.rollout.engine import RolloutEngine, Sampling
from megatron_posttrain.rollout.text import response_text, split_response, stop_token_ids

PATIENCE = 2.0  # seconds without any answer after which a round goes on without those that are missing
_NOT_STARTED = object()


@dataclass(frozen=True)
class Turns:
    """How conversations go on after a completion of the model; these: not at all.

    Attributes:
        form: of the tool calls of the environment.
        seconds: after which an environment's answer is an error that the model is told.
        thinking_tokens: of a turn after which reasoning is ended with `thinking_stop`; None: never.
    """

    environment: Environment | None = None
    form: CallForm | None = None
    max_turns: int = 1
    seconds: float = math.inf
    thinking_tokens: int | None = None
    thinking_stop: str = ""

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [] if self.environment is None else self.environment.tools


ONE_TURN = Turns()


@dataclass
class Answer:
    """What follows a turn, as the first rank of a replica tells the others."""

    tokens: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    done: bool = False
    reward: float = 0.0
    failure: str = ""  # why there is no answer
    late: bool = False


@dataclass
class Episode:
    """A sample: all that follows a prompt.

    Attributes:
        token_ids: of the model and of the environment.
        logprobs: the engine's, of the distribution that a token was drawn from; NaN of a token that was not drawn.
        messages: the turns, on the first rank of a replica, where there is an environment.
        begun: where in `token_ids` the present turn of the model begins.
        failure: of the environment: the sample must not train.
    """

    prompt: Prompt
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "stop"
    messages: list[Message] = field(default_factory=list)
    begun: int = 0
    reward: float = 0.0
    failure: str = ""
    metrics: Counter[str] = field(default_factory=Counter)
    state: Any = _NOT_STARTED
    rounds: int = 0
    turn: int = 1
    budgeted: bool = True  # the present turn may yet come to the limit of its reasoning

    def next_seed(self) -> int:
        """Of the next completion: it depends on the sample's seed and the round alone."""
        self.rounds += 1
        more = np.random.SeedSequence([self.seed, self.rounds]).generate_state(1)
        return self.seed if self.rounds == 1 else int(more[0]) >> 1

    def insert(self, tokens: Sequence[int], limit: int) -> bool:
        """Tokens that the model did not draw. False, and the sample is cut off, where they leave no room behind."""
        if len(self.token_ids) + len(tokens) >= limit:
            self.finish_reason = "length"
            return False
        self.token_ids += tokens
        self.logprobs += [math.nan] * len(tokens)
        return True

    @property
    def asked(self) -> list[int]:
        """Tokens before the present turn."""
        return self.prompt.token_ids + self.token_ids[: self.begun]

    @property
    def said(self) -> list[int]:
        """Tokens of the present turn."""
        return self.token_ids[self.begun :]


def converse(
    rollout: RolloutEngine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    turns: Turns = ONE_TURN,
) -> list[Episode]:
    """Collective over a replica: a sample for each prompt and seed; `sampling.max_tokens` bounds all of its turns."""
    episodes = [Episode(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    active = list(range(len(episodes)))
    pending: dict[int, Future[Any] | None] = {}  # a future on the first rank of the replica
    first = dist.get_rank() % rollout.tensor == 0
    while active or pending:
        _generate(rollout, [episodes[i] for i in active], sampling, turns)
        active, stopped = _after(tokenizer, episodes, active, sampling, turns)
        for i in stopped if turns.environment is not None else ():
            pending[i] = _ask(tokenizer, episodes[i], turns) if first else None
        if not pending:
            continue
        answers: dict[int, Answer] = {}
        if first:
            for i in _answered(pending, wait_for_one=not active):
                answers[i] = _answer(tokenizer, episodes[i], pending[i], turns, sampling)
        for i, answer in rollout.share(answers).items():
            del pending[i]
            if _go_on(episodes[i], answer, sampling.max_tokens, turns):
                active.append(i)
        active.sort()
    return episodes


def _generate(rollout: RolloutEngine, episodes: Sequence[Episode], sampling: Sampling, turns: Turns) -> None:
    """A completion behind each of these."""
    if not episodes:
        return
    limits = []
    for episode in episodes:
        room = sampling.max_tokens - len(episode.token_ids)
        limits.append(min(room, turns.thinking_tokens or room) if episode.budgeted else room)
    uneven = {"limits": limits} if set(limits) - {sampling.max_tokens} else {}
    asked = [episode.prompt.token_ids + episode.token_ids for episode in episodes]
    completions = rollout.generate(asked, sampling, [episode.next_seed() for episode in episodes], **uneven)
    for episode, completion in zip(episodes, completions, strict=True):
        episode.token_ids += completion.token_ids
        episode.logprobs += completion.logprobs
        episode.finish_reason = completion.finish_reason


def _after(
    tokenizer: Any, episodes: Sequence[Episode], numbers: Sequence[int], sampling: Sampling, turns: Turns
) -> tuple[list[int], list[int]]:
    """Those that go on with the same turn, behind the limit of its reasoning, and those whose turn has ended."""
    same, ended = [], []
    for i in numbers:
        episode = episodes[i]
        if episode.finish_reason == "stop":
            ended.append(i)
        elif turns.thinking_tokens is not None and episode.budgeted:
            episode.budgeted = False
            tag = _open_reasoning(tokenizer, episode)
            words = f"{turns.thinking_stop}{tag}\n\n" if tag else ""
            tokens = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
            episode.metrics["thinking_stopped"] += bool(tag)
            if episode.insert(tokens, sampling.max_tokens):
                same.append(i)
    return same, ended


def _open_reasoning(tokenizer: Any, episode: Episode) -> str | None:
    """The tag that would end the present turn's reasoning; None where it has none, or has ended it."""
    text = response_text(tokenizer, [*episode.asked[-32:], *episode.said])
    begun = len(response_text(tokenizer, episode.asked[-32:]).rstrip())
    for begin, end in REASONING:
        opened = text.rfind(begin)
        if opened >= 0 and opened + len(begin) >= begun and end not in text[opened:]:
            return end
    return None


def _ask(tokenizer: Any, episode: Episode, turns: Turns) -> Future[Any]:
    """The environment's answer to the present turn, in a thread."""
    environment = turns.environment
    assert environment is not None
    text = response_text(tokenizer, episode.said)
    final = split_response(tokenizer, episode.asked, episode.said, text)[1]
    turn = Turn(text, final, read_calls(turns.form, final))
    episode.messages.append({"role": "assistant", "content": text})
    episode.metrics["tool_calls"] += len(turn.calls)

    def reply(turn: Turn) -> Any:
        if episode.state is _NOT_STARTED:
            episode.state = environment.start(episode.prompt)
        return turn, environment.reply(episode.state, turn)

    future = in_thread(reply, turn, turns.seconds)
    future.turn = turn  # type: ignore[attr-defined]
    return future


def _answered(pending: dict[int, Future[Any] | None], *, wait_for_one: bool) -> list[int]:
    """Conversations whose answer is there, in their order."""
    missing = {future for future in pending.values() if future is not None}
    while missing:
        nothing_yet = wait_for_one and len(missing) == len(pending)
        done, missing = wait(missing, None if nothing_yet else PATIENCE, FIRST_COMPLETED)
        if not done:
            break
    return sorted(i for i, future in pending.items() if future not in missing)


def _answer(tokenizer: Any, episode: Episode, future: Any, turns: Turns, sampling: Sampling) -> Answer:
    late = False
    try:
        reply = future.result()[1]
    except TimeoutError:
        why, late = f"took longer than {turns.seconds:g} s", True
        if not future.turn.calls:
            return Answer(failure=f"its reply {why}", late=True)
        reply = tool_messages(future.turn.calls, [f"{ERROR}{why}"] * len(future.turn.calls))
    except Exception as error:
        return Answer(failure=last_line(error))
    if isinstance(reply, Done):
        return Answer(done=True, reward=float(reply.reward))
    asked = episode.prompt.messages
    try:
        ends = sampling.stop_token_ids
        tokens = following_tokens(tokenizer, episode.prompt.options, asked, reply, ends)
    except BadRow as error:
        return Answer(failure=str(error))
    return Answer(tokens, reply, late=late)


def _go_on(episode: Episode, answer: Answer, limit: int, turns: Turns) -> bool:
    """Whether the model has another turn."""
    episode.reward, episode.failure = answer.reward, answer.failure
    episode.metrics["late_answers"] += answer.late
    errors = sum(m["role"] == "tool" and str(m["content"]).startswith(ERROR) for m in answer.messages)
    episode.metrics["tool_errors"] += errors
    if answer.done or answer.failure:
        return False
    if episode.turn == turns.max_turns:
        episode.metrics["out_of_turns"] += 1
        return False
    if not episode.insert(answer.tokens, limit):
        return False
    episode.messages += answer.messages
    episode.begun, episode.turn, episode.budgeted = len(episode.token_ids), episode.turn + 1, True
    return True


def load_turns(config: GrpoConfig, tokenizer: Any) -> Turns:
    """As the config says. Raises UserError for an environment that cannot be made or that the template cannot carry."""
    rollout, spec = config.rollout, config.environment
    thinking: dict[str, Any] = {
        "thinking_tokens": rollout.thinking_tokens,
        "thinking_stop": rollout.thinking_stop,
    }
    if rollout.thinking_tokens is not None:
        known = f"{tokenizer.chat_template} {' '.join(tokenizer.get_added_vocab())}"
        if not any(begin in known for begin, _ in REASONING):
            raise UserError(
                f"rollout.thinking_tokens={rollout.thinking_tokens}: neither the chat template nor the tokens of "
                f"{tokenizer.name_or_path} begin reasoning; known: {', '.join(begin for begin, _ in REASONING)}"
            )
    if spec is None:
        return Turns(**thinking)
    environment = load_environment(spec, unsafe=config.sandbox.unsafe)
    form = check_dialogue(tokenizer, environment, stop_token_ids(tokenizer))
    return Turns(environment, form, spec.max_turns, spec.seconds, **thinking)
