r"""MATH: competition problems with worked solutions (Hendrycks et al., NeurIPS 2021, arXiv:2103.03874; MIT license).

Layout: `{train,test}/<subject>/<n>.json`, each an object with `problem`, `level` ("Level 1" to "Level 5", a few
"Level ?"), `type` and `solution`, whose last `\boxed{…}` is the answer. As a folder or an archive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from data_prep.documents import Document
from data_prep.sources.archive import Member
from data_prep.sources.base import FileSource, SourceOptions, parse_json_file
from data_prep.sources.layout import LayoutMismatch, describe_record
from data_prep.sources.template import LossTarget, render_question

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed (?=[^\s{])")


class MathOptions(SourceOptions):
    """Options of MATH.

    Attributes:
        split: the split.
        answer: the whole solution, or only the content of its last box.
        levels: levels to read; empty: all, also "Level ?".
        loss: what carries loss.
    """

    split: Literal["train", "test", "all"] = "train"
    answer: Literal["full", "final"] = "full"
    levels: tuple[Literal[1, 2, 3, 4, 5], ...] = ()
    loss: LossTarget = "all"


class Math(FileSource):
    """Problems of MATH, one document each."""

    kind = "math"
    expected = "{train,test}/<subject>/<n>.json with 'problem' and 'solution' (MATH, folder or archive)"
    endings = (".json",)
    license = "MIT"
    options_class = MathOptions

    def accepts(self, name: str) -> bool:
        """Accept the files of the selected split."""
        parts = name.split("/")
        if self.options.split == "all":
            return True
        return len(parts) >= 3 and parts[-3] == self.options.split

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield the problem, unless its level is not selected."""
        record = parse_json_file(member)
        if isinstance(record, Document | LayoutMismatch):
            yield record
            return
        fields = record if isinstance(record, dict) else {}
        problem, solution = fields.get("problem"), fields.get("solution")
        if not isinstance(problem, str) or not isinstance(solution, str):
            yield LayoutMismatch(member.name, describe_record(record))
            return
        if self.options.levels and fields.get("level") not in [f"Level {n}" for n in self.options.levels]:
            self.left_out["of other levels"] += 1
            return
        answer = find_last_boxed(solution) if self.options.answer == "final" else solution
        if answer is None:
            yield Document(member.name, None, problem="no \\boxed{} in the solution")
        else:
            yield render_question(member.name, problem, answer, self.options.loss)


def find_last_boxed(solution: str) -> str | None:
    r"""Return the content of the last `\boxed{…}` or `\fbox{…}` with matching braces, or None.

    The content of `\boxed 7` without braces is everything up to the closing dollar, as in lm-eval.
    """
    for box in reversed(list(_BOX.finditer(solution))):
        start = box.end()
        if solution[start] != "{":
            return solution[start:].partition("$")[0].strip()
        stop = _closing(solution, start)
        if stop is not None:
            return solution[start + 1 : stop]
    return None


def _closing(text: str, start: int) -> int | None:
    depth = 0
    position = start
    while position < len(text):
        if text[position] == "\\":
            position += 1  # an escaped brace is a character
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None
