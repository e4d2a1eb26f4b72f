"""`sample`: the same rows after a kill at any moment, and which rows are made of which responses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_posttrain.cli.main import main
from megatron_posttrain.config.schema import EnvironmentConfig, RewardConfig, RolloutConfig
from megatron_posttrain.data.dataset import PromptDataset
from megatron_posttrain.data.rows import Row, read_rows
from megatron_posttrain.data.tokenize import load_tokenizer
from megatron_posttrain.evaluation import sample as sampling_room
from megatron_posttrain.evaluation.evaluate import evaluate
from megatron_posttrain.evaluation.judge import read_answers
from megatron_posttrain.evaluation.responses import RESPONSES, Task, begin
from megatron_posttrain.evaluation.sample import write_rows
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.rewards import Reward, load_rewards
from megatron_posttrain.rollout import Completion, Sampling
from megatron_posttrain.rollout.engine import Request
from megatron_posttrain.rollout.turns import load_turns
from tests.helpers.launch import command, killed, ranks
from tests.helpers.rollout_models import EVEN, make_model, make_tokenizer
from tests.helpers.stand_in import StandIn


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sample")
    make_model(place / "model", "dense_tied", seed=0)
    make_tokenizer(place / "model")
    (place / "reward.py").write_text(EVEN)
    rows = [{"prompt": f"{i}?", "answer": str(i), "metadata": {"level": i}} for i in range(7)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def arguments(place: Path, output: Path) -> list[str]:
    return [
        "sample", *("--model", str(place / "model"), "--data", str(place / "rows.jsonl"), "--samples", "4"),
        *("--max-tokens", "8", "--reward", "even", "--reward-file", str(place / "reward.py"), "--save-every", "2"),
        *("--output", str(output)),
    ]  # fmt: skip


def answer(seed: int, tokens: int) -> list[int]:
    return np.random.default_rng(seed).integers(30, 90, tokens).tolist()


class Engine(StandIn):
    """A response depends on its seed alone."""

    def __init__(self) -> None:
        self.prompts = 0

    def answer(self, request: Request, sampling: Sampling) -> Completion:
        self.prompts += 1
        ids = answer(request.seed, sampling.max_tokens)
        return Completion(ids, [0.0] * len(ids), "length")


def test_a_killed_run_goes_on_to_the_same_responses(place: Path, tmp_path: Path) -> None:
    """Files cut at random bytes, as a kill leaves them: of 7 prompts x 4 responses, saved by two prompts."""
    start_distributed()
    tokenizer = load_tokenizer(str(place / "model"))
    prompts = PromptDataset(read_rows(place / "rows.jsonl"), tokenizer, 100).prompts
    rewards = [Reward("even", 1.0, lambda one: float(len(one.response) % 2 == 0))]

    def run(output: Path) -> int:
        engine: Any = Engine()
        figures = evaluate(engine, tokenizer, Task(prompts, rewards, Sampling(4, 8), 5, 2), output)
        assert figures is not None
        assert figures.accuracy == accuracy
        return engine.prompts // 4

    texts = [tokenizer.decode(answer(5 + i, 8)) for i in range(28)]
    accuracy = sum(len(text) % 2 == 0 for text in texts) / 28
    assert run(tmp_path) == 7
    whole = (tmp_path / RESPONSES).read_bytes()
    ends = [0, *np.cumsum([len(line) for line in whole.splitlines(keepends=True)]).tolist()]
    random = np.random.default_rng(0)
    for cut in [0, ends[8], ends[8] - 1, ends[24], len(whole) - 1, len(whole), *random.integers(0, len(whole), 20)]:
        (tmp_path / RESPONSES).write_bytes(whole[:cut])
        drawn = run(tmp_path)
        assert (tmp_path / RESPONSES).read_bytes() == whole
        there = sum(end <= cut for end in ends) - 1
        assert drawn == (0 if there == 28 else 7 - there // 8 * 2)


def test_two_turns_are_asked(place: Path, tmp_path: Path) -> None:
    """As MT-Bench: the second question behind the first answer; `judge --grade` finds both answers in the file."""
    start_distributed()
    tokenizer = load_tokenizer(str(place / "model"))
    rows = [Row([{"role": "user", "content": "1?"}], metadata={"turns": ["1?", "2?"], "category": "math"})]
    prompts = PromptDataset(rows, tokenizer, 100).prompts
    turns = load_turns(EnvironmentConfig(name="questions"), RolloutConfig(), tokenizer)
    seen: list[str] = []

    class Stopping(Engine):
        def answer(self, request: Request, sampling: Sampling) -> Completion:
            seen.append(tokenizer.decode(request.prompt))
            ids = [*tokenizer("Well.")["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
            return Completion(ids, [0.0] * len(ids), "stop")

    engine: Any = Stopping()
    task = Task(prompts, load_rewards([RewardConfig(name="environment")]), Sampling(1, 64), turns=turns)
    figures = evaluate(engine, tokenizer, task, tmp_path)
    assert figures is not None
    assert figures.accuracy == 1
    assert seen[1] == seen[0] + "Well.<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    answers = read_answers(str(tmp_path / RESPONSES), every=True)
    assert [(a.turn, a.text, a.metadata["category"]) for a in answers.values()] == [
        (k, "Well.", "math") for k in (1, 2)
    ]
    assert [m["content"] for m in json.loads([*answers][1])] == ["1?", "Well.", "2?"]


def test_the_command(place: Path, tmp_path: Path) -> None:
    """Two processes, an engine each."""
    said = ranks(2, "-m", "megatron_posttrain", *arguments(place, tmp_path), rollout=True).stdout
    assert said.count("7 of 7 prompts") == 1
    lines = (tmp_path / RESPONSES).read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["index"], r["sample"]) for r in records] == [(i, k) for i in range(7) for k in range(4)]
    assert len({r["response"] for r in records[:4]}) > 1  # drawn, not greedy
    assert json.loads((tmp_path / "sample.json").read_text())["sampling"]["temperature"] == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_ten_moments(place: Path, tmp_path: Path) -> None:
    """Two processes killed at ten random moments leave, in the end, what one process leaves alone."""
    rows, chance = [{"prompt": f"{i}?", "answer": str(i)} for i in range(160)], np.random.default_rng(0)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "killed" / RESPONSES

    def line(name: str) -> list[str]:
        more = ["--data", str(tmp_path / "rows.jsonl"), "--max-tokens", "32"]
        return ["-m", "megatron_posttrain", *arguments(place, tmp_path / name), *more]

    def there() -> int:
        return file.read_bytes().count(b"\n") if file.exists() else 0

    command(*line("whole")[2:], rollout=True)
    found = []
    for _ in range(10):  # on the way to the first part that this attempt adds, or some parts behind it
        parts, begun = int(chance.integers(4)), time.monotonic()
        goal = there() + parts * 8
        with killed(2, *line("killed"), rollout=True) as job:
            while there() < goal and job.is_alive():
                time.sleep(0.003)
            time.sleep(chance.random() * 0.2 if parts else 1 + chance.random() * 20)
        found.append((there(), file.stat().st_size if file.exists() else 0, round(time.monotonic() - begun, 1)))
    print("responses, bytes, seconds after each kill:", found)
    ranks(2, *line("killed"), rollout=True)
    for name in ("responses", "sft", "dpo", "grpo"):
        whole, cut = ((tmp_path / run / f"{name}.jsonl").read_bytes() for run in ("whole", "killed"))
        assert cut == whole


def test_other_settings_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RESPONSES).touch()
    (tmp_path / "sample.json").write_text('{"seed": 1}')
    assert main(arguments(place, tmp_path)) == 2
    assert "the responses in it were sampled with another model, weights, sampling" in capsys.readouterr().err


def test_what_other_settings_left_is_not_summed_up(tmp_path: Path) -> None:
    for settings, left in (({"seed": 1}, False), ({"seed": 1}, True), ({"seed": 2}, False)):
        begin(tmp_path, settings, "evaluation.json")
        assert [(tmp_path / name).exists() for name in (RESPONSES, "evaluation.json")] == [left] * 2
        for name in (RESPONSES, "evaluation.json"):
            (tmp_path / name).touch()


def record(index: int, reward: float, tokens: int, cut: bool = False) -> dict[str, Any]:
    reason = "length" if cut else "stop"
    said = f"{index}: {reward} in {tokens}"
    return {"index": index, "response": said, "reward": reward, "tokens": tokens, "finish_reason": reason}


LAST = ["3: 0.0 in 3", "3: 0.0 in 4", "3: 0.0 in 5"]
RECORDS = [
    *(record(0, 1.0, 9), record(0, 1.0, 5), record(0, 0.2, 7), record(0, 0.0, 3)),
    *(record(1, 1.0, 4), record(1, 0.9, 4), record(1, 1.0, 6), record(1, 1.0, 8)),
    *(record(2, 0.0, 4), record(2, 0.0, 4), record(2, 0.0, 6), record(2, 0.0, 8)),
    *(record(3, 1.0, 9, cut=True), record(3, 0.0, 3), record(3, 0.0, 4), record(3, 0.0, 5)),
]


@pytest.mark.parametrize(
    ("keep", "mixed_only", "sft"),
    [
        ("correct", False, ["0: 1.0 in 9", "0: 1.0 in 5", "1: 1.0 in 4", "1: 0.9 in 4", "1: 1.0 in 6", "1: 1.0 in 8"]),
        ("correct", True, ["0: 1.0 in 9", "0: 1.0 in 5"]),
        ("shortest-correct", False, ["0: 1.0 in 5", "1: 1.0 in 4"]),
        ("best", False, ["0: 1.0 in 5", "1: 1.0 in 4", "2: 0.0 in 4", "3: 0.0 in 3"]),
        ("all", True, ["0: 1.0 in 9", "0: 1.0 in 5", "0: 0.2 in 7", "0: 0.0 in 3", *LAST]),
    ],
)  # fmt: skip
def test_rows(keep: str, mixed_only: bool, sft: list[str], tmp_path: Path) -> None:
    (tmp_path / RESPONSES).write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    asked = [{"role": "user", "content": "?"}]
    rows = [Row(asked, "7", {"level": i}, tools=[{"type": "function", "function": {"name": "f"}}]) for i in range(4)]
    counts = write_rows(tmp_path, rows, keep, mixed_only)
    assert (counts["all_correct"], counts["none_correct"], counts["correct"]) == (1, 1, 7 / 16)
    made = read_rows(tmp_path / "sft.jsonl", require_assistant=True)
    assert [row.messages[-1]["content"] for row in made] == sft
    assert made[0].tools == rows[0].tools
    pairs = read_rows(tmp_path / "dpo.jsonl", use="preference")
    said = [(row.messages, row.chosen[0]["content"], row.rejected[0]["content"]) for row in pairs]
    assert said == [(asked, "0: 1.0 in 5", "0: 0.0 in 3"), (asked, "1: 1.0 in 4", "1: 0.9 in 4")]
    prompts = read_rows(tmp_path / "grpo.jsonl")
    assert [(row.answer, row.metadata) for row in prompts] == [
        ("7", {"level": 0, "difficulty": 0.5}),
        ("7", {"level": 3, "difficulty": 0.75}),
    ]


def test_every_rule_is_offered() -> None:
    from megatron_posttrain.cli.sample import KEEP

    assert set(KEEP) == set(sampling_room.KEEP)
