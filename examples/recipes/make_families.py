"""Make a toy recipe's models and rows, three families of tasks: what a paper takes from its own stores.

    python examples/recipes/make_families.py OUT_DIR --seed 0

OUT_DIR gets
model, student        checkpoints with random weights: a Qwen3-MoE of a million parameters, a dense Qwen3 of a quarter
train.jsonl           right demonstrations of all families; few of them worked out inside <think>
rl.jsonl              problems;  flags.jsonl: problems with /think and /no_think in one or two turns
held/FAMILY.jsonl     problems that no other file has, FAMILY_no_think.jsonl the same with that flag, flags.jsonl

add, a sum of two-digit numbers, is the hard family: models this small add when they work it out. max (the larger of
two numbers) and rev (five digits from the right) can be told at once.
"""

from __future__ import annotations

import argparse
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quickstart"))

from make_assets import QUESTIONS, make_model, make_tokenizer, work_out, write_jsonl

FAMILIES = {"add": 0.7, "max": 0.15, "rev": 0.15}  # and how much of the base's demonstrations each is
FLAGS = {"/think": "think", "/no_think": "no_think"}
STUDENT = {"dense": True, "hidden_size": 96, "intermediate_size": 192, "initializer_range": 0.07}


@dataclass(frozen=True)
class Task:
    asked: str
    reasoning: str
    answer: str

    @classmethod
    def draw(cls, family: str, rng: random.Random, held: bool) -> Task:
        """A task that is held out, or one that is not: its numbers decide, whatever their order."""
        while True:
            numbers = (
                rng.sample(range(10, 100), 2)
                if family != "rev"
                else [int(d) for d in f"{rng.randint(10**4, 10**5 - 1)}"]
            )
            if (zlib.crc32(repr((family, sorted(numbers))).encode()) % 10 == 0) == held:
                return cls(*TASKS[family](*numbers))

    def question(self, form: str, flag: str = "") -> dict[str, str]:
        return {"role": "user", "content": form.replace("{a}+{b}", self.asked) + f" {flag}" * bool(flag)}

    def reply(self, reasoned: bool) -> dict[str, str]:
        return {"role": "assistant", "content": f"<think>{self.reasoning * reasoned}</think>{self.answer}"}


def _max(a: int, b: int) -> tuple[str, str, str]:
    return f"max {a},{b}", f"{a // 10},{b // 10}:{max(a, b)}", str(max(a, b))


def _rev(*digits: int) -> tuple[str, str, str]:
    text = "".join(map(str, digits))
    return f"rev {text}", ",".join(text[::-1]), text[::-1]


TASKS: dict[str, Any] = {"add": lambda a, b: (f"{a}+{b}", work_out(a, b), str(a + b)), "max": _max, "rev": _rev}


def flagged(rng: random.Random, held: bool) -> dict[str, Any]:
    """One or two turns with flags or without; the last flag of the conversation says what the last turn is to do."""
    messages: list[dict[str, str]] = []
    mode, turns = "think", rng.choice((1, 1, 2))
    for turn in range(turns):
        task = Task.draw(rng.choice([*FAMILIES]), rng, held)
        flag = rng.choice(("", *FLAGS))
        mode = FLAGS.get(flag, mode)
        messages.append(task.question(rng.choice([*QUESTIONS]), flag))
        messages += [task.reply(mode == "think")] * (turn + 1 < turns)
    return {"messages": messages, "answer": task.answer, "metadata": {"mode": mode}}


def demonstrations(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        [family] = rng.choices([*FAMILIES], [*FAMILIES.values()])
        task, form = Task.draw(family, rng, False), rng.choice([*QUESTIONS])
        yield {"messages": [task.question(form), task.reply(rng.random() < QUESTIONS[form])]}


def problems(rng: random.Random, families: list[str], count: int, held: bool) -> Iterator[dict[str, Any]]:
    """No two are the same."""
    seen: dict[str, Task] = {}
    while len(seen) < count:
        task = Task.draw(rng.choice(families), rng, held)
        seen.setdefault(task.asked, task)
    for task in seen.values():
        yield {"messages": [task.question(rng.choice([*QUESTIONS]))], "answer": task.answer}


def no_think(row: dict[str, Any]) -> dict[str, Any]:
    [asked] = row["messages"]
    return row | {"messages": [asked | {"content": asked["content"] + " /no_think"}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tasks (default: 0)")
    parser.add_argument("--train", type=int, default=5000, help="demonstrations (default: 5000)")
    parser.add_argument("--held", type=int, default=150, help="problems of a held-out set (default: 150)")
    args = parser.parse_args()
    rng, tokenizer = random.Random(args.seed), make_tokenizer()
    (args.out / "held").mkdir(parents=True, exist_ok=True)
    for name, sizes in (("model", {}), ("student", STUDENT)):
        tokenizer.save_pretrained(args.out / name)
        make_model(tokenizer, args.seed, "float32", **sizes).save_pretrained(args.out / name)
    write_jsonl(args.out / "train.jsonl", list(demonstrations(rng, args.train)))
    write_jsonl(args.out / "rl.jsonl", list(problems(rng, [*FAMILIES], 2000, False)))
    write_jsonl(args.out / "flags.jsonl", [flagged(rng, False) for _ in range(2000)])
    for family in FAMILIES:
        rows = list(problems(rng, [family], args.held, True))
        write_jsonl(args.out / f"held/{family}.jsonl", rows)
        write_jsonl(args.out / f"held/{family}_no_think.jsonl", [no_think(row) for row in rows])
    write_jsonl(args.out / "held/flags.jsonl", [flagged(rng, True) for _ in range(args.held)])


if __name__ == "__main__":
    main()
