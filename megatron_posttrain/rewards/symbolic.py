"""Mathematical equivalence by math-verify, with what it is too lenient about made strict."""

from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, grader, parse, verify
from sympy import Float, Integer

# Only what is in the box, read whole as LaTeX: by default a fragment that parses is enough, and letters that
# could be a unit are dropped (`5t`).
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
)
_WHOLE = [
    LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=_NORMALIZATION)
]
_EXACT, _ROUNDED = 1e-12, 1e-4  # relative; the second where one side is a decimal
_numeric_eq = grader.sympy_numeric_eq


def equivalent(expected: str, given: str) -> bool:
    """Without math-verify's own timeouts, which are signals with handlers."""
    gold, answer = _parse(expected), _parse(given)
    return bool(gold and answer) and verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True)


def _parse(answer: str) -> list[Any]:
    return parse(f"\\boxed{{{answer}}}", _WHOLE, fallback_mode="no_fallback", parsing_timeout=None)


def _relative_numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Refuses what is equal only because both are small: 1/2^98 and 1/2^99."""
    if not _numeric_eq(a, b, float_rounding, numeric_precision):
        return False
    try:
        if a.free_symbols or b.free_symbols:
            return True
        x, y = a.doit().evalf(50), b.doit().evalf(50)
        rounded = a.has(Float) or b.has(Float)
        return bool(abs(x - y) <= (_ROUNDED if rounded else _EXACT) * max(abs(x), abs(y))) or _percentage(a, b)
    except (TypeError, AttributeError):  # matrices, compared element by element
        return True


def _percentage(a: Any, b: Any) -> bool:
    """Whether math-verify took 9% for 9."""
    return bool(grader.get_pct_val(a, a) == grader.get_pct_val(b, b) and isinstance(grader.get_pct_val(a, a), Integer))


grader.sympy_numeric_eq = _relative_numeric_eq
