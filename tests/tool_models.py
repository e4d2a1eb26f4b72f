"""A byte-level tokenizer whose chat template carries tools, and engines that follow a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.tokenize import encode_prompt
from megatron_posttrain.rollout.engine import Completion, Sampling
from tests.chat_tokenizers import byte_tokenizer

HERMES = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'


def tool_tokenizer(template: str = HERMES) -> Any:
    tokenizer: Any = byte_tokenizer(template)
    begin, end = CALL.split("%s")
    tokenizer.add_tokens(["<think>", "</think>", "<tool_response>", "</tool_response>", begin, end])
    return tokenizer


class Scripted:
    """A rollout engine's place: `say` maps the text so far and the seed to what the model says next."""

    tensor, replica, replicas = 1, 0, 1

    def __init__(self, tokenizer: Any, say: Callable[[str], str]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.rounds: list[list[list[int]]] = []  # prompts of every call

    def share(self, value: Any) -> Any:
        return value

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: Any, limits: Any = None
    ) -> list[Completion]:
        self.rounds.append([list(prompt) for prompt in prompts])
        limits = limits or [sampling.max_tokens] * len(prompts)
        return [self._completion(*each) for each in zip(prompts, limits, seeds, strict=True)]

    def _completion(self, prompt: list[int], limit: int, seed: int) -> Completion:
        ids = self.tokenizer(self.say(self.tokenizer.decode(prompt)), add_special_tokens=False)["input_ids"]
        cut = ids[:limit]
        return Completion(cut, [-1.0 / (seed % 97 + 1)] * len(cut), "length" if len(ids) > limit else "stop")


def prompt_of(tokenizer: Any, question: str, tools: list[Any], answer: str | None = None) -> Prompt:
    messages = [{"role": "user", "content": question}]
    options = {"tools": tools} if tools else {}
    return Prompt(0, encode_prompt(tokenizer, messages, options=options), answer, {}, messages, options)
