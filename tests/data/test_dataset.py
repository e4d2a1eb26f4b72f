"""Which conversations and prompts the n-th step takes."""

import json
from collections import Counter

import pytest

from megatron_posttrain.data.cache import Encoder, tokenized
from megatron_posttrain.data.dataset import PromptDataset, SftDataset, TokenizedDataset
from megatron_posttrain.data.rows import Row, read_rows
from megatron_posttrain.data.tokenize import encode_conversation
from megatron_posttrain.errors import UserError
from tests.helpers.chat_tokenizers import CHATML, byte_tokenizer, turns

LONG = "x" * 100


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(CHATML)


def conversations(directory, tokenizer, rows, name="a"):
    """The rows, as a file that is read through a cache of its own."""
    file = directory / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return tokenized(str(file), Encoder(tokenizer, {}, "refuse", "all-assistant"), directory / "cache")


def turns_of(contents):
    return [turns("q", content) for content in contents]


def test_rows_in_memory_are_what_files_are(tmp_path, tokenizer, source):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))
    rows, files = SftDataset(read_rows(file), tokenizer, 90, seed=3), TokenizedDataset([source], 90, seed=3)
    assert rows.message == files.message
    assert [rows.batch(i, 4) for i in range(3)] == [files.batch(i, 4) for i in range(3)]


ROWS = turns_of(["a" * (1 + i * 7 % 40) for i in range(23)])


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    return conversations(tmp_path_factory.mktemp("data"), tokenizer, ROWS)


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_holds_every_conversation_once(source, packing):
    data = TokenizedDataset([source], 90, packing=packing, seed=3)
    assert len(data) == 23
    for epoch in range(3):
        packed = data.epoch_rows(epoch)
        assert len(packed) == data.rows_per_epoch
        assert sorted(i for row in packed for i in row) == list(range(23))
        assert all(sum(data.lengths[i] for i in row) <= 90 for row in packed)
        assert packing or all(len(row) == 1 for row in packed)
    assert data.epoch_rows(0) != data.epoch_rows(1)


def test_batches_follow_one_another_without_a_gap(source):
    data = TokenizedDataset([source], 90, seed=3)
    stream = [row for epoch in range(4) for row in data.epoch_rows(epoch)]
    again = TokenizedDataset([source], 90, seed=3)  # a resumed run
    for step in (5, 0, 2, 1):
        expected = [[data[i] for i in row] for row in stream[step * 4 : step * 4 + 4]]
        assert data.batch(step, 4) == expected == again.batch(step, 4)
    assert TokenizedDataset([source], 90, seed=4).batch(0, 4) != data.batch(0, 4)
    n = data.rows_per_epoch
    assert [data.steps_per_epoch(k) for k in (1, n - 1, n, n + 1)] == [n, 2, 1, 1]
    assert data.steps_per_epoch(n, epochs=2.5) == 3


def test_conversations_keep_tokens_and_mask(source, tokenizer):
    data = TokenizedDataset([source], 90)
    for i in (0, 7, 22):
        assert data[i] == encode_conversation(tokenizer, ROWS[i])


def test_overlong_conversations_are_dropped_or_cut(tmp_path, tokenizer):
    rows = [*turns_of(["a", LONG, "b"]), turns(LONG, "c")]
    source = conversations(tmp_path, tokenizer, rows)
    dropped = TokenizedDataset([source], 60, overlong="drop")
    assert (len(dropped), dropped.dropped, dropped.truncated) == (2, 2, 0)
    assert "2 dropped, 0 truncated" in dropped.message
    # The last one's answer lies behind the cut: nothing is left to learn from it.
    cut = TokenizedDataset([source], 60, overlong="truncate")
    assert (len(cut), cut.dropped, cut.truncated) == (3, 1, 1)
    whole = encode_conversation(tokenizer, rows[1])
    assert cut[1].token_ids == whole.token_ids[:60]
    assert cut[1].loss_mask == whole.loss_mask[:60]
    assert f", {sum(sum(cut[i].loss_mask) for i in range(3)):.0f} with loss" in cut.message
    with pytest.raises(UserError, match=r"data\.sequence_length is 10, and none of the 4 .*overlong=truncate"):
        TokenizedDataset([source], 10)


def test_a_row_without_anything_to_learn_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"a\.jsonl:2: no assistant turn.*\['user'\]"):
        conversations(tmp_path, tokenizer, [*turns_of(["a"]), turns("only a question")])


def test_a_mixture_has_exact_counts_and_wastes_no_row(tmp_path, tokenizer):
    sizes, weights = [20, 6, 11], [1.0, 3.0, 1.0]
    sources = [
        conversations(tmp_path, tokenizer, turns_of([name * (shortest + 9 * (i % 5)) for i in range(n)]), name)
        for n, name, shortest in zip(sizes, "xyz", (1, 20, 1), strict=True)
    ]
    data = TokenizedDataset(sources, 90, seed=3, weights=weights)
    counts = [8, 22, 7]  # of 37, by 1 : 3 : 1 = 7.4, 22.2, 7.4
    assert "22 (of 6) from" in data.message
    firsts = [range(20), range(20, 26), range(26, 37)]
    drawn = [[i for row in data.epoch_rows(epoch) for i in row] for epoch in range(6)]
    for epoch in drawn:
        assert [sum(i in first for i in epoch) for first in firsts] == counts
    for first, count in zip(firsts, counts, strict=True):
        seen = Counter(i for epoch in drawn for i in epoch if i in first)
        assert set(map(seen.__getitem__, first)) <= {6 * count // len(first), -(-6 * count // len(first))}
    # A step is a pure function of its number, though epochs have different conversations and may have other sizes.
    stream = [row for epoch in range(6) for row in data.epoch_rows(epoch)]
    again = TokenizedDataset(sources, 90, seed=3, weights=weights)
    for step in (9, 0, 4):
        assert again.batch(step, 3) == [[data[i] for i in row] for row in stream[3 * step : 3 * step + 3]]
    sizes_of_epochs = [len(data.epoch_rows(epoch)) for epoch in range(6)]
    assert data.steps_per_epoch(1, 6) == sum(sizes_of_epochs)
    assert len(set(sizes_of_epochs)) > 1
    assert data.fingerprint != TokenizedDataset(sources, 90, seed=3, weights=[1.0, 3.0, 2.0]).fingerprint
    with pytest.raises(UserError, match=r"none of the 6 conversations of .*y\.jsonl fits"):
        TokenizedDataset(sources, 40, weights=weights)


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
