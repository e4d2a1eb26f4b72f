"""Every public row form, and one clear message for every kind of bad row."""

import json

import pytest

from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.errors import UserError

ASK, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [ASK, REPLY]}, [ASK, REPLY]),
        ({"prompt": "2+2?", "response": "4"}, [ASK, REPLY]),
        ({"prompt": [ASK], "response": "4"}, [ASK, REPLY]),
        ({"instruction": "2+2?", "output": "4"}, [ASK, REPLY]),
        (
            {"instruction": "Add", "input": "2, 2", "output": "4"},
            [{"role": "user", "content": "Add\n\n2, 2"}, REPLY],
        ),
        ({"instruction": "2+2?", "context": "", "response": "4", "category": "qa"}, [ASK, REPLY]),
        (
            {"instruction": "Add", "context": "2, 2", "response": "4"},
            [{"role": "user", "content": "Add\n\n2, 2"}, REPLY],
        ),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            [ASK, REPLY],
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "2+2?"}]},
            [{"role": "system", "content": "s"}, ASK],
        ),
        ({"messages": [ASK, REPLY], "prompt": "other", "prompt_id": 7}, [ASK, REPLY]),
    ],
)
def test_forms(tmp_path, record, messages):
    path = write(tmp_path / "a.jsonl", record)
    (row,) = read_rows(path, require_assistant=REPLY in messages)
    assert row.messages == messages
    assert row.source == f"{path}:1"


def test_reinforcement_rows(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "2+2?", "answer": "4", "metadata": {"level": 1}},
        "",
        {"messages": [ASK], "answer": 4},
        {"messages": [ASK]},
    )
    rows = read_rows(path)
    assert [row.answer for row in rows] == ["4", "4", None]
    assert rows[0].metadata == {"level": 1}
    assert [row.source.rpartition(":")[2] for row in rows] == ["1", "3", "4"]
    assert all(row.messages == [ASK] for row in rows)


def test_several_files_keep_their_order(tmp_path):
    a = write(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "2"})
    b = write(tmp_path / "b.jsonl", {"prompt": "3"})
    assert [row.messages[0]["content"] for row in read_rows([a, b, a])] == ["1", "2", "3", "1", "2"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"messages": [', ["malformed JSON", "column"]),
        ("[1, 2]", ["JSON object", "[1, 2]"]),
        (
            {"query": "x", "reply": "y"},
            ["['query', 'reply']", "messages", "ShareGPT", "Alpaca", "Dolly", "{prompt: query, response: reply}"],
        ),
        ({"messages": "hello"}, ["messages must be a list", '"hello"']),
        ({"messages": []}, ["without messages"]),
        (
            {"messages": [ASK, {"role": "assistant", "content": 4}]},
            ["messages[1].content must be a string", "4"],
        ),
        ({"messages": [{"content": "x"}]}, ["messages[0].role", "nothing"]),
        ({"prompt": 3, "response": "4"}, ["prompt must be a string", "3"]),
        ({"conversations": [{"from": "humam", "value": "x"}]}, ["conversations[0].from", "humam", "human"]),
        ({"messages": [ASK, REPLY], "answer": ["4"]}, ["answer must be a string or a number"]),
        ({"messages": [ASK, REPLY], "metadata": "x"}, ["metadata must be an object"]),
        ({"messages": [ASK]}, ["no assistant turn", "['user']"]),
    ],
)
def test_bad_row_names_file_and_line(tmp_path, bad, words):
    path = write(tmp_path / "a.jsonl", {"messages": [ASK, REPLY]}, bad)
    with pytest.raises(UserError) as error:
        read_rows(path, require_assistant=True)
    for word in [f"{path}:2", *words]:
        assert word in str(error.value)


def test_missing_empty_and_undecodable_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="no rows"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "ok"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:2: not UTF-8"):
        read_rows(tmp_path / "latin.jsonl")


def test_other_sources_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "1", "response": "2"}, {"prompt": "3", "response": "4"}])
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        rows = read_rows(source, require_assistant=True)
        assert [row.messages[1]["content"] for row in rows] == ["2", "4"]
        assert rows[1].source == f"{source}:2"
    (tmp_path / "neither").mkdir()
    with pytest.raises(UserError, match="neither"):
        read_rows(tmp_path / "neither")
