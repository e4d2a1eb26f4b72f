"""Variants of rows and files that people have: read as they mean, or refused with what is wrong with them."""

import bz2
import gzip
import json
import re

import pytest
import yaml

from megatron_posttrain.data.rows import Reader, read_rows
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


ASKED, SAID, WORSE = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, SAID], "rejected_response": "b"},  # ms-swift
        {"messages": [ASKED, SAID], "rejected_messages": [ASKED, WORSE]},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},  # LLaMA-Factory
        {"input": "q", "chosen": "a", "rejected": "b"},  # Intel's orca_dpo_pairs
        {"context": [ASKED], "response1": "b", "response2": "a", "overall_preference": 2},  # HelpSteer3
        {"context": [ASKED], "response1": "a", "response2": "b", "overall_preference": -1},
        {"prompt": json.dumps([ASKED]), "chosen": json.dumps([SAID]), "rejected": json.dumps([WORSE])},  # from CSV
    ],
)
def test_pairs_under_other_names(record: dict[str, object]) -> None:
    row = Reader({}, "preference").read("f:1", record)
    assert row is not None
    assert (row.messages, row.chosen, row.rejected) == ([ASKED], [SAID], [WORSE])


def test_no_preference_is_left_out() -> None:
    reader = Reader({}, "preference")
    assert reader.read("f:1", {"context": "q", "response1": "a", "response2": "b", "overall_preference": 0}) is None
    assert sum(reader.left_out.values()) == 1
    with pytest.raises(UserError, match="overall_preference must be -3 to 3, found 4"):
        reader.read("f:1", {"context": "q", "response1": "a", "response2": "b", "overall_preference": 4})


def test_calls_of_tools_as_an_answer() -> None:
    """xLAM's rows: tools and calls are JSON text."""
    tool = {"name": "add", "description": "", "parameters": {"x": {"type": "int"}}}
    record = {
        "query": "q", "tools": json.dumps([tool]), "answers": json.dumps([{"name": "add", "arguments": {"x": 1}}]),
    }  # fmt: skip
    row = Reader({}, "sft").read("f:1", record)
    assert row is not None
    assert [found.get("function", found) for found in row.tools] == [tool]
    (call,) = row.messages[1]["tool_calls"]
    assert call.get("function", call)["arguments"] == {"x": 1}


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"problem": "q", "messages": [ASKED, SAID], "solution": r"\boxed{4}"}, "4"),  # NuminaMath
        ({"problem": "q", "messages": [ASKED, SAID], "answer": "4", "generations": ["a"]}, "4"),  # OpenR1
        ({"question": "q", "response": "a", "answer": "4"}, "4"),
        ({"prompt": json.dumps([ASKED]), "reward_model": json.dumps({"ground_truth": "4"}), "data_source": "x"}, "4"),
    ],
)
def test_the_prompt_beside_its_answer_is_what_is_asked(record: dict[str, object], answer: str) -> None:
    row = Reader({}, "other").read("f:1", record)
    assert row is not None
    assert (row.messages, row.answer) == ([ASKED], answer)


@pytest.mark.parametrize(
    ("use", "record", "mapping"),
    [
        ("sft", {"question": "q", "answer": "a #### 4"}, "{prompt: question, response: answer}"),
        ("sft", {"problem": "q", "solution": "a", "answer": "4"}, "{prompt: problem, response: solution}"),
        ("sft", {"problem": "q", "generated_solution": "a"}, "{prompt: problem, response: generated_solution}"),
        ("sft", {"inputs": "q", "targets": "a"}, "{prompt: inputs, response: targets}"),
        ("sft", {"prompt": "q", "chosen": [ASKED, SAID], "rejected": [ASKED, WORSE]}, "{messages: chosen}"),
        ("other", {"Problem": "q", "Answer": 204}, "{prompt: Problem, answer: Answer}"),
        ("preference", {"question": "q", "response_j": "a", "response_k": "b"}, "{prompt: question, chosen: response_j, rejected: response_k}"),  # noqa: E501
        ("preference", {"prompt": "q", "chosen_response": "a", "rejected_response": "b"}, "{prompt: prompt, chosen: chosen_response, rejected: rejected_response}"),  # noqa: E501
        ("preference", {"context_messages": [ASKED], "chosen": "a", "rejected": "b"}, "{prompt: context_messages, chosen: chosen, rejected: rejected}"),  # noqa: E501
        ("preference", {"input": {"messages": [ASKED]}, "preferred_output": [SAID], "non_preferred_output": [WORSE]}, "{prompt: input.messages, chosen: preferred_output, rejected: non_preferred_output}"),  # noqa: E501
    ],
)  # fmt: skip
def test_proposed_mapping_is_one_for_the_use_and_works(use: str, record: dict[str, object], mapping: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"try data.columns: {mapping}")):
        Reader({}, use).read("f:1", record)
    assert Reader(yaml.safe_load(mapping), use).read("f:1", record) is not None
