"""A small model with a tokenizer, preferences, and transformers' sums on the same rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.helpers.models import EXPERTS, SIZES

WORDS = ["seven", "a green tree", "no", "it is late", "12", "the sum of two numbers", "yes, and why not?"]


def make_model(directory: Path, tokenizer: Path, vocabulary: int, layers: int, hidden: int, head: int = 16) -> Path:
    """With experts, random norms, and the tokenizer of another directory."""
    torch.manual_seed(layers)
    sizes = SIZES | {"vocab_size": vocabulary, "num_hidden_layers": layers, "hidden_size": hidden, "head_dim": head}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **EXPERTS | {"num_experts": 4}, tie_word_embeddings=False))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1, 0.2)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, directory / name)
    return directory


def write_rows(directory: Path) -> None:
    """pairs.jsonl, labelled.jsonl and chat.jsonl of 12 rows each."""
    pairs, labelled, chat = [], [], []
    for k in range(12):
        prompt = [{"role": "user", "content": f"{WORDS[k % 7]} {k}?"}]
        if k % 3 == 0:
            prompt += [{"role": "assistant", "content": WORDS[k % 5]}, {"role": "user", "content": "and?"}]
        chosen, rejected = f"{WORDS[(k + 1) % 7]} {WORDS[k % 4]}", WORDS[(k + 3) % 7]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": k / 10})
        labelled.append({"messages": prompt, "response": chosen, "label": k % 2 == 0})
        chat.append({"messages": [*prompt, {"role": "assistant", "content": chosen}]})
    for name, rows in (("pairs", pairs), ("labelled", labelled), ("chat", chat)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def encode(tokenizer: Any, prompt: list[dict[str, str]], answer: str | None) -> tuple[Tensor, int]:
    """[1, t] tokens of the conversation, and how many of them the prompt with its generation prompt has."""
    whole = [*prompt, {"role": "assistant", "content": answer}] if answer is not None else prompt
    asked = whole[:-1]
    ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    begin = tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids[: len(begin)] == begin
    return torch.tensor([ids]), len(begin)


def answer_logprob(model: Any, tokenizer: Any, prompt: list[dict[str, str]], answer: str) -> tuple[Tensor, int]:
    """Summed log-prob of the answer with its end of turn, and its number of tokens."""
    ids, begin = encode(tokenizer, prompt, answer)
    end = int((ids[0] == tokenizer.eos_token_id).nonzero()[-1]) + 1
    logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return logprobs[begin - 1 : end - 1].sum(), end - begin


def grad_norm(model: Any) -> float:
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def load_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)
