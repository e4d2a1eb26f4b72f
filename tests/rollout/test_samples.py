"""Samples stay where they were drawn until a rank trains on them, under several replicas and data parallel sizes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.launch import ranks
from tests.helpers.models import make_assets
from tests.helpers.samples_worker import completion, prompts

CASES = [(1, 5, 4), (2, 5, 2), (4, 2, 4), (1, 1, 2), (2, 3, 1)]  # more replicas than samples, too


def run(directory: Path, processes: int, **more: object) -> None:
    (directory / "rewards.py").write_text(
        "from megatron_posttrain.rewards import reward\n\n\n@reward('long')\ndef long(sample):\n"
        "    return len(sample.response)\n"
    )
    files = {"rewards": str(directory / "rewards.py"), "out": str(directory)}
    job = files | {"tokenizer": str(make_assets(directory) / "model")} | more
    (directory / "job.json").write_text(json.dumps(job))
    ranks(processes, "-m", "tests.helpers.samples_worker", str(directory / "job.json"))


def test_trainers_receive_what_rollout_ranks_drew(tmp_path: Path) -> None:
    run(tmp_path, 6, rollout_ranks=4)
    for file in ("1.jsonl", "2.jsonl"):
        records = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
        assert [record["token_ids"] for record in records] == [completion(i).token_ids for i in range(15)]
        assert all(record["rewards"]["long"] == len(record["response"]) for record in records)


def test_every_rank_receives_what_it_trains_on(tmp_path: Path) -> None:
    run(tmp_path, 4, cases=CASES)
    for number, (_, count, _) in enumerate(CASES):
        lines = (tmp_path / f"{number}.jsonl").read_text().splitlines()
        assert len(lines) == 3 * count
        for i, line in enumerate(lines):
            record, prompt, said = json.loads(line), prompts(count)[i // 3], completion(i)
            assert record["index"] == prompt.index
            assert record["prompt"] == prompt.messages
            assert record["prompt_token_ids"] == prompt.token_ids
            assert record["token_ids"] == said.token_ids
            assert record["finish_reason"] == said.finish_reason
            assert record["rewards"]["long"] == len(record["response"]) > 0
            assert record["reward"] == 0.5 * record["rewards"]["long"] + record["rewards"]["math"]
            assert record["logprob_difference"] == i / len(said.token_ids)
