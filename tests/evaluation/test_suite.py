"""`evaluate --suite`: rows and prompts of the examples on real files, sampling presets, comparison of results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_posttrain.cli.main import main
from megatron_posttrain.config.load import load_config
from megatron_posttrain.data.files import records
from megatron_posttrain.errors import UserError
from megatron_posttrain.evaluation.evaluate import VOTES, of_samples
from megatron_posttrain.evaluation.responses import by_prompt
from megatron_posttrain.evaluation.suite import EvaluationSet, Suite
from megatron_posttrain.rewards import Sample, compute_rewards, load_rewards
from tests.helpers.launch import command
from tests.helpers.rollout_models import make_model, make_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples" / "suites"
DATA = Path(__file__).parents[3] / "shared" / "data" / "datasets"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
ROWS = {"gsm8k": 1319, "gsm8k_5_shot": 1319, "math_500": 500, "aime_2025": 30, "human_eval": 164, "mbpp": 973,
        "truthfulqa_mc1": 817, "hellaswag": 2000, "openbookqa": 500, "mmlu_stem": 3018, "ifeval": 540, "mt_bench": 80,
        "bfcl_simple": 400, "bfcl_multiple": 200,
        "bfcl_parallel": 200, "bfcl_parallel_multiple": 200, "bfcl_live_simple": 258, "bfcl_irrelevance": 240,
        "bbh_causal_judgement": 187, "bbh_penguins_in_a_table": 146, "bbh_snarks": 178}  # fmt: skip
# Published answers, from the files' own columns: what graders must call right.
RIGHT = {
    "gsm8k": lambda r: r["answer"],
    "gsm8k_5_shot": lambda r: r["answer"],
    "math_500": lambda r: r["solution"],
    "aime_2025": lambda r: f"\\boxed{{{r['answer']:.0f}}}",
    "human_eval": lambda r: f"```python\n{r['prompt']}{r['canonical_solution']}```",
    "mbpp": lambda r: f"```python\n{r['code']}\n```",
    "hellaswag": lambda r: "ABCD"[r["label"]],
    "openbookqa": lambda r: f"The answer is {r['answerKey']}.",
    "mmlu_stem": lambda r: "ABCD"[r["answer"]],
}


def calls_of(answer: str | None) -> str:
    """Python calls with the first value that is accepted of each argument."""
    calls = [next(iter(call.items())) for call in json.loads(answer or "")]
    said = [
        f"{f}({', '.join(f'{k}={first_value(v)!r}' for k, v in given.items() if v[0] != '')})" for f, given in calls
    ]
    return f"```python\n[{', '.join(said)}]\n```" if said else "None of them fits."


def first_value(accepted: list[Any]) -> Any:
    found = accepted[0]
    return {k: first_value(v) for k, v in found.items()} if isinstance(found, dict) else found


@needs_data
@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_examples_on_the_public_files(file: Path) -> None:
    for name, one in load_config(Suite, file).sets.items():
        rows = one.rows(DATA)
        assert len(rows) == ROWS.get(name, 250)  # BBH's others
        rewards = load_rewards(one.rewards)
        first = rows[:12]
        if name == "truthfulqa_mc1":  # the best answer stands first in the file, and anywhere in the prompt
            said = [re.search(rf"^{row.answer}\. (.*)", row.messages[-1]["content"], re.MULTILINE) for row in rows]
            public = [r["mc1_targets"]["choices"][0] for _, r in records(str(DATA / one.data))]
            assert [match and match[1] for match in said] == public
            assert {row.answer for row in rows} >= set("ABCDEFGH")
            continue
        if name == "mt_bench":
            assert rows[0].metadata["turns"][1].startswith("Rewrite your previous response")
            continue
        if name == "ifeval":
            grades = compute_rewards([Sample(r.messages, "?", metadata=r.metadata) for r in first], rewards)
            assert not any(grade.failures for grade in grades)
            continue
        public = [r for _, r in records(str(DATA / one.data))][:12]
        if name.startswith("bbh"):
            RIGHT[name] = lambda r: f"If the answer is X, no.\nSo the answer is {r['target']}."
            assert first[0].messages[0]["content"].count("Let's think step by step.") == 4
        if name.startswith("bfcl"):
            right, wrong = [calls_of(row.answer) for row in first], ["[other(a=1)]"] * 12
        else:
            right, wrong = [RIGHT[name](r) for r in public], ["I do not know."] * 12
        for answers, expected in ((right, 1.0), (wrong, 0.0)):
            samples = [Sample(r.messages, a, r.answer, r.metadata) for r, a in zip(first, answers, strict=True)]
            assert {grade.total for grade in compute_rewards(samples, rewards)} == {expected}, name
        if one.few_shot:
            assert [m["role"] for m in first[0].messages] == ["user", "assistant"] * 5 + ["user"]
            assert first[0].messages[1]["content"].endswith("#### 72")


def test_presets_of_qwen3() -> None:
    def sampling(**keys: Any) -> tuple[float, ...]:
        s = EvaluationSet(data="x", **keys).sampling
        return s.temperature, s.top_p, s.top_k, s.presence_penalty

    assert sampling() == (0, 1, 0, 0)
    assert sampling(preset="qwen3-thinking") == (0.6, 0.95, 20, 0)
    assert sampling(preset="qwen3-non-thinking", temperature=1.0) == (1.0, 0.8, 20, 1.5)


def test_thinking_follows_the_preset(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?", "answer": "1"}')
    for preset, expected in (("greedy", {}), ("qwen3-thinking", {"enable_thinking": True})):
        [row] = EvaluationSet(data="rows.jsonl", preset=preset, system="Be brief.").rows(tmp_path)
        assert row.options == expected
        assert [m["role"] for m in row.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": "{{ stem }}"}, r"rows.jsonl:1: prompt: 'stem' is undefined; columns found: question"),
        ({"prompt": "{{ question"}, "a template of the set on rows.jsonl: unexpected end of template"),
        ({"prompt": "?", "metadata": {"tests": "tst"}}, "rows.jsonl:1: .*no column tst"),
        ({"few_shot": {"data": "rows.jsonl", "response": "!"}}, "another file than the set's"),
        ({"few_shot": {"data": "shots.jsonl", "count": 1, "response": "!"}}, "few_shot needs `prompt`"),
    ],
)
def test_mistakes_in_a_set(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "shots.jsonl"):
        (tmp_path / name).write_text('{"question": "?"}')
    with pytest.raises(UserError, match=message):
        EvaluationSet(data="rows.jsonl", **keys).rows(tmp_path)


def record(index: int, response: str, right: bool) -> dict[str, Any]:
    asked = [{"role": "user", "content": f"{index}?"}]
    return {"index": index, "messages": asked, "answer": "7", "response": response, "reward": float(right)}


def test_figures_of_several_samples() -> None:
    records = [
        *(record(0, r"\boxed{7}", True), record(0, "It is 7.0", True), record(0, r"\boxed{8}", False)),
        *(record(1, "<think>7</think> 9", False), record(1, "9", False), record(1, "7", True)),
    ]
    found = of_samples(by_prompt(records), VOTES["math"])
    assert found["pass_at"] == pytest.approx({"1": 0.5, "2": (1 + 2 / 3) / 2, "3": 1})
    assert found["majority"] == 0.5  # 7 and 7.0 are one answer
    assert found["accuracy_low"] < 0.5 < found["accuracy_high"]
    assert "majority" not in of_samples(by_prompt(records), None)


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rights in (("a", [1, 0, 0, 0, 1, 0, 0, 1]), ("b", [1, 1, 0, 1, 1, 0, 1])):
        (tmp_path / name / "set").mkdir(parents=True)
        lines = [json.dumps(record(i, "7", bool(right))) for i, right in enumerate(rights)]
        (tmp_path / name / "set" / "responses.jsonl").write_text("\n".join(lines))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["evaluate", "--compare", a, b]) == 0
    said = capsys.readouterr().out
    # Seven prompts in common: differences 0 1 0 1 0 0 1, mean 3/7, standard error 0.2020.
    assert re.search(r"\+0\.429 +\+0\.033 to \+0\.825 +0\.0339 +0\.566", said)
    assert "1 prompts are in one of them only" in said
    assert main(["evaluate", "--compare", a, str(tmp_path / "c")]) == 2
    assert "no responses.jsonl" in capsys.readouterr().err
    assert main(["evaluate", "--compare", a, b, "--model", "x"]) == 2
    assert "--model would be ignored beside --compare" in capsys.readouterr().err


def test_the_command(tmp_path: Path) -> None:
    """Two sets of different rewards and lengths in one start of vLLM."""
    make_model(tmp_path / "model", "dense_tied", seed=0)
    make_tokenizer(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"q": "1?", "a": 1}\n{"q": "2?", "a": 2}')
    common = {"data": "rows.jsonl", "prompt": "{{ q }}", "answer": "{{ a }}", "max_tokens": 6}
    drawn = {"samples": 4, "temperature": 1.0, "top_k": 5, "presence_penalty": 1.0}
    sets = {"one": common | {"rewards": [{"name": "exact"}]}, "two": common | drawn}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"sets": sets}))
    arguments = ["evaluate", "--model", str(tmp_path / "model"), "--suite", str(tmp_path / "suite.yaml")]
    arguments += ["--save-every", "1"]
    said = command(*arguments, "--output", str(tmp_path / "out"), rollout=True).stdout
    assert re.search(r"^one +2 +1 ", said, re.MULTILINE)
    found = json.loads((tmp_path / "out" / "two" / "evaluation.json").read_text())
    assert found["pass_at"].keys() == {"1", "2", "4"}
    assert found["majority"] is not None
    # Ended in the second set, behind its first prompt: nothing that is there is generated or graded again.
    file = tmp_path / "out" / "two" / "responses.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    assert len(whole) == 8
    kept = [line.replace(b'"reward":0.0', b'"reward":0.75') for line in whole[:4]]
    file.write_bytes(b"".join([*kept, whole[4][:40]]))
    (tmp_path / "out" / "two" / "evaluation.json").unlink()
    said = command(*arguments, "--output", str(tmp_path / "out"), rollout=True).stdout
    assert "out/one: finished before with the same settings" in said
    assert file.read_bytes() == b"".join([*kept, *whole[4:]])
    assert json.loads((tmp_path / "out" / "two" / "evaluation.json").read_text())["accuracy"] >= 0.5
