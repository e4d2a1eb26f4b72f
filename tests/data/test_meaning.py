"""What a row says about its tools, its system text, its mask and its columns reaches the template or is refused."""

import gzip
import json

import pytest

from megatron_posttrain.cli.main import main
from megatron_posttrain.config.schema import DataConfig
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.data.tokenize import encode_conversation, encode_row, load_tokenizer
from megatron_posttrain.errors import UserError
from megatron_posttrain.rollout.text import stop_token_ids
from tests.helpers.chat_tokenizers import CHATML, CHATML_MARKED, byte_tokenizer, turns

ASK, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def learned(conversation, tokenizer):
    return tokenizer.decode([t for t, m in zip(conversation.token_ids, conversation.loss_mask, strict=True) if m])


def test_compressed_files_and_arrays(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"messages": [ASK, REPLY]}, {"prompt": "2+2?", "completion": "4"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    array = json.dumps(rows, indent=1).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(array))
    (tmp_path / "a.json").write_bytes(array)
    (tmp_path / "b.json").write_bytes(lines)
    with pyarrow.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    for file in tmp_path.iterdir():
        assert [row.messages for row in read_rows(file, require_assistant=True)] == [[ASK, REPLY]] * 2, file
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines * 99)[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        read_rows(tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss_weight": 0.0}])
def test_a_turn_that_is_not_to_be_learned(tmp_path, template, mark):
    tokenizer = byte_tokenizer(template)
    messages = turns("a", "bad", "c", "good")
    messages[1] |= mark
    (row,) = read_rows(write(tmp_path / "a.jsonl", {"messages": messages}))
    assert learned(encode_row(tokenizer, row), tokenizer) == "good<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_weights_of_turns(tmp_path, template):
    tokenizer = byte_tokenizer(template)
    messages = turns("a", "some", "c", "more")
    messages[1] |= {"weight": 0.5, "loss_weight": 0.5}
    messages[3] |= {"loss_scale": 3, "train": True}
    file = write(tmp_path / "a.jsonl", {"messages": messages})
    (row,) = read_rows(file, require_assistant=True)
    found = encode_row(tokenizer, row)
    assert {weight: tokenizer.decode([t for t, w in zip(found.token_ids, found.loss_mask, strict=True) if w == weight])
            for weight in (0.25, 3)} == {0.25: "some<|im_end|>", 3: "more<|im_end|>"}  # fmt: skip
    everything = encode_row(tokenizer, row, train_on="everything").loss_mask
    assert everything == [w or 1 for w in found.loss_mask]
    with pytest.raises(
        UserError, match=r"a turn of weight 0\.25: only sft and distill weigh turns; allowed here: 0 or 1"
    ):
        read_rows(file)
    for bad, why in (
        ({"weight": -0.5}, r"messages\[1\]\.weight must be a number of at least 0, found -0\.5"),
        ({"weight": "much"}, r"messages\[1\]\.weight must be a number of at least 0, found \"much\""),
        ({"train": 0.5}, r"messages\[1\]\.train must be 0 or 1"),
    ):
        with pytest.raises(UserError, match=why):
            read_rows(write(tmp_path / "b.jsonl", {"messages": [messages[0], REPLY | bad]}))
    with pytest.raises(UserError, match=r"messages\[0\]\.weight is 0\.5 in a turn of the user; allowed there: 0 or 1"):
        read_rows(write(tmp_path / "b.jsonl", {"messages": [ASK | {"weight": 0.5}, REPLY]}))


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_train_on(template):
    """Against transformers' own mask of the same template with markers."""
    tokenizer, twin = byte_tokenizer(template), CHATML_MARKED
    if template == CHATML:  # jinja cuts the line break after a block
        twin = twin.replace("{% endgeneration %}\n", "{% endgeneration %}{{ '\\n' }}")
    marked = byte_tokenizer(twin)
    messages = turns("a", "first", "c", "last", "e")
    every = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ends = [i for i, token in enumerate(every["input_ids"]) if token == marked.eos_token_id]
    last = [int(counts and i > ends[1]) for i, counts in enumerate(every["assistant_masks"])]
    assert 0 < sum(last) < sum(every["assistant_masks"])
    for train_on, expected in (
        ("all-assistant", every["assistant_masks"]),
        ("last-assistant", last),
        ("everything", [1] * len(last)),
    ):
        found = encode_conversation(tokenizer, messages, train_on=train_on)
        assert (found.token_ids, found.loss_mask) == (every["input_ids"], expected)
    with pytest.raises(UserError, match=r"messages\[0\]\.weight would be ignored: data\.train_on=everything"):
        encode_conversation(tokenizer, [messages[0] | {"weight": 0}, *messages[1:]], "a:1", train_on="everything")


def test_system_history_verl_and_parts(tmp_path):
    parts = [{"type": "text", "value": "2+"}, {"type": "text", "text": "2?"}]
    rows = read_rows(write(
        tmp_path / "a.jsonl",
        {"system": "s", "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2+2?", "output": "4", "history": [["a", "b"]]},
        {"messages": [{"role": "user", "content": parts}, REPLY]},
        {"prompt": [ASK], "reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "x"},
        {"text": "Human: 2+2?\n\nAssistant: 4"},
    ))  # fmt: skip
    assert rows[0].messages == [{"role": "system", "content": "s"}, ASK, REPLY]
    assert rows[1].messages == [*turns("a", "b"), ASK, REPLY]
    assert rows[2].messages == rows[4].messages == [ASK, REPLY]
    assert (rows[3].answer, rows[3].metadata) == ("4", {"data_source": "x"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: reward_model\.ground_truth"):
        read_rows(write(tmp_path / "a.jsonl", {"prompt": [ASK], "reward_model": {"style": "rule"}}))


def test_columns(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", {"q": {"stem": "2+2?"}, "options": ["3", "4"], "a": 4.0, "odd": 1})
    with pytest.raises(UserError, match="unknown row form with the keys"):
        read_rows(file)
    (row,) = read_rows(file, columns={"prompt": ["q.stem", "options"], "answer": "a"})
    assert (row.messages[0]["content"], row.answer) == ("2+2?\n\n3\n4", "4")
    assert "odd (1)" in caplog.text
    with pytest.raises(UserError, match=r"a\.jsonl:1: data\.columns\.prompt: no column stem"):
        read_rows(file, columns={"prompt": "stem"})
    with pytest.raises(ValueError, match="no column 'promt'; did you mean 'prompt'"):
        DataConfig(train="a", columns={"promt": "q"})


def test_preferences(tmp_path, caplog):
    asked = "\n\nHuman: a\n\nAssistant: "
    file = write(tmp_path / "a.jsonl", {"chosen": asked + "b", "rejected": asked + "c"},
                 {"prompt": "a", "chosen": turns("a", "b"), "rejected": turns("a", "c"), "margin": 1},
                 {"prompt": "a", "response": "b", "label": False})  # fmt: skip
    rows = read_rows(file, use="preference")
    assert [row.messages for row in rows[:2]] == [turns("a")] * 2
    assert [(row.chosen[0]["content"], row.rejected[0]["content"]) for row in rows[:2]] == [("b", "c")] * 2
    assert (rows[1].margin, rows[2].label, rows[2].messages) == (1, False, turns("a", "b"))
    judged = {"instruction": "a", "output_1": "b", "output_2": "c"}
    both = write(tmp_path / "b.jsonl", *(judged | {"preference": p} for p in (1, 2.0, 0, 1.5, None)))
    rows_of_two = read_rows(both, use="preference")
    assert [(row.chosen[0]["content"], row.rejected[0]["content"]) for row in rows_of_two] == [("b", "c"), ("c", "b")]
    assert "b.jsonl: 3 rows left out: preference says that neither" in caplog.text
    with pytest.raises(UserError, match=r"b\.jsonl:1: data\.columns\.chosen is the same output in every row"):
        read_rows(
            both, use="preference", columns={"prompt": "instruction", "chosen": "output_1", "rejected": "output_2"}
        )
    with pytest.raises(UserError, match=r"b\.jsonl:1: preference must be 1 or 2, or 0 for a tie, found 3"):
        read_rows(write(tmp_path / "b.jsonl", judged | {"preference": 3}), use="preference")
    with pytest.raises(UserError, match=r"a\.jsonl:1: a row of the form comparison \(chosen, rejected\)"):
        read_rows(file, require_assistant=True)


def test_what_the_template_leaves_out(tmp_path):
    lossy = byte_tokenizer(
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}")
    )
    messages = [{"role": "developer", "content": "rule"}, *turns("a", "b")]
    with pytest.raises(UserError, match=r"a:1: the chat template leaves out the text of messages\[0\] \(developer\)"):
        encode_conversation(lossy, messages, "a:1")
    assert learned(encode_conversation(lossy, messages, omissions="allow"), lossy) == "b<|im_end|>"
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    with pytest.raises(UserError, match=r"leaves out messages\[1\]\.tool_calls\[0\], a call of f"):
        encode_conversation(byte_tokenizer(CHATML), [ASK, call], "a:1")
    with pytest.raises(UserError, match=r"leaves out the tool f"):
        encode_conversation(byte_tokenizer(CHATML), [ASK, REPLY], "a:1", {"tools": [{"name": "f"}]})
    with pytest.raises(UserError, match=r"leaves out chat_template_kwargs\.documents, which it does not read"):
        encode_conversation(byte_tokenizer(CHATML), [ASK, REPLY], "a:1", {"documents": [{"title": "t", "text": "d"}]})
    with pytest.raises(UserError, match="half of a character"):
        encode_conversation(byte_tokenizer(CHATML), turns("cut \ud83d", "b"), "a:1")


def test_stops(tmp_path):
    taken_along = CHATML_MARKED.replace("<|im_end|>{% endgeneration %}\n", "<|im_end|>\n{% endgeneration %}")
    tokenizer = byte_tokenizer(taken_along, eos="</s>")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop_token_ids(tokenizer)
    tokenizer.name_or_path = str(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert {5, 7} < set(stop_token_ids(tokenizer))


def test_stops_of_a_model_with_the_tokenizer_of_another_directory(tmp_path):
    """Those of the model's list that are the same token in the run's tokenizer; its end of turn in any case."""
    ends = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eom|>"]
    base = byte_tokenizer(CHATML, special=[*ends, "<|only|>"])
    for name, tokenizer in (("model", base), ("own", byte_tokenizer(CHATML, special=[*ends, "<|other|>"]))):
        tokenizer.save_pretrained(tmp_path / name)
    ids = {token: base.convert_tokens_to_ids(token) for token in (*ends, "<|only|>")}
    listed = [ids["</s>"], ids["<|eom|>"], ids["<|only|>"], 5]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    run = load_tokenizer(tmp_path / "own", tmp_path / "model")
    assert set(stop_token_ids(run)) == {ids["<|im_end|>"], ids["</s>"], ids["<|eom|>"]}
    assert set(stop_token_ids(load_tokenizer(tmp_path / "own"))) == {ids["<|im_end|>"]}
    assert set(stop_token_ids(load_tokenizer(tmp_path / "model"))) == {ids["<|im_end|>"], *listed}


def test_command_data(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", {"messages": [ASK, REPLY], "odd": 1})
    assert main(["data", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"file": str(file), "form": "messages", "use": "sft", "rows": 1, "columns_ignored": ["odd"]}
    ]
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    assert main(["data", str(file), "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    said = capsys.readouterr().out
    assert "<|im_start|>assistant\n\u00ab4<|im_end|>\u00bb" in said
    assert "of them counted: 0%: 2" in said
    write(file, {"question": "2+2?", "answer": "4"})
    assert main(["data", str(file), "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    said = capsys.readouterr().out
    assert "tokens a prompt: 0%:" in said
    assert "counted" not in said
    with pytest.raises(SystemExit, match="2"):
        main(["data", str(file), "--columns", "{promt: question}"])
    assert "no column 'promt'; did you mean 'prompt'?" in capsys.readouterr().err
    assert main(["data", str(tmp_path / "no.jsonl")]) == 2
