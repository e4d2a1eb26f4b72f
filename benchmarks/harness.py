"""Our sets against lm-evaluation-harness: the same model, prompts and greedy sampling, every disagreement printed.

    PYTHONPATH=WHERE_LM_EVAL_IS python -m benchmarks.harness --model DIR --data DIRECTORY_OF_THE_FILES --output DIR

`gsm8k` and `openbookqa` of examples/suites, graded here by the rewards `math` and `choice`, there by the filters of its
own gsm8k task (the last number) and by a letter at the beginning. What is in --output already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_posttrain.config.load import load_config
from megatron_posttrain.evaluation.suite import Suite

SUITES = Path(__file__).parents[1] / "examples" / "suites"
SETS = {"gsm8k": ("math.yaml", "math"), "openbookqa": ("choice.yaml", "choice")}
IGNORED = [",", "\\$", "(?s).*#### ", "\\.$"]  # as the harness's own gsm8k does
PATTERNS: dict[str, dict[str, Any]] = {
    "gsm8k": {"regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1},
    "openbookqa": {"regex_pattern": "^\\s*\\(?([A-D])\\b"},
}


def write(name: str, data: Path, place: Path, count: int, max_tokens: int) -> dict[str, Any]:
    """The first prompts as a file of rows and as a task of the harness; returns the set that `evaluate` reads."""
    file, reward = SETS[name]
    rows = load_config(Suite, str(SUITES / file)).sets[name].rows(data)[:count]
    lines = [{"prompt": str(row.messages[0]["content"]), "answer": str(row.answer).strip()} for row in rows]
    (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": f"our_{name}", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(place.resolve() / f"{name}.jsonl")}},
        "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": max_tokens},
        "filter_list": [
            {"name": "ours", "filter": [{"function": "regex", **PATTERNS[name]}, {"function": "take_first"}]}
        ],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": IGNORED}
        ],
    }  # fmt: skip
    (place / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return {"data": f"{name}.jsonl", "rewards": [{"name": reward}], "max_tokens": max_tokens}


def compare(name: str, place: Path) -> None:
    lines = (place / "ours" / name / "responses.jsonl").read_text().splitlines()
    ours = [json.loads(line) for line in lines]
    theirs = json.loads((place / "theirs" / "lm_eval.json").read_text())["samples"][f"our_{name}"]
    theirs.sort(key=lambda sample: int(sample["doc_id"]))
    texts = [(a["response"].strip(), b["resps"][0][0].strip()) for a, b in zip(ours, theirs, strict=True)]
    rights = [(a["reward"] > 0.5, float(b["exact_match"]) == 1) for a, b in zip(ours, theirs, strict=True)]
    shares = [sum(right) / len(right) for right in zip(*rights, strict=True)]
    print(
        f"{name}: {len(ours)} prompts, {sum(a == b for a, b in texts)} answers equal to the last character; accuracy "
        f"{shares[0]:.3f} here, {shares[1]:.3f} there; {sum(a == b for a, b in rights)} verdicts equal"
    )
    for i, ((a, b), (right, there)) in enumerate(zip(texts, rights, strict=True)):
        if a != b:
            at = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            print(f"  {i}: texts part at character {at}: {a[at - 40 : at + 20]!r} here, {b[at - 40 : at + 20]!r} there")
        if right != there:
            said = theirs[i]["filtered_resps"][0]
            print(
                f"  {i}: right {right} here, {there} there (read {said!r}); wanted {ours[i]['answer']!r}: {a[-90:]!r}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR")
    add("--data", type=Path, required=True, metavar="DIR", help="with gsm8k/ and openbookqa/")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--prompts", type=int, default=200, help="of each set (default: 200)")
    add("--max-tokens", type=int, nargs=2, default=(320, 8), metavar="N", help="of both sets (default: 320 8)")
    args = parser.parse_args()
    place = args.output
    (place / "tasks").mkdir(parents=True, exist_ok=True)
    sets = {name: write(name, args.data, place, args.prompts, n) for name, n in zip(SETS, args.max_tokens, strict=True)}
    (place / "suite.yaml").write_text(yaml.safe_dump({"sets": sets}))
    start = [sys.executable, "-m", "megatron_posttrain", "evaluate", "--model", args.model]
    tasks = ["--lm-eval", ",".join(f"our_{name}" for name in SETS), "--data", str(place / "tasks")]
    for what, file, output in (
        (["--suite", str(place / "suite.yaml"), "--save-every", "40"], "openbookqa/evaluation.json", place / "ours"),
        (tasks, "lm_eval.json", place / "theirs"),
    ):
        if not (output / file).exists():
            subprocess.run([*start, *what, "--output", str(output)], check=True)
    for name in SETS:
        compare(name, place)


if __name__ == "__main__":
    main()
