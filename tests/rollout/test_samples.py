"""Samples stay where they were drawn until a rank trains on them, under several replicas and data parallel sizes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.launch import ranks
from tests.helpers.models import make_assets
from tests.helpers.samples_worker import completion, prompts

CASES = [(1, 5, 4), (2, 5, 2), (4, 2, 4), (1, 1, 2), (2, 3, 1)]  # more replicas than samples, too


def test_every_rank_receives_what_it_trains_on(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "from megatron_posttrain.rewards import reward\n\n\n@reward('long')\ndef long(sample):\n"
        "    return len(sample.response)\n"
    )
    job = {
        "tokenizer": str(make_assets(tmp_path) / "model"),
        "rewards": str(tmp_path / "rewards.py"),
        "cases": CASES,
        "out": str(tmp_path),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    ranks(4, "-m", "tests.helpers.samples_worker", str(tmp_path / "job.json"))
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
