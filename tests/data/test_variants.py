"""Variants of rows and files that people have: read as they mean, or refused with what is wrong with them."""

import bz2
import gzip
import json

import pytest

from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.response import split_reasoning
from megatron_posttrain.rollout.text import stop_message, stop_token_ids
from tests.helpers.chat_tokenizers import CHATML, byte_tokenizer

ASK, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"name": "f", "arguments": {"a": 1}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3"}
TEXT_CALL = json.dumps(CALL)


def one(path, record):
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    (row,) = read_rows(path)
    return row


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "human", "content": "2+2?"}, {"role": "gpt", "content": "4"}], [ASK, REPLY]),
        ([{"role": "User", "content": "2+2?"}, {"role": "ASSISTANT", "content": "4"}], [ASK, REPLY]),
        (json.dumps([ASK, REPLY]), [ASK, REPLY]),
        ([ASK, REPLY | {"loss": False}, ASK, REPLY | {"training": True}], [ASK, REPLY | {"weight": 0}, ASK, REPLY]),
        ([ASK, {"role": "assistant", "content": None, "function_call": CALL | {"arguments": '{"a": 1}'}},
          {"role": "function", "content": "3"}], [ASK, CALLING, RESULT]),
        ([ASK, {"role": "tool_call", "content": TEXT_CALL}, {"role": "tool_response", "content": "3"}],
         [ASK, CALLING, RESULT]),
        ([ASK, {"role": "assistant", "content": "", "tool_calls": f"[{TEXT_CALL}]"}], [ASK, CALLING]),
        ([ASK, CALLING | {"tool_calls": [{"name": "f", "parameters": {"a": 1}}]}], [ASK, CALLING]),
        ([ASK, CALLING | {"tool_calls": [{"name": "f", "arguments": None}]}],
         [ASK, CALLING | {"tool_calls": [{"name": "f", "arguments": {}}]}]),
        ([ASK, {"role": "observation", "content": "x"}], [ASK, {"role": "observation", "content": "x"}]),
    ],
)  # fmt: skip
def test_messages(tmp_path, messages, expected):
    assert one(tmp_path / "a.jsonl", {"messages": messages}).messages == expected


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [{"role": "usr", "content": "a"}]}, r"messages\[0\]\.role is 'usr'; did you mean 'user'"),
        ({"messages": [ASK, CALLING | {"tool_calls": [{"name": "f", "arguments": [1]}]}]}, "arguments must be an obj"),
        ({"messages": [ASK, CALLING | {"tool_calls": [{"name": "f", "input": {}}]}]}, r"tool_calls\[0\]\.input would"),
        ({"messages": [ASK, REPLY], "images": ["a.png"]}, "images: only text is trained on"),
        ({"messages": [ASK, REPLY], "loss_mask": [0, 1]}, "loss_mask would not be read; allowed: `weight`"),
        ({"messages": [ASK], "chat_template_kwargs": {"add_generation_prompt": True}}, "are not a row's to set"),
        ({"dialog": [ASK, REPLY]}, r"try data\.columns: \{messages: dialog\}"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "form labelled .* for preference"),
        ({"prompt": "a", "answer": [1]}, "answer must be a string or a number"),
    ],
)
def test_refused_rows(tmp_path, record, said):
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{said}"):
        one(tmp_path / "a.jsonl", record)


def test_values_that_tables_write_otherwise(tmp_path):
    row = one(tmp_path / "a.jsonl", {"messages": [ASK], "functions": [{"name": "f"}],
                                     "chat_template_kwargs": '{"enable_thinking": false}'})  # fmt: skip
    assert row.options == {
        "enable_thinking": False,
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    assert one(tmp_path / "a.jsonl", '{"prompt": "a", "answer": NaN, "score": NaN}').answer is None
    file = tmp_path / "k.csv"
    file.write_text("prompt,completion,label\na,b,True\na,c,0\n")
    assert [row.label for row in read_rows(file, use="preference")] == [True, False]


LINE = json.dumps({"messages": [ASK, REPLY]}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", LINE.decode().encode("utf-16"), "UTF-16"),
        ("a.jsonl", gzip.compress(LINE, mtime=0), "gzip without the suffix"),
        ("a.jsonl.bz2", bz2.compress(LINE), "bzip2"),
        ("a.tsv", b"prompt\tresponse\na\tb\n", r"no CSV; allowed: \.jsonl"),
        ("a.json", b"PAR1" + LINE, "Parquet without the suffix"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jsonl.gz", LINE, "cannot be read: Not a gzipped file"),
    ],
)
def test_refused_files(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*{said}"):
        read_rows(tmp_path / name)


def test_stops_of_odd_tokenizers(tmp_path):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
    assert stop_message(byte_tokenizer(plain, eos=None)).startswith("warning: responses stop at no token")
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
    tokenizer = byte_tokenizer(strict, eos="</s>")
    assert [tokenizer.decode([i]) for i in stop_token_ids(tokenizer)] == ["<|im_end|>", "</s>"]
    tokenizer.name_or_path = str(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [99999, null, 5]}')
    assert stop_token_ids(tokenizer)[0] == 5
    for content, said in (('{"eos_token_id": "</s>"}', "must be a token's number"), ("{", "cannot be read")):
        file.write_text(content)
        with pytest.raises(UserError, match=rf"generation_config\.json: .*{said}"):
            stop_token_ids(tokenizer)


def test_reasoning_between_the_tags_of_other_families():
    assert split_reasoning("<seed:think>41?</seed:think>42") == ("41?", "42")
    assert split_reasoning("41?</seed:think>42", "<seed:think>") == ("41?", "42")
