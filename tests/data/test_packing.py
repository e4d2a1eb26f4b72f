"""Packing of conversations into rows, and of sequences into micro-batches."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_posttrain.data.batch import FILLER, Sequence, filler, pack_batch, unit_numbers
from megatron_posttrain.data.packing import deal, pack
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.planning.flops import sequence_flops, training_flops


def best_fit_decreasing(lengths, capacity):
    """The textbook's loop over all rows, sums only."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, filled in enumerate(rows) if filled + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda i: rows[i])] += length
        else:
            rows.append(length)
    return sorted(rows)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 70), st.randoms(use_true_random=False))
def test_pack_is_best_fit_decreasing(lengths, capacity, shuffler):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in row) for row in rows) == best_fit_decreasing(lengths, capacity)
    assert all(rows)
    assert rows == pack(lengths, capacity)
    shuffled = list(lengths)
    shuffler.shuffle(shuffled)
    assert len(pack(shuffled, capacity)) == len(rows)


def test_pack_of_many_rows_is_nearly_full():
    rng = random.Random(0)
    lengths = [min(4096, max(1, int(rng.lognormvariate(6, 1)))) for _ in range(100_000)]
    assert len(pack(lengths, 4096)) < 1.01 * sum(lengths) / 4096


def test_pack_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="between 1 and 8"):
        pack([4, 9], 8)
    assert pack([], 8) == []


def sequence(length, index=0, seed=0):
    rng = random.Random(seed * 1000 + index)
    return Sequence(
        token_ids=[rng.randrange(1, 99) for _ in range(length)],
        loss_mask=[rng.randrange(2) for _ in range(length)],
        extras={"advantages": [rng.random() for _ in range(length)]},
        index=index,
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([1, 2, 4, 8]))
def test_pack_batch_token_by_token(lengths, multiple):
    sequences = [sequence(length, index) for index, length in enumerate(lengths)]
    batch = pack_batch(sequences, multiple=multiple, pad_token=7)
    starts = batch.cu_seqlens.tolist()
    assert len(batch.tokens) == starts[-1]
    assert batch.real_lengths == lengths
    assert batch.sequence_ids == list(range(len(lengths)))
    padding = batch.padding.tolist()
    for s, start, stop in zip(sequences, starts, starts[1:], strict=False):
        assert (stop - start) % multiple == 0
        assert len(s.token_ids) <= stop - start < len(s.token_ids) + multiple
        for t in range(stop - start):
            at, real = start + t, t < len(s.token_ids)
            last = t >= len(s.token_ids) - 1
            assert batch.position_ids[at] == t
            assert padding[at] is not real
            assert batch.tokens[at] == (s.token_ids[t] if real else 7)
            assert batch.labels[at] == (0 if last else s.token_ids[t + 1])
            assert batch.loss_mask[at] == (0 if last else s.loss_mask[t + 1])
            expected = 0 if last else s.extras["advantages"][t + 1]
            assert batch.extras["advantages"][at].item() == pytest.approx(expected)
    assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(starts))
    assert batch.has_padding == any(padding)
    assert batch.real_tokens == sum(lengths)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 16, 24]))
def test_padded_to_adds_only_padding(lengths, multiple, row_multiple):
    before = pack_batch([sequence(length, index) for index, length in enumerate(lengths)], multiple=multiple)
    after = before.padded_to(row_multiple)
    total = len(before.tokens)
    assert len(after.tokens) % row_multiple == 0
    assert len(after.tokens) - total < row_multiple
    assert after.cu_seqlens[:-1].tolist() == before.cu_seqlens[:-1].tolist()
    assert after.cu_seqlens[-1] == len(after.tokens)
    assert after.padding[total:].all()
    assert after.padding[:total].tolist() == before.padding.tolist()
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert getattr(after, name)[:total].tolist() == getattr(before, name).tolist()
        assert len(getattr(after, name)) == len(after.tokens)
    assert not after.loss_mask[total:].any()
    assert len(after.extras["advantages"]) == len(after.tokens)
    starts = after.cu_seqlens.tolist()
    assert after.position_ids[starts[-2] :].tolist() == list(range(starts[-1] - starts[-2]))
    assert after.max_seqlen == max(b - a for a, b in itertools.pairwise(starts))


def test_pack_batch_types_and_moves():
    batch = pack_batch([sequence(3), Sequence([1, 2], [0, 1])], multiple=4)
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.loss_mask.dtype == batch.extras["advantages"].dtype == torch.float32
    assert batch.extras["advantages"][4:].tolist() == [0, 0, 0, 0]  # the second has no such key
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.extras["advantages"].device.type == "meta"
    assert moved.real_lengths == batch.real_lengths
    pieces = batch.per_sequence(torch.arange(8))
    assert [piece.tolist() for piece in pieces] == [[0, 1], [4]]


def test_pack_batch_refuses_broken_sequences():
    with pytest.raises(ValueError, match="at least one"):
        pack_batch([])
    with pytest.raises(ValueError, match="without tokens"):
        pack_batch([Sequence([], [])])
    with pytest.raises(ValueError, match="loss_mask has 1 entries for 2 tokens"):
        pack_batch([Sequence([1, 2], [1])])


def flat(rows):
    return [i for row in rows for i in row]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=40), st.integers(32, 100), st.integers(1, 5), st.integers(1, 8)
)
def test_deal(lengths, budget, multiple, ranks):
    shares = deal(lengths, budget, ranks=ranks, multiple=multiple)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) % multiple == 0
    assert sorted(i for share in shares for i in flat(share)) == list(range(len(lengths)))
    # No more than a longest sequence between the fullest and the emptiest (least-filled-first keeps it so).
    loads = [sum(lengths[i] for i in flat(share)) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
    for share in shares:
        totals = [sum(lengths[i] for i in group) for group in share]
        assert max(totals) <= budget
        assert max(totals) - min(totals) <= max(lengths)
        if len(share) <= len(flat(share)):
            assert min(totals) > 0
    assert len(shares[0]) >= math.ceil(sum(lengths) / budget / ranks)
    assert shares == deal(lengths, budget, ranks=ranks, multiple=multiple)


def test_pairs_are_never_parted():
    """1,000 random pairs and budgets: rows, token budgets and data parallel ranks keep them whole and in order."""
    rng = random.Random(0)
    for ranks in range(1, 9):
        lengths = [rng.randint(1, 900) for _ in range(2000)]
        order = rng.sample(range(1000), 1000)  # the two of a pair need not be neighbours
        units = [*range(1000), *order]
        longest = max(lengths[i] + lengths[1000 + k] for k, i in enumerate(order))
        budget = rng.randint(longest, 6000)
        multiple = rng.randint(1, 4)
        rows = pack(lengths, budget, units)
        batches = [
            group for share in deal(lengths, budget, ranks=ranks, multiple=multiple, units=units) for group in share
        ]
        for groups in (rows, batches):
            assert sorted(flat(groups)) == list(range(2000))
            for group in groups:
                assert sum(lengths[i] for i in group) <= budget
                numbers = [units[i] for i in group]
                assert all(numbers.count(unit) == 2 for unit in numbers)
        assert len(batches) % (ranks * multiple) == 0
        assert all(group == sorted(group) for group in batches)  # so chosen comes before rejected


def test_work_is_balanced_over_ranks():
    """Attention included, on a log-normal mix of lengths, where equal tokens are not equal work."""
    arch = Architecture("qwen3", 48, 2048, 32, 4, 128, 6144, 151936, 40960)
    rng = random.Random(1)
    lengths = [max(16, min(32768, int(rng.lognormvariate(8, 1.2)))) for _ in range(1024)]
    work = sequence_flops(arch, lengths)

    def imbalance(shares):
        of_ranks = [sum(work[i] for i in flat(share)) for share in shares]
        return max(of_ranks) / (sum(of_ranks) / 16)

    assert imbalance(deal(lengths, 32768, ranks=16, work=work)) <= 1.03
    assert imbalance(deal(lengths, 32768, ranks=16)) > imbalance(deal(lengths, 32768, ranks=16, work=work))


def test_sequence_flops_sum_up_to_those_of_the_batch():
    full = Architecture("qwen3", 4, 64, 4, 2, 16, 128, 301, 512)
    sliding = Architecture("gpt_oss", 4, 64, 4, 2, 16, 128, 301, 512, sliding_window=8, sliding_layers=(0, 2))
    for arch in (full, sliding):
        assert sum(sequence_flops(arch, [1, 7, 300])) == pytest.approx(training_flops(arch, [1, 7, 300]), rel=1e-12)


def test_units_of_a_batch():
    mine = [Sequence([1, 2, 3], [0, 1, 1], index=i, unit=u) for i, u in enumerate([7, None, 3, 7, 3, None])]
    assert unit_numbers(mine) == [0, 1, 2, 0, 2, 3]
    batch = pack_batch([*mine, filler()])
    assert batch.units == [[0, 3], [1], [2, 4], [5]]
    assert batch.sequence_ids[-1] == FILLER
    assert batch.counts == (12, 6, 4)
    assert pack_batch([filler()]).counts == (0, 0, 0)


def test_deal_refuses_what_exceeds_the_budget():
    with pytest.raises(ValueError, match="a sequence of 10 tokens exceeds the micro-batch budget of 8"):
        deal([10], 8)
    with pytest.raises(ValueError, match="a unit of 2 sequences of 10 tokens exceeds the micro-batch budget of 8"):
        deal([5, 3, 5], 8, units=[0, 1, 0])
    with pytest.raises(ValueError, match="no sequences"):
        deal([], 8)
