"""Make the quickstart's model, tokenizer and data: nothing is downloaded.

    python examples/quickstart/make_assets.py OUT_DIR --seed 0

writes OUT_DIR/model (a small Qwen3-MoE checkpoint with random weights, its tokenizer and chat template) and
OUT_DIR/train.jsonl, rl.jsonl and heldout.jsonl: additions. The demonstrations in train.jsonl are all correct;
some work the sum out inside <think>, digit by digit, the others answer at once. Which of the two pays is left
to reinforcement learning.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK_TOKENS = ["<think>", "</think>"]  # not special: a decoded response keeps them
VOCABULARY = 288  # 256 bytes, 5 tokens above, 27 merges; divisible by any tensor parallel size of a small run
THINK_SHARE = 0.4  # demonstrations that work the sum out

# As Qwen3's: earlier turns lose their reasoning, the turns after the last question keep it.
CHAT_TEMPLATE = """\
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and loop.index0 < last.question and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think></think>' }}
    {%- endif %}
{%- endif %}
"""


def make_tokenizer() -> Any:
    """A byte-level BPE with single digits; its merges come from the words of the chat format."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(THINK_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    # The roles come first, so each becomes one token; a few common words fill the rest.
    words = ["assistant", "system", "user"] * 9 + ["the", "sum", "of", "two", "numbers", "is", "answer"]
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: Any, seed: int, dtype: str) -> Any:
    """About a million parameters: 2 layers, 8 experts of which a token uses 2."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.001,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        # 0.02 is for wider models; at 128 it leaves the first hundred steps without progress.
        initializer_range=0.06,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def work_out(a: int, b: int) -> str:
    """The written addition from the right, carries last: 347+465 -> 7+5=12;4+6+1=11;3+4+1=8."""
    steps, carry = [], 0
    x, y = str(a)[::-1], str(b)[::-1]
    for i in range(max(len(x), len(y))):
        digits = [number[i] for number in (x, y) if i < len(number)]
        total = sum(map(int, digits)) + carry
        steps.append("+".join(digits + ["1"] * carry) + f"={total}")
        carry = total // 10
    return ";".join(steps)


def problems(rng: random.Random, avoid: set[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Endless additions, none of whose unordered pairs is in `avoid`."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if (min(a, b), max(a, b)) not in avoid:
            yield a, b


def question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"{a}+{b}="}


def make_data(out: Path, seed: int, train: int, rl: int, heldout: int) -> None:
    rng = random.Random(seed)
    held: set[tuple[int, int]] = set()
    held_rows = []
    for a, b in problems(rng, held):
        held.add((min(a, b), max(a, b)))
        held_rows.append({"messages": [question(a, b)], "answer": str(a + b), "metadata": {"a": a, "b": b}})
        if len(held_rows) == heldout:
            break
    write_jsonl(out / "heldout.jsonl", held_rows)
    source = problems(rng, held)
    train_rows = []
    for _ in range(train):
        a, b = next(source)
        reasoning = work_out(a, b) if rng.random() < THINK_SHARE else ""
        reply = {"role": "assistant", "content": f"<think>{reasoning}</think>{a + b}"}
        train_rows.append({"messages": [question(a, b), reply]})
    write_jsonl(out / "train.jsonl", train_rows)
    rl_rows = []
    for _ in range(rl):
        a, b = next(source)
        rl_rows.append({"messages": [question(a, b)], "answer": str(a + b), "metadata": {"a": a, "b": b}})
    write_jsonl(out / "rl.jsonl", rl_rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0, help="of weights and problems (default: 0)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--train", type=int, default=20000, help="demonstrations (default: 20000)")
    parser.add_argument("--rl", type=int, default=2000, help="problems for RL (default: 2000)")
    parser.add_argument("--heldout", type=int, default=500, help="held-out problems (default: 500)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(args.out / "model")
    model = make_model(tokenizer, args.seed, args.dtype)
    model.save_pretrained(args.out / "model")
    make_data(args.out, args.seed, args.train, args.rl, args.heldout)
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {size:,} parameters, {len(tokenizer)} tokens, {args.train} demonstrations, "
          f"{args.rl} problems for RL, {args.heldout} held out")  # fmt: skip


if __name__ == "__main__":
    main()
