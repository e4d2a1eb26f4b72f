"""`curate`: what is dropped and why, against plain Python on planted defects in real rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_posttrain.cli.main import main
from megatron_posttrain.curation.words import common_subsequence, ngrams, words
from megatron_posttrain.data.files import records

DATA = Path(__file__).parents[3] / "shared" / "data" / "datasets"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def curate(output: Path, *arguments: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    assert main(["curate", *map(str, arguments), "--output", str(output)]) == 0
    kept, dropped = ([json.loads(x) for x in (output / n).open()] for n in ("rows.jsonl", "dropped.jsonl"))
    assert not (output / "rows.jsonl.part").exists()
    report = json.loads((output / "curation.json").read_text())
    assert (report["kept"], report["rows"] - report["kept"]) == (len(kept), len(dropped))
    return kept, dropped


def shingles(text: str) -> set[tuple[str, ...]]:
    """By Python's own means, for texts in ASCII; the end of a text counts as words."""
    found = [*re.findall(r"[a-z0-9]+|[+*/=<>^%]", text.lower()), *[""] * 4]
    return {tuple(found[i : i + 5]) for i in range(len(found) - 4)}


def test_words_and_ngrams_of_a_batch_are_those_of_each_text() -> None:
    texts = [
        "",
        "Ünïted “states” — 3+4=7, isn't?",
        "?!",
        "你好，世界。abc",
        "a\nb",
        "A  b",
        "x" * 3000,
        "ünïted STATES",
    ]
    hashes, offsets = words(texts)
    assert np.diff(offsets).tolist() == [0, 9, 0, 5, 2, 2, 1, 2]
    for i, text in enumerate(texts):
        assert words([text])[0].tolist() == hashes[offsets[i] : offsets[i + 1]].tolist()
    assert len(set(hashes.tolist())) == 9 + 5 + 2 + 1
    grams, whole = ngrams(hashes, offsets, 2)
    assert grams[offsets[4]] == grams[offsets[5]]
    assert whole[offsets[4] : offsets[5]].tolist() == [True, False]
    assert grams[offsets[4] + 1] == ngrams(*words(["b"]), 2)[0][0]


def test_rules(tmp_path: Path) -> None:
    def row(prompt: str, answer: str) -> dict[str, Any]:
        return {"prompt": prompt, "response": answer}

    rows = {
        "": row("What is the sum of 3 and 4?", "The sum of the two is \\boxed{7}."),
        "exact duplicate": row("What is the sum of 3 and 4?", "The sum of the two is \\boxed{7}.\n"),
        "empty": row("What is the sum of 5 and 4?", " "),
        "too short": row("3 + 4", "\\boxed{7}"),
        "too long": row("Count", " and ".join(map(str, range(200))) + "\\boxed{1}"),
        "repetition": row("Say it", "I do not know what this is. " * 10 + "\\boxed{1}"),
        "format": row("What is the product of 3 and 4?", "The product of the two is 12."),
        "language": row("Was ist die Summe von 3 und 9?", "Die Summe der beiden ist nicht 13, es ist \\boxed{12}."),
        "contaminated": row("Tell me: Which of the many birds that sing at night can not fly well?", "\\boxed{None}"),
    }
    test = write(tmp_path / "test.jsonl", [{"prompt": "which of the many birds that sing at night cannot fly?"}])
    kept, dropped = curate(
        tmp_path / "out", write(tmp_path / "rows.jsonl", list(rows.values())), "--min-words", 6, "--max-words", 100,
        "--repetition", 0.5, "--language", "en", "--require", r"\\boxed\{", "--refuse", "sorry", "--against", test,
    )  # fmt: skip
    assert kept == [rows[""]]
    assert {d["reason"]: d["row"] for d in dropped} == {k: v for k, v in rows.items() if k}
    assert dropped[0]["detail"] == f"of {tmp_path / 'rows.jsonl'}:1"
    assert dropped[-1]["detail"] == f"82% of the words of {test}:1"


@needs_data
def test_near_duplicates_against_exact_similarity(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [r for _, r in records(str(DATA / "gsm8k" / "train.jsonl.gz"))][:1500]
    texts = [f"{r['question']}\n{r['answer']}".encode("ascii", "ignore").decode() for r in rows]
    planted = []
    for text in texts[:400]:
        parts = text.split(" ")
        for place in random.choice(len(parts), max(1, len(parts) // 40), replace=False):
            parts[place] = "changed"
        planted.append(" ".join(parts))
    file = write(tmp_path / "rows.jsonl", [{"prompt": "Write.", "response": t} for t in [*texts, *planted]])
    _, dropped = curate(tmp_path / "out", file)
    found = {int(d["source"].rpartition(":")[2]) - 1: int(d["detail"].rpartition(":")[2]) - 1 for d in dropped}
    exact = {1500 + i: len(a & b) / len(a | b) for i, (a, b) in enumerate(zip(map(shingles, texts), map(shingles, planted), strict=False))}  # fmt: skip # noqa: E501
    clear = [j for j, similarity in exact.items() if similarity >= 0.87]
    assert len(clear) > 100
    assert sum(j in found for j in clear) >= 0.97 * len(clear)  # recall
    every = [*texts, *planted]
    true = [len(shingles(every[i]) & shingles(every[j])) / len(shingles(every[i]) | shingles(every[j])) for j, i in found.items()]  # fmt: skip # noqa: E501
    assert min(true) > 0.68  # five standard errors below
    assert np.mean(np.array(true) >= 0.77) > 0.9  # precision


def _changed(text: str) -> str:
    return " ".join("changed" if i % 10 == 9 else word for i, word in enumerate(text.split()))


def _reordered(text: str) -> str:
    return " ".join(reversed(re.split(r"(?<=[.?!])\s+", text)))


@needs_data
@pytest.mark.parametrize(("rule", "recall", "precision"), [((8, 0.5), 0.97, 0.99), ((13, 0), 0.6, 0.98)])
def test_contamination_planted_in_real_rows(
    rule: tuple[int, float], recall: float, precision: float, tmp_path: Path
) -> None:
    test = [r["question"] for _, r in records(str(DATA / "gsm8k" / "test.jsonl.gz"))]
    math = [r["problem"] for _, r in records(str(DATA / "math" / "math500.jsonl.gz"))]
    long = [text for text in test[:300] + math[:200] if len(text.split()) > 20]
    planted = [way(text) for way in (str, _changed, _reordered) for text in long]
    clean = [r["question"] for _, r in records(str(DATA / "gsm8k" / "train.jsonl.gz"))][:3000]
    rows = [{"prompt": f"Solve this. {text} Think.", "answer": "1"} for text in [*clean, *planted]]
    _, dropped = curate(
        tmp_path / "out", write(tmp_path / "rows.jsonl", rows), "--near", 0, "--ngram", rule[0], "--overlap", rule[1],
        "--against", DATA / "gsm8k" / "test.jsonl.gz", DATA / "math" / "math500.jsonl.gz",
    )  # fmt: skip
    found = {int(d["source"].rpartition(":")[2]) - 1 for d in dropped if d["reason"] == "contaminated"}
    hits = [len(clean) + i in found or text in planted[:i] for i, text in enumerate(planted)]
    verbatim, changed, reordered = np.array(hits).reshape(3, -1).mean(1)
    print("recall", verbatim, changed, reordered, "clean rows found", sum(i < len(clean) for i in found))
    assert verbatim == 1
    assert np.mean([verbatim, changed, reordered]) >= recall
    assert changed < 0.2 if rule[0] == 13 else changed > 0.95  # formulas have more words than spaces
    assert sum(i < len(clean) for i in found) <= (1 - precision) * len(clean)


def test_longest_common_subsequence() -> None:
    random = np.random.default_rng(0)
    for _ in range(30):
        one, two = (random.integers(0, 6, random.integers(0, 90)).astype(np.uint64) for _ in range(2))
        table = np.zeros((len(one) + 1, len(two) + 1), int)
        for i, a in enumerate(one):
            for j, b in enumerate(two):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        assert common_subsequence(one, two) == table[-1, -1]


def test_subsequences_domains_and_mixed_languages(tmp_path: Path) -> None:
    asked = "how many of the seven red boats sail north on a day with a strong west wind from the old harbour"
    first, *_, last = asked.split(" a day ")
    rows = [
        {"prompt": f"Tell me {asked} please", "response": "Six.", "kind": "a"},
        {"prompt": f"{last} a day {first}", "response": "None of them.", "kind": "a"},  # n-grams shared, not the order
        {"prompt": "What is it that you see in the sky?", "response": "The moon and the stars.", "kind": "a"},
        {"prompt": "What is it?", "response": "Das ist nicht der Mond, es ist die Sonne.", "kind": "a"},
        {"prompt": "Where is the dog?", "response": "It is in the garden of the house.", "kind": "b"},
        {"prompt": "Where are all of the other dogs?", "response": "They are at the vet.", "kind": "a"},
    ]
    test = write(tmp_path / "test.jsonl", [{"prompt": asked}])
    file = write(tmp_path / "rows.jsonl", rows)
    kept, dropped = curate(
        tmp_path / "out", file, "--against", test, "--ngram", 8, "--overlap", 0, "--lcs", 0.6, "--mixed", 0.2,
        "--domain", "kind", "--per-domain", 2,
    )  # fmt: skip
    assert kept == [rows[1], rows[2], rows[4]]
    assert [(d["reason"], d["row"]) for d in dropped] == [
        ("contaminated", rows[0]), ("mixed language", rows[3]), ("domain", rows[5]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "kind"], "--domain would be ignored without --per-domain"),
        (["--domain", "knd", "--per-domain", "1"], "rows.jsonl:1: --domain: no column knd"),
        (["--ngram", "13"], "--ngram would be ignored without --against"),
        (["--language", "eng"], "no language 'eng'; did you mean"),
        (["--against", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--against-columns", "{prompt: stem}"], "--against-columns would be ignored"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "Who?", "response": "I."}])
    assert main(["curate", str(file), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nothing_stays(tmp_path: Path) -> None:
    row = {"prompt": "?", "response": "!"}
    kept, dropped = curate(tmp_path / "out", write(tmp_path / "rows.jsonl", [row]))
    assert (kept, dropped[0]["reason"]) == ([], "empty")


def test_its_own_output_is_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "?", "response": "!"}])
    assert main(["curate", str(file), "--output", str(tmp_path)]) == 2
    assert "choose another directory" in capsys.readouterr().err
