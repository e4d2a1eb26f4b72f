"""Which conversations and prompts the n-th step takes."""

import pytest

from megatron_posttrain.data.dataset import PromptDataset, SftDataset
from megatron_posttrain.data.rows import Row
from megatron_posttrain.data.tokenize import encode_conversation
from megatron_posttrain.errors import UserError
from tests.chat_tokenizers import CHATML, byte_tokenizer, turns

LONG = "x" * 100


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(CHATML)


def rows_of(contents):
    return [Row(turns("q", content), source=f"a.jsonl:{i + 1}") for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def rows():
    return rows_of(["a" * (1 + i * 7 % 40) for i in range(23)])


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_holds_every_conversation_once(rows, tokenizer, packing):
    data = SftDataset(rows, tokenizer, 90, packing=packing, seed=3)
    assert len(data) == 23
    for epoch in range(3):
        packed = data.epoch_rows(epoch)
        assert len(packed) == data.rows_per_epoch
        assert sorted(i for row in packed for i in row) == list(range(23))
        assert all(sum(data.lengths[i] for i in row) <= 90 for row in packed)
        assert packing or all(len(row) == 1 for row in packed)
    assert data.epoch_rows(0) != data.epoch_rows(1)


def test_batches_follow_one_another_without_a_gap(rows, tokenizer):
    data = SftDataset(rows, tokenizer, 90, seed=3)
    stream = [row for epoch in range(4) for row in data.epoch_rows(epoch)]
    again = SftDataset(rows, tokenizer, 90, seed=3)  # a resumed run
    for step in (5, 0, 2, 1):
        expected = [[data[i] for i in row] for row in stream[step * 4 : step * 4 + 4]]
        assert data.batch(step, 4) == expected == again.batch(step, 4)
    assert SftDataset(rows, tokenizer, 90, seed=4).batch(0, 4) != data.batch(0, 4)
    n = data.rows_per_epoch
    assert [data.steps_per_epoch(k) for k in (1, n - 1, n, n + 1)] == [n, 2, 1, 1]
    assert data.steps_per_epoch(n, epochs=2.5) == 3


def test_conversations_keep_tokens_and_mask(rows, tokenizer):
    data = SftDataset(rows, tokenizer, 90)
    for i in (0, 7, 22):
        assert data[i] == encode_conversation(tokenizer, rows[i].messages)


def test_overlong_conversations_are_dropped_or_cut(tokenizer):
    rows = [*rows_of(["a", LONG, "b"]), Row(turns(LONG, "c"), source="a.jsonl:4")]
    dropped = SftDataset(rows, tokenizer, 60, overlong="drop")
    assert (len(dropped), dropped.dropped, dropped.truncated) == (2, 2, 0)
    assert "2 dropped, 0 truncated" in dropped.message
    # The last one's answer lies behind the cut: nothing is left to learn from it.
    cut = SftDataset(rows, tokenizer, 60, overlong="truncate")
    assert (len(cut), cut.dropped, cut.truncated) == (3, 1, 1)
    whole = encode_conversation(tokenizer, rows[1].messages)
    assert cut[1].token_ids == whole.token_ids[:60]
    assert cut[1].loss_mask == whole.loss_mask[:60]
    with pytest.raises(UserError, match=r"data\.sequence_length is 10, and none of the 4 .*overlong=truncate"):
        SftDataset(rows, tokenizer, 10)


def test_a_row_without_anything_to_learn_is_refused(tokenizer):
    rows = [*rows_of(["a"]), Row(turns("only a question"), source="a.jsonl:2")]
    with pytest.raises(UserError, match=r"a\.jsonl:2: no token of an assistant .*\['user'\]"):
        SftDataset(rows, tokenizer, 60)


def test_prompts(tokenizer):
    rows = [Row(turns(f"{i}+1="), str(i + 1), {"i": i}, f"a.jsonl:{i + 1}") for i in range(9)]
    rows.insert(4, Row(turns(LONG), "no", {}, "a.jsonl:10"))
    data = PromptDataset(rows, tokenizer, 60, seed=1)
    assert (len(data), data.dropped) == (9, 1)
    taken = [prompt for step in range(3) for prompt in data.batch(step, 3)]
    assert sorted(prompt.index for prompt in taken) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    for prompt in taken:
        row = rows[prompt.index]
        assert (prompt.answer, prompt.metadata, prompt.messages) == (row.answer, row.metadata, row.messages)
        text = tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(prompt.token_ids) == text
    assert data.batch(2, 4)[0] == data.prompts[data.epoch_rows(0)[8]]
    assert data.batch(2, 4)[1] == data.prompts[data.epoch_rows(1)[0]]
    with pytest.raises(UserError, match=r"none of the 10 prompts .* rollout\.max_tokens"):
        PromptDataset(rows, tokenizer, 5)
    with pytest.raises(UserError, match=r"a\.jsonl:7: a prompt must end with a user's turn"):
        PromptDataset([Row(turns("a", "b"), source="a.jsonl:7")], tokenizer, 60)
