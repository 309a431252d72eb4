r"""Whether two answers in LaTeX are the same text, apart from how they are written.

What is written in several ways gets one form: `\dfrac12`, `1/2` and `0.5`; `1{,}000` and `1,000`; `\left(`; blanks;
`\pi` and π. An answer may leave out its unit or the name of its variable, but not have another one. Answers that are
equal only by calculation, such as √8 and 2√2, differ here: that is what `math_equivalence` is for.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "π": r"\pi ",
        "∞": r"\infty ",
        "×": r"\times ",
        "·": r"\cdot ",
        "≤": r"\leq ",
        "≥": r"\geq ",
        "≠": r"\neq ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "°": r"^\circ ",
        "\u00a0": " ",
        "\u202f": " ",
        "\n": " ",
        "\t": " ",
    }
)
# In this order: a pattern and what it becomes.
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s*\\\\\s*", "\x1e"),  # the end of a row of a matrix
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\w+)", r"\\sqrt{\1}"),
        (r"\\(left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"\\(lvert|rvert|vert)(?![a-zA-Z])", "|"),
        (r"\\(lbrace)(?![a-zA-Z])", r"\\{"),
        (r"\\(rbrace)(?![a-zA-Z])", r"\\}"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|operatorname)(?![a-zA-Z])\s*", r"\\text"),
        (r"\\le(?![a-zA-Z])", r"\\leq"),
        (r"\\ge(?![a-zA-Z])", r"\\geq"),
        (r"\\ne(?![a-zA-Z])", r"\\neq"),
        (r"\{[bp]matrix\}", "{pmatrix}"),
        (r"\\(degrees?)(?![a-zA-Z])|\^\s*\\circ(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}", r"\\text{degree}"),
        (r"(?<=[^\s{])\s*(?:\\text\s*\{\s*(and|or)\s*\}|(?<![a-z\\])(and|or)(?![a-z]))(?=\s*[^\s}])", ","),
        (r",\s*,", ","),
        (r"(?<=\d)\s*(\{,\}|,\\!|\\!|\\,)\s*(?=\d{3}(?!\d))", ""),
        (r"\\[,;:! ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*([a-zA-Z\d])", r"\\frac\1{\2}"),
        (r"\\sqrt\s*([a-zA-Z\d])", r"\\sqrt{\1}"),
        (r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2"),
    )
)
_UNITS = (
    r"(?:(?:square|sq\.?|cubic)?\s*(?:cm|mm|km|(?<=\s)m|(?<=\s)in|inch|inches|foot|feet|ft|yards?|miles?|meters?|"
    r"centimeters?|units?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|degrees?|dollars?|cents?|percent|mph|"
    r"grams?|kg|points?))"
)
_UNIT = re.compile(
    rf"(?P<value>.*[\d)}}])\s*(?P<unit>\\text\s*\{{[^{{}}]*\}}|(?<=[\d\s)}}]){_UNITS})(?P<power>\^\d)?\.?"
)
# Words that are a part of the number.
_NUMBER_WORDS = {"pi", "i", "e", "hundred", "thousand", "million", "billion", "trillion", "dozen", "base"}
_PERCENT = re.compile(r"(?P<value>.*\d)\s*\\?%")
_VARIABLE = re.compile(r"(?P<name>[a-zA-Z]|[a-zA-Z]\([a-zA-Z]\))\s*(?:=|\\in(?![a-zA-Z]))(?P<value>[^=]+)")
_GROUPED = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_DECIMAL = re.compile(r"(?<![\w.^}\\])(\d*\.\d+)(?![\w.^\\])")
_SLASH = re.compile(r"(?<![\w.^/})!])(\d+)/(\d+)(?![\w.^/{(!])")
_FRACTION = re.compile(r"(?<![\w.^}])\\frac\{\s*(-?)\s*(\d+)\s*\}\{\s*(\d+)\s*\}")
# Longer ones are compared as they are: patterns take time, and no answer of MATH has more than 200 characters.
_MAX_CHARACTERS = 1000


class NormalizedAnswer(NamedTuple):
    """An answer in one of many ways to write it.

    Attributes:
        name: Variable before "=", or "".
        value: What it is.
        unit: After the value, or "".
    """

    name: str
    value: str
    unit: str


def is_same_answer(first: str, second: str) -> bool:
    r"""Return whether two answers are the same text after normalization.

    Example:
        >>> is_same_answer(r"\dfrac12", "0.5"), is_same_answer(r"x=1{,}000\text{ cm}", "1,000")
        (True, True)
        >>> is_same_answer("5 cm", "5 miles"), is_same_answer("x=5", "y=5"), is_same_answer(r"\sqrt8", r"2\sqrt2")
        (False, False, False)
    """
    if max(len(first), len(second)) > _MAX_CHARACTERS:
        return first.strip() == second.strip()
    one, other = normalize_math(first), normalize_math(second)
    return (
        one.value == other.value
        and (one.name == other.name or "" in (one.name, other.name))
        and (one.unit == other.unit or "" in (one.unit, other.unit))
    )


def normalize_math(answer: str) -> NormalizedAnswer:
    """Return the normal form of an answer in LaTeX."""
    text = answer.translate(_SYMBOLS).strip()
    unit = "dollar" if re.match(r"\\\$", text) else ""
    text = text.replace(r"\$", "").replace("$", "")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().removesuffix(".").strip()
    name, text = _split_variable(text)
    text, found = _split_unit(text)
    value = _normalize_numbers(_unwrap_text(text))
    return NormalizedAnswer(name, _drop_blanks(value), unit or found)


def _split_variable(text: str) -> tuple[str, str]:
    found = _VARIABLE.fullmatch(text)
    return (found["name"], found["value"].strip()) if found else ("", text)


def _split_unit(text: str) -> tuple[str, str]:
    if found := _PERCENT.fullmatch(text):
        return found["value"], "percent"
    found = _UNIT.fullmatch(text)
    if not found:
        return text, ""
    unit = re.sub(r"\\text\s*\{|\}|[\s.]", "", found["unit"]).lower()
    if unit in _NUMBER_WORDS or not unit:
        return (text, "") if unit else (found["value"], "")
    return found["value"].strip(), unit.removesuffix("s") + (found["power"] or "")


def _unwrap_text(text: str) -> str:
    text = re.sub(r"\\text\s*\{\s*([^{}]*?)\s*\}", r"\1", text).strip()
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:-1]:
        text = text[1:-1].strip()
    if choice := re.fullmatch(r"\(([A-Z])\)", text):
        return choice[1]
    return text.lower() if re.fullmatch(r"[a-zA-Z][a-zA-Z ]{3,}", text) else text


def _normalize_numbers(text: str) -> str:
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    text = _SLASH.sub(r"\\frac{\1}{\2}", text)
    text = _FRACTION.sub(lambda found: found[1] + _write_fraction(found[2], found[3]), text)
    text = _DECIMAL.sub(lambda found: _write_decimal(found[1]), text)
    return re.sub(r"^\+\s*", "", text)


def _write_fraction(above: str, below: str) -> str:
    if int(below[:40]) == 0 or max(len(above), len(below)) > 40:
        return rf"\frac{{{above}}}{{{below}}}"
    return _write(Fraction(int(above), int(below)))


def _write_decimal(decimal: str) -> str:
    return decimal if len(decimal) > 40 else _write(Fraction(decimal))


def _write(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _drop_blanks(text: str) -> str:
    # Between digits a blank is no ornament: 3 1/2, or two numbers.
    return re.sub(r"(?<=\d)\s+(?=\d)", "\0", text).replace(" ", "").replace("\0", " ")
