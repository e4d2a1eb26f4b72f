"""Answers without what does not change them: one spelling for what Unicode, LaTeX and Markdown write in many ways."""

import re
import unicodedata
from fractions import Fraction

_SUPERSCRIPTS = {ord(c): str(i) for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {ord("⁻"): "-", ord("⁺"): "+"}
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]{1,20}")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
        "→": r"\rightarrow ", "←": r"\leftarrow ", "⇒": r"\Rightarrow ", "±": r"\pm ", "°": r"^\circ ",
        "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "⁄": "/",
        "，": ", ", "、": ", ", "；": ";", "：": ":",
        "“": "", "”": "", "\u200b": "", "\u2009": " ", "\u202f": " ", "\u00a0": " ",
    }
)  # fmt: skip
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\*\*(?=\S)(.{1,500}?)(?<=\S)\*\*", r"\1"),
        (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
        (r"\\(?:display|text|script)style(?![A-Za-z])", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"^\s*(?:\\approx(?![A-Za-z])|≈)|\\\\\s*$", ""),
        (r"(?<!\\)\\(?:[,;:>\s]|q?quad(?![A-Za-z]))|~|&nbsp;", " "),
        (r"\\[()\[\]]", " "),
        (r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname|bm|boldsymbol)\s*\{([^{}]*)\}",
         r" \1 "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])(?![0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{([^{}]*)\}\s*([0-9A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9A-Za-z])\s*\{([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\frac\s+\{", r"\\frac{"),
        (r"\}\s+\{", "}{"),
        (r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"(?:√|(?<![\\A-Za-z])sqrt)\s*[({]([^(){}]*)[)}]", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\w)(?!\w)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:infinity|infty|oo)(?![A-Za-z])", r"\\infty "),
        (r"\\(?:varnothing|O|empty)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\to(?![A-Za-z])", r"\\rightarrow"),
        (r"\\(?:leq|leqslant)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"(?<=\{)(?:b|small)matrix(?=\})", "pmatrix"),
    )
)  # fmt: skip
_ENDS = " \t\r\n.;,:`\"'*_"


def normalize(answer: str) -> str:
    """The answer in one spelling; white space only where it separates two words or numbers.

    What tells two answers apart stays: brackets, signs, the white space of `3 1/2` and `5 1`, letters' case.
    """
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m.group()), answer)
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)
    text = re.sub(r"[^\x00-\x7f]", lambda m: str(unicodedata.digit(m[0], m[0])), text)  # type: ignore[arg-type]
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    # Dollars of mathematics go, those of money stay as the unit that they are.
    text = text.replace("\\$", "USD")
    if text.count("$") % 2:
        text = re.sub(r"\$(?=\s*\d)", "USD", text, count=1)
    text = re.sub(r"USD(?=USD)", "", text.replace("$", " "))
    text = re.sub(r"\s+", " ", text).rstrip(_ENDS).lstrip(_ENDS.replace(".", ""))
    return re.sub(r"(?<=[^A-Za-z0-9)},]) | (?=[^A-Za-z0-9\\({.])", "", text)


_DIGITS = 1000  # longer numbers are compared as text
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d{1,3}(?: \d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_FRACTION = (
    rf"(?:\\frac\{{ ?(?P<top>-?{_DECIMAL}) ?\}}\{{ ?(?P<bottom>{_DECIMAL}) ?\}}"
    rf"|(?P<up>{_DECIMAL}) ?/ ?(?P<down>{_DECIMAL}))"
)
_POWER = r"(?:e|E|\\(?:times|cdot) ?10\^|\*10\^|x10\^)\{?(?P<exponent>[+-]?\d{1,3})\}?"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?:"
    rf"(?:(?P<whole>\d+)(?: (?=[\d])| ?(?=\\frac)))?{_FRACTION}"
    r"|(?P<plain>\d*)\.(?P<fixed>\d*)(?:\\overline ?\{(?P<repeat>\d+)\}|\((?P<repeated>\d+)\))"
    rf"|(?P<decimal>{_DECIMAL})(?:{_POWER}| (?P<scale>thousand|million|billion|trillion))?"
    r"|(?P<digits>[0-9A-Fa-f]+)_\{?(?:\\?[a-z]* ?)(?P<base>\d{1,2})\}?"
    r")"
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def number(text: str) -> Fraction | None:
    """The value of a number in digits: decimal, fraction, mixed, repeating, with separators, power of ten, base."""
    match = _NUMBER.fullmatch(text) if len(text) <= _DIGITS else None
    if match is None:
        return None
    value = _value(match.groupdict())
    return -value if value is not None and match["sign"] == "-" else value


def _value(part: dict[str, str]) -> Fraction | None:
    if part["base"]:
        try:
            return Fraction(int(part["digits"], int(part["base"])))
        except ValueError:
            return None
    if block := part["repeat"] or part["repeated"]:
        whole = int(part["plain"] + part["fixed"] or "0") + Fraction(int(block), 10 ** len(block) - 1)
        return whole / 10 ** len(part["fixed"])
    if part["decimal"]:
        power = int(part["exponent"] or _SCALES.get(part["scale"], 0))
        return _decimal(part["decimal"]) * Fraction(10) ** power
    top, bottom = _decimal(part["top"] or part["up"]), _decimal(part["bottom"] or part["down"])
    return int(part["whole"] or 0) + top / bottom if bottom else None


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub("[ ,]", "", text).rstrip("."))


def base_of(text: str) -> str | None:
    """The base that a number's subscript names."""
    match = _NUMBER.fullmatch(text) if len(text) <= _DIGITS else None
    return match["base"] if match else None


_SHORT_UNIT = re.compile("[mgshLlNJWVKCF]")
_GLUED_UNIT = re.compile(
    "km|cm|mm|nm|kg|mg|m[lL]|mi|ft|in|lbs?|oz|hrs?|min|sec|mph|kmh|kph|yd|pm|am|USD|cents|degrees|st|nd|rd|th"
)
_NO_UNIT = re.compile(
    "and|or|not|to|if|for|where|when|with|over|mod|choose|times|plus|minus|divided|by|squared|cubed|factorial|base|"
    "half|halves|thirds?|quarters?|dozen|hundred|thousand|million|billion|trillion|"
    "sin|cos|tan|cot|csc|log|ln|exp|sqrt|pi|det|gcd|lcm|max|arcsin|arccos|arctan",
    re.IGNORECASE,
)
_UNIT = re.compile(
    r"(?P<core>.*[\d})\]!.])(?P<space> ?)(?P<unit>\^\\circ ?[CF]?|\^\{ ?\\circ ?\} ?[CF]?|\\%|%|\([A-Za-z][A-Za-z ]*\)"
    r"|[A-Za-z¢€£¥₹₩\u3040-\u9fff][A-Za-z\u3040-\u9fff. ]*(?:\^\{?[23]\}?)?"
    r"(?: ?(?:/|per) ?[A-Za-z]+(?:\^\{?[23]\}?)?)?)",
    re.DOTALL,
)
_MONEY = {"USD": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "₩": "won"}
_PERCENT = {"%", "\\%", "percent", "per cent", "pct", "percentage"}


def split_unit(text: str) -> tuple[str, str]:
    """An answer and its unit: `35 cm`, `USD5`, `12 apples`, `(apples)`, `25\\%`; no letter of a product is a unit."""
    for sign, name in _MONEY.items():
        if text.lstrip("-+ ").startswith(sign):
            return split_unit(text.replace(sign, "", 1).strip())[0], name
    match = _UNIT.fullmatch(text) if len(text) <= 300 else None
    if match is None:
        return text, ""
    core, unit = match["core"].strip(), match["unit"].strip("() ")
    unit = _MONEY.get(unit, unit)
    if unit in _PERCENT:
        return core, "%"
    if "circ" in unit:
        return core, "degree"
    words = re.findall(r"[A-Za-z]+", unit)
    if any(map(_NO_UNIT.fullmatch, words)):
        return text, ""
    if words and words[0] == words[-1] == unit and len(unit) <= 3:
        spaced = match["space"] and (len(unit) > 1 or _SHORT_UNIT.fullmatch(unit))
        return (core, unit) if spaced or _GLUED_UNIT.fullmatch(unit) else (text, "")
    return (core, unit) if match["space"] or number(core) is not None else (text, "")


def same_unit(one: str, other: str) -> bool:
    """Whether both name one unit, or one names none: a full word and its short form are the same."""
    if not one or not other:
        return True
    (short, power), (long, other_power) = sorted(map(_unit_key, (one, other)), key=lambda key: len(key[0]))
    if short == long:
        return power == other_power
    letters = iter(long)
    shortened = len(long) > 3 and short[:1] == long[:1] and short.isalpha() and all(c in letters for c in short)
    return shortened and power == other_power


def _unit_key(unit: str) -> tuple[str, str]:
    """A unit's name without plural, and its power."""
    unit = re.sub(r"[{}. ]|\\", " ", unit.lower())
    unit = re.sub(r"\b(?:square|sq)\s+(\w+)|\b(\w+)\s+squared", r"\1\2^2", unit)
    unit = re.sub(r"\bcubic\s+(\w+)", r"\1^3", unit)
    unit = re.sub(r"\s*\bper\b\s*", "/", unit)
    name, _, power = re.sub(r"(?<=\w\w)(?:es|s)(?=\s*(?:\^|/|$))", "", unit).partition("^")
    return name.replace(" ", ""), power.strip()
