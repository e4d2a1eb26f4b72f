"""Whether two final answers are the same: as text, as numbers, element by element, else by math-verify."""

import re
from fractions import Fraction

from megatron_posttrain.rewards.extract import boxed, final_answer
from megatron_posttrain.rewards.normalize import base_of, normalize, number, same_unit, split_unit

LONGEST = 2000  # characters of an answer; a longer one is compared as text
LONGEST_FORMULA = 400  # characters that the grammar is asked about
MOST_ELEMENTS = 50
_ROUNDED = Fraction(1, 10**6)  # how far a decimal may be from what it rounds
_CHOICE = re.compile(r"\(?([A-J])\)?(?:[.:)]\s*\S.*)?")
_OPEN, _CLOSE = "([{", ")]}"
# What math-verify's grammar reads as something else, in silence: words as products of letters, arrows as letters,
# numbers side by side as a sum, a base as nothing.
_WORD = re.compile(
    r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|det|gcd|lcm|max|min|pmatrix)(?![A-Za-z]))[A-Za-z]{3,}"
)
_MISREAD = re.compile(r"arrow|(?<!_)\d \d|\d_\{?\d|\\(?:implies|iff|mapsto)")
_PRODUCT = re.compile(r"[abcxyzmnpqrst]{2}")


def graded(expected: str, response: str) -> bool:
    """Whether the answer that `response` ends with is the expected one."""
    answer = expected.rpartition("####")[2] if (box := boxed(expected)) is None else box
    given = final_answer(response)
    if len(given) > LONGEST or len(answer) > LONGEST:
        return given.strip() == answer.strip() != ""
    return equal(normalize(answer), normalize(given))


def equal(expected: str, given: str) -> bool:
    """Compares two normalised answers. A unit, a base and a variable's name may be left out where the key has them."""
    if _squeezed(expected) == _squeezed(given):
        return expected != ""
    if not re.search(r"[\w\\]", expected) or not re.search(r"[\w\\]", given):
        return False
    choice = _CHOICE.fullmatch(given)
    if re.fullmatch(r"\(?[A-J]\)?", expected):
        return choice is not None and choice[1] == expected.strip("()")
    if _is_text(expected) or _is_text(given):
        return _as_words(expected) == _as_words(given)
    elements, answers = _elements(expected), _elements(given)
    if elements and answers:
        return _same_elements(elements, answers)
    if elements and not elements[0]:  # with brackets it may be an interval, which an inequality can give
        return False
    return _same_value(expected, given)


def _same_value(expected: str, given: str) -> bool:
    (core, unit), (found, found_unit) = split_unit(expected), split_unit(_right_side(expected, given))
    value, other = number(core), number(found)
    if other is None and value is not None and "," not in expected:
        other = _decimal_comma(found)
    if value is not None and other is not None:
        base, found_base = base_of(core), base_of(found)
        if base and base != found_base:
            return found_base is None and _squeezed(core).split("_")[0] == _squeezed(found)
        return _same_number(value, other, unit, found_unit, _decimals(core), _decimals(found))
    if not same_unit(unit, found_unit) and "%" not in (unit, found_unit):
        return False
    if _MISREAD.search(core) or _MISREAD.search(found):
        return False
    if max(len(core), len(found)) > LONGEST_FORMULA or _WORD.search(core) or _WORD.search(found):
        return _as_words(core) == _as_words(found)
    from megatron_posttrain.rewards.symbolic import equivalent

    return equivalent(_for_grammar(core), _for_grammar(found))


def _for_grammar(text: str) -> str:
    """With mixed numbers and repeating decimals as fractions, which the grammar reads otherwise."""
    value = number(text)
    return text if value is None else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _same_number(value: Fraction, other: Fraction, unit: str, found: str, places: int, others: int) -> bool:
    if "%" in (unit, found) and unit != found:
        share, plain = (value, other) if unit == "%" else (other, value)
        # Left out of a percentage, or of what could not be a share; and a share is its percentage.
        return (share == plain and abs(share) >= 1) or share == 100 * plain
    if not same_unit(unit, found):
        return False
    if value == other:
        return True
    # 0.333333 for 1/3: a decimal against what no decimal is.
    rounded = max(places, others) >= 6 > min(places, others)
    return rounded and abs(value - other) <= min(_ROUNDED, abs(value) / 10**4) and bool(places) != bool(others)


def _decimals(text: str) -> int:
    """Places behind the point of a plain decimal."""
    match = re.fullmatch(r"[+-]?\d*\.(\d+)", text)
    return len(match[1]) if match else 0


def _decimal_comma(text: str) -> Fraction | None:
    """Value of `3,14` and `1.234,56`."""
    if re.fullmatch(r"[+-]?\d+,(?:\d{1,2}|\d{4,50})|[+-]?\d{1,3}(?:\.\d{3})+,\d{1,50}", text):
        return number(text.replace(".", "").replace(",", "."))
    return None


def _right_side(expected: str, given: str) -> str:
    """What an equation with a name or a calculation on its left says: `x = 5` and `2 + 3 = 5` say 5."""
    if re.search(r"[=<>]|\\(?:le|ge|ne|in)(?![A-Za-z])", expected) or "\\" in given.rpartition("=")[0]:
        return given
    left, _, right = given.rpartition("=")
    single = re.fullmatch(r"(?:[A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?|[\d\s.+\-*/()x^]+|[A-Za-z ]+)(?:=.*)?", left)
    return right.strip() if right and single and "," not in left else given


def _squeezed(text: str) -> str:
    """Without white space, where no two numbers or words stand side by side."""
    return text if re.search(r"\w \w|\} \d|\d \\frac", text) else text.replace(" ", "")


def _is_text(text: str) -> bool:
    """Whether it is words: letters and spaces, but no single letter and no short product of variables."""
    bare = text.replace(" ", "").strip("()")
    return bare.isalpha() and len(bare) > 1 and not _PRODUCT.fullmatch(bare)


def _as_words(text: str) -> str:
    return re.sub(r"[\s{}()]+", " ", text).strip(" .'\"").casefold()


def _elements(text: str) -> tuple[str, list[str]] | None:
    """Brackets and elements of a list, tuple, interval or set; None for a single value and for what is no list."""
    brackets, inner = "", text
    whole = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text, re.DOTALL)
    if whole and _closes_at_end(text):
        brackets, inner = whole[1][-1] + whole[3][-1], whole[2]
    elif re.search(r"[=<>|]|\\(?:cup|cap|in|le|ge|ne|begin)(?![A-Za-z])", text) and not re.search(
        r",| (?:and|or) ", text
    ):
        return None
    if not brackets and number(split_unit(text)[0]) is not None:
        return None
    signs = inner.count("\\pm")
    parts = _split(inner) if signs != 1 else [inner.replace("\\pm", sign) for sign in "+-"]
    if len(parts) > MOST_ELEMENTS or (len(parts) == 1 and brackets != "{}"):
        return None
    return brackets, parts


def _split(text: str) -> list[str]:
    """Parts between commas and semicolons outside of brackets; where commas are spaced, others are in numbers."""
    text = re.sub(r",? (?:and|or) ", ", ", text)
    spaced = re.search(r",\s", text)
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        grouped = character == "," and spaced and re.match(r",\d{3}(?!\d)", text[i : i + 5])
        if character in ",;" and not grouped and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _closes_at_end(text: str) -> bool:
    """Whether the first bracket is closed by the last one; intervals mix round and square ones."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and i and character in _CLOSE:
            return i == len(text) - 1
    return False


def _same_elements(expected: tuple[str, list[str]], given: tuple[str, list[str]]) -> bool:
    (brackets, parts), (found_brackets, found) = expected, given
    # A bare list may stand for a tuple or a set, not for an interval with an end that belongs to it.
    either = {brackets, found_brackets}
    if len(parts) != len(found) or not (len(either) == 1 or either <= {"", "()"} or either <= {"", "{}"}):
        return False
    if brackets not in ("", "{}") or found_brackets not in ("", "{}"):
        return all(map(equal, parts, found))
    left = list(found)
    for part in parts:
        match = next((other for other in left if equal(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True
