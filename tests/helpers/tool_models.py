"""A byte-level tokenizer whose chat template carries tools, and engines that follow a script."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.tokenize import encode_conversation, encode_prompt
from megatron_posttrain.rollout.engine import Completion, Request, Sampling
from tests.helpers.chat_tokenizers import byte_tokenizer
from tests.helpers.stand_in import StandIn

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


class Scripted(StandIn):
    """`say` maps the text so far to what the model says next."""

    def __init__(self, tokenizer: Any, say: Callable[[str], str]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.asked: list[list[int]] = []  # prompts in their order

    def answer(self, request: Request, sampling: Sampling) -> Completion:
        self.asked.append(request.prompt)
        ids = self.tokenizer(self.say(self.tokenizer.decode(request.prompt)), add_special_tokens=False)["input_ids"]
        cut, logprob = ids[: request.limit], -1.0 / (request.seed % 97 + 1)
        return Completion(cut, [logprob] * len(cut), "length" if len(ids) > request.limit else "stop")


def prompt_of(tokenizer: Any, question: str, tools: list[Any], answer: str | None = None) -> Prompt:
    messages = [{"role": "user", "content": question}]
    options = {"tools": tools} if tools else {}
    return Prompt(0, encode_prompt(tokenizer, messages, options=options), answer, {}, messages, options)


def sums(count: int, seed: int, largest: int) -> list[tuple[str, str]]:
    """Questions and answers."""
    draw = random.Random(seed)
    pairs = ((draw.randint(2, largest), draw.randint(2, largest)) for _ in range(count))
    return [(f"{a}*{b}", str(a * b)) for a, b in pairs]


def make_tool_model(
    directory: Path, steps: int, tools: list[Any], largest: int = 9, rows: int = 16, guesses: float = 0.0
) -> None:
    """A tiny Qwen3 that has seen, for `steps`, conversations which ask the calculator for a product and repeat it; a
    share `guesses` of them answer at once, with some number."""
    draw = random.Random(0)
    tokenizer = tool_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model: Any = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20, 2 - 2 * step / steps))
    for step in range(steps):
        pairs = [
            _guessing(draw, *pair) if draw.random() < guesses else _asking(*pair) for pair in sums(rows, step, largest)
        ]
        found = [encode_conversation(tokenizer, messages, options={"tools": tools}) for messages in pairs]
        longest = max(len(row.token_ids) for row in found)
        ids = torch.tensor([row.token_ids + [0] * (longest - len(row.token_ids)) for row in found])
        mask = torch.tensor([row.loss_mask + [0] * (longest - len(row.token_ids)) for row in found])
        loss = model(ids, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(step, loss.item(), flush=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _asking(question: str, answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": CALL % question},
        {"role": "tool", "content": answer},
        {"role": "assistant", "content": answer},
    ]


def _guessing(draw: random.Random, question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": str(draw.randint(4, 81))}]
