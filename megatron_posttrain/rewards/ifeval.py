"""Verifiable instructions (IFEval, arXiv 2311.07911): all 25 types, with the verdicts of its official checker."""

import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.rewards.language import detect
from megatron_posttrain.rewards.registry import GradingError, Sample, Score, reward

_RELATIONS = {"less than": operator.lt, "at least": operator.ge}
# Ends of words that end no sentence.
_ABBREVIATIONS = re.compile(
    r"mrs?|ms|dr|st|prof|rev|gen|sen|rep|gov|capt|col|sgt|jr|sr|vs|etc|e\.g|i\.e|u\.[skn]|[ap]\.m|no|vol|inc|ltd|co|corp"
    r"|ph\.d|m\.d|b\.a|jan|feb|mar|apr|aug|sept|oct|nov|dec"
)
_SENTENCE_END = re.compile(r"([^\s]*?)([.!?]+)([\"'”’)\]*]*)(\s+)(?=(\S+))")


def _unknown(name: str) -> str:
    return f"no instruction {name!r}{nearest(name, CHECKS)}; allowed: {', '.join(sorted(CHECKS))}"


def follows(name: str, text: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a response follows an instruction, strictly; an empty response follows none. Raises GradingError where
    there is no such instruction, or it has no such arguments."""
    if name not in CHECKS:
        raise GradingError(_unknown(name))
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        return bool(text.strip()) and CHECKS[name](text, **given)
    except (TypeError, KeyError) as error:
        reason = str(error).removeprefix("<lambda>() ")
        raise GradingError(f"instruction {name!r}: arguments {given}: {reason}") from None


def follows_loosely(name: str, text: str, arguments: Mapping[str, Any]) -> bool:
    """Whether it does with its first or last line, or its asterisks, left out; section 2.2 of the paper."""
    lines = text.split("\n")
    cuts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(follows(name, variant, arguments) for cut in cuts for variant in (cut, cut.replace("*", "")))


@reward("ifeval")
class IfEval:
    """1.0 when a response follows all instructions: the row's `metadata.instruction_id_list` and `kwargs`, else `args`.

    Args:
        instructions: for all rows: `[{id: punctuation:no_comma}, {id: ..., KEY: VALUE}]`.
        mode: `loose` forgives a first or last line, and asterisks.
        partial: the share of instructions that it follows.
        of: the answer that follows the reasoning, or the whole response.
    """

    def __init__(
        self,
        *,
        instructions: list[dict[str, Any]] | None = None,
        mode: Literal["strict", "loose"] = "strict",
        partial: bool = False,
        of: Literal["answer", "response"] = "answer",
    ) -> None:
        for instruction in instructions or []:
            if (name := instruction.get("id", "")) not in CHECKS:
                raise UserError(f"rewards: 'ifeval': args.instructions: {_unknown(name)}")
        self._instructions = instructions
        self._check = follows if mode == "strict" else follows_loosely
        self._partial, self._of = partial, of

    def __call__(self, sample: Sample) -> Score:
        text = sample.response if self._of == "response" else sample.final or ""
        verdicts = [self._check(name, text, arguments) for name, arguments in self._asked(sample)]
        share = sum(verdicts) / len(verdicts)
        return Score(share if self._partial else float(share == 1.0), {"instructions_followed": share})

    def _asked(self, sample: Sample) -> Iterator[tuple[str, Mapping[str, Any]]]:
        names = sample.metadata.get("instruction_id_list")
        if names:
            arguments: Sequence[Mapping[str, Any] | None] = sample.metadata.get("kwargs") or [{}] * len(names)
            yield from ((name, given or {}) for name, given in zip(names, arguments, strict=True))
        elif self._instructions:
            yield from ((str(i["id"]), {k: v for k, v in i.items() if k != "id"}) for i in self._instructions)
        else:
            raise GradingError("neither the row's metadata.instruction_id_list nor args.instructions is there")


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if count != num_paragraphs or nth_paragraph > count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _postscript(text: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(postscript_marker, rf"\s*{postscript_marker.lower()}.*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    stars, dashes = (re.findall(p, text, re.MULTILINE) for p in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
    return len(stars) + len(dashes) == num_bullets


def _highlights(text: str, num_highlights: int) -> bool:
    found = [*re.findall(r"\*([^\n\*]*)\*", text), *re.findall(r"\*\*([^\n\*]*)\*\*", text)]
    return sum(bool(section.strip()) for section in found) >= num_highlights


def _json(text: str) -> bool:
    text = re.sub(r"^```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = text.split("******")
    given = [part.strip() for part in parts if part.strip()]
    return _filled(parts) == 2 and given[0] != given[1]


def _capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"\w+(?:[-./&]\w+)*|'\w+", text)
    return _RELATIONS[capital_relation](sum(word.isupper() for word in words), capital_frequency)


def _filled(parts: list[str]) -> int:
    """How many parts hold text; -1 where one between others is empty."""
    if any(not part.strip() for part in parts[1:-1]):
        return -1
    return sum(bool(part.strip()) for part in parts)


def count_sentences(text: str) -> int:
    """Sentences, as the Punkt model for English counts them but for rare abbreviations."""
    count = 1 if text.strip() else 0
    for word, marks, _, _, following in _SENTENCE_END.findall(text.strip()):
        bare = word.lower().lstrip("\"'“‘([*")
        initial = len(bare) == 1 and bare.isalpha() and bare != "i" and word.isupper()
        if marks == "." and (_ABBREVIATIONS.fullmatch(bare) or initial):
            continue
        if (marks.startswith("...") or bare.isdigit()) and following[0].islower():
            continue
        count += 1
    return count


# Parameters have the data set's names.
CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(re.search(word, text, re.IGNORECASE) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation: _RELATIONS[relation](
        len(re.findall(keyword, text, re.IGNORECASE)), frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _RELATIONS[let_relation](
        text.lower().count(letter.lower()), let_frequency
    ),
    "language:response_language": lambda text, language: detect(text) in (language, None),
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _RELATIONS[relation](
        count_sentences(text), num_sentences
    ),
    "length_constraints:number_words": lambda text, num_words, relation: _RELATIONS[relation](
        len(re.findall(r"\w+", text)), num_words
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        _filled(re.split(r"\s?\*\*\*\s?", text)) == num_paragraphs
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text: any(
        f"My answer is {word}." in text for word in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.split(rf"\s?{section_spliter}\s?\d+\s?", text)) - 1 >= num_sections
    ),
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda text: any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", text)),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: re.fullmatch('".*"', text.strip(), re.DOTALL) is not None,
    "change_case:capital_word_frequency": _capitals,
    "change_case:english_capital": lambda text: text.isupper() and detect(text) == "en",
    "change_case:english_lowercase": lambda text: text.islower() and detect(text) == "en",
    "punctuation:no_comma": lambda text: "," not in text,
}
