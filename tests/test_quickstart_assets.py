"""The quickstart's data, tokenizer and model: correct, split without overlap, the same for the same seed."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.data.cache import Encoder, tokenized
from megatron_posttrain.data.dataset import PromptDataset, TokenizedDataset
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.rewards import Sample, compute_rewards, load_rewards

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart" / "make_assets.py"
spec = importlib.util.spec_from_file_location("make_assets", SCRIPT)
make_assets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_assets)

SIZES = {"train": 3000, "rl": 400, "heldout": 500}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    make_assets.make_tokenizer().save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def data():
    return make_assets.make_data(0, **SIZES)


def numbers(row):
    return tuple(sorted(int(n) for n in re.findall(r"\d+", row["messages"][0]["content"])))


def test_split_without_overlap(data):
    assert {name: len(rows) for name, rows in data.items()} == SIZES
    held = {numbers(row) for row in data["heldout"]}
    assert len(held) == 500
    assert not held & {numbers(row) for name in ("train", "rl") for row in data[name]}


def test_same_seed_same_data_other_seed_other_data(data):
    assert make_assets.make_data(0, **SIZES) == data
    assert make_assets.make_data(1, **SIZES)["heldout"] != data["heldout"]


def test_every_answer_and_every_step_is_right(data):
    for row in data["heldout"] + data["rl"]:
        assert int(row["answer"]) == sum(numbers(row))
    reasoned = Counter()
    for row in data["train"]:
        question, reply = (message["content"] for message in row["messages"])
        reasoning, answer = re.fullmatch(r"<think>(.*)</think>(\d+)", reply).groups()
        assert int(answer) == sum(numbers(row))
        form = "full" if question.startswith("What") else "terse"
        reasoned[form, bool(reasoning)] += 1
        digits = ""
        for step in filter(None, reasoning.split(";")):
            terms, total = step.split("=")
            assert sum(map(int, terms.split("+"))) == int(total)
            digits = total[-1] + digits
            carry = total[:-1]
        assert not reasoning or carry + digits == answer
    assert 0.7 < reasoned["full", True] / (reasoned["full", True] + reasoned["full", False]) < 0.9
    assert 0.1 < reasoned["terse", True] / (reasoned["terse", True] + reasoned["terse", False]) < 0.3


def test_tokenizer(tokenizer):
    assert len(tokenizer) == 288
    for text in ("47+85=132", "é 世界 \n\t🙂", "<think>x</think>1"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234567890")["input_ids"]) == 10
    for word in ("assistant", "user", "system", "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(word)["input_ids"]) == 1
    ids = tokenizer("<think>1</think>2<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1</think>2"  # the reward looks for it
    assert ids[-1] == tokenizer.eos_token_id


def test_chat_template(tokenizer):
    ask, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>why</think>a"}
    user = "<|im_start|>user\nq<|im_end|>\n"
    render = tokenizer.apply_chat_template
    assert render([ask], tokenize=False, add_generation_prompt=True) == user + "<|im_start|>assistant\n"
    assert render([ask], tokenize=False, add_generation_prompt=True, enable_thinking=False).endswith(
        "assistant\n<think></think>"
    )
    assert render([{"role": "system", "content": "s"}, ask, reply, ask, reply], tokenize=False) == (
        "<|im_start|>system\ns<|im_end|>\n"
        + user
        + "<|im_start|>assistant\na<|im_end|>\n"
        + user
        + "<|im_start|>assistant\n<think>why</think>a<|im_end|>\n"
    )


def test_through_datasets_and_reward(tokenizer, data, tmp_path):
    for name, rows in data.items():
        make_assets.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    encoder = Encoder(tokenizer, {}, "refuse", "all-assistant")
    sft = TokenizedDataset([tokenized(str(tmp_path / "train.jsonl"), encoder, tmp_path / "cache")], 256)
    assert (len(sft), sft.dropped) == (3000, 0)
    conversation = sft[0]
    learned = [t for t, m in zip(conversation.token_ids, conversation.loss_mask, strict=True) if m]
    assert tokenizer.decode(learned) == data["train"][0]["messages"][1]["content"] + "<|im_end|>"
    prompts = PromptDataset(read_rows(tmp_path / "heldout.jsonl"), tokenizer, 32)
    assert len(prompts) == 500
    right = [Sample(p.messages, f"<think></think>{p.answer}", p.answer) for p in prompts.prompts[:50]]
    wrong = [Sample(p.messages, f"<think>{p.answer}</think>1{p.answer}", p.answer) for p in prompts.prompts[:50]]
    grades = compute_rewards(right + wrong, load_rewards([RewardConfig(name="math")]))
    assert [grade.total for grade in grades] == [1.0] * 50 + [0.0] * 50


def test_model_loads_and_fits_small_layouts(tokenizer, tmp_path):
    model = make_assets.make_model(tokenizer, 0, "float32")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = make_assets.make_model(tokenizer, 0, "float32").state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, again[name])
    config = loaded.config
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen3_moe", 8, 2)
    for size in ("vocab_size", "num_attention_heads", "num_key_value_heads", "num_experts", "num_hidden_layers"):
        assert getattr(config, size) % 2 == 0
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
