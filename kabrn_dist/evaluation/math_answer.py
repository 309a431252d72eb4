r"""Find the final answer in a text: the content of the last `\boxed{}`, or what "The final answer is" says."""

from __future__ import annotations

import re

from data_prep.sources.math import find_last_boxed

_SAID = re.compile(r"final answer is:?([^\n]*)", re.IGNORECASE)
_HOPE = re.compile(r"I hope it is correct", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
# What a model without an end writes must not take long: the end of a text counts, and its last boxes.
_MAX_TEXT = 50_000
_MAX_BOXES = 10


def find_final_answer(text: str) -> str | None:
    r"""Return the final answer of a solution, or None.

    The last `\boxed{}` and the last sentence "The final answer is $X$" count; of both, what comes later.

    Example:
        >>> find_final_answer(r"So it is \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> find_final_answer("The final answer is $7$. I hope it is correct.")
        '7'
    """
    text = text[-_MAX_TEXT:]
    boxes = [found.start() for found in _BOX.finditer(text)][-_MAX_BOXES:]
    boxed = find_last_boxed(text[boxes[0] :]) if boxes else None
    said = list(_SAID.finditer(text))
    if not said or (boxed is not None and boxes[-1] > said[-1].start()):
        return boxed
    answer = _HOPE.split(said[-1][1])[0].strip().removesuffix(".").strip()
    if answer.startswith("$") and answer.endswith("$") and len(answer) > 1:
        answer = answer[1:-1].strip()
    return answer or boxed
