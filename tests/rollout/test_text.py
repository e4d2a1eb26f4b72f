"""Reasoning and answer of a response, by its tokens and by how its prompt ended."""

from __future__ import annotations

import pytest

from megatron_posttrain.rollout.text import response_text, split_response
from tests.helpers.chat_tokenizers import CHATML, SPECIAL, byte_tokenizer

HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]
ASSISTANT = "<|start|>assistant"
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "response", "parts"),
    [
        (
            ASSISTANT,
            "<|channel|>analysis<|message|>41 or 42.<|end|><|start|>assistant<|channel|>final<|message|>41<|return|>",
            ("41 or 42.", "41"),
        ),
        (ASSISTANT, "<|channel|>final<|message|>42<|return|>", ("", "42")),
        (ASSISTANT, "<|channel|>analysis<|message|>It is 42", ("It is 42", "")),
        (ASSISTANT, "<|channel|>final<|message|>1<|end|><|start|>assistant<|channel|>final<|message|>2", ("1", "2")),
        (ASSISTANT, "<|channel|>commentary to=f <|message|>{}<|call|>", ("{}", "")),
        (ASSISTANT + "<|channel|>analysis<|message|>", "42<|end|>", ("42", "")),
        (ASSISTANT + "<|channel|>final<|message|>", "42<|return|>", ("", "42")),
        (ASSISTANT, "42<|return|>", ("", "42")),  # a model that has not learned channels
    ],
)
def test_channels(prompt, response, parts):
    tokenizer = byte_tokenizer(CHANNELS, special=[*HARMONY, "<s>"], eos="<|return|>")
    asked = ids(tokenizer, "<|start|>user<|message|>Use <think> and \\boxed{}.<|end|>" + prompt)
    assert split_response(tokenizer, asked, ids(tokenizer, response)) == parts


@pytest.mark.parametrize("special", [SPECIAL, [*SPECIAL, "<think>", "</think>"]])
@pytest.mark.parametrize(
    ("end", "response", "parts"),
    [
        ("<think>\n", "I guess 42, but", ("I guess 42, but", "")),
        ("<think>\n", "41?\n</think>\n\n42<|im_end|>", ("41?", "42")),
        ("<think>\n\n</think>\n\n", "42<|im_end|>", ("", "42")),
        ("", "<think>\n42", ("42", "")),
        ("", "42<|im_end|>", ("", "42")),
    ],
)
def test_thinking(special, end, response, parts):
    tokenizer = byte_tokenizer(THINKING, special=special)
    asked = ids(tokenizer, "<|im_start|>user\nUse <think>.<|im_end|>\n<|im_start|>assistant\n" + end)
    assert split_response(tokenizer, asked, ids(tokenizer, response)) == parts


def test_own_special_tokens_are_seen():
    tokenizer = byte_tokenizer(CHATML, special=[*SPECIAL, "<answer>", "</answer>"])
    assert response_text(tokenizer, ids(tokenizer, "so <answer>42</answer><|im_end|>")) == "so <answer>42</answer>"
