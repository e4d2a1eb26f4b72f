"""Make the quickstart's model, tokenizer and data: nothing is downloaded.

    python examples/quickstart/make_assets.py OUT_DIR --seed 0

writes OUT_DIR/model (a small Qwen3-MoE checkpoint with random weights, its tokenizer and chat template) and
OUT_DIR/train.jsonl, rl.jsonl and heldout.jsonl: additions, asked in two ways. All demonstrations in train.jsonl
are correct, but a terse question mostly gets its answer at once, while a full one mostly gets it worked out
inside <think>. A model this small can only add when it works the sum out, so supervised training leaves it
right about half of the time; that reasoning pays for terse questions too is left to reinforcement learning.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK_TOKENS = ["<think>", "</think>"]  # not special: a decoded response keeps them
VOCABULARY = 288  # 256 bytes, 5 tokens above, 27 merges; divisible by any tensor parallel size of a small run
# Two ways to ask, as often, and the share of their demonstrations that work the sum out.
QUESTIONS = {"{a}+{b}=": 0.2, "What is {a}+{b}?": 0.8}

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
    words = ["assistant", "system", "user", "What is"] * 9 + ["the", "sum", "of", "two", "numbers", "answer"]
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


def make_model(tokenizer: Any, seed: int, dtype: str, *, dense: bool = False, **sizes: float) -> Any:
    """About a million parameters: 2 layers, 8 experts of which a token uses 2 (or `dense`, 0.4 million); `sizes`: other
    values, by config key."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        # 0.02 is for wider models; at 128 it leaves the first hundred steps without progress.
        "initializer_range": 0.06,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }
    if dense:
        model: Any = Qwen3ForCausalLM(Qwen3Config(**values | sizes))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**values | experts | sizes))
    model = model.to(getattr(torch, dtype))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def work_out(a: int, b: int) -> str:
    """The written addition from the right, carries last: 47+85 -> 7+5=12;4+8+1=13."""
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append("+".join([x, y] + ["1"] * carry) + f"={total}")
        carry = total // 10
    return ";".join(steps)


def make_data(seed: int, train: int, rl: int, heldout: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by file. An unordered pair of numbers is held out or trained on, never both."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)

    def ask(pair: tuple[int, int]) -> tuple[str, dict[str, Any]]:
        a, b = rng.sample(pair, 2)
        form = rng.choice(list(QUESTIONS))
        message = {"role": "user", "content": form.format(a=a, b=b)}
        return form, {"messages": [message], "answer": str(a + b), "metadata": {"a": a, "b": b}}

    def demonstrate(pair: tuple[int, int]) -> dict[str, Any]:
        form, row = ask(pair)
        reasoned = rng.random() < QUESTIONS[form]
        reasoning = work_out(**row["metadata"]) if reasoned else ""
        reply = {"role": "assistant", "content": f"<think>{reasoning}</think>{row['answer']}"}
        return {"messages": [*row["messages"], reply]}

    held, seen = pairs[:heldout], pairs[heldout:]
    return {
        "heldout": [ask(pair)[1] for pair in held],
        "train": [demonstrate(rng.choice(seen)) for _ in range(train)],
        "rl": [ask(rng.choice(seen))[1] for _ in range(rl)],
    }


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
    for name, rows in make_data(args.seed, args.train, args.rl, args.heldout).items():
        write_jsonl(args.out / f"{name}.jsonl", rows)
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: a model of {size:,} parameters and {len(tokenizer)} tokens, {args.train:,} demonstrations,")
    print(f"{args.rl:,} problems for reinforcement learning, {args.heldout:,} held out")


if __name__ == "__main__":
    main()
