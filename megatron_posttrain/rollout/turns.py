"""Conversations of several turns: the engine's tokens and an environment's, one behind the other.

A round generates for all conversations whose environment has answered. Those that wait for it join a later one, so
that none holds up the others. Tokens of the model are the engine's own and are never made anew from text.
"""

import math
from collections import Counter
from collections.abc import Sequence
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
from megatron_posttrain.rollout.engine import RolloutEngine, Sampling
from megatron_posttrain.rollout.text import response_text, split_response, stop_token_ids

PATIENCE = 2.0  # seconds without any answer after which a round goes on without those that are missing


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

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [] if self.environment is None else self.environment.tools

    @property
    def metrics(self) -> list[str]:
        """Names of what episodes count."""
        counted = ("turns", "tool_calls", "tool_errors", "late", "out_of_turns", "failed") if self.environment else ()
        stopped = ["thinking_stopped"] if self.thinking_tokens else []
        return [*stopped, *(f"environment/{name}" for name in counted)]


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
    finish_reason: Literal["stop", "length"] = "stop"
    messages: list[Message] = field(default_factory=list)  # on the first rank of a replica, with an environment
    reward: float = 0.0
    failure: str = ""  # of the environment: the sample must not train
    metrics: Counter[str] = field(default_factory=Counter)
    state: Any = None
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
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    turns: Turns = ONE_TURN,
) -> list[Episode]:
    """Collective over a replica: a sample for each prompt and seed; `sampling.max_tokens` bounds all of its turns."""
    episodes = [Episode(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    rounds = _Rounds(rollout, tokenizer, sampling, turns)
    active = list(range(len(episodes)))
    pending: dict[int, Future[Any] | None] = {}  # a future on the first rank of the replica
    first = dist.get_rank() % rollout.tensor == 0
    while active or pending:
        rounds.generate([episodes[i] for i in active])
        stopped = [i for i in active if episodes[i].finish_reason == "stop"] if turns.environment else []
        active = [i for i in active if episodes[i].finish_reason == "length" and rounds.stop_thinking(episodes[i])]
        pending |= {i: rounds.ask(episodes[i]) if first else None for i in stopped}
        if not pending:
            continue
        ready = _ready(pending, wait_for_one=not active) if first else {}
        answers = rollout.share({i: rounds.answer(episodes[i], future) for i, future in ready.items()})
        pending = {i: future for i, future in pending.items() if i not in answers}
        active = sorted([*active, *(i for i, answer in answers.items() if rounds.go_on(episodes[i], *answer))])
    return episodes


def _ready(pending: dict[int, Any], *, wait_for_one: bool) -> dict[int, Any]:
    missing = set(pending.values())
    while missing:
        patience = None if wait_for_one and len(missing) == len(pending) else PATIENCE
        done, missing = wait(missing, patience, FIRST_COMPLETED)
        if not done:
            break
    return {i: future for i, future in sorted(pending.items()) if future not in missing}


@dataclass(frozen=True)
class _Rounds:
    """What is done with a conversation in a round."""

    rollout: RolloutEngine
    tokenizer: Any
    sampling: Sampling
    turns: Turns

    def generate(self, episodes: Sequence[Episode]) -> None:
        if not episodes:
            return
        most, thinking = self.sampling.max_tokens, self.turns.thinking_tokens
        limits = [min(most - len(e.token_ids), thinking if thinking and e.thinks else most) for e in episodes]
        uneven = {"limits": limits} if set(limits) - {most} else {}
        asked, seeds = [e.prompt.token_ids + e.token_ids for e in episodes], [e.next_seed() for e in episodes]
        for e, completion in zip(episodes, self.rollout.generate(asked, self.sampling, seeds, **uneven), strict=True):
            e.token_ids += completion.token_ids
            e.logprobs += completion.logprobs
            e.finish_reason = completion.finish_reason
            if completion.experts is not None:
                e.experts.append(completion.experts[sum(map(len, e.experts)) :])

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
        return Turns(thinking_tokens=limit, thinking_stop=stop)
    environment = load_environment(spec, unsafe=unsafe)
    form = check_dialogue(tokenizer, environment, stop_token_ids(tokenizer))
    return Turns(environment, form, spec.max_turns, spec.seconds, limit, stop)
