"""Filters rows by rules, duplicates and contamination; every dropped row is kept aside with its reason."""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator
from pydantic_core import from_json, to_json

from megatron_posttrain.config.schema import Fraction, Section
from megatron_posttrain.curation.contamination import Contamination
from megatron_posttrain.curation.duplicates import SHINGLE, NearDuplicates
from megatron_posttrain.curation.words import Hashes, Offsets, mixed, ngrams, text_of_word, words
from megatron_posttrain.data.columns import Columns
from megatron_posttrain.data.messages import Message
from megatron_posttrain.data.rows import Reader, Row, read_records
from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.rewards.language import LANGUAGES, language_share

KEPT, DROPPED = "rows.jsonl", "dropped.jsonl"
BATCH = 4096  # rows


class Rules(Section):
    """What a row must be; what is None is not looked at."""

    text: Literal["row", "prompt"] = Field("row", description="what is looked at: all of a row, or its prompt alone")
    near: Fraction = Field(0.8, description="Jaccard similarity of 5-word shingles from which a row repeats an earlier "
        "one; 0: equal texts only")  # fmt: skip
    against: list[str] = Field([], description="evaluation files: rows that share their prompts go")
    ngram: PositiveInt = Field(8, description="words of a shared n-gram; in print: 8, 10 or 13")
    overlap: Fraction = Field(0.5, description="share of an evaluation prompt's words that lie in shared n-grams; 0: "
        "one n-gram is enough")  # fmt: skip
    lcs: Fraction | None = Field(None, description="smallest share of its words in the longest common subsequence too")
    min_words: PositiveInt | None = Field(None, description="of a text")
    max_words: PositiveInt | None = Field(None, description="of a text")
    repetition: Fraction | None = Field(None, description="largest share of 5-word shingles that repeat one in it")
    language: str | None = Field(None, description="ISO 639-1 code")
    language_share: Fraction = Field(0.8, description="smallest share of words that are in sentences of it")
    mixed: Fraction | None = Field(None, description="largest share of words in other languages than a text's main one")
    domain: str | None = Field(None, description="column whose values are balanced")
    per_domain: PositiveInt | None = Field(None, description="rows that stay of each value of it, the first ones")
    require: re.Pattern[str] | None = Field(None, description="regular expression that the last answer must match")
    refuse: re.Pattern[str] | None = Field(None, description="regular expression that the last answer must not match")

    @model_validator(mode="after")
    def _check(self) -> Rules:
        if self.language is not None and self.language not in LANGUAGES:
            raise ValueError(f"no language {self.language!r}{nearest(self.language, LANGUAGES)}; allowed: {LANGUAGES}")
        needs = {"ngram": "against", "overlap": "against", "lcs": "against", "language_share": "language"}
        for name, needed in (needs | {"per_domain": "domain", "domain": "per_domain"}).items():
            if name in self.model_fields_set and not getattr(self, needed):
                raise ValueError(f"{option(name)} would be ignored without {option(needed)}")
        return self


def option(name: str) -> str:
    """Of the command line."""
    return "--" + name.replace("_", "-")


def curate(
    sources: Iterable[str], output: Path, rules: Rules, columns: Columns | None = None, against: Columns | None = None
) -> dict[str, Any]:
    """Writes OUTPUT/rows.jsonl and dropped.jsonl ({reason, detail, source, row}); returns what was dropped and why.

    Of rows that repeat each other the first one stays. Rows are read once and written under our column names.
    """
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    part = output / (KEPT + ".part")
    evaluation = Contamination(rules.against, rules.ngram, rules.overlap, rules.lcs, against)
    near = NearDuplicates(rules.near) if rules.near else None
    exact: dict[bytes, str] = {}
    counts: Counter[str] = Counter()
    total = 0
    rows = chain.from_iterable(read_records(source, Reader(columns or {}, "any")) for source in sources)
    with part.open("wb") as kept, (output / DROPPED).open("wb") as dropped:
        while batch := list(islice(rows, BATCH)):
            total += len(batch)
            texts = [_text(row, rules) for row, _ in batch]
            hashes, offsets = words(texts)
            reasons = _reasons([row for row, _ in batch], texts, hashes, offsets, rules, exact, evaluation)
            for i, (row, record) in enumerate(batch):
                if i in reasons:
                    counts[reasons[i][0]] += 1
                    dropped.write(_dropped(*reasons[i], row.source, record))
                else:
                    kept.write(row.source.encode() + b"\t" + to_json(record) + b"\n")
            if near is not None:
                stay = np.array([i not in reasons for i in range(len(batch))])
                shingles, _ = ngrams(hashes, offsets, SHINGLE)
                near.add(shingles[stay[text_of_word(offsets)]], np.append(0, np.cumsum(np.diff(offsets)[stay])))
        if not total:
            raise UserError("no rows to curate: the files are empty")
        twins = near.find() if near is not None else {}
        kept.flush()
        counts |= _finish(part, output / KEPT, twins, dropped, rules)
    return {
        "rows": total, "kept": total - counts.total(), "dropped": dict(counts.most_common()),
        "evaluation": evaluation.report(), "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def _finish(part: Path, kept: Path, twins: dict[int, int], dropped: Any, rules: Rules) -> Counter[str]:
    """The rows that stay, from the file of all that passed the other rules; near duplicates and rows of domains that
    have enough go aside, and are counted."""
    wanted = set(twins.values())
    of_domain: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    sources: dict[int, str] = {}
    with part.open("rb") as lines, kept.open("wb") as file:
        for number, line in enumerate(lines):
            source, _, record = line.partition(b"\t")
            reason = detail = ""
            if number in wanted:
                sources[number] = source.decode()
            if number in twins:
                reason, detail = "near duplicate", f"of {sources[twins[number]]}"
            elif rules.domain is not None and rules.per_domain is not None:
                domain = _domain(rules.domain, record, source)
                of_domain[domain] += 1
                reason, detail = "domain" if of_domain[domain] > rules.per_domain else "", f"enough of {domain}"
            if reason:
                counts[reason] += 1
                dropped.write(_dropped(reason, detail, source.decode(), from_json(record)))
            else:
                file.write(record)
    part.unlink()
    return counts


def _domain(column: str, record: bytes, source: bytes) -> str:
    row = from_json(record)
    if column not in row:
        raise UserError(
            f"{source.decode()}: --domain: no column {column}{nearest(column, row)}; found {', '.join(row)}"
        )
    return str(row[column])


def _dropped(reason: str, detail: str, source: str, record: dict[str, Any]) -> bytes:
    return to_json({"reason": reason, "detail": detail, "source": source, "row": record}) + b"\n"


def _messages(row: Row) -> list[Message]:
    return [*row.messages, *row.chosen, *row.rejected]


def _content(message: Message) -> str:
    """All that a message says: its reasoning, text or parts, and calls."""
    parts = [message.get(key) for key in ("reasoning_content", "content", "tool_calls")]
    return "\n".join(part if isinstance(part, str) else to_json(part).decode() for part in parts if part)


def _text(row: Row, rules: Rules) -> str:
    said = [m for m in _messages(row) if rules.text == "row" or m["role"] != "assistant"]
    return "\n".join(map(_content, said)).strip()


def _reasons(
    rows: Sequence[Row], texts: Sequence[str], hashes: Hashes, offsets: Offsets, rules: Rules,
    exact: dict[bytes, str], evaluation: Contamination,
) -> dict[int, tuple[str, str]]:  # fmt: skip
    """Rows of a batch to drop, by number, with the first reason and its detail."""
    repeated = _repetition(hashes, offsets) if rules.repetition is not None else np.zeros(len(rows))
    contaminated = evaluation.find(hashes, offsets) if rules.against else {}
    found: dict[int, tuple[str, str]] = {}
    for i, (row, text, length) in enumerate(zip(rows, texts, np.diff(offsets).tolist(), strict=True)):
        answer = next((_content(m) for m in reversed(_messages(row)) if m["role"] == "assistant"), None)
        key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        if not length or (answer is not None and not answer.strip()):
            found[i] = "empty", "no words in the text or the answer"
        elif i in contaminated:
            found[i] = "contaminated", contaminated[i]
        elif (first := exact.setdefault(key, row.source)) is not row.source:
            found[i] = "exact duplicate", f"of {first}"
        elif rules.min_words is not None and length < rules.min_words:
            found[i] = "too short", f"{length} words"
        elif rules.max_words is not None and length > rules.max_words:
            found[i] = "too long", f"{length} words"
        elif rules.repetition is not None and repeated[i] > rules.repetition:
            found[i] = "repetition", f"{repeated[i]:.0%} of {SHINGLE}-word shingles"
        elif rules.require is not None and not rules.require.search(answer or ""):
            found[i] = "format", f"the answer does not match {rules.require.pattern}"
        elif rules.refuse is not None and (match := rules.refuse.search(answer or "")):
            found[i] = "format", f"the answer matches {rules.refuse.pattern}: {match[0][:80]!r}"
        elif rules.language and (share := language_share(text, rules.language)) < rules.language_share:
            found[i] = "language", f"{share:.0%} of words in {rules.language}"
        elif rules.mixed is not None and (others := 1 - language_share(text, None)) > rules.mixed:
            found[i] = "mixed language", f"{others:.0%} of words in other languages than most"
    return found


def _repetition(hashes: Hashes, offsets: Offsets) -> NDArray[np.float64]:
    """[texts] the share of a text's shingles that repeat one before them in it."""
    shingles, whole = ngrams(hashes, offsets, SHINGLE)
    text = text_of_word(offsets)[whole]
    _, first = np.unique(shingles[whole] ^ mixed(text.astype(np.uint64)), return_index=True)
    total, once = (np.bincount(each, minlength=len(offsets) - 1) for each in (text, text[first]))
    return 1 - once / np.maximum(1, total) - (total == 0)
