"""Checkpoints: every rank writes and reads its share, any layout reads any, and those of before are read."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_posttrain.checkpoint.distcp import DistcpReader
from megatron_posttrain.checkpoint.hf import HfReader, check_directory
from megatron_posttrain.training.stretches import boxes
from tests.helpers.launch import ranks
from tests.helpers.models import make_qwen3

RANKS = 4
ONE_BUCKET = 1 << 30
EXPERTS = {"expert": 2}
SPLIT = {"tensor": 2, "pipeline": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    model = make_qwen3(directory, "moe")

    def job(name: str, layout: dict[str, int], **options: Any) -> dict[str, Any]:
        return {"model": model, "layout": layout, "out": str(directory / name), **options}

    new, old, other = (str(directory / name) for name in ("new", "old", "other"))
    jobs = [
        job("whole", EXPERTS, train=2, save=new, then=2),
        job("same", EXPERTS, load=new, then=2),
        # megatron-core's own way shifts what comes after a bucket's padding: one bucket.
        job("gathers", EXPERTS, load=new, gather=old, bucket=ONE_BUCKET, export=str(directory / "hf")),
        job("of_old", EXPERTS, load=old, then=2),
        job("stock", EXPERTS, stock=new),
        job("gathers_split", SPLIT, load=new, gather=other, bucket=ONE_BUCKET, export=str(directory / "hf_split")),
        job("of_split", EXPERTS, load=other),
        job("all", SPLIT | EXPERTS, train=2, save=str(directory / "all"), then=3, dtype="fp32"),
        job("of_all_data", {}, load=str(directory / "all"), then=3, dtype="fp32"),
        job("of_all_experts", {"expert": 4}, load=str(directory / "all"), then=3, dtype="fp32"),
    ]
    (directory / "jobs.json").write_text(json.dumps(jobs))
    ranks(RANKS, "-m", "tests.helpers.checkpoint_worker", str(directory / "jobs.json"))
    return directory


def facts(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((runs / f"{name}.{rank}.json").read_text()) for rank in range(RANKS)]


def step(runs: Path, name: str) -> Path:
    return runs / name / "checkpoints" / "step_000002"


def digests(runs: Path, name: str) -> list[str]:
    return [rank["digest"] for rank in facts(runs, name)]


def test_resumes_bitwise(runs: Path) -> None:
    for before, after in zip(facts(runs, "whole"), facts(runs, "same"), strict=True):
        assert after["first"] == 2
        assert (after["digest"], after["then"]) == (before["digest"], before["then"])


def test_resumes_from_what_megatron_core_gathered(runs: Path) -> None:
    """The checkpoints of versions before this one, and stock Megatron's."""
    assert digests(runs, "of_old") == digests(runs, "whole")
    assert [f["then"] for f in facts(runs, "of_old")] == [f["then"] for f in facts(runs, "whole")]


def test_stock_megatron_core_reads_it(runs: Path) -> None:
    assert digests(runs, "stock") == digests(runs, "whole")


def test_another_layout_reads_it_and_is_read(runs: Path) -> None:
    assert digests(runs, "of_split") == digests(runs, "whole")


@pytest.mark.parametrize("name", ["of_all_data", "of_all_experts"])
def test_goes_on_under_another_layout(runs: Path, name: str) -> None:
    """Losses and gradient norms of three more steps; saved with tensor, pipeline and expert parallelism of two."""
    assert facts(runs, name)[0]["then"] == pytest.approx(facts(runs, "all")[0]["then"], rel=1e-4)


def check_memory_of_a_save(runs: Path, saved: str, name: str, count: int) -> None:
    sizes = [sum(f.stat().st_size for f in step(runs, saved).glob(f"__{rank}_*.distcp")) for rank in range(count)]
    assert max(sizes) < 1.1 * min(sizes)
    tensors = DistcpReader(step(runs, saved)).tensors.values()
    for rank in range(count):
        found = json.loads((runs / f"{name}.{rank}.json").read_text())
        # bf16 weights, fp32 main weights and two moments; on CPU a bucket on its way is in host memory too.
        pieces = sum(chunk.file.startswith(f"__{rank}_") for stored in tensors for chunk in stored.chunks)
        rounding = 512 * (pieces + 4)  # the tracker's
        plans = (step(runs, saved) / ".metadata").stat().st_size  # of all ranks, on rank 0
        print(f"rank {rank} of {count}: a share of {found['share']:,} elements, peak of a save {found['peak']:,} bytes")
        assert 13 * found["share"] < found["peak"] < 14 * found["share"] + 8 * found["bucket"] + rounding + plans


def test_every_rank_writes_its_share_from_a_share_of_host_memory(runs: Path) -> None:
    check_memory_of_a_save(runs, "new", "whole", RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, EXPERTS, SPLIT | EXPERTS])
def test_eight_ranks_write_their_shares(tmp_path: Path, layout: dict[str, int]) -> None:
    job = {"model": make_qwen3(tmp_path, "moe"), "layout": layout, "out": str(tmp_path / "x"), "train": 2}
    again = job | {"out": str(tmp_path / "y"), "load": str(tmp_path / "save"), "train": 0}
    (tmp_path / "jobs.json").write_text(
        json.dumps([job | {"save": str(tmp_path / "save"), "then": 2}, again | {"then": 2}])
    )
    ranks(8, "-m", "tests.helpers.checkpoint_worker", str(tmp_path / "jobs.json"))
    check_memory_of_a_save(tmp_path, "save", "x", 8)
    before, after = ([json.loads((tmp_path / f"{n}.{r}.json").read_text()) for r in range(8)] for n in "xy")
    assert [f["then"] for f in before] == [f["then"] for f in after]


def test_a_resume_reads_each_byte_of_optimizer_states_once_and_no_weights(runs: Path) -> None:
    reader = DistcpReader(step(runs, "new"))
    states = sum(c.length for k, t in reader.tensors.items() if "optimizer.state" in k for c in t.chunks)
    read = sum(rank["read"] for rank in facts(runs, "same"))
    assert read == states


def test_few_pieces_however_many_buckets(runs: Path) -> None:
    """Two at most for each end of a rank's stretch, of dense weights and of experts."""
    new, old = DistcpReader(step(runs, "new")).tensors, DistcpReader(step(runs, "old")).tensors
    assert new.keys() == old.keys()
    pieces, whole = (sum(len(t.chunks) for k, t in x.items() if "exp_avg_sq" in k) for x in (new, old))
    assert pieces <= whole + 2 * 4 * RANKS


def test_a_directory_is_read_once_by_all_ranks(runs: Path) -> None:
    """Of 4 copies of dense weights and 2 of each expert: the ranks together fill each parameter once."""
    found = facts(runs, "whole")
    reader = HfReader(runs / "moe")
    padding = 0  # the vocabulary's, without tensor parallelism
    assert sum(rank["filled"] for rank in found) == padding + sum(
        math.prod(reader.entry(n).shape) for n in reader.names()
    )
    assert min(rank["filled"] for rank in found) > 0
    # expert ranks alternate: (0, 2) and (1, 3) hold the same
    assert [rank["loaded"] for rank in found[:2]] == [rank["loaded"] for rank in found[2:]]


def test_each_stage_writes_its_own_files_of_the_same_tensors(runs: Path) -> None:
    wrote = [rank["wrote"] for rank in facts(runs, "gathers_split")]
    first, second = ("model-00001-of-00002.safetensors",), ("model-00002-of-00002.safetensors",)
    assert [tuple(w) for w in wrote] == [first, (), second, ()]
    assert [rank["wrote"] for rank in facts(runs, "gathers")] == [["model.safetensors"], [], [], []]
    whole, split = load_file(runs / "hf" / "model.safetensors"), {}
    for file in (*first, *second):
        split |= load_file(runs / "hf_split" / file)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    index = json.loads((runs / "hf_split" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    check_directory(runs / "hf_split")


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 5), (1, 9)])
def test_boxes_are_the_elements_in_their_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        found = [
            numbers[tuple(slice(o, o + n) for o, n in zip(offsets, size, strict=True))].flatten()
            for offsets, size in boxes(shape, start, stop)
        ]
        assert torch.cat(found).tolist() == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1
